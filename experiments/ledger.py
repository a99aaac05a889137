"""
What each form in nonlinear.py and lookup.py saves, one by one: bytes, messages, seconds and largest error of the form and of the
obvious one beside it, on the real engine (Cheetah), for one layer of the given shape. Two processes; writes private_ledger.{json,md}.

    python experiments/ledger.py                                       # GPT-2 small's, 5 minutes on 2 cores
    python experiments/ledger.py --n_head=2 --n_embd=32 --block_size=16 --vocab_size=600 --into=/tmp   # a toy

The obvious forms are as cheap as they come: SPU's settings are the same, secrets of one party stay its own.
"""
import json
import math
import os
import sys
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
from configurator import configure, die  # noqa: E402
from private.meet import free_addresses  # noqa: E402

n_head, n_embd, block_size, vocab_size = 12, 768, 128, 50257
into = str(HERE.parent / "results")

configure(globals())
if not os.path.isdir(into):
    die(f"no folder {into} to write into", 2)
ends = free_addresses(2)
server = os.fork()  # before jax has threads
rank = 0 if server else 1

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
from private.lookup import buckets, queries  # noqa: E402
from private.engine import Engine
from private.infer import CHUNK, GROUP  # noqa: E402
from model import GPTConfig  # noqa: E402
from private.nonlinear import (EXACT, LOGIT_UNIT, SECURE, causal_row_max, engine_square, exponentials, normalise, only, secure_argmax, secure_exp,  # noqa: E402
                       secure_exponentials, secure_gelu, secure_normalise, secure_reciprocal, secure_row_exponentials, square)
from pi_export import last_attention_steps, one_of_each, run  # noqa: E402

H, d, T, V, rng = n_head, n_embd, block_size, vocab_size, np.random.default_rng(0)
dk, party, specs, rows = d // H, Engine(rank, ends, "cheetah", 600, 60), {}, []


def share(dtype=np.float32, **values):
    """Secrets that neither party knows: sums of one number of each."""
    for name, x in values.items():
        mask = rng.normal(size=x.shape) if dtype == np.float32 else rng.integers(-99, 99, x.shape)
        for owner, part in enumerate((mask, x - mask)):
            party.put(f"{name}{owner}", x.shape, owner, part, dtype)
        pair = {f"{name}{owner}": (x.shape, dtype) for owner in (0, 1)}
        specs[name], _ = party.run(("share", name, x.shape), lambda a, b: a + b, pair, name)


def own(owner, dtype=np.float32, **values):
    for name, x in values.items():
        party.put(name, x.shape, owner, x, dtype)
        specs[name] = (x.shape, dtype)


def measure(what, form, function, inputs, exact=None, times=1):
    """A row: one form of one operation. exact: what should come out; times: how many of it the whole takes."""
    specs["out"], cost = party.run((what, form), function, {name: specs[name] for name in inputs}, "out")
    got = party.reveal("out")
    if rank == 0:
        error = float(np.abs(got - exact).max()) if exact is not None else None
        rows.append({"what": what, "form": form, "MB": times * cost[0] / 1e6, "messages": times * cost[1], "seconds": times * cost[2], "largest error": error})
        print(json.dumps(rows[-1]), file=party.terminal, flush=True)


def whole_max(s):
    return jnp.where(past, s, -99.0).max(-1)


own(0, mine=np.ones((2, 2)))
own(1, theirs=np.ones((2, 2)))
measure("set-up", "once", one_of_each, ["mine", "theirs"])

i, j = np.tril_indices(T)
s = rng.normal(size=(H, T, T)) * 3 / LOGIT_UNIT
e = np.asarray(exponentials(s))
past = np.tri(T, dtype=bool)
m = np.where(past, s, -np.inf).max(-1, keepdims=True)
u = (s - m)[:, i, j].clip(-2) + 1
share(s=s, e=e, u=u)
packed = np.exp(LOGIT_UNIT * (u - 1))
measure("a square of every causal logit", "x * x", lambda u: u * u, ["u"], u * u)
measure("a square of every causal logit", "engine_square, in blocks begun", engine_square, ["u"], u * u)
measure("a square of every causal logit", "square: whole blocks, the rest multiplied", square, ["u"], u * u)
measure("exponential", "secure_exp, three squares", secure_exp, ["u"], packed)
measure("row maxima", "of T x T", whole_max, ["s"], m[..., 0])
measure("row maxima", "causal_row_max", lambda s: causal_row_max(s)[..., 0], ["s"], m[..., 0])
measure("softmax without its division", "T x T, masked after", lambda s: only(past, secure_exp(jnp.maximum(s - whole_max(s)[..., None], -2.0) + 1)), ["s"], e)
measure("softmax without its division", "secure_exponentials", secure_exponentials, ["s"], e)
measure("softmax without its division", "a range known beforehand: no maxima, but a clip on both sides", lambda s: secure_exp(jnp.clip(s[:, i, j], -1, 1)), ["s"],
        np.exp(LOGIT_UNIT * (s[:, i, j].clip(-1, 1) - 1)))
share(S=e.sum(-1, keepdims=True), y=(y := rng.normal(size=(H, T, dk))))
measure("1 / sum", "SPU's", lambda S: 1 / S, ["S"], 1 / e.sum(-1, keepdims=True))
measure("1 / sum", "secure_reciprocal", lambda S: secure_reciprocal(S, T), ["S"], 1 / e.sum(-1, keepdims=True))
measure("A V", "all keys", lambda e, y: e @ y, ["e", "y"], e @ y)
measure("A V", "one key short: A' (V' - v)", lambda e, y: e[..., :-1] @ (y[:, :-1] - y[:, -1:]), ["e", "y"], e[..., :-1] @ (y[:, :-1] - y[:, -1:]))
measure("dividing by the sum", "the weights, T x T", lambda e, S: e * S, ["e", "S"], e * e.sum(-1, keepdims=True))
measure("dividing by the sum", "what they weigh, T x d_k", lambda y, S: y * S, ["y", "S"], y * e.sum(-1, keepdims=True))
x, W, ffn, yy = rng.normal(size=(T, d)) * 2, rng.normal(size=(2 * d, d)) / math.sqrt(d), rng.normal(size=(d, d)) / math.sqrt(d), rng.normal(size=(T, d))
share(x=x, Y=yy)
own(1, W=W, W_o=W[d:], ffn=ffn)
measure("projection and linear FFN", "one after the other", lambda x, Y, o, f: (x + Y @ o) @ f, ["x", "Y", "W_o", "ffn"], (x + yy @ W[d:]) @ ffn)
measure("projection and linear FFN", "one matrix, [x, y] [[W'], [W_O W']]", lambda x, Y, W: jnp.hstack((x, Y)) @ W, ["x", "Y", "W"], np.hstack((x, yy)) @ W)
measure("projection and linear FFN", "FFN in the basis: x + y W_O'", lambda x, Y, W: x + Y @ W, ["x", "Y", "W_o"], x + yy @ W[d:])
measure("LayerNorm", "normalise, entry by entry", lambda x: normalise(x), ["x"], np.asarray(normalise(x)))
measure("LayerNorm", "secure_normalise, two products", secure_normalise, ["x"], np.asarray(normalise(x)))
h = rng.normal(size=(T, 4 * d)) * 2
share(h=h)
measure("activation", "ReLU", jax.nn.relu, ["h"], np.maximum(h, 0))
measure("activation", "GELU by its tanh", lambda h: jax.nn.gelu(h), ["h"], np.asarray(jax.nn.gelu(h)))
measure("activation", "secure_gelu", secure_gelu, ["h"], np.asarray(jax.nn.gelu(h, approximate=False)))
share(row=s[:, -1:])
own(0, seen=np.ones((1, T)))
measure("the last block's softmax", "one row", lambda s, seen: secure_row_exponentials(s, seen), ["row", "seen"], e[:, -1:])
own(0, last=np.eye(T)[-1:])
own(1, QKV=(QKV := rng.normal(size=(d, 3 * d)) * np.repeat((0.01, 0.01, 0.03), d)))
c, named = GPTConfig(block_size=T, n_head=H, n_embd=d, use_layernorm=False), {"x": x, "last": np.eye(T)[-1:], "seen": np.ones((1, T))}


def by_keys(x, last, seen, W):
    q, k, v = (a.reshape(len(a), H, dk).transpose(1, 0, 2) for a in (last @ x @ W[:, :d], *jnp.split(x @ W[:, d:], 2, 1)))
    weights = secure_row_exponentials(q @ k.transpose(0, 2, 1), seen)
    return (weights @ v * secure_reciprocal(weights.sum(-1, keepdims=True), T))[:, 0]


def by_matrices(x, last, seen, W, f=SECURE):
    return run(last_attention_steps(c, {"qkv": W}, f, "x"), {"qkv": W}, {"x": x, "last": last, "seen": seen})["y"].reshape(H, dk)


for form, f in (("keys and values of all rows", by_keys), ("last_attention_steps", by_matrices)):
    measure("the last block's attention, of one row", form, f, [*named, "QKV"], np.asarray(by_matrices(*named.values(), QKV, EXACT)))
t = np.exp(rng.normal(size=(H, T, 1)) / 3)
own(1, t=t)
measure("temperature", "per head and position", lambda y, t: y * t, ["y", "t"], y * t)

ids, wte = rng.integers(0, V, T), np.vstack((rng.integers(-9999, 9999, (V, d)), np.zeros((1, d), int)))
n = min(V, CHUNK)
own(0, np.int32, hot=(ids[:, None] == np.arange(n)))
own(1, np.int32, wte=wte[:n])
measure("embedding", "one-hot, a piece multiplied", lambda h, w: h @ w, ["hot", "wte"], (ids[:, None] == np.arange(n)) @ wte[:n], V / n)
dealt = buckets(V, T, b"ledger")
hot, chosen = queries(ids, dealt)
own(0, np.int32, hot=hot[:GROUP], chosen=chosen)
own(1, np.int32, table=wte[dealt[:GROUP]])
measure("embedding", "by buckets: the questions, a group multiplied", lambda h, w: h @ w, ["hot", "table"], hot[:GROUP] @ wte[dealt[:GROUP]], len(dealt) / len(hot[:GROUP]))
share(np.int32, found=(hot @ wte[dealt]).reshape(-1, d))
measure("embedding", "by buckets: the order", lambda c, f: c @ f, ["chosen", "found"], wte[ids])
logits = rng.normal(size=(1, V))
share(logits=logits)
measure("the most likely token alone (--reveal=token)", "secure_argmax", secure_argmax, ["logits"], logits.argmax(-1))
if rank == 0:
    title = f"{H} heads, width {d}, T = {T}, vocabulary {V}; {os.cpu_count()} cores for both parties"
    table = [f"One layer's operations, each in two or three forms: {title}. Made by `python experiments/ledger.py`.", "",
             "| operation | form | MB | messages | s | largest error |", "|---|---|---|---|---|---|"]
    for r in rows:
        error = "" if r["largest error"] is None else f"{r['largest error']:.0e}"
        table.append(f"| {r['what']} | {r['form']} | {r['MB']:.1f} | {r['messages']:.0f} | {r['seconds']:.1f} | {error} |")
    (Path(into) / "private_ledger.md").write_text("\n".join(table) + "\n")
    (Path(into) / "private_ledger.json").write_text(json.dumps({"shape": title, "rows": rows}, indent=1) + "\n")
party.link.all_gather("done")
os._exit(os.waitstatus_to_exitcode(os.waitpid(server, 0)[1]) if server else 0)
