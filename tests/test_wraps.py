"""What products in pairs do beyond their range, and that a pass tells of it: two real parties."""
from functools import partial

import numpy as np
import pytest

pytest.importorskip("spu", reason="spu needs Python 3.10 or 3.11")

from private import shares, wraps  # noqa: E402
from private.nonlinear import FACTOR, SECURE  # noqa: E402
from test_shares import split  # noqa: E402

H, T, d_k, d = 2, 23, 8, 16
rng = np.random.default_rng(0)
X_BITS, W_BITS = 11, 13
X = rng.integers(-2**10, 2**10, (T, d)) / 2.0**10
W = rng.integers(-2**13, 2**13, (d, 12)) / 2.0**13
LIMIT = 2.0**30  # of what a product in pairs holds for certain
SUM = LIMIT / 2**(X_BITS + W_BITS)
LOGIT_BITS = 10, 10
LOGIT = LIMIT / 2 / 2**sum(LOGIT_BITS) / FACTOR  # of a logit
QKV = rng.normal(size=(T, 3 * H * d_k))
MEANS = {bits: LIMIT / 2**sum(bits) for bits in ((15, 13), (18, 16))}  # bits of sums and of 1 / T


def with_sum(row, column, size):
    """X of which one number of X W is so large, and the others of its row are 0."""
    changed = X.copy()
    changed[row] = size * np.linalg.pinv(W)[column]
    return changed


def with_logits(rows, key, size):
    """QKV of which these rows' logits by one key are so large in head 1, whose others are 0."""
    q, k = (np.s_[part * H * d_k + d_k:part * H * d_k + 2 * d_k] for part in (0, 1))
    changed = QKV.copy()
    changed[:, k] = 0
    changed[key, k] = QKV[key, k]
    changed[rows, q] = QKV[key, k] * size / (QKV[key, k] @ QKV[key, k])
    return changed


# From 1 to 3 times its limit a number is now and then read rightly, and a pass may tell or not; a
# logit there, whose limit is half of the others', softmax reads rightly in any case.
WRAPPING = {  # of whether a pass wraps: what is multiplied, by name of the function below
    False: {"rows": [X, with_sum(1, 3, 0.99 * SUM), with_sum(T - 1, 0, -0.99 * SUM)],
            "logits": [QKV, with_logits(20, 3, 0.99 * LOGIT), with_logits([4, 5], 1, 0.99 * LOGIT),
                       with_logits(22, 22, -0.99 * LOGIT), with_logits(5, 14, 9 * LOGIT)],
            "quotients": [(bits, 0.99 * size) for bits, size in MEANS.items()],
            "layer_norm": [1.0, 60.0]},
    True: {"rows": [with_sum(1, 3, 3.2 * SUM), with_sum(T - 1, 0, -3.2 * SUM),
                    with_sum(T - 2, 0, 1000 * SUM), 50 * X * SUM],
           "logits": [with_logits([4, 5], 1, 3.2 * LOGIT), with_logits(22, 22, -3.2 * LOGIT),
                      *(with_logits(20, 3, n * LOGIT) for n in (4.1, 4.4, 5, 6.4, 8)), 100 * QKV],
           "quotients": [(bits, n * size) for bits, size in MEANS.items() for n in (3.2, 50)],
           "layer_norm": [70.0, 2000.0]},
}


def rows(op, engine, x):
    from private.block import linear
    from private.engine import SERVER
    from private.pairs import Paired
    paired = Paired(engine.own(W.shape, SERVER, shares.signed(W * 2.0**W_BITS)), (X_BITS, W_BITS))
    x = split(np.rint(x * 2.0**18))[engine.rank]
    op(linear, engine.hold(x, dtype=np.float32), paired)


def logits(op, engine, qkv):
    from private.block import scores
    qkv = split(np.rint(qkv * 2.0**18))[engine.rank]
    op(scores, engine.hold(qkv, dtype=np.float32), n_head=H, bits=LOGIT_BITS)


def quotients(op, engine, given):
    """The means of values, by weights 1 and their sum T; at one place it is so large."""
    bits, size = given
    from private.block import divide
    from private.forms import E_BITS
    y = np.full((H, T, d_k), size * T / 4)
    y[1, 5, 6] = -size * T
    y = engine.hold(split(np.rint(y * 2.0**42))[engine.rank])
    y.fraction = 42
    e = engine.hold(split(np.full((H, T, T), 2**E_BITS))[engine.rank])
    op(divide, y, e, reciprocal=SECURE.reciprocal, most=T, bits=bits)


def layer_norm(op, engine, size):
    """Of rows whose standard deviation is a unit, and one whose deviation is so many."""
    x = np.random.default_rng(1).normal(size=(T, d)) / 4
    x[7] *= size / x[7].std() / 4
    x = split(np.rint(x * 2.0**18))[engine.rank]
    op(SECURE.normalise, engine.hold(x, dtype=np.float32), unit=0.25)


def party(engine):
    """What either party runs: of each pass the difference, and the bit that it tells."""
    op = partial(engine.op, "other")
    found = []
    for wrapping, passes in WRAPPING.items():
        for function, values in passes.items():
            for value in values:
                engine.wraps = wraps.begin(op, engine)
                globals()[function](op, engine, value)
                bit = engine.reveal(wraps.settle(op, engine))
                more = np.zeros((1, 1), np.uint64)
                if engine.wraps.left:
                    more = wraps.difference(op, engine)
                more = engine.reveal(engine.hold(shares.without_low_bits(more, 32), bits=32))
                if bit is not None:
                    found.append((wrapping, function, int(more.item()), bool(bit.item())))
    engine.wraps = None
    return found


def test_a_pass_tells_whether_a_number_left_its_range(saw):
    """
    Numbers at the limit and beyond it, of either half of a pair, of rows by a matrix, of logits and
    of quotients, and rows of LayerNorm; and a logit of the future, which is not read. The client
    hears a bit, and the server nothing.
    """
    told, none = saw[__name__]
    assert none == []
    assert len(told) == sum(map(len, (*WRAPPING[False].values(), *WRAPPING[True].values())))
    for wrapping, function, more, bit in told:
        assert bit == wrapping, (function, more)
        assert wrapping or abs(more) < wraps.LIMIT / 50


def test_several_wraps_seldom_cancel_each_other():
    """Two of one column, two of one row, four, with factors drawn ten thousand times."""
    seen = wraps.Wraps(np.array([1, 2], np.uint64))
    for places in ([(0, 0), (1, 0)], [(2, 1), (2, 4)], [(0, 0), (0, 1), (1, 0), (1, 1)]):
        r, s = seen.factors(10_000, 3).view(np.int64), seen.factors(10_000, 5).view(np.int64)
        assert set(np.abs(r).ravel()) == set(range(1, 32, 2))
        total = sum(r[:, i] * s[:, j] * k for k, (i, j) in zip((1, -1, -1, 1), places))
        assert (total % 2**12 == 0).mean() < 1 / 16 + 0.01
