"""
A further token's row through the private model: what a reply takes after its prompt.

The keys and values of earlier tokens stay in the engine, as secret as they were made. A token more
is one row through each block, in the steps of block.py. Which position it has is the client's
secret, as the length of the prompt is: a prompt is padded, and a further token gets a place of the
cache, a public one, behind the padding. Attention doesn't mind the order of its keys, so that a
place is only hidden or not; what depends on the position (its embedding, its temperature, the
weight of a mean) the client picks by secrets of its own.

A cache has its last size from the start: before the prompt's places is the room for further tokens,
hidden, and each of these takes one of it away. So all cost the same, and the engine's programs are
compiled for one shape.

Shapes: block.py's, and n places in the cache: the room, and those of the padded prompt.
"""
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from private.block import (HEAD, add_linear, by_own_temperature, divide_row, ffn, head, linear, now,
                           own_columns, weights_of, without_queries)
from private.nonlinear import CLIPPED, EXACT, HIDDEN, only


class Place(NamedTuple):
    """Where a further token stands: the client's secrets, or arrays in the clear."""
    hidden: Any  # (1, n), HIDDEN at those places that are padding, 0 at all others
    left: Any    # (1, n), CLIPPED and 0 there
    order: Any   # (T, n), 1 where a position has its place, up to the token's own
    at: Any      # (1, T), 1 at the token's position and 0 elsewhere
    share: Any   # (1, 1), 1 over the number of tokens up to it


def place_of(position, prompt, padded, room, T):
    """
    The Place, as arrays, of the token at `position` of T, behind a prompt of so many tokens that
    was padded to `padded`, in a cache with that room for further ones.
    """
    first = room - (1 + position - prompt)  # place of the prompt, once this token has its own
    hidden = np.zeros((1, room + padded), np.float32)
    hidden[:, :first] = HIDDEN
    hidden[:, first + prompt:first + padded] = HIDDEN
    left = np.where(hidden, CLIPPED, 0)
    order = np.zeros((T, room + padded), np.float32)
    order[np.arange(position + 1), np.flatnonzero(hidden[0] == 0)] = 1
    at = np.eye(T, dtype=np.float32)[position:position + 1]
    return Place(hidden, left, order, at, np.full((1, 1), 1 / (position + 1)))


def make_room(op, last, caches, room):
    """
    Make of what a prompt's pass left in the layers' caches what further tokens need: "kv" (n, 2 d)
    and "v" (n, d) with room for them; "means" of the last row alone, (1, m d), which `last` (1, T)
    marks.
    """
    for cache in caches.values():
        for name, kept in cache.items():
            if name == "means":
                cache[name] = op("average", jnp.matmul, last, kept)
            else:
                cache[name] = op("matmul", behind_zeros, kept, rows=room)


def behind_zeros(kept, rows):
    return jnp.pad(kept, ((rows, 0), (0, 0)))


def next_block(op, x, place, cache, w, c, f, units=(1.0, 1.0)):
    """
    block() of one token more: x (1, d) -> (1, d). cache: what block() left there of the rows
    before, of "means" only the last row; this row is added.
    """
    n = op("LayerNorm", f.normalise, x, unit=units[0]) if c.use_layernorm else x   # (1, d)
    if "qkv" in w:
        y = next_attention(op, n, place, cache, w, c, f)                           # (1, d)
    elif "pattern" in w:
        y = next_by_position(op, n, place, cache, w)                               # (1, d)
    else:
        y = op("average", next_means, n, cache["means"], place.share)              # (1, m d)
        cache["means"] = y
    x = op("matmul", add_linear, x, y, *w["o"])                                    # (1, d)
    return ffn(op, x, w, c, f, units[1])                                           # (1, d)


def next_attention(op, n, place, cache, w, c, f):
    """
    attention() of one row, whose own key is the last of the cache: n (1, d) -> (1, d).

    A product with few rows costs by its ciphertexts, hardly by their content. So Q, K and V are one
    product, and the heads' rows of Q, each 0 outside its head's columns, another.
    """
    qkv = op("matmul", linear, n, *w["qkv"])                                   # (1, 3 d)
    q = op("matmul", queries, qkv)                                             # (1, d)
    if "inverse_t" in w:
        q = op("temperature", by_own_temperature, q, *w["inverse_t"], place.at)
    own = op("matmul", without_queries, qkv)                                   # (1, 2 d)
    kv = cache["kv"] = op("matmul", append, cache["kv"], own)                  # (n, 2 d)
    s = op("matmul", next_scores, q, kv, n_head=c.n_head)                      # (H, 1, n)
    e = op("softmax", f.row_exponentials, s, place.hidden, place.left)         # (H, 1, n)
    y = op("matmul", next_mix, e, kv)                                          # (H, d_k)
    return op("softmax", divide_row, y, e,
              reciprocal=f.reciprocal, most=c.block_size)                      # (1, d)


def next_by_position(op, n, place, cache, w):
    """
    A V of one row: n (1, d) -> (1, d). The row of A at the token's position is its weights by
    position, which the client's order makes weights by place.
    """
    own = op("matmul", linear, n, *w["value"])                                 # (1, d)
    v = cache["v"] = op("pattern", append, cache["v"], own)                    # (n, d)
    a = op("pattern", row_of_pattern, place.at, *w["pattern"])                 # (H, T)
    a = op("pattern", jnp.matmul, a, place.order)                              # (H, n)
    return op("pattern", own_heads, a, v)                                      # (1, d)


def row_of_pattern(at, A):
    """The row of A (H, T, T) that `at` (1, T) marks: (H, T), one product for all heads."""
    H, T, _ = A.shape
    return (at @ A.transpose(1, 0, 2).reshape(T, H * T)).reshape(H, T)


def own_heads(a, v):
    """Each head's weights a (H, n) times its own columns of v (n, d), side by side: (1, d)."""
    return only(own_columns(len(a), v.shape[1]), a @ v).sum(0, keepdims=True)


def queries(qkv):
    """Q of Q, K and V, side by side."""
    return jnp.split(qkv, 3, axis=1)[0]


def append(kept, own):
    """What is kept of n places, the first of them given up for a row's own at the end."""
    return jnp.concatenate((kept[1:], own))


def next_scores(q, kv, n_head):
    """A row of logits for each head: q (1, d), kv (n, 2 d) -> (H, 1, n)."""
    d = q.shape[1]
    return (only(own_columns(n_head, d), q) @ kv[:, :d].T)[:, None]


def next_mix(e, kv):
    """sum_j A_j v_j of each head, (H, d_k), its weights not yet divided by their sum."""
    d = kv.shape[1] // 2
    return own_heads(e[:, 0], kv[:, d:]).reshape(len(e), -1)


def next_means(n, means, share):
    """
    causal_means() of one row more, i: its power C^p is that of the row before, moved by 1/i of the
    way to this row's C^(p-1). n (1, d), means (1, m d), share (1, 1), 1/i -> (1, m d).
    """
    d = n.shape[1]
    moved = [n]
    for before in jnp.split(means, means.shape[1] // d, axis=1):
        moved.append(before + share * (moved[-1] - before))
    return jnp.hstack(moved[1:])


# ------------------------------------------------------------------------------------ in the clear
def forward_next(arrays, c, token, place, caches, f=EXACT, units=None):
    """
    Logits (1, V) after one token more, in the clear, where forward() left its caches. token (1, V):
    one-hot; place: a Place; f, units: as in forward().
    """
    units = units or [1.0] * (2 * c.n_layer + 1)
    x = token @ arrays["wte"] + place.at @ arrays["wpe"]                       # (1, d)
    for i, cache in caches.items():
        w = weights_of(arrays, f"blocks.{i}.")
        x = next_block(now, x, place, cache, w, c, f, units[2 * i:2 * i + 2])  # (1, d)
    return head(now, x, weights_of(arrays, *HEAD), c, f, units[-1])            # (1, V)
