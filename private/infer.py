"""
One private forward pass of both parties: the client's prompt embedded, every block, the head, the
result revealed to the client. And the pass of further tokens.
"""
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby

import jax.numpy as jnp
import numpy as np

from model import GPTConfig
from private.ahead import Matrix, fixed
from private.block import (HEAD, NO_TOKEN, Bits, Row, block, head, last_block, layers_of, row_of,
                           weights_of)
from private.embed import TABLE, columns, embed, embed_next, silent, table_of
from private.engine import CLIENT, SERVER
from private.further import Place, Seats, make_room, next_block
from private.nonlinear import SECURE, secure_argmax
from private.pairs import Paired
from private.plain import plain_block, plain_head
from private.wraps import begin, settle

BEYOND = ("numbers of this prompt go further than the export allows for, and its answer may be "
          "wrong: python pi_export.py --pairs=False allows for more, but in LayerNorms")


@dataclass
class Cache:
    """What the engine keeps of a prompt and of the tokens behind it."""
    seats: Seats | None                         # who sits where in it, as the client alone knows
    padded: int                                 # places of the prompt
    room: int                                   # places for further rows, all that may come
    kept: int = 1                               # of how many rows there are means
    layers: dict = field(default_factory=dict)  # by layer, see block()

    def of(self, layer):
        return self.layers.setdefault(layer, {})


def infer(engine, public, weights, ids, told=silent, layers=0, reveal="logits", every_row=False,
          padded_to=0, cache=None, ahead=None):
    """
    One private forward pass. public: public.json's dict; weights: server.npz's arrays on the
    server, embedding.npz's on the client if the embedding is public, else None; ids: the prompt's
    tokens on the client, else None; reveal: "logits" or "token"; layers: how many equal layers to
    run of each kind, uniform and softmax, 0 for all. The last layer, which makes one row, comes
    besides (plain's is equal). With fewer layers than all, only two pieces of the embedding are
    looked up, and the result means nothing. padded_to: how many tokens the prompt is padded to,
    0 for the context; cache: a Cache of as many, from which infer_next() then goes on; ahead: of
    make_ahead() for a prompt, or None.

    Returns (result, costs). result, None but on the client: the logits (V,) of the last position,
    or its most likely token, or with every_row the logits (T, V). costs: Engine.costs, of this
    pass. told(stage, costs) is called after each stage. ValueError on the client if a number left
    its range, see wraps.py.
    """
    c = GPTConfig(**public["config"])
    T, L = padded_to or c.block_size, c.n_layer
    units = units_of(public)
    costs = engine.costs = []
    whole = not layers or layers >= L
    client = engine.rank == CLIENT
    put = partial(put_weights, engine, public["shapes"], weights)
    bits = bits_of(engine, public)
    engine.wraps = engine.by_form(begin, "watch", times=1) if engine.forms else None
    at_hand = partial(put, ahead=ahead, bits=bits)

    padded = np.pad(ids, (0, T - len(ids)), constant_values=NO_TOKEN) if client else None
    x = embed(engine, public["embedding"], c, weights, T, padded, told, whole)  # (T, d)

    row = row_of(len(ids) - 1, T) if client else Row(None, None, None)
    if not every_row:  # which row is the last is the client's secret
        row = Row(*(engine.put((1, T), CLIENT, mask) for mask in row))

    one_row = not every_row and not engine.plain  # the last layer makes what a next token needs
    inner = [i for i in layers_of(public["shapes"]) if i < L - 1 or not one_row]
    for i, times in layers_to_run(public["shapes"], inner, layers, bits):
        op = partial(engine.op, times=times)
        if engine.plain:
            x = plain_block(op, x, put(f"blocks.{i}."), c)                      # (T, d)
        else:
            own = Bits(*(bits.get(f"blocks.{i}.{name}") for name in Bits._fields))
            x = block(op, x, at_hand(f"blocks.{i}."), c, SECURE, units[2 * i:2 * i + 2],
                      cache and cache.of(i), own)                               # (T, d)
        told(f"layer {i + 1}/{L}", costs)
    if one_row:
        x = last_block(engine.op, x, row, put(f"blocks.{L - 1}."), c, SECURE,
                       units[2 * L - 2:2 * L], cache and cache.of(L - 1))       # (1, d)
        told(f"layer {L}/{L}", costs)
    elif not every_row:
        x = engine.op("head", jnp.matmul, row.last, x)                            # (1, d)

    if engine.plain:
        y = plain_head(engine.op, x, put(*HEAD), c)                             # (rows, V)
    else:
        y = head(engine.op, x, at_hand(*HEAD), c, SECURE, units[-1])            # (rows, V)
    if cache:
        make_room(engine.op, row.last, cache.layers, cache.room)
    if reveal == "token":
        y = engine.op("argmax", secure_argmax, y)                               # (rows,)
    beyond = None
    if engine.wraps and (engine.wraps.left or engine.wraps.compared):
        beyond = engine.reveal(engine.by_form(settle, "watch", times=1))
    engine.wraps = None
    result = engine.reveal(y)
    told("done", costs)
    if client and whole and beyond:
        raise ValueError(BEYOND)
    if client and not every_row:
        result = result[0]
    return result, costs


def infer_next(engine, public, weights, k, tokens, cache, layers=0, reveal="logits", ahead=None):
    """
    The pass of k tokens more, (k,), the client's, from where infer() or infer_next() left the
    cache. ahead: of make_ahead(), with k rows left, or None. All else as of infer(); the result is
    of every row.
    """
    c = GPTConfig(**public["config"])
    L = c.n_layer
    units = units_of(public)
    costs = engine.costs = []
    put = partial(put_weights, engine, public["shapes"], weights, ahead=ahead)
    whole = not layers or layers >= L
    table = ahead and ahead.get(TABLE)

    positions = cache.seats.positions(k) if engine.rank == CLIENT else None
    x = embed_next(engine, public["embedding"], c, weights, k, tokens, positions, whole, table)
    place = put_place(engine, cache, k, c.block_size)
    inner = [i for i in layers_of(public["shapes"]) if i < L - 1]
    bits = bits_of(engine, public)
    for i, times in [*layers_to_run(public["shapes"], inner, layers, bits), (L - 1, 1)]:
        op = partial(engine.op, times=times)
        x = next_block(op, x, place, cache.of(i), put(f"blocks.{i}."), c, SECURE,
                       units[2 * i:2 * i + 2])                                  # (k, d)
    y = head(engine.op, x, put(*HEAD), c, SECURE, units[-1])                    # (k, V)
    if reveal == "token":
        y = engine.op("argmax", secure_argmax, y)                               # (k,)
    return engine.reveal(y), costs


def put_place(engine, cache, k, T):
    """The Place of the next k tokens, as secrets of the client's."""
    mine = cache.seats.seat(k) if engine.rank == CLIENT else Place(*[None] * len(Place._fields))
    n = cache.room + cache.padded
    shapes = Place((k, n), (k, n), (T, n), (k, T), (k, cache.kept + k))
    cache.kept = k
    return Place(*(engine.put(shape, CLIENT, a) for shape, a in zip(shapes, mine)))


def units_of(public):
    """Of the 2 L + 1 LayerNorms; a model exported as plain.py's may have none."""
    return public.get("layernorm_units") or [1.0] * (2 * public["config"]["n_layer"] + 1)


def bits_of(engine, public):
    """{name: (bits, bits)} of what a prompt's pass makes in pairs; a plain export has nothing."""
    found = public.get("bits", {}) if engine.forms else {}
    return {name: tuple(pair) for name, pair in found.items()}


def layers_to_run(shapes, layers, most, bits):
    """
    (layer, times) of the layers to run: of equal neighbours at most `most`, 0 for all, the last of
    which stands for those that aren't run. bits: of bits_of(), so that every pass runs the same.
    """
    for equal in equal_layers(shapes, layers, bits):
        run = equal[:most] if most else equal
        for i in run[:-1]:
            yield i, 1
        yield run[-1], 1 + len(equal) - len(run)


def equal_layers(shapes, layers, bits=()):
    """
    The layers in groups of neighbours whose arrays have the same shapes and whose same products are
    made in pairs, and so one price.
    """
    def arrays_of(i):
        mine = f"blocks.{i}."
        arrays = {name.removeprefix(mine): s for name, s in shapes.items() if name.startswith(mine)}
        return arrays, {name.removeprefix(mine) for name in bits if name.startswith(mine)}

    return [list(group) for _, group in groupby(layers, arrays_of)]


def put_weights(engine, shapes, weights, *prefixes, ahead=None, bits=()):
    """
    The server's arrays whose names start with one of the prefixes, as weights_of() has them; those
    that are in `ahead` as they are there, and those that have `bits` as a Paired.
    """
    server = engine.rank == SERVER
    secrets = {}
    for name, shape in shapes.items():
        if not name.startswith(prefixes):
            continue
        if ahead and name in ahead:
            secrets[name] = ahead[name]
        elif name in bits:
            numbers = fixed(weights[name], bits[name][1]) if server else None
            secrets[name] = Paired(engine.own(shape, SERVER, numbers), bits[name])
        else:
            secrets[name] = engine.put(shape, SERVER, weights[name] if server else None)
    return weights_of(secrets, *prefixes)


def make_ahead(engine, public, weights, ahead, prompt=0, further=0, told=silent, layers=0):
    """
    Have rows at hand in `ahead`, {name: Matrix}, for a pass over a prompt that is padded to so many
    tokens, all but its embedding and its last layer, and for so many further tokens, whatever they
    will be. Rows that are there already are not made again. weights, told, layers: as of infer().
    Returns the costs.
    """
    c = GPTConfig(**public["config"])
    shapes, server = public["shapes"], engine.rank == SERVER
    costs = engine.costs = []
    inner = [i for i in layers_of(shapes) if i < c.n_layer - 1]
    to_run = layers_to_run(shapes, inner, layers, bits_of(engine, public))
    groups = [(f"blocks.{i}.", times, prompt + further) for i, times in to_run]
    groups += [(f"blocks.{c.n_layer - 1}.", 1, further), (HEAD, 1, bool(prompt) + further)]

    def have(name, shape, rows, times, numbers):
        if name not in ahead:
            ahead[name] = Matrix(shape, numbers() if server else None)
        matrix = ahead[name]
        if rows > matrix.left():
            op = partial(engine.op, "ahead", times=times)
            matrix.make(op, engine, rows - matrix.left())
            told(f"ahead: {name}", costs)

    for prefix, times, rows in groups:
        for name, shape in shapes.items():
            if name.startswith(prefix) and len(shape) == 2:
                have(name, shape, rows, times, lambda: fixed(weights[name]))
    if public["embedding"] == "private":
        shape = (c.vocab_size + c.block_size, columns(engine, c.n_embd))
        have(TABLE, shape, further, 1, lambda: table_of(engine, weights))
    return costs


def set_up(engine):
    """Have the engine make its keys, which it does at the first operation of each kind."""
    ones = np.ones((2, 2))
    mine = engine.put(ones.shape, CLIENT, ones)
    theirs = engine.put(ones.shape, SERVER, ones)
    engine.op("set-up", one_of_each, mine, theirs)
    if 32 in engine.rings:  # where it compares
        engine.op("set-up", jnp.maximum, *(engine.hold(ones, bits=32) for _ in range(2)))


def one_of_each(a, b):
    """A product by entries, a matrix product, a comparison of the client's and the server's."""
    return jnp.maximum(((a + b) * (a + b)) @ (a + b), a)
