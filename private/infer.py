"""
One private forward pass of both parties: the client's prompt embedded, every block, the head, the result revealed to the client.
"""
import numpy as np

CHUNK = 2048     # rows of the embedding a one-hot product takes: one for all would need 88 GB at V = 50257
BUCKETED = 8 * CHUNK  # from this vocabulary on, if T is 32 or more, the embedding is looked up by buckets (lookup.py)
GROUP = 8        # buckets a product takes
SCALE = 2.0**16  # the embedding is looked up as integers, exact to 1 / SCALE


def infer(party, public, weights, ids, told=lambda stage, costs: None, layers=0, reveal="logits", every_row=False):
    """
    One private forward pass. public: public.json's dict; weights: server.npz's arrays on the server, embedding.npz's on the client if
    the embedding is public, else None; ids: the prompt's tokens on the client, else None; reveal: "logits" or "token"; layers: how
    many equal layers to run, 0 for all; the last one, which computes one row, comes besides (plain's is equal). With fewer than all
    only two pieces of the embedding are looked up, and the result means nothing.

    Returns (result, costs). result, None but on the client: logits (V,) of the last position, or its most likely token, or
    with every_row the logits (T, V). costs: [(kind, times, cost of Engine.run)] in the order run; times is how many equal
    pieces this one stands for, itself included. told(stage, costs) is called after each stage.
    """
    import jax.numpy as jnp
    from private.lookup import QUERIES, buckets, queries
    from model import GPTConfig
    from private.nonlinear import SECURE, secure_argmax
    from pi_export import block_steps, head_steps, of_block, one_of_each
    from private.plain import plain_block_steps, plain_head_steps
    c, shapes = GPTConfig(**public["config"]), {k: tuple(v) for k, v in public["shapes"].items()}
    T, V, d, server, client = c.block_size, c.vocab_size, c.n_embd, party.rank == 1, party.rank == 0
    block_steps_of, head_steps_of = (plain_block_steps, plain_head_steps) if party.plain else (block_steps, head_steps)
    one_row = not every_row and not party.plain  # the last block computes only what a next token needs
    whole = not layers or layers >= c.n_layer
    if client:
        end, ids = len(ids) - 1, np.pad(ids, (0, T - len(ids)), constant_values=-1)  # no position sees those past the prompt
    specs, costs = {}, []

    def put(name, shape, owner, value, dtype=np.float32):
        specs[name] = (tuple(shape), dtype)
        party.put(name, shape, owner, value, dtype)

    def step(kind, output, function, inputs, scope, times=1):
        specs[output], cost = party.run((scope, output, tuple(inputs), kind), function, {name: specs[name] for name in inputs}, output)
        costs.append((kind, times, cost))

    def look_up():
        """x, the embedded prompt, by encrypted one-hot rows of the tokens, or of their places in the buckets."""
        bucketed = V >= BUCKETED and T >= 32 and not party.plain
        if bucketed:
            dealt = buckets(V, T, party.session.encode())
            hot, chosen = queries(ids, dealt) if client else (None, None)
            tokens = [dealt[i:i + GROUP] for i in range(0, len(dealt), GROUP)]
            asked = [hot[i:i + GROUP] for i in range(0, len(dealt), GROUP)] if client else None
        else:
            tokens = [np.arange(start, min(start + CHUNK, V)) for start in range(0, V, CHUNK)]
            asked = [ids[:, None] == piece for piece in tokens] if client else None
        table = np.round(np.vstack((weights["wte"], np.zeros((1, d)))) * SCALE).astype(np.int32) if server else None  # row V stands for no token
        run = len(tokens) if whole else min(len(tokens), 2)
        for i in range(run):
            *bucket, rows = tokens[i].shape
            put("hot", (*bucket, QUERIES if bucketed else T, rows), 0, asked[i] if client else None, np.int32)
            put("table", (*bucket, rows, d), 1, table[tokens[i]] if server else None, np.int32)
            times = 1 if i + 1 < run else sum(piece.size for piece in tokens[i:]) / tokens[i].size
            step("embedding", f"found {i}", lambda h, w: (h @ w).reshape(-1, d), ["hot", "table"], f"embedding {rows}", times)
            told(f"embedding {i + 1}/{len(tokens)}", costs)
        found = [f"found {i}" for i in range(run)]
        if bucketed:
            put("chosen", (T, len(dealt) * QUERIES), 0, chosen, np.int32)
            step("embedding", "found", lambda chosen, *found: chosen @ jnp.vstack([found[min(i, run - 1)] for i in range(len(tokens))])[:chosen.shape[1]],
                 ["chosen"] + found, "choose")
        else:
            step("embedding", "found", lambda *found: sum(found), found, "sum")
        put("wpe", (T, d), 1, weights["wpe"] if server else None)
        step("embedding", "x", lambda found, wpe: found.astype(np.float32) * (1 / SCALE) + wpe, ["found", "wpe"], "embedding")

    put("mine", (2, 2), 0, np.ones((2, 2)) if client else None)
    put("theirs", (2, 2), 1, np.ones((2, 2)) if server else None)
    step("set-up", "ready", one_of_each, ["mine", "theirs"], "set-up")
    told("set-up", costs)

    if public["embedding"] == "private":
        look_up()
    else:  # the client's own doing
        put("x", (T, d), 0, np.where(ids[:, None] < 0, 0, weights["wte"][ids]) + weights["wpe"] if client else None)

    if not every_row:  # which row is the last is the client's secret
        put("last", (1, T), 0, np.eye(T)[end:end + 1] if client else None)
    if one_row:
        put("seen", (1, T), 0, np.tri(T)[end:end + 1] if client else None)
    equal = c.n_layer - one_row
    for layer in [*range(equal if whole else min(layers, equal)), *[equal] * one_row]:
        block = of_block(shapes, layer)
        for name, shape in block.items():
            put(f"W.{name}", shape, 1, weights[f"blocks.{layer}.{name}"] if server else None)
        times = 1 if whole or layer + 1 < layers or layer == equal else equal - layer
        for i, (kind, output, function, inputs) in enumerate(block_steps_of(c, block, SECURE, layer == equal)):
            step(kind, output, function, inputs, f"step {i} {block.keys()} {layer == equal}", times)
        told(f"layer {layer + 1}/{c.n_layer}", costs)

    if party.plain and not every_row:
        step("head", "x", lambda last, x: last @ x, ["last", "x"], "select")
    for name, shape in shapes.items():
        if not name.startswith("blocks.") and name not in ("wte", "wpe"):
            put(f"W.{name}", shape, 1, weights[name] if server else None)
    for kind, output, function, inputs in head_steps_of(c, shapes, SECURE):
        step(kind, output, function, inputs, f"head {every_row}")
    if reveal == "token":
        step("argmax", "logits", secure_argmax, ["logits"], "argmax")
    result = party.reveal("logits")
    told("done", costs)
    return result if result is None or every_row else result[0], costs
