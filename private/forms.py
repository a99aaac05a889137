"""
What softmax, GELU and ReLU gain under Cheetah by local functions of shares, see shares.py.
LayerNorm is here so that its variances can be watched.

FORMS at the end says which functions of block.py and nonlinear.py have a form here: Engine.op()
takes it in their place. Integers, as dtype int32, are what these hand on, each with the fraction
bits that its docstring tells. What the values must stay below is in ranges.LIMITS; products in
pairs, which take the bits that ranges.py chose for a layer, hold up to 4 times what it saw there.

docs/private.md argues that these forms are secure, one by one.
"""
from functools import partial

import jax.numpy as jnp
import numpy as np

from private.block import (divide, divide_row, heads, join_heads, mix, mix_rows, row_scores, scores)
from private.further import next_mix, next_scores
from private.nonlinear import (CIPHERTEXT, FACTOR, GELU_FAR, GELU_NEAR, LOGIT_UNIT, ROWS,
                               SECURE, causal_row_max, centred, gelu_terms, of_unit_variance,
                               secure_exponentials, secure_row_exponentials, variances)
from private.shares import (CLIENT, FRACTION, HALF, apart, dropped, kept, of_fraction, paired,
                            scaled, signed, without, without_low_bits)

# ------------------------------------------------------------------- exp(-x) of a sum of two shares
# Logits below their row's largest are counted in steps, so many of them down to the clip: STEPS, or
# pair_steps(). A number of LOGIT_UNITs with S_BITS fraction bits, times FACTOR and without DROPPED
# bits, is so many of STEPS.
STEPS = 2**16
S_BITS, DROPPED = 36, 24
CLIP = STEPS * LOGIT_UNIT * 2.0 ** (DROPPED - S_BITS) / FACTOR  # nats: 11.4
EXP_BITS = 42                 # of exp(-x) in the product of the parties' factors:
LOW, HIGH = 2.0**13, 2.0**29  # LOW HIGH = 2^42, and neither factor passes 2^30
E_BITS = EXP_BITS - FRACTION  # what is left of the 42,
Y_BITS = 26                   # and what a sum of weighted values takes into a whole division
FAR = 2**30                   # steps that what a row hides lies below: LIMITS keep the rest above
NARROW_BITS = 15              # of an activation's input where it is compared


def pair_steps(bits):
    """The steps to the clip of FACTOR times logits of which Q and K have so many fraction bits."""
    return round(CLIP / LOGIT_UNIT * FACTOR) << sum(bits)


def own_half(x, steps=STEPS):
    """
    A share of x, 0 <= x < steps -> (v, top), x = v_0 + v_1 + 2 steps (top_0 and top_1).

    v is the share mod 2 steps, from -steps to steps - 1, and top says whether it is negative. So
    v_0 + v_1 is x or x - 2 steps. It is the latter exactly if both are negative: x is not negative,
    and a sum with one that isn't is -steps at least, more than x - 2 steps.
    """
    v = x.astype(np.int64) % (2 * steps)
    top = v >= steps
    return v - np.where(top, 2 * steps, 0), top


def client_factor(nats, top):
    """The client's factor of exp(-x) 2^EXP_BITS, of its v in nats."""
    return np.exp(-nats) * np.where(top, LOW, HIGH)


def server_factors(nats, top):
    """The server's: (if the client's v is positive, if it is negative)."""
    return (np.rint(np.exp(-nats) * LOW),
            np.rint(np.exp(-nats - np.where(top, 2 * CLIP, 0)) * HIGH))


# --------------------------------------------------------------------------------- what goes over
def steps_below(s, steps):
    """Causal entries of s (H, T, T) less their row's largest, in steps: 1 - steps to 0."""
    i, j = np.tril_indices(s.shape[-1])
    below_most = (s - causal_row_max(s))[:, i, j]
    return jnp.maximum(below_most, 1 - steps)                                 # (H, T (T + 1) / 2)


def row_steps_below(s):
    """The same of rows that see all: s (H, k, n)."""
    return jnp.maximum(s - s.max(-1, keepdims=True), 1 - STEPS)


def chosen(first, change, top):
    return first + jnp.where(top, change, 0.0)


def product(a, b, zero):
    """
    a b, a being the client's alone, by whole ciphertexts; of a short rest as of two secrets, which
    `zero`, a secret, makes of it.
    """
    whole = len(a) - len(a) % CIPHERTEXT
    if len(a) - whole > CIPHERTEXT // 2:
        whole = len(a)
    pieces = []
    if whole:
        pieces.append(a[:whole] * b[:whole])
    if whole < len(a):
        pieces.append((a[whole:] + zero) * b[whole:])
    return jnp.concatenate(pieces)


def positive(x):
    return x > 0


def below(t, edges):
    """t < edges[i], stacked."""
    return t < np.reshape(edges, (-1, *[1] * t.ndim))


def where(bits, x):
    return jnp.where(bits, x, 0.0)


def by_keys(q, k):
    return q @ k.transpose(0, 2, 1)


# ---------------------------------------------------------------------------------------- the forms
def in_integers(function):
    """The form of a product: that of its values as integers, 18 fraction bits of a float32's."""
    product_of = partial(function)  # which has no form

    def form(op, engine, *secrets, **static):
        whole = [engine.hold(engine.numbers(secret)) for secret in secrets]
        return op(product_of, *whole, **static)
    return form


def weighted(function):
    """The form of weights, integers of E_BITS, times what they weigh: integers of both's bits."""
    product_of = in_integers(function)

    def form(op, engine, e, values, **static):
        y = product_of(op, engine, e, values, **static)
        y.fraction = E_BITS + values.fraction
        return y
    return form


def weighted_rows(op, engine, e, n):
    """block.mix_rows() -> Y_BITS as float32; e: of E_BITS. A product by W_V is next."""
    y = engine.numbers(in_integers(mix_rows)(op, engine, e, n))               # EXP_BITS
    return engine.hold(dropped(op, engine, y, EXP_BITS - Y_BITS), dtype=np.float32)


def scores_form(op, engine, qkv, n_head, bits=None):
    """
    Q K^T (H, T, T): integers of S_BITS; or with bits, those of Q and of K, FACTOR times that of
    their sum, mod 2^32. A key and the one T / 2 places behind it are then one, and the products of
    either come apart for nothing, as each party keeps the low or the high half of its share.
    Price: 11 MB for 12 heads of 128 x 128 in place of 17.
    """
    if not bits:
        qkv = of_fraction(op, engine, qkv)
        return in_integers(scores)(op, engine, qkv, n_head=n_head)
    T, half = qkv.shape[0], -(-qkv.shape[0] // 2)
    q, k, _ = (heads(a, n_head) for a in np.split(engine.numbers(qkv), 3, axis=1))
    q = dropped(op, engine, q * np.uint64(FACTOR), qkv.fraction - bits[0])    # (H, T, d_k)
    k = np.pad(k, ((0, 0), (0, 2 * half - T), (0, 0)))
    halves = without(op, engine, k[:, :half], k[:, half:], qkv.fraction - bits[1])
    s = op(by_keys, engine.hold(q), engine.hold(paired(*halves)))             # (H, T, half)
    s = engine.numbers(s)
    if engine.wraps:
        engine.wraps.note_logits(op, engine, q, np.concatenate(halves, 1), s)
    both = np.concatenate((without_low_bits(s, 0), without_low_bits(s, HALF)), 2)
    return engine.hold(both[..., :T], bits=32)


def exponentials_form(op, engine, s, bits=None):
    """
    exp(logit - row maximum) on the causal half, 0 above it, as integers of E_BITS fraction bits;
    s (H, T, T): of scores_form(), with the same bits.

    Price: row maxima and clip 54 bytes each, where they take 98 mod 2^64; and exp_of().
    """
    steps = pair_steps(bits) if bits else STEPS
    if not bits:
        s = engine.hold(in_steps(engine, s), bits=32)
    x = op(steps_below, s, steps=steps)                                       # (H, T (T + 1) / 2)
    e = exp_of(op, engine, x, steps)
    return engine.hold(among_zeros(e, s.shape[-1]))                           # (H, T, T)


def row_exponentials_form(op, engine, s, hidden, left):
    """
    The same of rows s (H, k, n), 0 where the client's `hidden` (k, n) isn't. It takes what it hides
    FAR below all else, and makes its factor there 0.
    """
    hides = engine.numbers(hidden) != 0                                       # (k, n)
    steps = in_steps(engine, s) - np.where(hides, np.uint32(FAR), np.uint32(0))
    x = op(row_steps_below, engine.hold(steps, bits=32))                      # (H, k, n)
    return engine.hold(exp_of(op, engine, x, STEPS, hides))


def in_steps(engine, s):
    """A share of logits, integers of S_BITS, counted in steps mod 2^32."""
    return without_low_bits(engine.numbers(s) * np.uint64(FACTOR), DROPPED)


def exp_of(op, engine, x, steps, hides=False):
    """
    A share of exp(x) of E_BITS fraction bits, 0 where the client hides x: 1 - steps to 0, so many
    to CLIP.

    With -x = v_0 + v_1 + 2 steps (top_0 and top_1), see own_half(), it is a product of two numbers.
    The client has one, exp(-v_0). The server has the other twice, for either top_0: the client's
    bit chooses. So this takes a choice and a product of the client's with a secret.

    Price: choice 16 bytes; product 143. Error: 2e-4. What is more than 11.4 nats below its row's
    largest counts as 1e-5 or 0.
    """
    v, top = own_half(-engine.numbers(x).ravel(), steps)
    nats = v * (CLIP / steps)
    factor = None
    first = change = np.zeros(v.shape)
    if engine.rank == CLIENT:
        shown = ~np.broadcast_to(hides, x.shape).ravel()
        factor = client_factor(nats, top) / 2.0**FRACTION * shown
    else:
        first, second = server_factors(nats, top)
        change = second - first
        top = np.zeros(v.shape, bool)
    factor = engine.put(v.shape, CLIENT, factor)
    first, change = (engine.hold(signed(a), dtype=np.float32) for a in (first, change))
    other = op(chosen, first, change, engine.hold(top, dtype=np.bool_))
    zero = engine.hold(np.zeros(1), dtype=np.float32)
    return engine.numbers(op(product, factor, other, zero)).reshape(x.shape)


def among_zeros(e, T):
    """(H, T (T + 1) / 2) -> (H, T, T)."""
    i, j = np.tril_indices(T)
    whole = np.zeros((len(e), T, T), e.dtype)
    whole[:, i, j] = e
    return whole


def divide_form(op, engine, y, e, reciprocal, most, bits=None):
    """
    block.divide() -> (T, d); y (H, T, d_k), integers of its fraction bits. bits: of y and of 1 /
    sum, where they are multiplied in pairs.
    """
    r = over_row_sums(op, engine, e, reciprocal, most)                        # (H, T, 1)
    if bits:
        quotient = join_heads(quotient_in_pairs(op, engine, y, r, bits))
        return engine.hold(quotient, dtype=np.float32, fraction=kept(bits))
    short = dropped(op, engine, engine.numbers(y), y.fraction - Y_BITS)
    return engine.hold(join_heads(whole_quotient(op, engine, short, r)), dtype=np.float32)


def divide_row_form(op, engine, y, e, reciprocal, most):
    """block.divide_row(): y (H, d_k), of Y_BITS -> (1, d)."""
    y = engine.numbers(y)[:, None]                                            # (H, 1, d_k)
    r = over_row_sums(op, engine, e, reciprocal, most)                        # (H, 1, 1)
    return engine.hold(join_heads(whole_quotient(op, engine, y, r)), dtype=np.float32)


def over_row_sums(op, engine, e, reciprocal, most):
    """1 over the sums, which are local, of e's rows (H, T, n): (H, T, 1)."""
    total = engine.numbers(e).sum(-1, keepdims=True)
    total = op(scaled, engine.hold(total, dtype=np.float32), bits=FRACTION - E_BITS)
    return op(reciprocal, total, most=most)


def whole_quotient(op, engine, y, r):
    """A share of y r, y (H, T, d_k) of Y_BITS. Price: 230 bytes a number."""
    y = op(jnp.multiply, engine.hold(y, dtype=np.float32), r)
    return engine.numbers(op(scaled, y, bits=FRACTION - Y_BITS))


def quotient_in_pairs(op, engine, y, r, bits):
    """
    The same of a secret y, a column and the one d_k / 2 behind it in one, of kept() bits. Price:
    123 bytes.
    """
    d_k, half = y.shape[-1], -(-y.shape[-1] // 2)
    share = np.pad(engine.numbers(y), ((0, 0), (0, 0), (0, 2 * half - d_k)))
    halves = without(op, engine, share[..., :half], share[..., half:], y.fraction - bits[0])
    r = dropped(op, engine, engine.numbers(r), FRACTION - bits[1])            # (H, T, 1)
    pairs = op(jnp.multiply, engine.hold(paired(*halves)), engine.hold(r))
    fewer = sum(bits) - kept(bits)
    quotient = apart(op, engine, engine.numbers(pairs), fewer, axis=2)
    if engine.wraps:
        rows = (a[:, :, None] for a in (r, np.concatenate(halves, 2), quotient))
        engine.wraps.note(*rows, fewer)
    return quotient[..., :d_k]                                                # (H, T, d_k)


def in_rows(form):
    """by_rows() of a form of one input."""
    def in_pieces(op, engine, x, **static):
        share = engine.numbers(of_fraction(op, engine, x))
        pieces = [share[i:i + ROWS] for i in range(0, len(share), ROWS)]
        found = [form(op, engine, piece, **static) for piece in pieces]
        return engine.hold(np.concatenate(found), dtype=np.float32)
    return in_pieces


def normalise_share(op, engine, share, unit=1.0):
    """secure_normalise() in steps: a pass watches how large the variances are."""
    y = op(centred, engine.hold(share, dtype=np.float32), unit=unit)
    variance = op(variances, y)
    if engine.wraps:
        engine.wraps.note_variances(engine.numbers(variance))
    return engine.numbers(op(of_unit_variance, y, variance, unit=unit))


def narrow(engine, share):
    """A share of 18 fraction bits as one of NARROW_BITS in the ring mod 2^32."""
    return engine.hold(without_low_bits(share, FRACTION - NARROW_BITS), bits=32)


def relu_share(op, engine, share):
    """
    max(x, 0): compared in the ring mod 2^32, chosen in the other. Price: 57 bytes. Error: 6e-5,
    where x is so near 0 that its sign is mistaken.
    """
    bits = engine.numbers(op(positive, narrow(engine, share)))
    x = engine.hold(share, dtype=np.float32)
    return engine.numbers(op(where, engine.hold(bits, dtype=np.bool_), x))


def gelu_share(op, engine, share):
    """secure_gelu(), its three comparisons in the ring mod 2^32. Price: 320 bytes."""
    relu = relu_share(op, engine, share)
    t = relu + relu - share                                                   # |x|
    edges = tuple(round(end * 2**NARROW_BITS) for end, *_ in (GELU_NEAR, GELU_FAR))
    bits = engine.numbers(op(below, narrow(engine, t), edges=edges))          # (2, rows, columns)
    terms = op(gelu_terms, engine.hold(t, dtype=np.float32))
    chosen_terms = engine.numbers(op(where, engine.hold(bits, dtype=np.bool_), terms))
    return relu + chosen_terms.sum(0, dtype=np.uint64)


FORMS = {  # those of softmax all or none, as they hand integers on
    **{f: in_integers(f) for f in (row_scores, next_scores)},
    **{f: weighted(f) for f in (mix, next_mix)},
    mix_rows: weighted_rows,
    scores: scores_form,
    secure_exponentials: exponentials_form,
    secure_row_exponentials: row_exponentials_form,
    divide: divide_form,
    divide_row: divide_row_form,
    SECURE.normalise: in_rows(normalise_share),
    SECURE.activation["relu"]: in_rows(relu_share),
    SECURE.activation["gelu"]: in_rows(gelu_share),
    SECURE.activation["gelu_tanh"]: in_rows(gelu_share),
}
