"""
Did a number of a product in pairs leave its range? One bit of a whole pass, for the client.

Such a number is read mod 2^32, see shares.py: beyond 2^31 it wraps, and is wrong by k 2^32 without
a sign of it. To compare each would cost what pairs save. But of a product X W, and of any factors
r of its rows and s of its columns,

    sum over i, j of r_i s_j (X W)_ij  =  (r X) (W s)

The right side is made of sums of each party's own shares, and one product for each column of X. The
left side is made of the numbers as they were read, so that it is off by 2^32 times the sum of
r_i s_j k_ij, and by roundings, which are far less. The differences of all products of a pass are
added up, and one comparison tells.

The factors are odd numbers of either sign, drawn anew for each pass, and no secret. So a number
that wraps alone is always seen, up to 2^43. Several that wrap once may cancel each other, with a
likelihood of 1 in 16 at most: whatever the other factors are, one of 32 of a row's does it at most,
and one of 32 of a column's.

The variances of LayerNorms' rows are compared as well, mod 2^30.

Price: 8 MB of the 900 of GPT-2 small, most of it for the logits of attention: all else is read as
64 bits anyway.
"""
import math
import os

import numpy as np

from private.nonlinear import LARGEST
from private.shares import CLIENT, FRACTION, HALF, SPARE, truncated, without_low_bits

MOST = 31  # of the factors
# All sums are taken times 2^SPARE, so that what b lacks above 2^44 vanishes mod 2^64.
LIMIT = 2 ** (SPARE - 2)  # half of the least wrap, 2^31, as it is without HALF low bits
VARIANCE_BITS = round(math.log2(LARGEST * 2.0**FRACTION / LIMIT))  # without which LARGEST is LIMIT


class Wraps:
    """What is known of a pass so far. seed: (2,) integers that both parties have."""

    def __init__(self, seed):
        self.random = np.random.Philox(key=seed)
        self.left, self.right = [], []  # this party's shares of all r X and of all W s
        self.read = np.zeros(1, np.uint64)  # and of the sums as they were read, times 2^SPARE
        self.compared = []  # and, mod 2^32, of other numbers that must stay below LIMIT

    def factors(self, *shape):
        drawn = self.random.random_raw(int(np.prod(shape))).reshape(shape) % np.uint64(MOST + 1)
        return drawn * np.uint64(2) - np.uint64(MOST)

    def note(self, X, W, read, bits):
        """
        A product of whole numbers: this party's shares X (..., R, n), W (..., n, C), and read
        (..., R, C) of what was read, bits bits less than X W.
        """
        r, s = self.factors(*X.shape[:-1]), self.factors(*W.shape[:-2], W.shape[-1])
        self.left.append((r[..., None, :] @ X).ravel())
        self.right.append((W @ s[..., None]).ravel())
        total = (r * (read @ s[..., None])[..., 0]).sum()
        self.read += total << np.uint64(SPARE + bits)

    def note_logits(self, op, engine, q, k, pairs):
        """
        The same of logits, of q (H, T, d_k) and k (H, n, d_k), two keys in one: pairs (H, T, n/2).
        As each party just takes half of its share for either, which tells nothing, these are
        truncated here as well, and so read mod 2^31: below 2^29 as they are, beyond 1.5 times 2^30
        never so. Softmax misreads what is beyond 2^31, or a row of which two numbers are so far
        apart: one of these is beyond 2^30, and misread here by half of all shares at least. Of the
        first rows all of the second half's keys are future.
        """
        T, half = pairs.shape[1:]
        both = np.concatenate((pairs << np.uint64(HALF), pairs[:, half:]), 1) << np.uint64(1)
        read = engine.numbers(truncated(op, engine, both))                        # (H, .., n/2)
        first, second = k[:, :half].swapaxes(1, 2), k[:, half:].swapaxes(1, 2)    # (H, d_k, n/2)
        bits = FRACTION - HALF - 1  # negative: read has more than the product
        self.note(q, first, read[:, :T], bits)
        self.note(q[:, half:], second, read[:, T:], bits)

    def note_variances(self, share):
        """This party's share of what enters a LayerNorm's reciprocal root."""
        self.compared.append(without_low_bits(share, VARIANCE_BITS))


def row_by_column(a, b):
    return a @ b


def any_beyond(x):
    return ((x >= LIMIT) | (x < -LIMIT)).any()


def begin(op, engine):
    """The Wraps of a pass, from a seed that the client sends. The server's own is not used."""
    seed = np.frombuffer(os.urandom(16), np.uint64)
    heard = engine.to_server(seed)
    return Wraps(seed if engine.rank == CLIENT else heard)


def difference(op, engine):
    """A party's share (1, 1) of what was read in a pass more than the products are, in all."""
    seen = engine.wraps
    left, right = (np.concatenate(parts) for parts in (seen.left, seen.right))
    product = op(row_by_column, engine.hold(left[None]), engine.hold(right[:, None]))
    return seen.read - (engine.numbers(product) << np.uint64(SPARE))


def settle(op, engine):
    """The secret bit, (): whether a number of the pass left its range."""
    numbers = [*engine.wraps.compared]
    if engine.wraps.left:
        numbers.append(without_low_bits(difference(op, engine), HALF)[0])
    return op(any_beyond, engine.hold(np.concatenate(numbers), bits=32))
