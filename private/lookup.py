"""
A private embedding by buckets: the client looks up its tokens in a table of the server's, which
learns nothing of them.

A one-hot matrix (T, V) times the table is the obvious way, and costs T V products for every column.
But T tokens need T rows: deal the vocabulary into buckets by public dice, ask every bucket for as
few rows as every other, whatever the prompt, and put what was needed in order by a second, small
product. Each token lies in two buckets, one of either group, so that the worst bucket is hardly
fuller than the mean one (two choices, as in cuckoo hashing).
"""
import math

import numpy as np

from private.nonlinear import CIPHERTEXT

ROWS_AT_ONCE = 1024  # rows of a bucket that SPU multiplies at a time
QUERIES = CIPHERTEXT // ROWS_AT_ONCE  # tokens a bucket answers for: so many fill a ciphertext
NEGLIGIBLE = 2.0**-40  # a probability


def overflow(T, V, side):
    """
    Bound on the probability that T of V tokens don't fit into two groups of `side` buckets. By
    Hall's theorem they do, unless more than QUERIES (i + j) of them have both their buckets among
    some i of one group and j of the other. A union bound over those, each by Chernoff's bound.
    """
    total = 0.0
    share = math.ceil(V / side) / V  # of the vocabulary in a bucket
    for i in range(1, side + 1):
        for j in range(1, side + 1):
            x = (QUERIES * (i + j) + 1) / T
            p = min(1, i * share) * min(1, j * share)
            if x <= p:
                return 1.0
            if x <= 1:
                sets = math.comb(side, i) * math.comb(side, j)
                total += sets * math.exp(-T * divergence(x, p))
    return total


def divergence(x, p):
    """Kullback and Leibler's, in nats, of a coin of probability x from one of p."""
    tails = (1 - x) * math.log((1 - x) / (1 - p)) if x < 1 else 0.0
    return x * math.log(x / p) + tails


def sides(T, V):
    """The fewest buckets to a group that make an overflow negligible."""
    return next(side for side in range(1, T + 1) if overflow(T, V, side) < NEGLIGIBLE)


def buckets(V, T, seed):
    """
    Two groups of buckets, the vocabulary dealt out to each in a random order that both parties
    know: (2 side, rows) token ids, the last bucket of a group filled up with V. seed: bytes; the
    name of the run, which the server draws when the parties meet, before it could know a prompt.
    """
    side = sides(T, V)
    rows = math.ceil(V / side)
    rng = np.random.RandomState(np.frombuffer(seed, np.uint8))  # the same in every version of numpy
    order = np.full((2, side * rows), V)
    order[0, :V] = rng.permutation(V)
    order[1, :V] = rng.permutation(V)
    return order.reshape(2 * side, rows)


def queries(ids, dealt):
    """
    The client's part of a bucketed lookup: hot (buckets, QUERIES, rows), one-hot rows of what it
    asks of each bucket, and chosen (T, buckets * QUERIES), which puts the answers into the order of
    ids (T,), so that
        wte[ids] = chosen @ (hot @ wte[dealt]).reshape(-1, d).
    Their shapes don't depend on ids, and the server sees them encrypted: it learns nothing. The
    lookup is exact, in a fraction of the products of a one-hot matrix (T, V): see "embedding" in
    docs/ledger.md. ids below 0 stand for no token. RuntimeError if a bucket overflows,
    which has a NEGLIGIBLE probability: see overflow().
    """
    ids = np.asarray(ids)
    T = len(ids)
    B, rows = dealt.shape
    place = np.argsort(dealt.reshape(2, -1), axis=1, kind="stable")  # of a token in either group
    hot = np.zeros((B, QUERIES, rows), np.int32)
    chosen = np.zeros((T, B * QUERIES), np.int32)
    for b, tokens in enumerate(seats(ids, place, B, rows)):
        group = 0 if b < B // 2 else 1
        for i, token in enumerate(tokens):
            hot[b, i, place[group, token] % rows] = 1
            chosen[ids == token, b * QUERIES + i] = 1
    return hot, chosen


def seats(ids, place, B, rows):
    """For each of B buckets what it is asked for: T tokens, each in one of its two buckets."""
    held = [[] for _ in range(B)]

    def seat(token, tried):
        for b in (place[0, token] // rows, place[1, token] // rows + B // 2):
            if b in tried:
                continue
            tried.add(b)
            if len(held[b]) < QUERIES:
                held[b].append(token)
                return True
            for i, other in enumerate(held[b]):  # it may do as well in its other bucket
                if seat(other, tried):
                    held[b][i] = token
                    return True
        return False

    T = len(ids)
    prompt = [int(token) for token in ids if token >= 0]
    filled_up = dict.fromkeys([*prompt, *range(T)])  # so that the time it takes says little
    for token in list(filled_up)[:T]:
        if not seat(token, set()):
            raise RuntimeError("a bucket of the embedding overflowed, which happens in one of 2^40 "
                               "runs: run again")
    return held
