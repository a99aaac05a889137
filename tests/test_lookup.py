"""lookup.py: exact, the same shapes whatever the prompt, and an overflow less likely than 2^-40."""
import numpy as np
import pytest

from private import lookup
from private.lookup import QUERIES, buckets, overflow, queries, sides


def test_what_is_looked_up_is_what_was_asked_for():
    V, T, d = 1000, 32, 4
    rng = np.random.default_rng(0)
    wte = np.vstack((rng.integers(-99, 99, (V, d)), np.zeros((1, d), int)))  # row V: no token
    for seed, ids in enumerate([rng.choice(V, T, replace=False), rng.integers(0, V, T), np.full(T, 7), np.r_[rng.integers(0, V, 5), np.full(T - 5, -1)],
                                np.full(T, -1), np.r_[V - 1, np.zeros(T - 1, int)]]):
        dealt = buckets(V, T, b"%d" % seed)
        hot, chosen = queries(ids, dealt)
        assert hot.shape == (len(dealt), QUERIES, dealt.shape[1]) and chosen.shape == (T, len(dealt) * QUERIES)  # what the server sees
        assert np.array_equal(chosen @ (hot @ wte[dealt]).reshape(-1, d), np.where(ids[:, None] >= 0, wte[ids], 0))
        assert hot.sum(-1).max() <= 1 and chosen.sum(-1).max() <= 1


def test_every_token_lies_once_in_either_group():
    V, T = 50257, 128
    dealt = buckets(V, T, b"5")
    for group in np.split(dealt, 2):
        assert np.array_equal(np.sort(group.ravel())[:V], np.arange(V)) and (group == V).sum() == group.size - V
    assert np.array_equal(dealt, buckets(V, T, b"5")) and not np.array_equal(dealt, buckets(V, T, b"6"))  # both parties deal alike, by the seed


@pytest.mark.parametrize("T", [1, 16, 128, 256, 512, 768, 1024])
@pytest.mark.parametrize("V", [16384, 50257])
def test_the_overflow_is_negligible(T, V):
    side = sides(T, V)
    assert overflow(T, V, side) < 2.0**-40 and 2 * side * QUERIES >= T and (side == 1 or overflow(T, V, side - 1) >= 2.0**-40)


def test_the_bound_is_a_bound(monkeypatch):
    """Where overflows can be counted: 12 tokens, buckets of one each."""
    monkeypatch.setattr(lookup, "QUERIES", 1)
    monkeypatch.setattr(lookup, "sides", lambda T, V: 16)
    rng, failed, trials = np.random.default_rng(0), 0, 3000
    for seed in range(trials):
        try:
            queries(rng.choice(400, 12, replace=False), buckets(400, 12, b"%d" % seed))
        except RuntimeError as e:
            assert "overflowed" in str(e)
            failed += 1
    assert 0 < failed / trials <= overflow(12, 400, 16) < 1
