"""
A private embedding by buckets: the client looks up its tokens in a table of the server's, which learns nothing of them.

A one-hot matrix (T, V) times the table is the obvious way, and costs T V products for every column. But T tokens need T rows:
deal the vocabulary into buckets by public dice, ask every bucket for the same few rows, whatever the prompt, and put what was
needed in order by a second, small product. Each token lies in two buckets, one of either group, so that the worst bucket is
hardly fuller than the mean one (two choices, as in cuckoo hashing).
"""
import math

import numpy as np

QUERIES = 8  # tokens a bucket answers for: SPU takes 1024 rows of a bucket at a time, and 8 x 1024 fill a ciphertext of 8192 numbers


def overflow(T, V, side):
    """
    Bound on the probability that T of V tokens don't fit into two groups of `side` buckets: by Hall's theorem they do unless more than
    QUERIES (i + j) of them have both their buckets among some i of one group and j of the other. A union bound over those, each by Chernoff's.
    """
    total, share = 0.0, -(-V // side) / V  # of the vocabulary in a bucket
    for i in range(1, side + 1):
        for j in range(1, side + 1):
            x, p = (QUERIES * (i + j) + 1) / T, min(1, i * share) * min(1, j * share)
            if x <= p:
                return 1.0
            if x <= 1:
                divergence = x * math.log(x / p) + ((1 - x) * math.log((1 - x) / (1 - p)) if x < 1 else 0)
                total += math.comb(side, i) * math.comb(side, j) * math.exp(-T * divergence)
    return total


def sides(T, V):
    """The fewest buckets to a group with an overflow below 2^-40."""
    return next(side for side in range(1, T + 1) if overflow(T, V, side) < 2.0**-40)


def buckets(V, T, seed):
    """
    Two groups of buckets, the vocabulary dealt out to each in a random order that both parties know: (2 side, rows) token ids, the last
    bucket of a group filled up with V. seed: bytes; the name of the run, which the server draws when the parties meet and knows no prompt.
    """
    side, rng = sides(T, V), np.random.RandomState(np.frombuffer(seed, np.uint8))  # its numbers are the same in every version of numpy
    order = np.full((2, side * -(-V // side)), V)
    order[:, :V] = rng.permutation(V), rng.permutation(V)
    return order.reshape(2 * side, -1)


def queries(ids, dealt):
    """
    The client's part of a bucketed lookup: hot (buckets, QUERIES, rows), one-hot rows of what it asks of each bucket, and chosen
    (T, buckets * QUERIES), which puts the answers into the order of ids (T,), so that
        wte[ids] = chosen @ (hot @ wte[dealt]).reshape(-1, d).
    Their shapes don't depend on ids, and the server sees them encrypted: it learns nothing. An exact lookup in an eighth of the products
    of a one-hot matrix (T, V), 32 MB for GPT-2 small in place of 220. ids below 0 stand for no token. RuntimeError if a bucket
    overflows, which has a probability below 2^-40: overflow().
    """
    hot = np.zeros((len(dealt), QUERIES, dealt.shape[1]), np.int32)
    chosen = np.zeros((len(ids), len(dealt) * QUERIES), np.int32)
    place = np.argsort(dealt.reshape(2, -1), axis=1, kind="stable")  # of a token in either group
    held = [[] for _ in dealt]

    def seat(token, tried):
        for b in place[:, token] // dealt.shape[1] + (0, len(dealt) // 2):
            if b not in tried:
                tried.add(b)
                if len(held[b]) < QUERIES:
                    return not held[b].append(token)
                for i, other in enumerate(held[b]):  # it may do as well in its other bucket
                    if seat(other, tried):
                        held[b][i] = token
                        return True
        return False

    asked = dict.fromkeys([*(int(t) for t in ids if t >= 0), *range(len(ids))])  # filled up, so that the time it takes says little
    for token in list(asked)[:len(ids)]:
        if not seat(token, set()):
            raise RuntimeError("a bucket of the embedding overflowed, which happens in one of 2^40 runs: run again")
    for b, tokens in enumerate(held):
        for i, token in enumerate(tokens):
            hot[b, i, place[b * 2 // len(dealt), token] % dealt.shape[1]] = 1
            chosen[np.asarray(ids) == token, b * QUERIES + i] = 1
    return hot, chosen
