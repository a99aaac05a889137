"""
What each form in nonlinear.py, block.py and lookup.py saves, one by one: bytes, messages, seconds
and largest error of the form and of the obvious one beside it, on the real engine (Cheetah), for
one layer of the given shape. Two processes; writes private_ledger.{json,md}.

    python experiments/ledger.py                    # GPT-2 small's, some minutes on 2 cores
    python experiments/ledger.py --n_head=2 --n_embd=32 --block_size=16 --vocab_size=600 \
                                 --into=/tmp --docs=/tmp

The obvious forms are as cheap as they come: SPU's settings are the same, secrets of one party stay
its own.
"""
import json
import math
import os
import sys
from functools import partial
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from configurator import configure, die, end_on_signals  # noqa: E402

end_on_signals()
import numpy as np  # noqa: E402

from private.meet import free_addresses  # noqa: E402

n_head = 12         # H
n_embd = 768        # d
block_size = 128    # T
vocab_size = 50257  # V
into = str(HERE.parent / "results")  # the folder for private_ledger.json
docs = str(HERE.parent / "docs")     # and for ledger.md

configure(globals())
for folder in (into, docs):
    if not os.path.isdir(folder):
        die(f"no folder {folder} to write into", 2)
addresses = free_addresses(2)
parent_lives, parent_end = os.pipe()
server = os.fork()  # before jax has threads
rank = 0 if server else 1
if rank == 1:
    os.close(parent_end)

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402

from model import GPTConfig  # noqa: E402
from private.ahead import fixed  # noqa: E402
from private.block import (Row, divide, join_heads, linear, now, row_attention,  # noqa: E402
                           row_of, scores, split_heads)
from private.embed import GROUP, PIECE  # noqa: E402
from private.engine import CLIENT, SERVER, Engine  # noqa: E402
from private.forms import E_BITS, EXP_BITS, S_BITS  # noqa: E402
from private.infer import one_of_each  # noqa: E402
from private.lookup import buckets, queries  # noqa: E402
from private.nonlinear import (  # noqa: E402
    EXACT, FACTOR, LOGIT_UNIT, REACH, SECURE, causal_row_max, engine_square, exponentials,
    normalise, only, row_exponentials, secure_argmax, secure_exp, secure_exponentials, secure_gelu,
    secure_normalise, secure_reciprocal, secure_row_exponentials, square)
from private.pairs import Paired  # noqa: E402
from private.shares import FRACTION  # noqa: E402
from private.wraps import Wraps, settle  # noqa: E402

H, d, T, V = n_head, n_embd, block_size, vocab_size
d_k = d // H
PAST = np.tri(T, dtype=bool)  # (T, T), the causal entries
engine = Engine(rank, addresses, "cheetah", timeout=600, connect_timeout=60)
rng = np.random.default_rng(0)  # both parties draw alike, and each puts in what is its own
rows = []


def own(owner, value, dtype=np.float32):
    """A secret of one party's."""
    return engine.put(value.shape, owner, value, dtype)


def shared(value, dtype=np.float32):
    """A secret that neither party knows: the sum of one number of each."""
    if dtype == np.float32:
        mask = rng.normal(size=value.shape)
    else:
        mask = rng.integers(-99, 99, value.shape)
    return engine.op("share", jnp.add, own(CLIENT, mask, dtype), own(SERVER, value - mask, dtype))


def measure(what, form, exact, function, *secrets, times=1, fraction=0, steps=False, **static):
    """
    A row: one form of one operation. exact: what should come out, or None; times: how many of it
    the whole takes; fraction: the fraction bits of what comes out as integers; steps: whether
    the function takes op() first, to make ops of its own.
    """
    before = len(engine.costs)
    if steps:
        found = function(engine.op, *secrets)
    else:
        found = engine.op(what, function, *secrets, **static)
    if fraction and found.ring.bits == 64:  # what is revealed of an int32 has 32 bits
        found, fraction = engine.hold(engine.numbers(found), dtype=np.float32), fraction - FRACTION
    got = engine.reveal(found)
    if rank == CLIENT:
        got = got / 2.0**fraction
        traffic, messages, seconds, _ = times * sum(cost for _, _, cost in engine.costs[before:])
        error = None if exact is None else float(np.abs(got - np.asarray(exact)).max())
        rows.append({"what": what, "form": form, "MB": traffic / 1e6, "messages": messages,
                     "seconds": seconds, "largest error": error})
        print(json.dumps(rows[-1]), file=engine.terminal, flush=True)


def softmax():
    s = rng.normal(size=(H, T, T)) * 3 / LOGIT_UNIT
    e = np.asarray(exponentials(s))
    largest = np.where(PAST, s, -np.inf).max(-1, keepdims=True)
    i, j = np.tril_indices(T)
    u = (s - largest)[:, i, j].clip(-REACH) + 1                                # (H, T (T + 1) / 2)
    secret_s, secret_u = shared(s), shared(u)
    in_integers = shared(s * 2.0**FRACTION)  # as the scores by shares are

    what = "a square of every causal logit"
    measure(what, "x * x", u * u, lambda u: u * u, secret_u)
    measure(what, "engine_square, in blocks begun", u * u, engine_square, secret_u)
    measure(what, "square: whole blocks, the rest multiplied", u * u, square, secret_u)
    exp = np.exp(LOGIT_UNIT * (u - 1))
    measure("exponential", "secure_exp, three squares", exp, secure_exp, secret_u)

    def whole_max(s):
        return jnp.where(PAST, s, -99.0).max(-1, keepdims=True)

    measure("row maxima", "of T x T", largest, whole_max, secret_s)
    measure("row maxima", "causal_row_max", largest, causal_row_max, secret_s)

    def masked_after(s):
        return only(PAST, secure_exp(jnp.maximum(s - whole_max(s), -REACH) + 1))

    def of_known_range(s):
        return secure_exp(jnp.clip(s[:, i, j], -1, 1))

    what = "softmax without its division"
    measure(what, "T x T, masked after", e, masked_after, secret_s)
    measure(what, "secure_exponentials", e, lambda s: secure_exponentials(s), secret_s)
    measure(what, "by shares", e, secure_exponentials, in_integers, fraction=E_BITS)
    clipped = np.exp(LOGIT_UNIT * (s[:, i, j].clip(-1, 1) - 1))
    measure(what, "a range known beforehand: no maxima, but a clip on both sides", clipped,
            of_known_range, secret_s)

    total = e.sum(-1, keepdims=True)                                           # (H, T, 1)
    v = rng.normal(size=(H, T, d_k))
    secret_e, secret_total, secret_v = shared(e), shared(total), shared(v)
    measure("1 / sum", "SPU's", 1 / total, lambda s: 1 / s, secret_total)
    measure("1 / sum", "secure_reciprocal", 1 / total, secure_reciprocal, secret_total, most=T)

    def one_key_short(e, v):
        return e[..., :-1] @ (v[:, :-1] - v[:, -1:])

    measure("A V", "all keys", e @ v, jnp.matmul, secret_e, secret_v)
    measure("A V", "one key short: A' (V' - v)", one_key_short(e, v),
            one_key_short, secret_e, secret_v)
    what = "dividing by the sum"
    measure(what, "the weights, T x T", e * total, jnp.multiply, secret_e, secret_total)
    measure(what, "what they weigh, T x d_k", v * total, jnp.multiply, secret_v, secret_total)


def in_pairs():
    """
    Products of two numbers in one beside whole ones, with bits like those of a trained layer, and
    with what it takes to tell that none wraps.
    """
    engine.wraps = Wraps(np.arange(2, dtype=np.uint64))
    qkv = rng.normal(size=(T, 3 * d)) * np.repeat((0.25, 0.3, 1), d)
    q, k, v = split_heads(qkv, H)
    s = q @ k.transpose(0, 2, 1)
    secret_qkv = shared(qkv)
    measure("Q K^T", "whole", s, scores, secret_qkv, fraction=S_BITS, n_head=H)
    fraction = 12 + 11 + math.log2(FACTOR)  # as they are FACTOR times the logits
    measure("Q K^T", "keys in pairs", s, scores, secret_qkv, fraction=fraction, n_head=H,
            bits=(12, 11))

    e = np.asarray(exponentials(s))
    y = e @ v
    exact = join_heads(y / e.sum(-1, keepdims=True))
    secrets = shared(y * 2.0 ** (EXP_BITS - FRACTION)), shared(e * 2.0 ** (E_BITS - FRACTION))
    secrets[0].fraction = EXP_BITS
    static = {"reciprocal": SECURE.reciprocal, "most": T}
    measure("dividing by shares", "whole", exact, divide, *secrets, **static)
    measure("dividing by shares", "columns in pairs", exact, divide, *secrets, **static,
            bits=(12, 15))

    x, W = rng.normal(size=(T, d)), rng.normal(size=(d, 3 * d)) / math.sqrt(d)
    X = shared(x)
    measure("Q, K and V", "whole", x @ W, linear, X, own(SERVER, W))
    numbers = engine.own(W.shape, SERVER, fixed(W, 15))
    measure("Q, K and V", "rows in pairs", x @ W, linear, X, Paired(numbers, (11, 15)))
    measure("has any of these wrapped", "of all at once", np.zeros((1, 1)),
            lambda op: settle(partial(op, "watch"), engine), steps=True)
    engine.wraps = None  # no other rows pay for it


def ffn_and_layernorm():
    x = rng.normal(size=(T, d)) * 2
    y = rng.normal(size=(T, d))
    W = rng.normal(size=(2 * d, d)) / math.sqrt(d)
    W_ffn = rng.normal(size=(d, d)) / math.sqrt(d)
    W_o = W[d:]
    X, Y = shared(x), shared(y)
    secret_o, secret_ffn = own(SERVER, W_o), own(SERVER, W_ffn)

    def one_after_the_other(x, y, W_o, W_ffn):
        return (x + y @ W_o) @ W_ffn

    def side_by_side(x, y, W):
        return jnp.hstack((x, y)) @ W

    def in_the_basis(x, y, W_o):
        return x + y @ W_o

    what = "projection and linear FFN"
    measure(what, "one after the other", one_after_the_other(x, y, W_o, W_ffn),
            one_after_the_other, X, Y, secret_o, secret_ffn)
    measure(what, "one matrix, [x, y] [[W'], [W_O W']]", np.hstack((x, y)) @ W,
            side_by_side, X, Y, own(SERVER, W))
    measure(what, "FFN in the basis: x + y W_O'", x + y @ W_o, in_the_basis, X, Y, secret_o)

    measure("LayerNorm", "normalise, entry by entry", normalise(x), normalise, X)
    measure("LayerNorm", "secure_normalise, two products", normalise(x), secure_normalise, X)

    h = rng.normal(size=(T, 4 * d)) * 2
    gelu = jax.nn.gelu(h, approximate=False)
    secret_h = shared(h)
    measure("activation", "ReLU", np.maximum(h, 0), jax.nn.relu, secret_h)
    measure("activation", "GELU by its tanh", jax.nn.gelu(h), jax.nn.gelu, secret_h)
    measure("activation", "secure_gelu", gelu, secure_gelu, secret_h)
    measure("activation", "ReLU by shares", np.maximum(h, 0), SECURE.activation["relu"], secret_h)
    measure("activation", "GELU by shares", gelu, SECURE.activation["gelu"], secret_h)


def last_row():
    s = rng.normal(size=(H, 1, T)) * 3 / LOGIT_UNIT
    row = row_of(T - 1, T)
    secret = Row(*(own(CLIENT, mask) for mask in row))
    e = row_exponentials(s, row.hidden, row.left)
    what = "the last block's softmax"
    measure(what, "one row", e, lambda *values: secure_row_exponentials(*values),
            shared(s), secret.hidden, secret.left)
    measure(what, "one row, by shares", e, secure_row_exponentials, shared(s * 2.0**FRACTION),
            secret.hidden, secret.left, fraction=E_BITS)

    c = GPTConfig(block_size=T, n_head=H, n_embd=d, use_layernorm=False)
    x = rng.normal(size=(T, d)) * 2
    W = rng.normal(size=(d, 3 * d)) * np.repeat((0.01, 0.01, 0.03), d)         # Q, K, V

    def by_keys(x, last, hidden, left, W):
        _, k, v = split_heads(x @ W, H)
        q, _, _ = split_heads(last @ x @ W, H)
        e = secure_row_exponentials(q @ k.transpose(0, 2, 1), hidden, left)
        return (e @ v * secure_reciprocal(e.sum(-1, keepdims=True), T)).reshape(1, d)

    def by_matrices(op, x, last, hidden, left, W, f=SECURE):
        own_row = op("matmul", jnp.matmul, last, x)
        return row_attention(op, x, own_row, Row(last, hidden, left), {"qkv": (W,)}, c, f)

    what = "the last block's attention, of one row"
    exact = by_matrices(now, x, *row, W, EXACT)
    secrets = shared(x), *secret, own(SERVER, W)
    measure(what, "keys and values of all rows", exact, by_keys, *secrets)
    measure(what, "row_attention", exact, partial(by_matrices, now), *secrets)
    measure(what, "row_attention, by shares", exact, by_matrices, *secrets, steps=True)

    y = rng.normal(size=(H, T, d_k))
    t = np.exp(rng.normal(size=(H, T, 1)) / 3)
    measure("temperature", "per head and position", y * t,
            jnp.multiply, shared(y), own(SERVER, t))


def embedding_and_argmax():
    ids = rng.integers(0, V, T)
    wte = np.vstack((rng.integers(-9999, 9999, (V, d)), np.zeros((1, d), int)))
    n = min(V, PIECE)
    hot = ids[:, None] == np.arange(n)                                         # (T, n)
    measure("embedding", "one-hot, a piece multiplied", hot @ wte[:n], jnp.matmul,
            own(CLIENT, hot, np.int32), own(SERVER, wte[:n], np.int32), times=V / n)

    dealt = buckets(V, T, b"ledger")
    hot, chosen = queries(ids, dealt)
    group, table = hot[:GROUP], wte[dealt[:GROUP]]
    measure("embedding", "by buckets: the questions, a group multiplied", group @ table, jnp.matmul,
            own(CLIENT, group, np.int32), own(SERVER, table, np.int32),
            times=len(dealt) / len(group))
    found = (hot @ wte[dealt]).reshape(-1, d)
    measure("embedding", "by buckets: the order", wte[ids], jnp.matmul,
            own(CLIENT, chosen, np.int32), shared(found, np.int32))

    logits = rng.normal(size=(1, V))
    measure("the most likely token alone (--reveal=token)", "secure_argmax", logits.argmax(-1),
            secure_argmax, shared(logits))


def write_rows():
    title = (f"{H} heads, width {d}, T = {T}, vocabulary {V}; "
             f"{os.cpu_count()} cores for both parties")
    table = ["# Each private form beside the obvious one", "",
             f"One layer's operations, each in two or three forms: {title}. "
             "Made by `python experiments/ledger.py`.", "",
             "| operation | form | MB | messages | s | largest error |",
             "|---|---|---|---|---|---|"]
    for r in rows:
        error = "" if r["largest error"] is None else f"{r['largest error']:.0e}"
        table.append(f"| {r['what']} | {r['form']} | {r['MB']:.1f} | {r['messages']:.0f} | "
                     f"{r['seconds']:.1f} | {error} |")
    (Path(docs) / "ledger.md").write_text("\n".join(table) + "\n")
    result = {"shape": title, "rows": rows}
    (Path(into) / "private_ledger.json").write_text(json.dumps(result, indent=1) + "\n")


ones = np.ones((2, 2))
measure("set-up", "once", None, one_of_each, own(CLIENT, ones), own(SERVER, ones))
narrow = engine.hold(ones, bits=32)
measure("set-up", "of the ring mod 2^32", None, jnp.maximum, narrow, engine.hold(ones, bits=32))
softmax()
in_pairs()
ffn_and_layernorm()
last_row()
embedding_and_argmax()
if rank == CLIENT:
    write_rows()
else:
    os.read(parent_lives, 1)  # what we sent last may be on its way: stay until the client has ended
os._exit(0)
