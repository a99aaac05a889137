"""
Products by the server's matrices, two rows of a prompt in one.

A row x_i and the one T / 2 places behind it, whole numbers of few bits, are one row of the ring's
numbers, x_i + 2^32 x_j. So half as many rows are multiplied, and their products come apart again,
see shares.py. For that the products must stay below 2^30, fraction bits included: ranges.py shares
these out between x and W, so that the products it has seen may grow fourfold. Rounding to so few
bits is off by 2e-3 of the products' size at most, or the product isn't made in pairs.

Price: 15 bytes less for each number of a product, and a third less time.
"""
import numpy as np

from private.ahead import around
from private.block import linear
from private.shares import FRACTION, apart, kept, paired, without


class Paired:
    """
    A matrix of the server's, as a secret in whole numbers, and the fraction bits of what it
    multiplies and of itself, (x_bits, W_bits). It stands for a secret among the values of an op().
    """

    def __init__(self, secret, bits):
        self.secret = secret
        self.shape = secret.shape
        self.bits = bits


def linear_in_pairs(op, engine, x, W, b=None):
    """linear(), of as many fraction bits as kept() says: what takes fewer drops the rest."""
    share, rows, half = engine.numbers(x), x.shape[0], -(-x.shape[0] // 2)
    share = np.pad(share, ((0, 2 * half - rows), (0, 0)))
    halves = without(op, engine, share[:half], share[half:], x.fraction - W.bits[0])
    y = engine.numbers(op(linear, engine.hold(paired(*halves)), W.secret))
    fraction = kept(W.bits)
    y = apart(op, engine, y, sum(W.bits) - fraction, axis=0)
    if engine.wraps:
        engine.wraps.note(np.concatenate(halves), engine.numbers(W.secret), y,
                          sum(W.bits) - fraction)
    y = y[:rows]
    if b is not None:
        y = y + (engine.numbers(b) << np.uint64(fraction - FRACTION))
    return engine.hold(y, dtype=np.float32, fraction=fraction)


Paired.forms = around(linear_in_pairs)  # where one is among their values
