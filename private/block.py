"""
The private block and the head, over pi_export.py's arrays, for one sequence.

Every step is a call op(kind, function, *values, **static). In the clear op is now(), which runs
the function at once; under MPC op is Engine.op, which compiles the function, runs it on secrets
and enters the cost under its kind. Cutting the model into steps costs nothing there, and shows
what each kind of operation costs. The functions are pure; keywords hold what is public.

Shapes: T tokens, width d, H heads of d_k = d / H each, V words. w holds a block's weights as
{name: (W,) or (W, b)}, see weights_of(); f is nonlinear.py's EXACT or SECURE.
"""
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from model import ACTIVATIONS
from private.nonlinear import CLIPPED, EXACT, HIDDEN, by_rows, only

WORDS = 2048  # of the vocabulary that a product of many rows takes at a time
NO_TOKEN = -1  # in place of a token's id, at positions past the prompt
HEAD = ("head", "basis", "ln_f")  # the arrays of head() and of plain_head(), as prefixes


class Bits(NamedTuple):
    """Fraction bits of what a layer multiplies in pairs, see shares.py; None of what it doesn't."""
    scores: tuple | None = None  # of Q and of K
    divide: tuple | None = None  # of the sum of weighted values and of 1 over the weights' sum


WHOLE = Bits()


class Row(NamedTuple):
    """The last row of a prompt: the client's secrets, or arrays in the clear."""
    last: Any    # (1, T), 1 at that row and 0 elsewhere
    hidden: Any  # (1, T), HIDDEN behind it, 0 up to it
    left: Any    # (1, T), CLIPPED and 0 there


# -------------------------------------------------------------------------------------------- model
def block(op, x, w, c, f, units=(1.0, 1.0), cache=None, bits=WHOLE):
    """
    One block, eq. 1 and 8: x (T, d) -> (T, d); or a run of m uniform ones, x + [C x, ..., C^m x]
    times one secret matrix, see fold_run() in pi_export.py. units: of its two LayerNorms, see
    nonlinear.py; bits: a Bits, public. cache: a dict, which gets what a further token needs, see
    further.py: "kv" (T, 2 d), or "v" (T, d), or "means" (T, m d).
    """
    n = op("LayerNorm", f.normalise, x, unit=units[0]) if c.use_layernorm else x  # (T, d)
    if "qkv" in w:
        y = attention(op, n, w, c, f, cache, bits)                                # (T, d)
    else:
        y = without_softmax(op, n, w, cache)                                      # (T, m d)
    x = op("matmul", add_linear, x, y, *w["o"])                                   # (T, d)
    return ffn(op, x, w, c, f, units[1])                                          # (T, d)


def last_block(op, x, row, w, c, f, units=(1.0, 1.0), cache=None):
    """
    The last block, of which a next token needs one row: x (T, d) -> (1, d). row: a Row; which it is
    stays the client's secret. cache: as in block().
    """
    n = op("LayerNorm", f.normalise, x, unit=units[0]) if c.use_layernorm else x  # (T, d)
    if "qkv" in w:
        own = op("matmul", jnp.matmul, row.last, n)                               # (1, d)
        x = op("matmul", jnp.matmul, row.last, x) if c.use_layernorm else own     # (1, d)
        y = row_attention(op, n, own, row, w, c, f)                               # (1, d)
        if cache is not None:
            cache["kv"] = op("matmul", keys_values, n, *w["qkv"])                 # (T, 2 d)
    else:
        y = without_softmax(op, n, w, cache)                                      # (T, d)
        x = op("matmul", jnp.matmul, row.last, x)                                 # (1, d)
        y = op("matmul", jnp.matmul, row.last, y)                                 # (1, d)
    x = op("matmul", add_linear, x, y, *w["o"])                                   # (1, d)
    return ffn(op, x, w, c, f, units[1])                                          # (1, d)


def attention(op, n, w, c, f, cache=None, bits=WHOLE):
    """
    softmax(Q K^T) V, eq. 3, 6 and 9: n (T, d) -> (T, d). The weights are divided by their sums
    after the product with V, which takes T x d quotients; the weights are H x T x T.
    """
    H = c.n_head
    qkv = op("matmul", linear, n, *w["qkv"])                                   # (T, 3 d)
    if "inverse_t" in w:
        qkv = op("temperature", by_temperature, qkv, *w["inverse_t"])          # (T, 3 d)
    if cache is not None:
        cache["kv"] = op("matmul", without_queries, qkv)                       # (T, 2 d)
    s = op("matmul", scores, qkv, n_head=H, bits=bits.scores)                  # (H, T, T)
    e = op("softmax", f.exponentials, s, bits=bits.scores)                     # (H, T, T)
    y = op("matmul", mix, e, qkv, n_head=H)                                    # (H, T, d_k)
    return op("softmax", divide, y, e, reciprocal=f.reciprocal, most=c.block_size,
              bits=bits.divide)                                                # (T, d)


def row_attention(op, n, own, row, w, c, f):
    """
    The same of one row: n (T, d) and that row itself, own (1, d) -> (1, d).

    Keys and values are not made. Head by head q k_j = (q W_K^T) n_j and
    sum_j A_j v_j = (sum_j A_j n_j) W_V take a product by a matrix for each head, where keys and
    values take one for each position.
    """
    H = c.n_head
    W_qkv = w["qkv"][0]                                                        # (d, 3 d)
    q = op("matmul", query, own, *w["qkv"])                                    # (1, d)
    if "inverse_t" in w:
        q = op("temperature", by_own_temperature, q, *w["inverse_t"], row.last)  # (1, d)
    z = op("matmul", through_keys, q, W_qkv, n_head=H)                         # (H, d)
    s = op("matmul", row_scores, z, n)                                         # (H, 1, T)
    e = op("softmax", f.row_exponentials, s, row.hidden, row.left)             # (H, 1, T)
    z = op("matmul", mix_rows, e, n)                                           # (H, d)
    y = op("matmul", through_values, z, W_qkv)                                 # (H, d_k)
    return op("softmax", divide_row, y, e,
              reciprocal=f.reciprocal, most=c.block_size)                      # (1, d)


def ffn(op, x, w, c, f, unit=1.0):
    """beta x + (1/alpha) FFN(LN(x)), eq. 8: x (rows, d) -> (rows, d). The arrays hold 1/alpha."""
    if "ffn" not in w and "in" not in w:  # a softmax-only model: folded into the basis of x
        return x
    h = op("LayerNorm", f.normalise, x, unit=unit) if c.use_layernorm else x   # (rows, d)
    if "in" in w:
        h = op("matmul", linear, h, *w["in"])                                  # (rows, 4 d)
        h = op(activation_kind(c), f.activation[c.activation], h)              # (rows, 4 d)
        W_and_b = w["up"]
    else:
        W_and_b = w["ffn"]
    if "beta" in w:
        return op("matmul", scale_add_linear, x, h, *w["beta"], *W_and_b)      # (rows, d)
    return op("matmul", add_linear, x, h, *W_and_b)                            # (rows, d)


def head(op, x, w, c, f, unit=1.0):
    """The logits of rows x: (rows, d) -> (rows, V)."""
    if "basis" in w:  # a softmax-only model's x is written in another basis than ln_f's
        x = op("head", linear, x, *w["basis"])                                 # (rows, d)
    if c.final_layernorm:
        x = op("head", f.normalise, x, unit=unit)                              # (rows, d)
    return op("head", logits, x, *w["head"])                                   # (rows, V)


def activation_kind(c):
    """What the cost of the FFN's activation is entered under: its class in torch, such as GELU."""
    return type(ACTIVATIONS[c.activation][1]).__name__


# ------------------------------------------------------------------------- heads without a softmax
def without_softmax(op, n, w, cache=None):
    """
    A V of patterns that are the server's and not the text's: n (T, d) -> (T, d). Of m uniform
    layers the means, (T, m d).
    """
    if "pattern" in w:
        kept, v = "v", op("matmul", linear, n, *w["value"])                    # (T, d)
        y = op("pattern", mix_by_position, *w["pattern"], v)                   # (T, d)
    else:
        kept, v = "means", op("average", causal_means, n, layers=layers_in(w))  # (T, m d)
        y = v
    if cache is not None:
        cache[kept] = v
    return y


def mix_by_position(A, v):
    """A (H, T, T) or more, v (T, d), whose heads are side by side -> A V (T, d)."""
    T, H = len(v), len(A)
    return join_heads(A[:, :T, :T] @ heads(v, H))


def layers_in(w):
    """How many uniform layers in a row a block's arrays stand for: "o" is (m d, d)."""
    rows, d = w["o"][0].shape
    return rows // d


def causal_means(x, layers):
    """
    [C x, C^2 x, ...], C_ij = 1/i for j <= i: x (T, d) -> (T, layers d). Price: sums are local, a
    division by a public number is a truncation. Range: 1/i has 18 bits in the engine, so that row i
    is wrong by i/2^19 of itself, a thousandth at i = 512.

    A prompt is padded at its end: no row up to its last one has padding in its mean, and C doesn't
    depend on its length.
    """
    count = np.arange(1, len(x) + 1)[:, None]
    means = [x]
    for _ in range(layers):
        means.append(jax.lax.associative_scan(jnp.add, means[-1]) / count)
    return jnp.hstack(means[1:])


# ---------------------------------------------------------------------------- matmul and its like
def linear(x, W, b=None):
    """x W + b, some rows of x at a time."""
    y = by_rows(jnp.matmul)(x, W)
    return y if b is None else y + b


def add_linear(x, y, W, b=None):
    """x + (y W + b)."""
    return x + linear(y, W, b)


def scale_add_linear(x, y, beta, W, b=None):
    """beta x + (y W + b)."""
    return beta * x + linear(y, W, b)


def logits(x, W, b=None):
    """x W + b. Of many rows, some words at a time: SPU encodes the whole product in memory."""
    if len(x) == 1:
        y = x @ W
    else:
        y = jnp.hstack([linear(x, W[:, i:i + WORDS]) for i in range(0, W.shape[1], WORDS)])
    return y if b is None else y + b


def split_heads(qkv, n_head):
    """(T, 3 d) -> Q, K, V, each (H, T, d_k)."""
    return [heads(a, n_head) for a in jnp.split(qkv, 3, axis=1)]


def heads(a, n_head):
    """(T, d) -> (H, T, d_k)."""
    return a.reshape(len(a), n_head, -1).transpose(1, 0, 2)


def join_heads(y):
    """(H, T, d_k) -> (T, d)."""
    return y.transpose(1, 0, 2).reshape(y.shape[1], -1)


def by_temperature(qkv, inverse_t):
    """Row i of each head's Q times inverse_t (H, T, 1): T x d products; logits are H x T x T."""
    q, _, _ = split_heads(qkv, len(inverse_t))
    return jnp.hstack((join_heads(q * inverse_t[:, :len(qkv)]), without_queries(qkv)))


def without_queries(qkv):
    """K and V, side by side, of Q, K and V."""
    return qkv[:, qkv.shape[1] // 3:]


def scores(qkv, n_head, bits=None):
    """Q K^T, whose 1 / sqrt(d_k) is in Q already. bits: see forms.py."""
    q, k, _ = split_heads(qkv, n_head)
    return q @ k.transpose(0, 2, 1)


def mix(e, qkv, n_head):
    """A V, its weights not yet divided by their sums."""
    _, _, v = split_heads(qkv, n_head)
    return e @ v


def divide(y, e, reciprocal, most, bits=None):
    """
    y / (the row sums of e), heads side by side. most: the largest that a sum can be; bits: see
    forms.py.
    """
    return join_heads(y * reciprocal(e.sum(-1, keepdims=True), most))


# ------------------------------------------------------------------------------ the same of one row
def query(n, *W_and_b):
    """Q of one row: the first d columns of linear()."""
    d = n.shape[1]
    return linear(n, *(a[..., :d] for a in W_and_b))


def keys_values(n, W, b=None):
    """K and V, side by side, of all rows. The bias is on Q alone: see fold_attention()."""
    return linear(n, without_queries(W))


def by_own_temperature(q, inverse_t, at):
    """
    Rows q (k, d), each head's part times its inverse_t (H, T, 1) at the row's position, which `at`
    (k, T) marks.
    """
    own = at @ inverse_t[:, :at.shape[1]]                                      # (H, k, 1)
    return join_heads(heads(q, len(inverse_t)) * own)


def own_columns(n_head, d):
    """(H, d), True at each head's columns."""
    return np.repeat(np.eye(n_head, dtype=bool), d // n_head, axis=1)


def through_keys(q, W, n_head):
    """q W_K^T of each head: (1, d) -> (H, d)."""
    d = q.shape[1]
    return only(own_columns(n_head, d), q) @ W[:, d:2 * d].T


def row_scores(z, n):
    """A row of logits for each head: z (H, d), n (T, d) -> (H, 1, T)."""
    return (z @ n.T)[:, None]


def mix_rows(e, n):
    """sum_j A_j n_j of each head, (H, d), its weights not yet divided by their sum."""
    return e[:, 0] @ n


def through_values(z, W):
    """z W_V of each head: (H, d) -> (H, d_k)."""
    H, d = z.shape
    return only(own_columns(H, d), z @ W[:, 2 * d:]).sum(0).reshape(H, -1)


def divide_row(y, e, reciprocal, most):
    """y / (the row sums of e), heads side by side: (1, d)."""
    return (y * reciprocal(e.sum(-1), most)).reshape(1, -1)


# ------------------------------------------------------------------------------------ in the clear
def now(kind, function, *values, **static):
    """The op() that runs in the clear."""
    return function(*values, **static)


def weights_of(arrays, *prefixes):
    """
    Of the arrays, or of what stands for them, those whose names start with one of the prefixes,
    each with its bias if it has one: {"blocks.0.qkv": W, "blocks.0.qkv_b": b} -> {"qkv": (W, b)}.
    """
    mine = {k.split(".")[-1]: a for k, a in arrays.items() if k.startswith(prefixes)}
    paired = {}
    for name, a in mine.items():
        if not name.endswith("_b"):
            paired[name] = (a, mine[name + "_b"]) if name + "_b" in mine else (a,)
    return paired


def layers_of(arrays):
    """The layers that arrays are of, in order: all, but of a run of uniform ones the last."""
    return sorted({int(name.split(".")[1]) for name in arrays if name.startswith("blocks.")})


def row_of(position, T):
    """The Row, as arrays, of a prompt that ends at `position` of T."""
    last = np.eye(T, dtype=np.float32)[position:position + 1]
    hidden = np.where(np.arange(T) > position, HIDDEN, 0)[None].astype(np.float32)
    return Row(last, hidden, np.where(hidden, CLIPPED, 0))


def forward(arrays, c, one_hot, f=EXACT, row=None, units=None, caches=None):
    """
    What a private pass computes, in the clear, as the tests compare it with the model: logits
    (T, V) of one sequence, or (1, V) of position `row`. one_hot (T, V): row i is the token at
    position i; c: the GPTConfig; f: EXACT or SECURE, whose square() means what it says only where
    exp(x) is (1 + x/2)^2; units: of the 2 L + 1 LayerNorms; caches: a dict, which gets each layer's
    cache.
    """
    T, L = len(one_hot), c.n_layer
    units = units or [1.0] * (2 * L + 1)
    x = one_hot @ arrays["wte"] + arrays["wpe"][:T]                            # (T, d)
    for i in layers_of(arrays):
        w = weights_of(arrays, f"blocks.{i}.")
        own_units = units[2 * i:2 * i + 2]
        cache = None if caches is None else caches.setdefault(i, {})
        if row is not None and i == L - 1:
            x = last_block(now, x, row_of(row, T), w, c, f, own_units, cache)      # (1, d)
        else:
            x = block(now, x, w, c, f, own_units, cache)                       # (T, d)
    return head(now, x, weights_of(arrays, *HEAD), c, f, units[-1])            # (T, V) or (1, V)
