"""
The embedding of a secret prompt from the server's secret table, and of a further token.
"""
import jax.numpy as jnp
import numpy as np

from private.ahead import product
from private.engine import CLIENT, SERVER
from private.lookup import QUERIES, buckets, queries
from private.nonlinear import CIPHERTEXT

ROWS = 2048  # of the embedding that a one-hot product takes: the engine encodes it whole in memory
GROUP = 8    # buckets that a product takes
# The embedding is looked up by buckets from this size and context on. Buckets take 2 QUERIES V
# products for every column and one-hot rows T V, cheap where the vocabulary is a few pieces.
BUCKETED_V = 8 * ROWS
BUCKETED_T = 4 * QUERIES
SCALE = 2**16  # the embedding is looked up in integers, exact to 1 / SCALE
TABLE = "wte and wpe"  # the Matrix of both
NO_TOKEN = -1  # at positions past the prompt


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
        table = whole_numbers(np.vstack((weights["wte"], np.zeros((1, d)))))    # (V + 1, d)
    if c.vocab_size >= BUCKETED_V and T >= BUCKETED_T and not engine.plain:
        found = by_buckets(engine, c, T, table, ids, told, whole)               # (T, d)
    else:
        pieces = in_pieces(c.vocab_size, ROWS)
        asked = [ids[:, None] == piece for piece in pieces] if client else None
        found = answers(engine, T, asked, pieces, table, d, told, whole)        # (T, d) each
        found = engine.op("embedding", add_up, *found)                          # (T, d)
    wpe = engine.put((T, d), SERVER, weights["wpe"][:T] if server else None)
    return engine.op("embedding", place, found, wpe)                            # (T, d)


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
        return engine.by_form(sum_of_rows, "embedding", hot, ahead, times=1)    # (k, d)
    table = table_of(weights) if server else None
    pieces = in_pieces(V + T, CIPHERTEXT)  # of a row, the engine sends whole ciphertexts
    asked = [hot[:, piece] for piece in pieces]
    found = answers(engine, k, asked, pieces, table, d, silent, whole)          # (k, d) each
    return engine.op("embedding", in_ones, engine.op("embedding", add_up, *found))  # (k, d)


def whole_numbers(table):
    return np.round(table * SCALE).astype(np.int32)


def table_of(weights):
    """The embeddings of all tokens and behind them of all positions, (V + T, d)."""
    return whole_numbers(np.vstack((weights["wte"], weights["wpe"])))


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
    found = answers(engine, QUERIES, asked, groups, table, c.n_embd, told, whole)
    chosen = engine.put((T, len(dealt) * QUERIES), CLIENT, chosen, np.int32)
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


def sum_of_rows(op, engine, hot, table):
    """hot (k, rows), the client's, times a Matrix of whole numbers."""
    return op(in_ones, engine.hold(product(engine, hot, table)))


def answer(hot, rows):
    return (hot @ rows).reshape(-1, rows.shape[-1])


def add_up(*found):
    return sum(found)


def put_in_order(chosen, *found, groups):
    """chosen (T, buckets QUERIES) times the answers; the last stands for those not asked."""
    found = [found[min(i, len(found) - 1)] for i in range(groups)]
    return chosen @ jnp.vstack(found)[:chosen.shape[1]]


def place(found, wpe):
    """The integers found and the position's embedding."""
    return in_ones(found) + wpe


def in_ones(found):
    """The integers found, back in units of 1."""
    return found.astype(np.float32) * (1 / SCALE)
