"""
The nonlinear functions of a GPT twice: EXACT, and SECURE, as a private inference engine computes them cheaply, each with the
identity it rests on. Pure functions of JAX, to be copied like entropy.py.

Prices are bytes per element, both directions, of SPU's Cheetah at 18 fraction bits: truncation 3, choice by a secret bit 16,
comparison 82, square 147, product of secrets 221 (in whole blocks; results/private_ledger.md measures the functions).
"""
import math
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np


# ------------------------------------------------------------------------------------------------ exact
def normalise(x, unit=1.0):
    """LayerNorm without gain and bias, rows of (T, d)."""
    x = x - x.mean(-1, keepdims=True)
    return x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + 1e-5)


def exponentials(s, seen=None, last=None):
    """
    exp(logit - row maximum) of the logits s (H, rows, T), given in units of LOGIT_UNIT, where seen (rows, T) is 1; 0 elsewhere. Without
    seen, rows is T and all is causal.
    """
    s = jnp.where((np.tri(s.shape[-1]) if seen is None else seen) > 0.5, LOGIT_UNIT * s, -jnp.inf)
    return jnp.exp(s - s.max(-1, keepdims=True))


# ------------------------------------------------------------------------------------------------ as MPC affords them
def square(w):
    """
    w^2 for 147 bytes instead of a product's 221: with one iteration SPU's exp(x) is (1 + x/2)^2, and only exp lowers to the cheap
    square. That comes in blocks of 2 x 8192, 2.4 MB each even if only begun: a short rest is multiplied, for 253 bytes apiece.
    """
    flat = w.ravel()
    whole = len(flat) - len(flat) % 16384 if len(flat) % 16384 < 4096 else len(flat)
    return jnp.concatenate([engine_square(flat[:whole])] * (whole > 0) + [flat[whole:] * flat[whole:]] * (whole < len(flat))).reshape(w.shape)


def engine_square(w):
    return jnp.exp(2 * (w - 1))


def only(diagonal, x):
    """x where the public `diagonal` is set, 0 elsewhere: free."""
    return jnp.where(diagonal, x, 0.0)


def secure_normalise(x, unit=1.0):
    """
    normalise() by two matrix products: the variances are the diagonal of x x^T / d, and rows are scaled by diag(r) x. 15 MB for
    128 x 768, where two products for every entry take 44; slower, as the engine's time goes into matrix products. Both products have
    rows x rows entries for rows that are wanted: more than 128 rows go by_rows.
    """
    x, diagonal = x - x.mean(-1, keepdims=True), np.eye(len(x), dtype=bool)
    y = x * (1 / math.sqrt(x.shape[-1]))  # before the product, which would overflow
    r = jax.lax.rsqrt(only(diagonal, y @ y.T).sum(-1) + 1e-5)
    return only(diagonal, r[:, None]) @ x


def causal_row_max(s):
    """Row maxima (H, T, 1) over the causal entries of s (H, T, T): a tree, all comparisons of a level in one call, none above the diagonal."""
    H, T, width = *s.shape[:2], s.shape[2]
    while width > 1:
        half = (width + 1) // 2
        row, left = np.nonzero(np.arange(T)[:, None] >= half + np.arange(width - half))  # pairs whose right half is not in the future
        larger = jnp.maximum(s[:, row, left], s[:, row, left + half])
        place = np.arange(T)[:, None] * width + np.arange(half)
        place[row, left] = T * width + np.arange(len(row))
        s, width = jnp.concatenate((s.reshape(H, -1), larger), 1)[:, place.ravel()].reshape(H, T, half), half
    return s


LOGIT_UNIT = 5.0  # the fit below holds on [-10, 0], which is [-2, 0] in this unit
FIT_Q = (1.12407794, -0.0802553, -0.03571606, -2.87437885)  # experiments/fit.py makes these
FIT_E = (0.03488002, 0.25602778, 0.01320943, 0.02924629, -0.28190972)


def secure_exp(u):
    """
    exp(5 (u - 1)) on [-1, 1] by three squares of linear combinations, least-squares fit, within 4e-3, and 0 at -1; each combination
    costs one truncation. SPU's own exp takes eight squares, and is three times as exact. The errors of a row's entries add up: the
    worst row, 127 of its logits at 9.4 below the other, sums to 8% too little; longer rows to more.
    """
    q, e = FIT_Q, FIT_E
    z1 = square(u)
    z2 = square(z1 + q[0] * u)
    z3 = square(z2 + q[1] * z1 + q[2] * u + q[3])
    return e[0] * z3 + e[1] * z2 + e[2] * z1 + e[3] * u + e[4]


def secure_exponentials(s):
    """
    exponentials() on the causal half alone: T(T+1)/2 entries are packed, exp'ed and put back among zeros. Logits more than 10 below
    their row's largest count as 0.
    """
    H, T, _ = s.shape
    i, j = np.tril_indices(T)
    e = secure_exp(jnp.maximum((s - causal_row_max(s))[:, i, j], -2.0) + 1)
    place = np.full((T, T), len(i))
    place[i, j] = np.arange(len(i))
    return jnp.concatenate((e, jnp.zeros((H, 1))), 1)[:, place.ravel()].reshape(H, T, T)


def secure_row_exponentials(s, seen, last=None):
    """exponentials() of one row (H, 1, T), seen (1, T) a secret: what isn't seen is lowered beyond the clip before the maximum, and zeroed after."""
    s = s + 1024 * (seen - 1)
    return secure_exp(jnp.maximum(s - s.max(-1, keepdims=True), -2.0) + 1) * seen


def sum_below(t, edges, terms):
    """The sum of those terms[i] where t < edges[i], a few public numbers: all comparisons in one call, and all choices."""
    return jnp.where(t < np.reshape(edges, (-1, *[1] * t.ndim)), jnp.stack(terms), 0.0).sum(0)


def secure_reciprocal(s, most):
    """
    1 / s for s in [1, most] by three steps (four beyond 256) of Newton's r (2 - s r) from a line, one of three by where s lies: 1.9 KB
    a number, SPU's own division takes 4.1. The best line on [a, b] is off by (b - a)^2 / ((b + a)^2 + 4 a b), and a step squares that.
    """
    edge = 0.97 * (1.05 * most) ** (np.arange(4) / 3)
    slope = 8 / ((edge[:-1] + edge[1:]) ** 2 + 4 * edge[:-1] * edge[1:])
    level = slope * (edge[:-1] + edge[1:])
    change = [(level[i] - level[i + 1]) - (slope[i] - slope[i + 1]) * s for i in (0, 1)]
    r = level[2] - slope[2] * s + sum_below(s, edge[1:3], change)
    for _ in range(3 + (most > 256)):
        r = r * (2 - s * r)
    return r


GELU_NEAR, GELU_FAR = (1.0, 0.30392104, -0.45216452, -0.00423425), (3.4, -0.03544199, 0.22379692, -0.35397822)  # each: up to t, t^2, t, 1


def secure_gelu(x):
    """
    GELU(x) = relu(x) + p(|x|): GELU(x) - relu(x) is even and vanishes past 3.4, so two parabolas in |x| serve both sides, within 7e-3, and
    without bias, which a row of a thousand numbers would add up (experiments/fit.py).
    One square and three comparisons (the sign also makes |x|): 441 bytes by the prices above; a quartic, twice as exact, 490, with a second
    square in place of the third comparison.
    """
    relu = jnp.where(x > 0, x, 0.0)
    t = 2 * relu - x  # |x|
    t2, (b, *near), (c, *far) = square(t), GELU_NEAR, GELU_FAR
    change = [k[0] * t2 + k[1] * t + k[2] for k in (np.subtract(near, far), far)]  # where t < c far, where t < b the rest to near
    return relu + sum_below(t, (b, c), change)


def secure_argmax(x):
    """Indices (rows,) of the row maxima of x (rows, V): a tree of V - 1 comparisons, each with a choice of the value and of its index."""
    index = jnp.broadcast_to(jnp.arange(x.shape[-1], dtype=jnp.int32), x.shape)
    while (half := x.shape[-1] // 2):
        left = x[:, :half] >= x[:, half:2 * half]
        x, index = (jnp.hstack((jnp.where(left, a[:, :half], a[:, half:2 * half]), a[:, 2 * half:])) for a in (x, index))
    return index[:, 0]


def by_rows(f):
    """f, row by row anyway, on 128 rows at a time: no more bytes, and the engine's memory doesn't grow with T (its encoding of GPT-2 small's QKV: 7 GB)."""
    return lambda x, *rest, **static: jnp.concatenate([f(x[i:i + 128], *rest, **static) for i in range(0, len(x), 128)])


EXACT = SimpleNamespace(
    normalise=normalise,
    exponentials=exponentials,
    row_exponentials=exponentials,
    reciprocal=lambda s, most: 1 / s,
    activation={"gelu": partial(jax.nn.gelu, approximate=False), "gelu_tanh": jax.nn.gelu, "relu": jax.nn.relu},
)
SECURE = SimpleNamespace(
    normalise=by_rows(secure_normalise),
    exponentials=secure_exponentials,
    row_exponentials=secure_row_exponentials,
    reciprocal=secure_reciprocal,
    activation={"gelu": by_rows(secure_gelu), "gelu_tanh": by_rows(secure_gelu), "relu": by_rows(jax.nn.relu)},
)
