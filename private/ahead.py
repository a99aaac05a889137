"""
Products by the server's matrices, made before anybody knows of what.

x W, of a secret x and a matrix W of the server's, is most of a pass's time, and of a single row
mostly ciphertexts that it hardly fills. But the parties can multiply beforehand: rows r that the
client draws at random, whole numbers mod 2^64, many in one product, of which each party keeps its
share of r W. When x has come, the client sends its own share of x less r:

    x W = (x_0 - r + x_1) W + r W,   x = x_0 + x_1

of which the server computes the first part in the clear. So a row takes 8 bytes a number over the
link, no encryption, and the truncation that any product ends in. To the server x_0 - r is as random
as r is, which serves this once; the client gets nothing.

Rows that are made ahead cost the bytes that a product of as many costs. A token at a time they are
fewer, as many rows fill what one leaves empty; and a prompt can be answered sooner.
"""
import os

import jax.numpy as jnp
import numpy as np

from private.block import add_linear, linear, logits, scale_add_linear
from private.nonlinear import CIPHERTEXT
from private.shares import CLIENT, FRACTION, SERVER, of_fraction, signed, truncated


class Matrix:
    """
    A matrix (n, m) of the server's, which alone gives its numbers, whole ones mod 2^64; and what
    has been made ahead of products by it. It stands for a secret among the values of an op().
    """

    def __init__(self, shape, numbers=None):
        n, m = self.shape = tuple(shape)
        self.numbers = None if numbers is None else np.asfortranarray(numbers)  # faster for a row
        self.masks = np.zeros((0, n), np.uint64)     # r, the client's; on the server 0
        self.products = np.zeros((0, m), np.uint64)  # this party's share of r W

    def left(self):
        """How many rows are made and not taken."""
        return len(self.products)

    def make(self, op, engine, rows):
        """Make so many rows more. op(function, *values) enters the cost."""
        n, m = self.shape
        masks = np.zeros((rows, n), np.uint64)
        if engine.rank == CLIENT:
            masks = np.frombuffer(os.urandom(masks.nbytes), np.uint64).reshape(rows, n)
        products = np.zeros((rows, m), np.uint64)
        for i in range(0, n, CIPHERTEXT):  # a piece at a time: the engine encodes it in memory
            r = engine.hold(masks[:, i:i + CIPHERTEXT])
            for j in range(0, m, CIPHERTEXT):
                piece = np.s_[i:min(i + CIPHERTEXT, n), j:min(j + CIPHERTEXT, m)]
                shape = [one.stop - one.start for one in piece]
                own = self.numbers[piece] if engine.rank == SERVER else None
                found = op(linear, r, engine.own(shape, SERVER, own))
                products[:, j:j + CIPHERTEXT] += engine.numbers(found)
        self.masks = np.concatenate((self.masks, masks))
        self.products = np.concatenate((self.products, products))

    def take(self, rows):
        """(r, share of r W) of so many rows, gone then. RuntimeError if fewer are left."""
        if rows > self.left():
            raise RuntimeError(f"a product of {rows} rows, and {self.left()} were made ahead")
        taken = self.masks[:rows], self.products[:rows]
        self.masks, self.products = self.masks[rows:], self.products[rows:]
        return taken


def fixed(weights, bits=FRACTION):
    """Numbers in units of 2^-bits, the engine's if not told, mod 2^64."""
    return signed(np.rint(np.asarray(weights, np.float64) * 2.0**bits))


def masked_product(engine, x, matrix):
    """A party's share of x W; x (rows, n) is its share of x."""
    mask, share = matrix.take(len(x))
    theirs = engine.to_server(x - mask)
    return share + (x + theirs) @ matrix.numbers if engine.rank == SERVER else share


# ---------------------------------------------------------------------------------------- the forms
def linear_ahead(op, engine, x, W, b=None):
    """linear(), and logits()."""
    x = engine.numbers(of_fraction(op, engine, x))
    y = truncated(op, engine, masked_product(engine, x, W))
    return y if b is None else op(jnp.add, y, b)


def scale_add(beta, x, y):
    return beta * x + y


def around(linear_form):
    """The forms of linear() and of those functions of block.py that add something to it."""
    def add_linear_form(op, engine, x, y, W, b=None):
        return op(jnp.add, x, linear_form(op, engine, y, W, b))

    def scale_add_linear_form(op, engine, x, y, beta, W, b=None):
        return op(scale_add, beta, x, linear_form(op, engine, y, W, b))

    return {linear: linear_form, add_linear: add_linear_form,
            scale_add_linear: scale_add_linear_form}


Matrix.forms = around(linear_ahead) | {logits: linear_ahead}  # where one is among their values
