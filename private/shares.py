"""
Shares as NumPy arrays, and what the softmax gains by them under Cheetah.

A secret x is two integers, x_0 of the client's and x_1 of the server's, with x_0 + x_1 = x 2^f mod
2^64, f its fraction bits. Either alone tells nothing of x. So whatever a party computes of its own
share costs nothing and tells nobody anything; only an op() goes over the link, and what ahead.py
sends. Three local functions are of use:

- a linear one with integer coefficients, such as a sum: its value is exactly the sum's;
- dropping m low bits and keeping the 32 above: shares mod 2^32 of the value with m bits fewer, less
  a last bit or not. The carry into the bits above the 64 is a multiple of 2^32, whatever the shares
  were, so that this is right for all of them. In the ring mod 2^32 a comparison costs half;
- any function at all, where an identity turns sums of shares into products: exp(a + b).

FORMS at the end says which functions of block.py and nonlinear.py have a form here: Engine.op()
takes it in their place. Integers, as dtype int32, are what these hand on, each with the fraction
bits that its docstring tells. What the values must stay below is in ranges.LIMITS.

docs/private.md argues that these forms are secure, one by one.
"""
from functools import partial

import jax.numpy as jnp
import numpy as np
import spu
from spu import libspu

from private.block import (divide, divide_row, join_heads, mix, mix_rows, row_scores, scores)
from private.further import next_mix, next_scores
from private.nonlinear import (CIPHERTEXT, GELU_FAR, GELU_NEAR, LOGIT_UNIT, ROWS, SECURE,
                               causal_row_max, gelu_terms, secure_exponentials,
                               secure_row_exponentials)

VERSION = "0.9.5"  # of SPU: what a share's bytes mean is no promise of its interface
CHUNK = 2**26      # bytes of a share in one protobuf
CLIENT, SERVER = 0, 1  # ranks


# ------------------------------------------------------------------------------ a share, out and in
def check_version():
    """RuntimeError if this isn't the SPU whose shares are known."""
    if spu.__version__ != VERSION:
        raise RuntimeError(f"SPU {spu.__version__} is installed, and what its shares mean is known "
                           f"of {VERSION} alone: pip install spu=={VERSION}")


def storage(bits, dtype=np.int32):
    """SPU's name of a share mod 2^bits: additive, but of bits a sum mod 2."""
    return f"cheetah.BShr<FM{bits},1>" if dtype == np.bool_ else f"cheetah.AShr<FM{bits}>"


def owned(bits, owner):
    """SPU's name of what is one party's own: to the other it is 0."""
    return f"Priv2k<FM{bits},{owner}>"


def numbers(share, bits, shape, dtype, rank):
    """
    The integers mod 2^bits of a libspu.Share. What XLA found to be public, such as x - x, is the
    client's share, and the server's is 0; what is one party's own is its share, and the other's 0.
    RuntimeError if it is another kind of share.
    """
    meta = libspu.ValueMeta()
    meta.ParseFromString(share.meta)
    public = meta.storage_type == f"Pub2k<FM{bits}>"
    known = {storage(bits, dtype), owned(bits, CLIENT), owned(bits, SERVER)}
    content = b"".join(content_of(chunk) for chunk in share.share_chunks)
    size = int(np.prod(shape)) * bits // 8
    if not (public or meta.storage_type in known) or len(content) != size:
        raise RuntimeError(f"a share is {meta.storage_type} of {len(content)} bytes, where "
                           f"{storage(bits, dtype)} of {size} is due")
    found = np.frombuffer(content, f"u{bits // 8}").reshape(shape)
    return np.zeros_like(found) if public and rank != CLIENT else found


def content_of(chunk):
    parsed = libspu.ValueChunk()
    parsed.ParseFromString(chunk)
    return parsed.content


def share_of(array, bits, dtype, owner=None):
    """
    The libspu.Share of integers mod 2^bits, of dtype int32 or float32; or of bits, of dtype bool.
    owner: the rank that has them all, if one has.
    """
    types = {np.float32: libspu.DataType.DT_F32, np.int32: libspu.DataType.DT_I32,
             np.bool_: libspu.DataType.DT_I1}
    meta = libspu.ValueMeta()
    meta.data_type = types[dtype]
    meta.visibility = spu.Visibility.VIS_SECRET
    meta.storage_type = storage(bits, dtype)
    if owner is not None:
        meta.visibility = spu.Visibility.VIS_PRIVATE
        meta.storage_type = owned(bits, owner)
    meta.shape = list(array.shape)
    share = libspu.Share()
    share.meta = meta.SerializeToString()
    content = np.ascontiguousarray(array, f"u{bits // 8}").tobytes()
    share.share_chunks = [chunk_of(content, at) for at in range(0, len(content) or 1, CHUNK)]
    return share


def chunk_of(content, at):
    chunk = libspu.ValueChunk()
    chunk.total_bytes = len(content)
    chunk.chunk_offset = at
    chunk.content = content[at:at + CHUNK]
    return chunk.SerializeToString()


def without_low_bits(share, dropped):
    """Shares mod 2^64 -> shares mod 2^32 of the value without that many low bits."""
    return (share >> np.uint64(dropped)).astype(np.uint32)


# ------------------------------------------------------------------- exp(-x) of a sum of two shares
# Logits below their row's largest are counted in steps, STEPS of them down to the clip. A number of
# LOGIT_UNITs with S_BITS fraction bits, times FACTOR and without DROPPED bits, is so many steps.
STEPS = 2**16
S_BITS, FACTOR, DROPPED = 36, 7, 24
NATS = LOGIT_UNIT * 2.0 ** (DROPPED - S_BITS) / FACTOR  # a step
FRACTION = 18                 # bits of a float32, and those that a product of two of them drops
EXP_BITS = 42                 # of exp(-x) in the product of the parties' factors:
LOW, HIGH = 2.0**13, 2.0**29  # LOW HIGH = 2^42, and neither factor passes 2^30
E_BITS = EXP_BITS - FRACTION  # what is left of the 42,
Y_BITS = 26                   # and what a sum of weighted values takes into its division
FAR = 2**30                   # steps that what a row hides lies below: LIMITS keep the rest above
NARROW_BITS = 15              # of an activation's input where it is compared


def own_half(x):
    """
    A share of x, 0 <= x < STEPS -> (v, top), x = v_0 + v_1 + 2 STEPS (top_0 and top_1).

    v is the share mod 2 STEPS, from -STEPS to STEPS - 1, and top says whether it is negative. So
    v_0 + v_1 is x or x - 2 STEPS. It is the latter exactly if both are negative: x is not negative,
    and a sum with one that isn't is -STEPS at least, more than x - 2 STEPS.
    """
    v = x.astype(np.int64) % (2 * STEPS)
    top = v >= STEPS
    return v - np.where(top, 2 * STEPS, 0), top


def client_factor(v, top):
    """The client's factor of exp(-x) 2^EXP_BITS."""
    return np.exp(-NATS * v) * np.where(top, LOW, HIGH)


def server_factors(v, top):
    """The server's: (if the client's v is positive, if it is negative)."""
    return (np.rint(np.exp(-NATS * v) * LOW),
            np.rint(np.exp(-NATS * (v + np.where(top, 2 * STEPS, 0))) * HIGH))


# --------------------------------------------------------------------------------- what goes over
def steps_below(s):
    """Causal entries of s (H, T, T) less their row's largest, in steps: 1 - STEPS to 0."""
    i, j = np.tril_indices(s.shape[-1])
    return jnp.maximum((s - causal_row_max(s))[:, i, j], 1 - STEPS)           # (H, T (T + 1) / 2)


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


def scaled(x, bits):
    """
    x 2^bits, bits from -16 on. A step of its own: XLA makes (y 2^a) r 2^b into y r 2^(a + b), and
    of a smaller factor SPU makes a larger one and a second truncation, right up to 2^45 alone.
    """
    return x * 2.0**bits


ODD = 65537  # 2^-18 ODD is no small factor
ODD_INVERSE = np.uint64(pow(ODD, -1, 2**64))


def times_odd(x):
    return x * (ODD * 2.0**-FRACTION)


def truncated(op, engine, share):
    """
    The secret of a share's numbers without 18 of their fraction bits. They are divided by ODD
    first, mod 2^64, whatever that makes of them, as the factor has ODD again.
    """
    return op(times_odd, engine.hold(share * ODD_INVERSE, dtype=np.float32))


# ---------------------------------------------------------------------------------------- the forms
def in_integers(function):
    """The form of a product: that of its values as integers, 18 fraction bits of a float32's."""
    product_of = partial(function)  # which has no form

    def form(op, engine, *secrets, **static):
        whole = [engine.hold(engine.numbers(secret)) for secret in secrets]
        return op(product_of, *whole, **static)
    return form


def mixed(function):
    """The form of weights, integers of E_BITS, times what they weigh -> Y_BITS as float32."""
    in_all_bits = in_integers(function)                                       # EXP_BITS

    def form(op, engine, *secrets, **static):
        y = engine.numbers(in_all_bits(op, engine, *secrets, **static))
        return op(scaled, engine.hold(y, dtype=np.float32), bits=Y_BITS - EXP_BITS)
    return form


def exponentials_form(op, engine, s):
    """
    exp(logit - row maximum) on the causal half, 0 above it, as integers of E_BITS fraction bits;
    s (H, T, T): integers of S_BITS.

    Price: row maxima and clip 54 bytes each, where they take 98 mod 2^64; and exp_of().
    """
    x = op(steps_below, engine.hold(in_steps(engine, s), bits=32))            # (H, T (T + 1) / 2)
    return engine.hold(among_zeros(exp_of(op, engine, x), s.shape[-1]))       # (H, T, T)


def row_exponentials_form(op, engine, s, hidden, left):
    """
    The same of rows s (H, k, n), 0 where the client's `hidden` (k, n) isn't. It takes what it hides
    FAR below all else, and makes its factor there 0.
    """
    hides = engine.numbers(hidden) != 0                                       # (k, n)
    steps = in_steps(engine, s) - np.where(hides, np.uint32(FAR), np.uint32(0))
    x = op(row_steps_below, engine.hold(steps, bits=32))                      # (H, k, n)
    return engine.hold(exp_of(op, engine, x, hides))


def in_steps(engine, s):
    """A share of logits, integers of S_BITS, counted in steps mod 2^32."""
    return without_low_bits(engine.numbers(s) * np.uint64(FACTOR), DROPPED)


def exp_of(op, engine, x, hides=False):
    """
    A share of exp(x) of E_BITS fraction bits, 0 where the client hides x: steps, 1 - STEPS to 0.

    With -x = v_0 + v_1 + 2 STEPS (top_0 and top_1), see own_half(), it is a product of two numbers.
    The client has one, exp(-v_0). The server has the other twice, for either top_0: the client's
    bit chooses. So this takes a choice and a product of the client's with a secret.

    Price: choice 16 bytes; product 143. Error: 2e-4. What is more than 11.4 nats below its row's
    largest counts as 1e-5 or 0.
    """
    v, top = own_half(-engine.numbers(x).ravel())
    factor = None
    first = change = np.zeros(v.shape)
    if engine.rank == CLIENT:
        shown = ~np.broadcast_to(hides, x.shape).ravel()
        factor = client_factor(v, top) / 2.0**FRACTION * shown
    else:
        first, second = server_factors(v, top)
        change = second - first
        top = np.zeros(v.shape, bool)
    factor = engine.put(v.shape, CLIENT, factor)
    first, change = (engine.hold(signed(a), dtype=np.float32) for a in (first, change))
    other = op(chosen, first, change, engine.hold(top, dtype=np.bool_))
    zero = engine.hold(np.zeros(1), dtype=np.float32)
    return engine.numbers(op(product, factor, other, zero)).reshape(x.shape)


def signed(a):
    """Whole numbers of either sign, as integers mod 2^64."""
    return a.astype(np.int64).view(np.uint64)


def among_zeros(e, T):
    """(H, T (T + 1) / 2) -> (H, T, T)."""
    i, j = np.tril_indices(T)
    whole = np.zeros((len(e), T, T), e.dtype)
    whole[:, i, j] = e
    return whole


def divide_form(op, engine, y, e, reciprocal, most):
    """block.divide() -> (T, d), of 18 fraction bits; y (H, T, d_k): of Y_BITS."""
    return engine.hold(join_heads(quotient(op, engine, y, e, reciprocal, most)), dtype=np.float32)


def divide_row_form(op, engine, y, e, reciprocal, most):
    """block.divide_row(): y (H, d_k) -> (1, d)."""
    y = engine.hold(engine.numbers(y)[:, None], dtype=np.float32)             # (H, 1, d_k)
    return divide_form(op, engine, y, e, reciprocal, most)


def quotient(op, engine, y, e, reciprocal, most):
    """A share of y / (the row sums of e), which are local: e (H, T, n), y (H, T, d_k)."""
    total = engine.numbers(e).sum(-1, keepdims=True)
    total = op(scaled, engine.hold(total, dtype=np.float32), bits=FRACTION - E_BITS)
    r = op(reciprocal, total, most=most)                                      # (H, T, 1)
    y = op(jnp.multiply, y, r)                                                # (H, T, d_k)
    return engine.numbers(op(scaled, y, bits=FRACTION - Y_BITS))


def in_rows(form):
    """by_rows() of a form of one input."""
    def in_pieces(op, engine, x):
        share = engine.numbers(x)
        pieces = [form(op, engine, share[i:i + ROWS]) for i in range(0, len(share), ROWS)]
        return engine.hold(np.concatenate(pieces), dtype=np.float32)
    return in_pieces


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


FORMS = {  # but for the activations all or none: they hand integers on
    **{f: in_integers(f) for f in (scores, row_scores, next_scores)},
    secure_exponentials: exponentials_form,
    secure_row_exponentials: row_exponentials_form,
    **{f: mixed(f) for f in (mix, mix_rows, next_mix)},
    divide: divide_form,
    divide_row: divide_row_form,
    SECURE.activation["relu"]: in_rows(relu_share),
    SECURE.activation["gelu"]: in_rows(gelu_share),
    SECURE.activation["gelu_tanh"]: in_rows(gelu_share),
}
