"""
The nonlinear functions of a GPT twice: exact, and beside it as a private inference engine affords
it, with the identity that the form rests on, its price and its range. Pure functions of JAX that
import nothing of ours, to be copied like entropy.py. EXACT and SECURE at the end are the two sets.

The engine is SPU 0.9.5 with 18 fraction bits of 64. Prices are those of its Cheetah protocol in
bytes of both directions; docs/ledger.md measures every form. There softmax and the activations
run as forms.py has them; the forms here serve the other protocols.

    truncation, or a product with a public number      3
    choice by a secret bit                            16
    comparison                                        82
    square                                           147
    product of two secrets                           221

A product, matrix products included, is right while its result lies within 2^26: its ring value is
2^36 times the result and must stay below 2^62. pi_export.py refuses a model that would leave that.
"""
import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np


# -------------------------------------------------------------------------------- what they are of
CIPHERTEXT = 8192       # numbers in one of Cheetah's ciphertexts
BLOCK = 2 * CIPHERTEXT  # numbers in a block of squares: each party answers for one ciphertext
REST = BLOCK // 4       # fewer numbers than these cost less multiplied than as a block of squares
ROWS = 128              # rows that by_rows() takes at a time


def square(w):
    """
    w^2. With one iteration SPU's exp(x) is (1 + x/2)^2, and only exp lowers to the cheap square.

    Price: 147 bytes a number, where a product takes 221. Squares come in blocks, and a block only
    begun costs as much, so that a short rest is multiplied. Range: |w| up to 2^13.
    """
    flat = w.ravel()
    rest = len(flat) % BLOCK
    if rest >= REST:
        rest = 0
    whole = len(flat) - rest
    pieces = []
    if whole:
        pieces.append(engine_square(flat[:whole]))
    if rest:
        pieces.append(flat[whole:] * flat[whole:])
    return jnp.concatenate(pieces).reshape(w.shape)


def engine_square(w):
    """w^2 where the engine's fxp_exp_iters is 1. In the clear it is an exponential of w."""
    return jnp.exp(2 * (w - 1))


def only(diagonal, x):
    """x where the public mask `diagonal` is set, 0 elsewhere. Price: nothing."""
    return jnp.where(diagonal, x, 0)


def sum_below(t, edges, terms):
    """
    The sum of those terms[i] where t < edges[i], a few public numbers. Price: a comparison and a
    choice for each edge and number, all comparisons in one call and all choices in another.
    """
    edges = np.reshape(edges, (-1, *[1] * t.ndim))
    return jnp.where(t < edges, terms, 0.0).sum(0)


def by_rows(f):
    """
    f, which works row by row, on ROWS rows at a time. Price: no byte more, and the engine's memory
    doesn't grow with T (its encoding of GPT-2 small's Q, K and V takes 7 GB).
    """
    def in_pieces(x, *rest, **static):
        pieces = [f(x[i:i + ROWS], *rest, **static) for i in range(0, len(x), ROWS)]
        return jnp.concatenate(pieces)
    return in_pieces


# --------------------------------------------------------------------------------------- LayerNorm
EPSILON = 1e-5       # torch's, added to a row's variance
CENTRE = 4.0         # what a standard deviation of one unit is brought to, inside rsqrt's range
SMALLEST = 2.0**-16  # a variance that the engine still tells from 0: four steps of 2^-18
LARGEST = 2.0**16    # that its rsqrt is sure to hold for


def normalise(x, unit=1.0):
    """LayerNorm without gain and bias of the rows of x (T, d). unit: see secure_normalise()."""
    x = x - x.mean(-1, keepdims=True)
    return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + EPSILON)


def secure_normalise(x, unit=1.0):
    """
    normalise() by two matrix products. Of y = k x, whatever k, the squared lengths of the rows are
    the diagonal of y y^T, and sqrt(d) y / |y| scales the rows by a diagonal matrix.

    unit: a public power of two near the rows' standard deviation; the result doesn't depend on it.
    The engine's rsqrt is right within 5e-4 from 2^-11 on and 0 from 2^17 on; k brings the unit in
    between. Range: rows of standard deviation from unit / 32 to 64 units, within 1e-2; from
    unit / 8 to 16 units, within 2e-3; from 90 units on the result is 0.
    The mean is subtracted twice: 1/d has 18 bits in the engine, and 1/768 is wrong by a thousandth.
    Beyond LARGEST, 64 units, a private pass says so, see wraps.py.

    Price: 15 MB for 128 x 768, where two products for every entry take 44. This form is slower, as
    the engine's time goes into matrix products. Both products have rows x rows entries of which
    `rows` are wanted: more than ROWS rows go by_rows().
    """
    y = centred(x, unit)                                      # (T, d)
    return of_unit_variance(y, variances(y), unit)            # (T, d)


def centred(x, unit):
    """y = k x, its rows less their means."""
    x = x - x.mean(-1, keepdims=True)
    x = x - x.mean(-1, keepdims=True)
    return x * (CENTRE / (unit * math.sqrt(x.shape[-1])))     # (T, d)


def variances(y):
    """The squared lengths of the rows of y (T, d): of a row of one unit CENTRE^2."""
    return only(np.eye(len(y), dtype=bool), y @ y.T).sum(-1)  # (T,)


def of_unit_variance(y, variance, unit):
    """The rows of y (T, d), of these variances (T,), scaled to a standard deviation of 1."""
    diagonal, d = np.eye(len(y), dtype=bool), y.shape[-1]
    epsilon = max(EPSILON * (CENTRE / unit) ** 2, SMALLEST)
    r = math.sqrt(d) * jax.lax.rsqrt(variance + epsilon)      # (T,)
    return only(diagonal, r[:, None]) @ y                     # (T, d)


# ----------------------------------------------------------------------------------------- softmax
LOGIT_UNIT = 5.0  # what logits are counted in, so that the fit's interval is two units long
FACTOR = 7        # a power of two of LOGIT_UNIT / FACTOR is a step of forms.py
REACH = 2.0       # a logit so many units below its row's largest counts as 0: exp(-10) is 5e-5
FIT_Q = (1.12407806, -0.08025701, -0.03571631)  # experiments/fit.py makes these
FIT_E = (0.03488004, 0.05551102, 0.02930196, 0.03640795, 0.00627089)


def exponentials(s, bits=None):
    """
    exp(logit - row maximum) of the logits s (H, T, T), counted in LOGIT_UNITs, on the causal half;
    0 above the diagonal. bits: see forms.py.
    """
    s = jnp.where(np.tri(s.shape[-1], dtype=bool), LOGIT_UNIT * s, -jnp.inf)
    return jnp.exp(s - s.max(-1, keepdims=True))


HIDDEN = -2.0**27  # added to a logit: below any other, and 64 bits hold the difference


def row_exponentials(s, hidden, left):
    """
    The same of k rows s (H, k, n), at places where hidden (k, n) is 0; 0 where it is HIDDEN. left:
    see secure_row_exponentials().
    """
    s = LOGIT_UNIT * (s + hidden)
    return jnp.exp(s - s.max(-1, keepdims=True))


def secure_exp(u):
    """
    exp(5 (u - 1)) by three squares of linear combinations, a least-squares fit. A logit z units
    below its row's largest has u = 1 - z.

    Range: u from -1 to 1, within 4e-3, and 0 at -1. The errors of a row's entries add up: the worst
    row, 127 of its logits at 9.4 below the other, sums to 8% too little; longer rows to more.
    Price: 3 squares and 4 truncations, 454 bytes. SPU's own exp takes eight squares, and is three
    times as exact.
    """
    q, e = FIT_Q, FIT_E
    z1 = square(u)
    z2 = square(z1 + q[0] * u)
    z3 = square(z2 + q[1] * z1 + q[2] * u)
    return e[0] * z3 + e[1] * z2 + e[2] * z1 + e[3] * u + e[4]


CLIPPED = 4.914e-5  # secure_exp(-1)


def clipped_exp(z):
    """secure_exp() of z <= 0, 0 from -REACH on. Price: secure_exp(), a comparison and a choice."""
    return secure_exp(jnp.maximum(z, -REACH) + 1)


def causal_row_max(s):
    """
    Row maxima (H, T, 1) over the causal entries of s (H, T, T), by a tree. Price: a comparison and
    a choice for each entry below the diagonal; a level's comparisons are one call.
    """
    H, T, width = s.shape
    i = np.arange(T)[:, None]
    while width > 1:
        half = (width + 1) // 2
        row, left = np.nonzero(i >= half + np.arange(width - half))  # whose partner is in the past
        larger = jnp.maximum(s[:, row, left], s[:, row, left + half])         # (H, pairs)
        place = i * width + np.arange(half)                                   # (T, half), in s
        place[row, left] = T * width + np.arange(len(row))                    # or in larger
        s = jnp.concatenate((s.reshape(H, -1), larger), 1)[:, place.ravel()].reshape(H, T, half)
        width = half
    return s


def secure_exponentials(s, bits=None):
    """
    exponentials() on the causal half alone: T (T + 1) / 2 entries are packed, exp'ed and put back
    among zeros. Range: all s. Price: clipped_exp() and causal_row_max() of every causal entry.
    """
    H, T, _ = s.shape
    i, j = np.tril_indices(T)
    e = clipped_exp((s - causal_row_max(s))[:, i, j])                         # (H, T (T + 1) / 2)
    place = np.full((T, T), len(i))                                           # the zero's
    place[i, j] = np.arange(len(i))
    return jnp.concatenate((e, jnp.zeros((H, 1))), 1)[:, place.ravel()].reshape(H, T, T)


def secure_row_exponentials(s, hidden, left):
    """
    row_exponentials() of rows that see themselves; which places are hidden is the client's secret.
    Sums are local: what is hidden is far below the clip, where secure_exp() is CLIPPED, and that
    much, the client's left (k, n), is taken away again.

    Range: logits up to 2^26. Price: clipped_exp(), a comparison and a choice for an entry.
    """
    s = s + hidden                                                            # (H, k, n)
    return clipped_exp(s - s.max(-1, keepdims=True)) - left                   # (H, k, n)


SUM_LEAST = 0.97   # what a row of secure_exponentials() may sum to in place of 1,
SUM_MOST = 1.0185  # and in place of its length, for each of its entries


def reciprocal(s, most):
    """1 / s. most: see secure_reciprocal()."""
    return 1 / s


def secure_reciprocal(s, most):
    """
    1 / s by steps of Newton's, r (2 - s r), from a line, one of three by where s lies. The best
    line on [a, b] is off by (b - a)^2 / ((b + a)^2 + 4 a b), and a step squares that.

    Range: s from 0.98 to 1.01 `most`, which is public, within 1e-4. Price: 1.9 KB a number, where
    SPU's own division takes 4.1.
    """
    edge = SUM_LEAST * (SUM_MOST / SUM_LEAST * most) ** (np.arange(4) / 3)    # of three intervals
    a, b = edge[:-1], edge[1:]
    slope = 8 / ((a + b) ** 2 + 4 * a * b)
    level = slope * (a + b)
    change = [(level[i] - level[i + 1]) - (slope[i] - slope[i + 1]) * s for i in (0, 1)]
    r = level[2] - slope[2] * s + sum_below(s, edge[1:3], jnp.stack(change))
    steps = 4 if most > 256 else 3
    for _ in range(steps):
        r = r * (2 - s * r)
    return r


# ------------------------------------------------------------------------------------- activations
GELU_NEAR = (1.0, 0.30392104, -0.45216452, -0.00423425)  # up to which |x|, and the parabola there,
GELU_FAR = (3.4, -0.03544199, 0.22379692, -0.35397822)   # highest power first; experiments/fit.py


def gelu(x):
    """x times the normal distribution function of x."""
    return jax.nn.gelu(x, approximate=False)


def secure_gelu(x):
    """
    GELU(x) = relu(x) + p(|x|): GELU(x) - relu(x) is even and vanishes past 3.4, so that two
    parabolas in |x| serve both sides, without bias, which a row of a thousand numbers would add up.

    Range: all x, within 7e-3; a square that overflows is one that isn't chosen.
    Price: a square and three comparisons (the sign also makes |x|), 441 bytes. A quartic, twice as
    exact, takes 490, with a second square in place of the third comparison.
    """
    relu = jnp.where(x > 0, x, 0.0)
    t = 2 * relu - x  # |x|
    return relu + sum_below(t, (GELU_NEAR[0], GELU_FAR[0]), gelu_terms(t))


def gelu_terms(t):
    """What secure_gelu() adds up to the near end, and up to the far one: (2, ...)."""
    t2 = square(t)
    near, far = GELU_NEAR[1:], GELU_FAR[1:]
    beyond_far = np.subtract(near, far)
    return jnp.stack([k[0] * t2 + k[1] * t + k[2] for k in (beyond_far, far)])


# ---------------------------------------------------------------------------- the most likely token
def secure_argmax(x):
    """
    Indices (rows,) of the row maxima of x (rows, V); among equals any. Range: all x. Price: V - 1
    comparisons a row, in a tree, each with a choice of the value and of its index.
    """
    index = jnp.broadcast_to(jnp.arange(x.shape[-1], dtype=jnp.int32), x.shape)
    while x.shape[-1] > 1:
        half = x.shape[-1] // 2
        first = x[:, :half] >= x[:, half:2 * half]
        x, index = winners(first, x), winners(first, index)
    return index[:, 0]


def winners(first, a):
    """Of a's columns i and i + half the one that first (rows, half) says, and what is left over."""
    half = first.shape[1]
    return jnp.hstack((jnp.where(first, a[:, :half], a[:, half:2 * half]), a[:, 2 * half:]))


# ------------------------------------------------------------------------------------ the two sets
ACTIVATIONS = {  # by model.py's name of it: what its cost is entered under, exact, secure
    "gelu": ("GELU", gelu, by_rows(secure_gelu)),
    "gelu_tanh": ("GELU", jax.nn.gelu, by_rows(secure_gelu)),
    "relu": ("ReLU", jax.nn.relu, by_rows(jax.nn.relu)),  # a comparison and a choice: 98 bytes
}
ACTIVATION_KIND = {name: kind for name, (kind, _, _) in ACTIVATIONS.items()}

EXACT = SimpleNamespace(
    normalise=normalise,
    exponentials=exponentials,
    row_exponentials=row_exponentials,
    reciprocal=reciprocal,
    activation={name: exact for name, (_, exact, _) in ACTIVATIONS.items()},
)
SECURE = SimpleNamespace(
    normalise=by_rows(secure_normalise),
    exponentials=secure_exponentials,
    row_exponentials=secure_row_exponentials,
    reciprocal=secure_reciprocal,
    activation={name: secure for name, (_, _, secure) in ACTIVATIONS.items()},
)
