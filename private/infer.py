"""
One private forward pass of both parties: the client's prompt embedded, every block, the head, the
result revealed to the client.
"""
from functools import partial
from itertools import groupby

import jax.numpy as jnp
import numpy as np

from model import GPTConfig
from private.block import HEAD, block, head, last_block, layers_of, row_masks, weights_of
from private.engine import CLIENT, SERVER
from private.lookup import QUERIES, buckets, queries
from private.nonlinear import SECURE, secure_argmax
from private.plain import plain_block, plain_head

ROWS = 2048  # of the embedding that a one-hot product takes: the engine encodes it whole in memory
GROUP = 8    # buckets that a product takes
# The embedding is looked up by buckets from this size and context on. Buckets take 2 QUERIES V
# products for every column and one-hot rows T V, cheap where the vocabulary is a few pieces.
BUCKETED_V = 8 * ROWS
BUCKETED_T = 4 * QUERIES
SCALE = 2**16  # the embedding is looked up in integers, exact to 1 / SCALE
NO_TOKEN = -1  # at positions past the prompt


def infer(engine, public, weights, ids, told=lambda stage, costs: None, layers=0, reveal="logits",
          every_row=False):
    """
    One private forward pass. public: public.json's dict; weights: server.npz's arrays on the
    server, embedding.npz's on the client if the embedding is public, else None; ids: the prompt's
    tokens on the client, else None; reveal: "logits" or "token"; layers: how many equal layers to
    run of each kind, uniform and softmax, 0 for all. The last layer, which makes one row, comes
    besides (plain's is equal). With fewer layers than all, only two pieces of the embedding are
    looked up, and the result means nothing.

    Returns (result, costs). result, None but on the client: the logits (V,) of the last position,
    or its most likely token, or with every_row the logits (T, V). costs: Engine.costs, of this
    pass. told(stage, costs) is called after each stage.
    """
    c = GPTConfig(**public["config"])
    T, L = c.block_size, c.n_layer
    units = public.get("layernorm_units") or [1.0] * (2 * L + 1)
    costs = engine.costs = []
    whole = not layers or layers >= L
    client = engine.rank == CLIENT
    put = partial(put_weights, engine, public["shapes"], weights)

    set_up(engine)
    told("set-up", costs)

    padded = np.pad(ids, (0, T - len(ids)), constant_values=NO_TOKEN) if client else None
    x = embed(engine, public["embedding"], c, weights, padded, told, whole)     # (T, d)

    last, seen = row_masks(len(ids) - 1, T) if client else (None, None)
    if not every_row:  # which row is the last is the client's secret
        last = engine.put((1, T), CLIENT, last)
        seen = engine.put((1, T), CLIENT, seen)

    one_row = not every_row and not engine.plain  # the last layer makes what a next token needs
    inner = [i for i in layers_of(public["shapes"]) if i < L - 1 or not one_row]
    for equal in equal_layers(public["shapes"], inner):
        run = equal if whole else equal[:layers]
        for i in run:
            not_run = len(equal) - len(run) if i == run[-1] else 0
            op = partial(engine.op, times=1 + not_run)
            if engine.plain:
                x = plain_block(op, x, put(f"blocks.{i}."), c)                  # (T, d)
            else:
                x = block(op, x, put(f"blocks.{i}."), c, SECURE, units[2 * i:2 * i + 2])  # (T, d)
            told(f"layer {i + 1}/{L}", costs)
    if one_row:
        x = last_block(engine.op, x, last, seen, put(f"blocks.{L - 1}."), c, SECURE,
                       units[2 * L - 2:2 * L])                                  # (1, d)
        told(f"layer {L}/{L}", costs)
    elif not every_row:
        x = engine.op("head", jnp.matmul, last, x)                              # (1, d)

    if engine.plain:
        y = plain_head(engine.op, x, put(*HEAD), c)                             # (rows, V)
    else:
        y = head(engine.op, x, put(*HEAD), c, SECURE, units[-1])                # (rows, V)
    if reveal == "token":
        y = engine.op("argmax", secure_argmax, y)                               # (rows,)
    result = engine.reveal(y)
    told("done", costs)
    if client and not every_row:
        result = result[0]
    return result, costs


def equal_layers(shapes, layers):
    """The layers in groups of neighbours whose arrays have the same shapes, and so one price."""
    def arrays_of(i):
        mine = f"blocks.{i}."
        return {name.removeprefix(mine): s for name, s in shapes.items() if name.startswith(mine)}

    return [list(group) for _, group in groupby(layers, arrays_of)]


def put_weights(engine, shapes, weights, *prefixes):
    """The server's arrays whose names start with one of the prefixes, as weights_of() has them."""
    server = engine.rank == SERVER
    secrets = {}
    for name, shape in shapes.items():
        if name.startswith(prefixes):
            secrets[name] = engine.put(shape, SERVER, weights[name] if server else None)
    return weights_of(secrets, *prefixes)


def set_up(engine):
    """Have the engine make its keys, which it does at the first operation of each kind."""
    ones = np.ones((2, 2))
    mine = engine.put(ones.shape, CLIENT, ones)
    theirs = engine.put(ones.shape, SERVER, ones)
    engine.op("set-up", one_of_each, mine, theirs)
    if 32 in engine.rings:  # where it compares
        engine.op("set-up", jnp.maximum, *(engine.hold(ones, bits=32) for _ in range(2)))


def one_of_each(a, b):
    """A comparison, a product by entries, matrix products of a client's and a server's (2, 2)."""
    return jnp.maximum(((a + b) * (a + b)) @ (a + b), a) + (a + b) @ b


# ----------------------------------------------------------------------------------- the embedding
def embed(engine, embedding, c, weights, ids, told, whole):
    """
    The embedded prompt (T, d), looked up under encryption; if the embedding is public, looked up by
    the client. ids (T,): the client's.
    """
    T, d = c.block_size, c.n_embd
    client, server = engine.rank == CLIENT, engine.rank == SERVER
    if embedding != "private":
        x = None
        if client:
            x = np.where(ids[:, None] == NO_TOKEN, 0, weights["wte"][ids]) + weights["wpe"]
        return engine.put((T, d), CLIENT, x)

    table = None
    if server:  # row V stands for no token
        table = np.vstack((weights["wte"], np.zeros((1, d))))
        table = np.round(table * SCALE).astype(np.int32)                        # (V + 1, d)
    if c.vocab_size >= BUCKETED_V and T >= BUCKETED_T and not engine.plain:
        found = by_buckets(engine, c, table, ids, told, whole)                  # (T, d)
    else:
        found = by_one_hot(engine, c, table, ids, told, whole)                  # (T, d)
    wpe = engine.put((T, d), SERVER, weights["wpe"] if server else None)
    return engine.op("embedding", place, found, wpe)                            # (T, d)


def by_one_hot(engine, c, table, ids, told, whole):
    """table[ids] by one-hot rows (T, V), a piece of the vocabulary at a time."""
    T, V = c.block_size, c.vocab_size
    pieces = [np.arange(start, min(start + ROWS, V)) for start in range(0, V, ROWS)]
    asked = None
    if engine.rank == CLIENT:
        asked = [ids[:, None] == piece for piece in pieces]                     # (T, rows) each
    found = answers(engine, T, asked, pieces, table, c.n_embd, told, whole)     # (T, d) each
    return engine.op("embedding", add_up, *found)


def by_buckets(engine, c, table, ids, told, whole):
    """table[ids] by lookup.py's buckets, some of them at a time."""
    dealt = buckets(c.vocab_size, c.block_size, engine.session.encode())        # (buckets, rows)
    groups = [dealt[i:i + GROUP] for i in range(0, len(dealt), GROUP)]
    asked = chosen = None
    if engine.rank == CLIENT:
        hot, chosen = queries(ids, dealt)
        asked = [hot[i:i + GROUP] for i in range(0, len(dealt), GROUP)]         # (8, QUERIES, rows)
    found = answers(engine, QUERIES, asked, groups, table, c.n_embd, told, whole)
    chosen = engine.put((c.block_size, len(dealt) * QUERIES), CLIENT, chosen, np.int32)
    return engine.op("embedding", put_in_order, chosen, *found, groups=len(groups))


def answers(engine, questions, asked, pieces, table, d, told, whole):
    """
    The client's one-hot questions asked[i] (..., questions, rows) to the server's table[pieces[i]]
    (..., rows, d): a list of answers, each (... questions, d). Unless `whole` only two pieces are
    asked, and the second stands for the others.
    """
    run = len(pieces) if whole else min(len(pieces), 2)
    found = []
    for i in range(run):
        *bucket, rows = pieces[i].shape
        hot = engine.put((*bucket, questions, rows), CLIENT, asked and asked[i], np.int32)
        part = table[pieces[i]] if engine.rank == SERVER else None
        part = engine.put((*bucket, rows, d), SERVER, part, np.int32)
        stands_for = pieces[i:] if i == run - 1 else pieces[i:i + 1]
        times = sum(piece.size for piece in stands_for) / pieces[i].size
        found.append(engine.op("embedding", answer, hot, part, times=times))
        told(f"embedding {i + 1}/{len(pieces)}", engine.costs)
    return found


def answer(hot, rows):
    return (hot @ rows).reshape(-1, rows.shape[-1])


def add_up(*found):
    return sum(found)


def put_in_order(chosen, *found, groups):
    """chosen (T, buckets QUERIES) times the answers; the last stands for those not asked."""
    found = [found[min(i, len(found) - 1)] for i in range(groups)]
    return chosen @ jnp.vstack(found)[:chosen.shape[1]]


def place(found, wpe):
    """The integers found, back in units of 1, and the position's embedding."""
    return found.astype(np.float32) * (1 / SCALE) + wpe
