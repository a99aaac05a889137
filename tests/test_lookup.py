"""lookup.py: exact, the same shapes whatever the prompt, an overflow less likely than 2^-40."""
import numpy as np
import pytest

from private import lookup
from private.lookup import QUERIES, buckets, overflow, queries, sides

V, T, d = 1000, 32, 4
RNG = np.random.default_rng(0)
PROMPTS = {
    "distinct": RNG.choice(V, T, replace=False),
    "random": RNG.integers(0, V, T),
    "one token": np.full(T, 7),
    "short": np.r_[RNG.integers(0, V, 5), np.full(T - 5, -1)],
    "empty": np.full(T, -1),
    "first and last": np.r_[V - 1, np.zeros(T - 1, int)],
}


@pytest.mark.parametrize("name", PROMPTS)
def test_what_is_looked_up_is_what_was_asked_for(name):
    ids = PROMPTS[name]
    wte = np.vstack((RNG.integers(-99, 99, (V, d)), np.zeros((1, d), int)))  # row V: no token
    dealt = buckets(V, T, name.encode())
    hot, chosen = queries(ids, dealt)
    found = chosen @ (hot @ wte[dealt]).reshape(-1, d)
    assert np.array_equal(found, np.where(ids[:, None] >= 0, wte[ids], 0))


@pytest.mark.parametrize("name", PROMPTS)
def test_the_server_sees_the_same_shapes_whatever_the_prompt(name):
    dealt = buckets(V, T, name.encode())
    hot, chosen = queries(PROMPTS[name], dealt)
    assert hot.shape == (len(dealt), QUERIES, dealt.shape[1])
    assert chosen.shape == (T, len(dealt) * QUERIES)
    assert hot.sum(-1).max() <= 1
    assert chosen.sum(-1).max() <= 1


def test_every_token_lies_once_in_either_group():
    vocabulary = 50257
    dealt = buckets(vocabulary, 128, b"5")
    for group in np.split(dealt, 2):
        assert np.array_equal(np.sort(group.ravel())[:vocabulary], np.arange(vocabulary))
        assert (group == vocabulary).sum() == group.size - vocabulary


def test_both_parties_deal_alike_by_the_seed():
    assert np.array_equal(buckets(V, T, b"5"), buckets(V, T, b"5"))
    assert not np.array_equal(buckets(V, T, b"5"), buckets(V, T, b"6"))


@pytest.mark.parametrize("length", [1, 16, 128, 256, 512, 768, 1024])
@pytest.mark.parametrize("vocabulary", [16384, 50257])
def test_the_overflow_is_negligible_with_as_few_buckets_as_can_be(length, vocabulary):
    side = sides(length, vocabulary)
    assert overflow(length, vocabulary, side) < 2.0**-40
    assert 2 * side * QUERIES >= length
    assert side == 1 or overflow(length, vocabulary, side - 1) >= 2.0**-40


def test_the_bound_is_a_bound(monkeypatch):
    """Where overflows can be counted: 12 tokens, buckets of one each."""
    monkeypatch.setattr(lookup, "QUERIES", 1)
    monkeypatch.setattr(lookup, "sides", lambda T, V: 16)
    failed, trials = 0, 3000
    for seed in range(trials):
        try:
            queries(RNG.choice(400, 12, replace=False), buckets(400, 12, b"%d" % seed))
        except RuntimeError as e:
            assert "overflowed" in str(e)
            failed += 1
    assert 0 < failed / trials <= overflow(12, 400, 16) < 1
