"""
The embedding of a secret prompt from the server's secret table, and of further tokens.

Under Cheetah two numbers of a row lie in one of the ring's, a + 2^32 b, so that a lookup multiplies
half as many columns. It picks rows as they are, and a sum of two embeddings stays below 2^30 in
units of 2^-16, so that no a runs into its b, and truncations hold: files.EMBEDDING.
"""
from functools import partial

import jax.numpy as jnp
import numpy as np

from private.ahead import masked_product
from private.block import NO_TOKEN
from private.engine import CLIENT, SERVER
from private.lookup import QUERIES, buckets, queries
from private.nonlinear import CIPHERTEXT
from private.shares import FRACTION, HALF, apart, signed

PIECE = 2048  # of the embedding that a one-hot product takes: the engine encodes it whole in memory
GROUP = 8     # buckets that a product takes
# The embedding is looked up by buckets from this size and context on. Buckets take 2 QUERIES V
# products for every column and one-hot rows T V, cheap where the vocabulary is a few pieces.
BUCKETED_V = 8 * PIECE
BUCKETED_T = 4 * QUERIES
BITS = 16  # the embedding is looked up in integers, in units of 2^-16
TABLE = "wte and wpe"  # the Matrix of both


def silent(stage, costs):
    """Whoever isn't interested in the stages of a pass."""


def embed(engine, embedding, c, weights, T, ids, told, whole):
    """
    The embedded prompt (T, d), looked up under encryption; if the embedding is public, looked up by
    the client. ids (T,): the client's, NO_TOKEN at the end.
    """
    d = c.n_embd
    client, server = engine.rank == CLIENT, engine.rank == SERVER
    if embedding != "private":
        x = None
        if client:
            found = np.where(ids[:, None] == NO_TOKEN, 0, weights["wte"][ids])
            x = found + weights["wpe"][:T]
        return engine.put((T, d), CLIENT, x)

    table = None
    if server:  # row V stands for no token
        table = whole_numbers(engine, np.vstack((weights["wte"], np.zeros((1, d)))))  # (V + 1, m)
    if c.vocab_size >= BUCKETED_V and T >= BUCKETED_T and not engine.plain:
        found = by_buckets(engine, c, T, table, ids, told, whole)               # (T, m)
    else:
        pieces = in_pieces(c.vocab_size, PIECE)
        asked = [ids[:, None] == piece for piece in pieces] if client else None
        found = answers(engine, T, asked, pieces, table, d, told, whole)        # (T, m) each
        found = engine.op("embedding", add_up, *found)                          # (T, m)
    wpe = engine.put((T, d), SERVER, weights["wpe"][:T] if server else None)
    return engine.op("embedding", jnp.add, in_ones(engine, found, d), wpe)      # (T, d)


def embed_next(engine, embedding, c, weights, k, tokens, positions, whole, ahead=None):
    """
    The embedding (k, d) of k tokens more, whose ids and positions, (k,) both, are the client's: by
    rows with two ones, over a table of the tokens and the positions. ahead: the table's Matrix, or
    None.
    """
    V, T, d = c.vocab_size, c.block_size, c.n_embd
    client, server = engine.rank == CLIENT, engine.rank == SERVER
    if embedding != "private":
        x = weights["wte"][tokens] + weights["wpe"][positions] if client else None
        return engine.put((k, d), CLIENT, x)
    hot = np.zeros((k, V + T), np.uint64)
    if client:
        hot[np.arange(k), tokens] = 1
        hot[np.arange(k), V + positions] = 1
    if ahead:
        found = engine.by_form(answer_ahead, "embedding", hot, ahead, times=1)  # (k, m)
        return in_ones(engine, found, d)                                        # (k, d)
    table = table_of(engine, weights) if server else None
    pieces = in_pieces(V + T, CIPHERTEXT)  # of a row, the engine sends whole ciphertexts
    asked = [hot[:, piece] for piece in pieces]
    found = answers(engine, k, asked, pieces, table, d, silent, whole)          # (k, m) each
    return in_ones(engine, engine.op("embedding", add_up, *found), d)           # (k, d)


def columns(engine, d):
    """m, in how many whole numbers d of a table are put: half as many, where shares serve."""
    return -(-d // 2) if engine.forms else d


def whole_numbers(engine, table):
    """A table (rows, d) in whole numbers, (rows, m): a column and the one m columns behind it."""
    if not engine.forms:
        return np.rint(table * 2.0**BITS).astype(np.int32)
    numbers = signed(np.rint(table * 2.0**BITS))
    m = columns(engine, table.shape[1])
    packed = numbers[:, :m].copy()
    packed[:, :table.shape[1] - m] += numbers[:, m:] << np.uint64(HALF)
    return packed


def table_of(engine, weights):
    """The embeddings of all tokens and behind them of all positions, (V + T, m)."""
    return whole_numbers(engine, np.vstack((weights["wte"], weights["wpe"])))


def in_pieces(rows, size):
    """The numbers of so many rows of a table, in pieces."""
    return [np.arange(start, min(start + size, rows)) for start in range(0, rows, size)]


def by_buckets(engine, c, T, table, ids, told, whole):
    """table[ids] by lookup.py's buckets, some of them at a time."""
    dealt = buckets(c.vocab_size, T, engine.session.encode())                   # (buckets, rows)
    groups = [dealt[i:i + GROUP] for i in range(0, len(dealt), GROUP)]
    asked = chosen = None
    if engine.rank == CLIENT:
        hot, chosen = queries(ids, dealt)
        asked = [hot[i:i + GROUP] for i in range(0, len(dealt), GROUP)]         # (8, QUERIES, rows)
    found = answers(engine, QUERIES, asked, groups, table, c.n_embd, told, whole)  # (..., m) each
    chosen = engine.put((T, len(dealt) * QUERIES), CLIENT, chosen, np.int32)
    return engine.op("embedding", put_in_order, chosen, *found, groups=len(groups))


def answers(engine, questions, asked, pieces, table, d, told, whole):
    """
    The client's one-hot questions asked[i] (..., questions, rows) to the server's table[pieces[i]]
    (..., rows, m): a list of answers, each (... questions, m). Unless `whole` only two pieces are
    asked, and the second stands for the others.
    """
    m = columns(engine, d)
    run = len(pieces) if whole else min(len(pieces), 2)
    found = []
    for i in range(run):
        *bucket, rows = pieces[i].shape
        hot = engine.put((*bucket, questions, rows), CLIENT, asked and asked[i], np.int32)
        part = table[pieces[i]] if engine.rank == SERVER else None
        put = engine.own if engine.forms else partial(engine.put, dtype=np.int32)
        part = put((*bucket, rows, m), SERVER, part)
        stands_for = pieces[i:] if i == run - 1 else pieces[i:i + 1]
        times = sum(piece.size for piece in stands_for) / pieces[i].size
        found.append(engine.op("embedding", answer, hot, part, times=times))
        told(f"embedding {i + 1}/{len(pieces)}", engine.costs)
    return found


def answer_ahead(op, engine, hot, table):
    """hot (k, rows), the client's, times a Matrix."""
    return engine.hold(masked_product(engine, hot, table))


def answer(hot, rows):
    return (hot @ rows).reshape(-1, rows.shape[-1])


def add_up(*found):
    return sum(found)


def put_in_order(chosen, *found, groups):
    """chosen (T, buckets QUERIES) times the answers; the last stands for those not asked."""
    found = [found[min(i, len(found) - 1)] for i in range(groups)]
    return chosen @ jnp.vstack(found)[:chosen.shape[1]]


def in_ones(engine, found, d):
    """The numbers found, (rows, m), in units of 1: (rows, d)."""
    if not engine.forms:
        return engine.op("embedding", in_units, found)
    return engine.by_form(halves, "embedding", found, times=1, d=d)


def halves(op, engine, found, d):
    numbers = apart(op, engine, engine.numbers(found), BITS - FRACTION, axis=1)[:, :d]
    return engine.hold(numbers, dtype=np.float32)


def in_units(found):
    return found.astype(np.float32) * 2.0**-BITS
