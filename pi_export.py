"""
What a private inference engine should see of a model: few float32 matrices, and a forward pass of pure functions.

    python pi_export.py --ckpt=out/ckpt.pt --out=out/private

writes out/private/server.npz, the weights, which only the server may hold, and out/private/public.json, which both
parties hold: the configuration, the shape of every array and the tokenizer, nothing that was learned from data but it (and, by
the shapes, which biases are zero and whether the FFN was folded). With --embedding=public also out/private/embedding.npz for the
client, who then looks its tokens up itself, for no bytes and no time. It learns by it the embeddings and what is tied to them, the output
matrix, but for the final LayerNorm's gain and bias, or in a softmax-only model, folded, both but for one unknown d x d matrix; by
that and a revealed row of logits it also learns the last hidden row. The prompt stays its own.

Under MPC a matrix product costs by its shape and every product of two secrets ends in a truncation, so whatever algebra
can do in the clear is done here, once, in float64:

- weight norm and spectral norm            -> the plain weight they stand for
- LayerNorm's gain and bias                -> the next matrix: (n g + b) W = n (diag(g) W) + b W
- 1 / sqrt(d_k), the unit of the logits, and a temperature per head -> W_Q   (nonlinear.py wants logits in fives)
- the biases of K and V -> none, and the projection's: one moves a row of logits as a whole, the other goes through A, whose rows sum to 1
- W_in W_out, where nothing is between     -> one d x d matrix, fused in training or not
- the whole FFN, alpha and beta too (eq. 8), where there is no LayerNorm and no activation -> nothing at all: it is
  X_SA W', W' = beta I + W_ffn / alpha, a change of basis, which the next block's matrices can be written in. A softmax-only
  model is attention alone, X_out = X + MHA(X), with two secret matrices to a block

The temperature per query position (eq. 9) does not fold: row i of Q is divided by t_i, which no matrix on the right of
X does. Dividing Q, T x d numbers, is the cheapest exact place; the logits are H x T x T.

block_steps() is a block over those arrays, a list of small steps, each a pure function; forward() runs them in the clear,
party.py under MPC. x is one sequence (T, d), a head axis is written (H, T, .). The nonlinear functions are nonlinear.py's.
"""
import hashlib
import io
import json
import math
import os
from dataclasses import asdict

import numpy as np
import torch

from configurator import configure, die, one_of

try:
    import jax.numpy as jnp
except ImportError:
    die("jax is missing: it comes with spu, which needs Python 3.10 or 3.11; then pip install -r requirements.txt")
from model import GPT, load_checkpoint
from private.nonlinear import EXACT, LOGIT_UNIT, by_rows, only

ckpt = "out/ckpt.pt"  # a checkpoint of train.py
out = "out/private"   # folder for server.npz, public.json and, if the embedding is public, embedding.npz
embedding = "private" # private | public, which gives the client token and position embeddings, and saves looking them up in private


# ------------------------------------------------------------------------------------------------ folding
def matrix(linear):
    """(W, b) of a torch Linear as float64 arrays with y = x W + b; norms resolved; b is zeros if it has none."""
    W = linear.weight.detach().double().T
    b = torch.zeros(W.shape[1], dtype=torch.float64) if linear.bias is None else linear.bias.detach().double()
    return W.numpy(), b.numpy()


def after_norm(ln, W, b):
    """(W, b) that take a LayerNorm's bare normalised rows in place of its output; as they are if `ln` is the identity."""
    if isinstance(ln, torch.nn.Identity):
        return W, b
    gain, shift = gain_and_shift(ln)
    return gain[:, None] * W, shift @ W + b


def gain_and_shift(ln):
    """A LayerNorm's two vectors (d,) as float64 arrays."""
    return ln.weight.detach().double().numpy(), ln.bias.detach().double().numpy()


def ffn_matrix(block, c):
    """(W, b) of (1/alpha) FFN(n) = n W + b, one d x d matrix whether it was trained fused or not; n: what follows a bare LayerNorm, if there is one."""
    alpha = block.alpha.item() if c.learnable_ffn_scale else 1.0
    W, b = matrix(block.ffn.w_ffn if c.fuse_ffn else block.ffn.w_in)
    if not c.fuse_ffn:
        W_out, b_out = matrix(block.ffn.w_out)
        W, b = W @ W_out, b @ W_out + b_out
    return after_norm(block.ln_2, W / alpha, b / alpha)


def bases(blocks, c):
    """
    R_l (d, d), L + 1 of them: in a softmax-only model the residual stream before block l is written x = u R_l, and with
    R_l+1 = R_l W', W' = beta I + W_ffn / alpha, the FFN u R_l -> u R_l W' leaves u as it is. R_L/2 = I, so that neither end is far
    from it. None if some R_l or its inverse stretches a thousandfold, as rounding would show: the FFN is then run.
    """
    products = [np.eye(c.n_embd)]
    for block in blocks:
        products.append(products[-1] @ ((block.beta.item() if c.learnable_ffn_scale else 1.0) * np.eye(c.n_embd) + ffn_matrix(block, c)[0]))
    try:
        R = [np.linalg.solve(products[len(blocks) // 2], product) for product in products]
        far = max(np.linalg.norm(r, 2) for pair in zip(R, map(np.linalg.inv, R)) for r in pair)
        return R if far < 1e3 else None
    except np.linalg.LinAlgError:
        return None


def fold_block(block, c, R=None, R_next=None):
    """One block's arrays: "qkv" and "o", each W with its b, all there is of a softmax-only block in bases R, R_next; else also
    "ffn", or "in" and "up", and "beta"; "inverse_t" (H, T, 1) where there is a temperature per position."""
    d = c.n_embd
    W, b = matrix(block.attn.qk)
    Wv, bv = matrix(block.attn.v)
    scale = np.repeat([1 / (LOGIT_UNIT * math.sqrt(d // c.n_head)), 1.0], d)  # over Q's columns alone
    inverse_t = 1 / block.attn.temperature.detach().double().numpy() if c.learnable_temperature else None  # (H, T) or (H, 1)
    if c.learnable_temperature and c.temperature_per_head:
        scale[:d] *= np.repeat(inverse_t, d // c.n_head)
    W, b = after_norm(block.ln_1, np.hstack((W * scale, Wv)), np.hstack((b * scale, bv)))
    o, bo = matrix(block.attn.o)
    b, bo = b * (np.arange(3 * d) < d), bo + b[2 * d:] @ o
    arrays = {"qkv": (W, b), "o": (o, bo)}
    if c.learnable_temperature and not c.temperature_per_head:
        arrays["inverse_t"] = (inverse_t[:, :, None],)
    if R is not None:  # x W = u (R W); x + y o + bo, then b after W', is u + (y o + bo) / R + b / R_next
        inverse = np.linalg.inv(R)
        arrays |= {"qkv": (R @ W, b), "o": (o @ inverse, bo @ inverse + ffn_matrix(block, c)[1] @ np.linalg.inv(R_next))}
        return named(arrays)
    if c.activation != "none":
        alpha = block.alpha.item() if c.learnable_ffn_scale else 1.0
        W_out, b_out = matrix(block.ffn.w_out)
        arrays |= {"in": after_norm(block.ln_2, *matrix(block.ffn.w_in)), "up": (W_out / alpha, b_out / alpha)}
    else:
        arrays["ffn"] = ffn_matrix(block, c)
    if c.learnable_ffn_scale:
        arrays["beta"] = (np.array(block.beta.item()),)
    return named(arrays)


def named(pairs):
    """{name: (W, b) or (W,)} as {name: W, name_b: b}."""
    return {name + suffix: a for name, pair in pairs.items() for suffix, a in zip(("", "_b"), pair)}


def export(model, dtype=np.float32):
    """
    A trained GPT as named arrays: "wte" (V, d), "wpe" (T, d), "head" (d, V), "head_b" (V,), and for each block "blocks.0.qkv" and so on.
    """
    c, wte, wpe = model.config, *(e.weight.detach().double().numpy() for e in (model.wte, model.wpe))
    head, head_b = after_norm(model.ln_f, wte.T, np.zeros(len(wte)))
    R = None if c.use_layernorm or c.activation != "none" else bases(model.blocks, c)
    if R:
        first = np.linalg.inv(R[0])
        wte, wpe = wte @ first, wpe @ first
        if not c.final_layernorm:
            head = R[-1] @ head
    blocks = [fold_block(block, c, *(R[i:i + 2] if R else ())) for i, block in enumerate(model.blocks)]
    top = {"basis": R[-1]} if R and c.final_layernorm else {}  # a LayerNorm wants x itself, x = u R_L
    return flat({"wte": wte, "wpe": wpe, "head": head, "head_b": head_b, **top}, blocks, dtype)


def flat(arrays, blocks, dtype):
    """
    One dict of the arrays and of each block's, as server.npz holds them. Biases that are zero throughout (a softmax-only
    model has one on Q alone) are left out.
    """
    arrays = arrays | {f"blocks.{i}.{name}": a for i, block in enumerate(blocks) for name, a in block.items()}
    return {name: np.asarray(a, dtype) for name, a in arrays.items() if not name.endswith("_b") or np.any(a)}


def of_block(arrays, i):
    """Block i's own among the arrays, or their shapes: "qkv" for "blocks.i.qkv"."""
    return {name.split(".")[2]: a for name, a in arrays.items() if name.startswith(f"blocks.{i}.")}


# ------------------------------------------------------------------------------------------------ the forward pass
def one_of_each(a, b):
    """A comparison, a product by entries and matrix products of a client's and a server's (2, 2): the first of each make the engine's keys, the set-up."""
    return jnp.maximum(((a + b) * (a + b)) @ (a + b), a) + (a + b) @ b


def matmul(x, W, *b):
    """x W + b."""
    y = by_rows(jnp.matmul)(x, W)
    return y + b[0] if b else y


def weights_in(arrays):
    """name -> the inputs that stand for it: the matrix, and its bias if it has one."""
    return lambda name: [f"W.{name}"] + [f"W.{name}_b"] * (name + "_b" in arrays)


def attention_steps(c, block, f, n):
    """
    Y = softmax(Q K^T) V, steps to "y" (T, d), from the rows n. One key fewer than there are, as a row's weights sum to 1:
    A V = A' (V' - v) + v, the last key's v left out of V' and its column of A'. At T = 128 SPU then takes the keys 64 at a time in place of
    128, which halves its automorphisms: in GPT-2 small 4.2 s for 6.4 a layer, and 15.3 MB for 10.9; at 256 and 512 nothing changes.
    """
    W, d = weights_in(block), c.n_embd

    def heads(qkv, i):  # (T, 3 d) -> the i-th of Q, K, V, (H, T, d_k)
        return qkv.reshape(len(qkv), 3, c.n_head, -1)[:, i].transpose(1, 0, 2)

    def mixed(e, qkv):
        v = heads(qkv, 2)
        return e[..., :-1] @ (v[:, :-1] - v[:, -1:])

    def normalised(y, e, qkv):  # after the product: T x d quotients, not H x T x T
        return unheads(y * f.reciprocal(e.sum(-1, keepdims=True), c.block_size) + heads(qkv, 2)[:, -1:])

    temperature = [("temperature", "qkv", lambda qkv, t: jnp.hstack((unheads(heads(qkv, 0) * t), qkv[:, d:])), ["qkv", "W.inverse_t"])]
    return [("matmul", "qkv", matmul, [n] + W("qkv")), *temperature * ("inverse_t" in block),
            ("matmul", "s", lambda qkv: heads(qkv, 0) @ heads(qkv, 1).transpose(0, 2, 1), ["qkv"]),
            ("softmax", "e", f.exponentials, ["s"]),
            ("matmul", "y", mixed, ["e", "qkv"]),
            ("softmax", "y", normalised, ["y", "e", "qkv"])]


def last_attention_steps(c, block, f, n):
    """
    The same of the last block, of which a next token needs one row: "y" and "row x" (1, d). "last" (1, T) is 1 at that row, "seen" (1, T)
    up to it; which one it is stays the client's secret. Keys and values are not made: a head's q k_j = (q W_K^T) n_j and
    sum_j A_j v_j = (sum_j A_j n_j) W_V take a product by a matrix for each head, in place of one for each position.
    """
    W, d, H = weights_in(block), c.n_embd, c.n_head
    own = np.repeat(np.eye(H), d // H, 1) > 0.5  # (H, d), each head's columns

    def normalised(y, e):
        return (y * f.reciprocal(e.sum(-1), c.block_size)).reshape(1, d)

    temperature = [("temperature", "q", lambda q, t, last: q * jnp.repeat((last @ t).ravel(), d // H), ["q", "W.inverse_t", "last"])]
    return [*(("matmul", name, jnp.matmul, ["last", name[4:]]) for name in dict.fromkeys(("row " + n, "row x"))),
            ("matmul", "q", lambda n, *w: matmul(n, *(a[..., :d] for a in w)), ["row " + n] + W("qkv")), *temperature * ("inverse_t" in block),
            ("matmul", "z", lambda q, w: only(own, q) @ w[:, d:2 * d].T, ["q", "W.qkv"]),
            ("matmul", "s", lambda z, n: (z @ n.T)[:, None], ["z", n]),
            ("softmax", "e", f.row_exponentials, ["s", "seen"]),
            ("matmul", "z", lambda e, n: e[:, 0] @ n, ["e", n]),
            ("matmul", "y", lambda z, w: only(own, z @ w[:, 2 * d:]).sum(0).reshape(H, -1), ["z", "W.qkv"]),
            ("softmax", "y", normalised, ["y", "e"])]


def block_steps(c, block, f, last=False):
    """
    One block as steps (kind, output, function, inputs): outputs and inputs are names of values, a name that starts with "W."
    being one of the block's arrays. Splitting costs nothing under MPC, and shows what each kind of operation costs.
    """
    W, n = weights_in(block), "n" if c.use_layernorm else "x"
    norm = [("LayerNorm", "n", f.normalise, ["x"])] * c.use_layernorm
    steps = norm + (last_attention_steps if last else attention_steps)(c, block, f, n)
    steps += [("matmul", "x", lambda x, y, *w: x + matmul(y, *w), ["row x" if last else "x", "y"] + W("o"))]
    if "ffn" not in block and "in" not in block:
        return steps
    steps, after = steps + norm, W("ffn")
    if "in" in block:
        act = ("GELU" if c.use_gelu else "ReLU", "h", f.activation[c.activation], ["h"])
        steps += [("matmul", "h", matmul, [n] + W("in")), act]
        n, after = "h", W("up")
    if "beta" in block:
        return steps + [("matmul", "x", lambda x, n, beta, *w: beta * x + matmul(n, *w), ["x", n, "W.beta"] + after)]
    return steps + [("matmul", "x", lambda x, n, *w: x + matmul(n, *w), ["x", n] + after)]


def unheads(y):
    """(H, T, d_k) -> (T, d)."""
    return y.transpose(1, 0, 2).reshape(y.shape[1], -1)


def logits(x, W, *b):
    """x W + b. Of many rows 2048 words at a time: SPU's encoding of 128 x 768 x 50257 at once takes more than 24 GB."""
    y = jnp.hstack([matmul(x, W[:, i:i + 2048]) for i in range(0, W.shape[1], 2048)]) if len(x) > 1 else x @ W
    return y + b[0] if b else y


def head_steps(c, arrays, f):
    """The logits of rows x."""
    n = "n" if c.final_layernorm else "x"
    basis = [("head", "x", matmul, ["x", "W.basis"])] if "basis" in arrays else []
    return basis + [("head", "n", f.normalise, ["x"])] * c.final_layernorm + [("head", "logits", logits, [n] + weights_in(arrays)("head"))]


def run(steps, arrays, values):
    """Run steps in the clear: `values` is extended by every step's output."""
    for _, output, function, inputs in steps:
        values[output] = function(*(arrays[name[2:]] if name.startswith("W.") else values[name] for name in inputs))
    return values


def forward(arrays, c, one_hot, f=EXACT, steps=(block_steps, head_steps), row=None):
    """
    Logits (T, V) of one sequence, or (1, V) of position `row`. one_hot: (T, V), row i the token at position i; c: the GPTConfig;
    f: EXACT or SECURE, whose square() means what it says only where exp(x) is (1 + x/2)^2; steps: those that `arrays` were exported for;
    row: with block_steps alone.
    """
    T = len(one_hot)
    values = {"x": one_hot @ arrays["wte"] + arrays["wpe"][:T]}
    if row is not None:
        values |= {"last": np.eye(T, dtype=np.float32)[row:row + 1], "seen": np.tri(T, dtype=np.float32)[row:row + 1]}
    for i in range(c.n_layer):
        block = {k: v[:, :T] if k == "inverse_t" else v for k, v in of_block(arrays, i).items()}
        run(steps[0](c, block, f, row is not None and i == c.n_layer - 1), block, values)
    return run(steps[1](c, arrays, f), arrays, values)["logits"]


# ------------------------------------------------------------------------------------------------ files
def load_weights(path):
    """The arrays of a server.npz. ValueError if it is missing, damaged or something else."""
    try:
        with np.load(path, allow_pickle=False) as f:
            return dict(f)
    except Exception as e:  # a zip that breaks does so in many ways
        raise ValueError(f"{path} is not a whole server.npz ({type(e).__name__}): make it again with python pi_export.py") from e


def load_public(path):
    """The dict of a public.json. ValueError if it isn't one, OSError if it can't be read."""
    try:
        with open(path) as f:
            public = json.load(f)
    except (OSError, ValueError) as e:
        raise ValueError(f"can't read {path}: {e}") from e
    if not {"config", "shapes", "tokenizer", "embedding"} <= set(public):
        raise ValueError(f"{path} is not a public.json: make it with python pi_export.py")
    return public


def load_server(folder):
    """(public, weights) of a server's folder. ValueError if they are not of one model."""
    public = load_public(os.path.join(folder, "public.json"))
    weights = load_weights(os.path.join(folder, "server.npz"))
    if {k: list(v.shape) for k, v in weights.items()} != public["shapes"]:
        raise ValueError(f"{folder}/server.npz and public.json are not of one model: run python pi_export.py again")
    return public, weights


def load_embedding(folder, public):
    """The client's {"wte": (V, d), "wpe": (T, d)} of a folder's embedding.npz. ValueError if it isn't what public.json names."""
    path = os.path.join(folder, "embedding.npz")
    try:
        with open(path, "rb") as f:
            if hashlib.sha256(data := f.read()).hexdigest() != public["embedding"]:
                raise ValueError("another model's, or damaged")
        with np.load(io.BytesIO(data), allow_pickle=False) as f:
            return dict(f)
    except (OSError, ValueError) as e:
        raise ValueError(f"no {path} that belongs to public.json ({e}): python pi_export.py --embedding=public makes both, copy both") from e


def write(model, tokenizer, folder, export=export, embedding="private"):
    """server.npz, public.json and, if the embedding is public, embedding.npz, of a model, its arrays made by `export`. Returns server.npz's."""
    arrays, path = export(model), os.path.join(folder, "embedding.npz")
    public = {"config": asdict(model.config), "shapes": {name: a.shape for name, a in arrays.items()}, "tokenizer": tokenizer, "embedding": "private"}
    os.makedirs(folder, exist_ok=True)
    write_whole(os.path.join(folder, "server.npz"), lambda f: np.savez(f, **arrays))
    if embedding == "public":
        np.savez(data := io.BytesIO(), wte=arrays["wte"], wpe=arrays["wpe"])
        write_whole(path, lambda f: f.write(data.getvalue()))
        public["embedding"] = hashlib.sha256(data.getvalue()).hexdigest()
    elif os.path.exists(path):  # an earlier export's
        os.remove(path)
    write_whole(os.path.join(folder, "public.json"), lambda f: f.write(json.dumps(public).encode()))
    return arrays


def write_whole(path, put):
    """Have put(f) write a binary file under a temporary name and rename it: path is never half a file. OSError names path."""
    temporary = path + ".tmp"
    try:
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as f:
            put(f)
        os.replace(temporary, path)
    except OSError as e:
        if os.path.exists(temporary):
            os.remove(temporary)
        raise OSError(f"can't write {path}: {e.strerror or e}") from e


def main():
    configure(globals())
    one_of(globals(), embedding=("private", "public"))
    try:
        checkpoint = load_checkpoint(ckpt)
        model = GPT.from_checkpoint(checkpoint)
        arrays = write(model, checkpoint.get("tokenizer"), os.path.expanduser(out), embedding=embedding)
    except (OSError, ValueError) as e:
        die(e)
    print(f"{model.config.name}: {sum(p.numel() for p in model.parameters()):,} parameters in {ckpt} -> {len(arrays)} arrays of "
          f"{sum(a.size for a in arrays.values()):,} numbers (the embedding twice, as table and as head) in {out}/server.npz, shapes and tokenizer in {out}/public.json"
          + f"; for the client also {out}/embedding.npz" * (embedding == "public"))


if __name__ == "__main__":
    main()
