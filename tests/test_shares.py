"""Shares drawn at random: identities, and forms.py's and pairs.py's forms of two real parties."""
from functools import partial

import numpy as np
import pytest

pytest.importorskip("spu", reason="spu needs Python 3.10 or 3.11")

from private import forms, shares  # noqa: E402
from private.nonlinear import EXACT, FACTOR, LOGIT_UNIT  # noqa: E402
from private.ranges import LIMITS  # noqa: E402

H, T, d_k = 2, 24, 8
rng = np.random.default_rng(0)
QKV = rng.normal(size=(T, 3 * H * d_k))
IN_PAIRS = (13, 12), (14, 13)  # bits of Q and K, of values and 1 / sum
CASES = [(T, 1.0, (), 18), (T, 2e3, (), 18), (1, 1.0, (), 18),  # rows, what Q is times, bits, and
         (T, 0.3, IN_PAIRS, 18), (T - 1, 0.3, IN_PAIRS, 24),    # the fraction of Q, K and V
         (T, 1.0, (), 21)]
LEFT = rng.integers(-2**10, 2**10, (5, 64)) / 2.0**10  # odd rows, two of the largest sums
LEFT[[1, 3]] = 1
RIGHT = rng.integers(-2**13, 2**13, (64, 6)) / 2.0**13
RIGHT[:, 2:4] = 0.99, -0.99  # 64 of them are nearly 2^30 units of 2^-24
EDGE = LIMITS["gelu"]
X = np.array([-EDGE, -9e3, -4, -1, -1e-4, 0, 1e-4, 1, 4, 9e3, EDGE])[None].repeat(130, axis=0)
ACTIVATED = {"relu": 1e-4, "gelu": 7e-3}  # how near the forms are
GREAT = np.array([0.5, -0.5, 0.999, -0.999, 0]) * 2.0**62
PAIRS = np.array([(a, b, 5) for a in (-2**30 + 64, -1, 0, 7, 2**30 - 64)
                  for b in (-2**30 + 64, -3, 0, 2**30 - 64)])
FAR = LIMITS["row_scores"] - 1
ROWS = np.array([[[0, -0.1, -0.3, FAR, FAR, FAR], [-FAR, -FAR - 0.1, -FAR - 0.3, FAR, FAR, FAR]]])


def split(x, seed=0):
    """Shares mod 2^64 of integers x, the first one drawn at random."""
    x = np.asarray(x).astype(np.int64).view(np.uint64)
    first = np.random.default_rng(seed).integers(0, 2**64, x.shape, np.uint64)
    return first, x - first


# ------------------------------------------------------------------------------------- alone
def test_low_bits_are_dropped_from_any_shares():
    x = np.random.default_rng(1).integers(-2**54, 2**54, 100_000)
    a, b = (shares.without_low_bits(share, 24) for share in split(x))
    error = (a + b).view(np.int32) - x / 2.0**24
    assert -2 < error.min()
    assert error.max() <= 0


@pytest.mark.parametrize("bits", [1, 7, 12, shares.SPARE])
def test_the_second_of_a_pair_loses_low_bits_alone(bits, monkeypatch):
    """Rounded, and right in the 44 bits that are left, and so in the 32 of a pair."""
    monkeypatch.setattr(shares, "dropped", lambda op, engine, share, bits: share)
    b = np.random.default_rng(2).integers(-2**30 << bits, 2**30 << bits, 100_000)
    first, second = (shares.without(None, None, share, share, bits)[1] for share in split(b))
    left = ((first + second) << np.uint64(shares.SPARE)).view(np.int64) >> shares.SPARE
    error = left - b / 2.0**bits
    assert np.abs(error).max() <= 1
    assert abs(error.mean()) < 0.01 + 0.5**bits


def test_logits_at_their_limit_are_told_apart():
    nats = forms.CLIP / forms.STEPS
    s = np.array([-LIMITS["scores"], 0, LIMITS["scores"]]) * 2.0**36
    for seed in range(100):
        a, b = (shares.without_low_bits(share * np.uint64(FACTOR), forms.DROPPED)
                for share in split(s, seed))
        steps = (a + b).view(np.int32)
        assert np.abs(steps * nats - s * LOGIT_UNIT / 2.0**36).max() < 2 * nats
        assert (steps[:-1] - steps[1:] < 0).all()
        assert steps[0] - steps[-1] < 0


@pytest.mark.parametrize("steps", [forms.STEPS, forms.pair_steps((9, 11)), 2**31])
def test_the_exponential_is_a_product_of_a_factor_of_each_party(steps):
    """x up to the clip, and shares at both ends of each half."""
    x = np.linspace(0, steps - 1, 2**16).astype(np.int64)
    nats = forms.CLIP / steps
    ends = [0, 1, steps - 1, steps, 2 * steps - 1]
    firsts = [np.full(x.shape, end, np.uint32) for end in ends]
    firsts.append(np.random.default_rng(2).integers(0, 2**32, x.shape, np.uint32))
    for first in firsts:
        v, top = forms.own_half(first, steps)
        v_1, top_1 = forms.own_half(x.astype(np.uint32) - first, steps)
        assert np.array_equal(v + v_1 + 2 * steps * (top & top_1), x)
        if_positive, if_negative = forms.server_factors(nats * v_1, top_1)
        factors = forms.client_factor(nats * v, top), np.where(top, if_negative, if_positive)
        assert all(0 <= factor.min() and factor.max() < 2**30.5 for factor in factors)
        e = factors[0].round() * factors[1] / 2.0**forms.EXP_BITS
        assert np.abs(e - np.exp(-nats * x)).max() < 2e-4
        assert np.sqrt(((e - np.exp(-nats * x)) ** 2).mean()) < 5e-5


def test_another_spu_is_refused(monkeypatch):
    monkeypatch.setattr(shares.spu, "__version__", "0.9.9")
    with pytest.raises(RuntimeError, match="pip install spu==0.9.5"):
        shares.check_version()


def test_what_is_no_additive_share_is_refused():
    bit = shares.share_of(np.ones(3, bool), 64, np.bool_)
    with pytest.raises(RuntimeError, match="BShr"):
        shares.numbers(bit, 64, (3,), np.int32, rank=0)
    a = np.arange(6, dtype=np.uint64).reshape(2, 3)
    share = shares.share_of(a, 64, np.int32)
    assert np.array_equal(shares.numbers(share, 64, (2, 3), np.int32, rank=1), a)
    with pytest.raises(RuntimeError, match="48 bytes"):
        shares.numbers(share, 32, (2, 3), np.int32, rank=0)


# -------------------------------------------------------------------------------- two parties
def steps_of(op, qkv, f, bits=()):
    """The steps of block.attention() from Q, K and V on."""
    from private.block import Bits, divide, mix, scores
    bits = Bits(*bits)
    s = op("matmul", scores, qkv, n_head=H, bits=bits.scores)
    e = op("softmax", f.exponentials, s, bits=bits.scores)
    y = op("matmul", mix, e, qkv, n_head=H)
    return op("softmax", divide, y, e, reciprocal=f.reciprocal, most=T, bits=bits.divide)


def party(engine):
    """What either party runs: what came out for small logits, huge ones, activations."""
    from private.nonlinear import SECURE
    results, rank = [], engine.rank
    for rows, scale, bits, fraction in CASES:
        share = split(np.rint(qkv_of(rows, scale) * 2.0**fraction), seed=3)[rank]
        qkv = engine.hold(share, dtype=np.float32, fraction=fraction)
        found = engine.reveal(steps_of(engine.op, qkv, SECURE, bits))
        results.append(None if found is None else found.tolist())
    for name in ACTIVATED:
        x = engine.hold(split(np.rint(X * 2.0**18), seed=4)[rank], dtype=np.float32)
        found = engine.reveal(engine.op(name, SECURE.activation[name], x))
        results.append(None if found is None else found.tolist())
    costs = [(kind, cost.tolist()) for kind, _, cost in engine.costs]
    op = partial(engine.op, "other")
    for found in (shares.truncated(op, engine, split(GREAT, seed=5)[rank]), pairs(op, engine),
                  hidden_rows(op, engine), rows_in_pairs(op, engine)):
        found = engine.reveal(found)
        results.append(None if found is None else found.tolist())
    return results, costs


def pairs(op, engine):
    """The embeddings' lookup of PAIRS, all of them found."""
    from private.embed import BITS, halves, whole_numbers
    table = whole_numbers(engine, PAIRS / 2.0**BITS)
    return halves(op, engine, engine.hold(split(table, seed=6)[engine.rank]), d=PAIRS.shape[1])


def hidden_rows(op, engine):
    """The exponentials of ROWS, of which the client hides the last half."""
    from private.engine import CLIENT
    from private.nonlinear import CLIPPED, HIDDEN, SECURE
    hidden = np.where(np.arange(6) < 3, 0, HIDDEN)[None].repeat(2, axis=0)
    masks = [engine.put((2, 6), CLIENT, mask) for mask in (hidden, np.where(hidden, CLIPPED, 0))]
    s = engine.hold(split(np.rint(ROWS * 2.0**36), seed=7)[engine.rank])
    return op(SECURE.row_exponentials, s, *masks)


def rows_in_pairs(op, engine):
    """LEFT RIGHT + LEFT's first columns, the matrix the server's: sums of 2^30 units at most."""
    from private.block import add_linear
    from private.engine import SERVER
    from private.pairs import Paired
    own = shares.signed(RIGHT * 2.0**13)
    W = Paired(engine.own(RIGHT.shape, SERVER, own), (11, 13))
    x, y = (engine.hold(split(a * 2.0**18, seed=8)[engine.rank], dtype=np.float32)
            for a in (LEFT[:, :6], LEFT))
    return op(add_linear, x, y, W)


def qkv_of(rows, scale):
    return QKV[:rows] * np.repeat((scale, 1.0, 1.0), H * d_k)


@pytest.fixture
def seen(saw):
    """What the client and the server saw: (results, costs) of either."""
    return saw[__name__]


def test_the_softmax_of_two_parties(seen):
    """Shares drawn at random; the largest logits lie 10^5 nats apart. And of one token alone."""
    from private.block import now
    (found, _), (none, _) = seen
    assert none == [None] * len(found)
    for y, case in zip(found, CASES):
        exact = np.asarray(steps_of(now, qkv_of(*case[:2]).astype(np.float32), EXACT))
        assert np.sqrt(((y - exact) ** 2).mean()) < 3e-4
        assert np.abs(y - exact).max() < 3e-3


def test_activations_of_two_parties(seen):
    """Up to the limit that ranges.py knows, and on more rows than are taken at a time."""
    found = seen[0][0][len(CASES):-4]
    for y, (name, error) in zip(found, ACTIVATED.items(), strict=True):
        assert np.abs(y - np.asarray(EXACT.activation[name](X.astype(np.float32)))).max() < error


def test_a_truncation_by_18_bits_alone(seen):
    y = np.array(seen[0][0][-4])
    assert np.abs(y * 2.0**36 - GREAT).max() < 2.0**19 + 2.0**62 * 2.0**-23  # float32 has 24 bits


def test_numbers_two_in_one_come_apart(seen):
    """Up to the limit of a sum of two embeddings, of either sign, and an odd one left over."""
    y = np.array(seen[0][0][-3])
    assert np.abs(y * 2.0**16 - PAIRS).max() < 2.0**30 * 2.0**-23


def test_hidden_places_of_rows_at_their_limit(seen):
    e = np.array(seen[0][0][-2]) / 2.0**forms.E_BITS
    assert np.abs(e[..., :3] - np.exp(LOGIT_UNIT * np.array([0, -0.1, -0.3]))).max() < 1e-3
    assert np.abs(e[..., 3:]).max() < 1e-6


def test_rows_two_in_one_are_multiplied_by_themselves(seen):
    """Up to sums of either sign near their limit, in the first of a pair or in the second."""
    exact = LEFT @ RIGHT
    assert 2**29.9 < np.abs(exact).max() * 2**24 < 2**30
    assert np.abs(np.array(seen[0][0][-1]) - exact - LEFT[:, :6]).max() < 0.02


def test_the_parts_of_a_form_are_entered_under_its_kind(seen):
    for _, costs in seen:
        assert {kind for kind, _ in costs} == {"matmul", "softmax", "relu", "gelu"}
        assert all(cost[2] >= 0 for _, cost in costs)
