"""
Further tokens' rows through the private model: what a reply takes after its prompt.

The keys and values of earlier tokens stay in the engine, as secret as they were made. A token more
is one row through each block, in the steps of block.py. Which position it has is the client's
secret, as the length of the prompt is: a prompt is padded, and a further token gets a place of the
cache, a public one, behind the padding. Attention doesn't mind the order of its keys, so that a
place is only hidden or not; what depends on the position (its embedding, its temperature, the
weights of a mean) the client picks by secrets of its own.

A pass may take k rows: one token, and others that the client guesses to follow it. Of those that
it then drops, the places stay hidden; the server doesn't hear how many these are.

A cache has its last size from the start: before the prompt's places is the room for further rows,
hidden, and each of these takes one of it away. So all cost the same, and the engine's programs are
compiled for one shape.

Shapes: block.py's; k rows; and n places in the cache: the room, and those of the padded prompt.
"""
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from private.block import (HEAD, add_linear, by_own_temperature, divide, ffn, head, heads, linear,
                           now, own_columns, weights_of, without_queries)
from private.nonlinear import CLIPPED, EXACT, HIDDEN, only


class Place(NamedTuple):
    """Where k further rows stand: the client's secrets, or arrays in the clear."""
    hidden: Any  # (k, n), HIDDEN at those places that a row doesn't see, 0 at all others
    left: Any    # (k, n), CLIPPED and 0 there
    order: Any   # (T, n), 1 where a position has its place, up to the last row's own
    at: Any      # (k, T), 1 at each row's position and 0 elsewhere
    means: Any   # (k, j + k), the weights of a causal mean: of j rows kept, and of these


class Seats:
    """
    What the client knows of a cache: the position that each of its n places holds, -1 at those that
    are hidden from all. For a prompt of so many tokens, padded to `padded`, and room for further
    rows; T: the context.
    """

    def __init__(self, prompt, padded, room, T):
        self.held = np.full(room + padded, -1)
        self.held[room:room + prompt] = np.arange(prompt)
        self.next = prompt           # the next token's position
        self.kept, self.last = 1, 0  # of how many rows there are means, and which of them counts
        self.T = T

    def positions(self, k):
        """Those of the next k tokens, (k,)."""
        return self.next + np.arange(k)

    def seat(self, k):
        """The Place, as arrays, of the next k tokens, which have their places from now on."""
        own = self.positions(k)
        self.held = np.concatenate((self.held[k:], own))
        sees = (0 <= self.held) & (self.held <= own[:, None])                    # (k, n)
        hidden = np.where(sees, 0, HIDDEN)
        places = np.flatnonzero(self.held >= 0)
        order = np.zeros((self.T, len(self.held)))
        order[self.held[places], places] = 1
        means = np.zeros((k, self.kept + k))
        means[:, self.last] = self.next
        means[:, self.kept:] = np.tri(k)
        means /= own[:, None] + 1
        self.next, self.kept, self.last = self.next + k, k, k - 1
        return Place(hidden, np.where(hidden, CLIPPED, 0), order, np.eye(self.T)[own], means)

    def drop(self, n):
        """The last n tokens aren't to be: hide their places."""
        self.held[len(self.held) - n:] = -1
        self.next -= n
        self.last -= n


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
    block() of k tokens more: x (k, d) -> (k, d). cache: what block() left there of the rows before,
    of "means" only those of the last pass; these rows are added.
    """
    n = op("LayerNorm", f.normalise, x, unit=units[0]) if c.use_layernorm else x   # (k, d)
    if "qkv" in w:
        y = next_attention(op, n, place, cache, w, c, f)                           # (k, d)
    elif "pattern" in w:
        y = next_by_position(op, n, place, cache, w)                               # (k, d)
    else:
        y = op("average", next_means, n, cache["means"], place.means)              # (k, m d)
        cache["means"] = y
    x = op("matmul", add_linear, x, y, *w["o"])                                    # (k, d)
    return ffn(op, x, w, c, f, units[1])                                           # (k, d)


def next_attention(op, n, place, cache, w, c, f):
    """
    attention() of k rows, whose own keys are the last of the cache: n (k, d) -> (k, d).

    A product with few rows costs by its ciphertexts, hardly by their content. So Q, K and V are one
    product, and the heads' rows of Q, each 0 outside its head's columns, another.
    """
    qkv = op("matmul", linear, n, *w["qkv"])                                   # (k, 3 d)
    q = op("matmul", queries, qkv)                                             # (k, d)
    if "inverse_t" in w:
        q = op("temperature", by_own_temperature, q, *w["inverse_t"], place.at)
    own = op("matmul", without_queries, qkv)                                   # (k, 2 d)
    kv = cache["kv"] = op("matmul", append, cache["kv"], own)                  # (n, 2 d)
    s = op("matmul", next_scores, q, kv, n_head=c.n_head)                      # (H, k, n)
    e = op("softmax", f.row_exponentials, s, place.hidden, place.left)         # (H, k, n)
    y = op("matmul", next_mix, e, kv)                                          # (H, k, d_k)
    return op("softmax", divide, y, e,
              reciprocal=f.reciprocal, most=c.block_size)                      # (k, d)


def next_by_position(op, n, place, cache, w):
    """
    A V of k rows: n (k, d) -> (k, d). The row of A at a token's position is its weights by
    position, which the client's order makes weights by place.
    """
    own = op("matmul", linear, n, *w["value"])                                 # (k, d)
    v = cache["v"] = op("pattern", append, cache["v"], own)                    # (n, d)
    a = op("pattern", rows_of_pattern, place.at, *w["pattern"])                # (H, k, T)
    a = op("pattern", jnp.matmul, a, place.order)                              # (H, k, n)
    return op("pattern", own_heads, a, v)                                      # (k, d)


def rows_of_pattern(at, A):
    """The rows of A (H, T, T) that `at` (k, T) marks: (H, k, T), one product for all heads."""
    H, T, _ = A.shape
    rows = at @ A.transpose(1, 0, 2).reshape(T, H * T)                         # (k, H T)
    return rows.reshape(-1, H, T).transpose(1, 0, 2)


def own_heads(a, v):
    """Each head's weights a (H, k, n) times its own columns of v (n, d), side by side: (k, d)."""
    H, k, n = a.shape
    y = (a.reshape(H * k, n) @ v).reshape(H, k, -1)                            # (H, k, d)
    return only(own_columns(H, v.shape[1])[:, None], y).sum(0)


def queries(qkv):
    """Q of Q, K and V, side by side."""
    return jnp.split(qkv, 3, axis=1)[0]


def append(kept, own):
    """What is kept of n places, the first of them given up for the rows' own at the end."""
    return jnp.concatenate((kept[len(own):], own))


def next_scores(q, kv, n_head):
    """Rows of logits for each head: q (k, d), kv (n, 2 d) -> (H, k, n)."""
    k, d = q.shape
    by_heads = only(own_columns(n_head, d)[:, None], q)                        # (H, k, d)
    return (by_heads.reshape(-1, d) @ kv[:, :d].T).reshape(n_head, k, -1)


def next_mix(e, kv):
    """sum_j A_j v_j of each head, (H, k, d_k), its weights not yet divided by their sum."""
    return heads(own_heads(e, kv[:, kv.shape[1] // 2:]), len(e))


def next_means(n, kept, means):
    """
    causal_means() of k rows more, n (k, d): their power C^p is the mean of C^(p-1) over all rows,
    so that of C^p at the row before, which is among those kept (j, m d), and of C^(p-1) at these,
    by weights means (k, j + k) -> (k, m d).
    """
    moved = [n]
    for before in jnp.split(kept, kept.shape[1] // n.shape[1], axis=1):
        moved.append(means @ jnp.concatenate((before, moved[-1])))
    return jnp.hstack(moved[1:])


# ------------------------------------------------------------------------------------ in the clear
def forward_next(arrays, c, tokens, place, caches, f=EXACT, units=None):
    """
    What a private pass of k tokens more computes, in the clear, from where forward() left its
    caches: logits (k, V). tokens (k, V): one-hot; place: a Place; f, units: as in forward().
    """
    units = units or [1.0] * (2 * c.n_layer + 1)
    x = tokens @ arrays["wte"] + place.at @ arrays["wpe"]                       # (k, d)
    for i, cache in caches.items():
        w = weights_of(arrays, f"blocks.{i}.")
        x = next_block(now, x, place, cache, w, c, f, units[2 * i:2 * i + 2])  # (k, d)
    return head(now, x, weights_of(arrays, *HEAD), c, f, units[-1])            # (k, V)
