"""
What a private inference engine should see of a model: few float32 matrices, and a forward pass of pure functions.

    python pi_export.py --ckpt=out/ckpt.pt --out=out/private

writes out/private/server.npz, the weights, which only the server may hold, and out/private/public.json, which both
parties hold: the configuration, the shape of every array and the tokenizer, nothing that was learned from data but it.

Under MPC a matrix product costs by its shape and every product of two secrets ends in a truncation, so whatever algebra
can do in the clear is done here, once, in float64:

- weight norm and spectral norm            -> the plain weight they stand for
- LayerNorm's gain and bias                -> the next matrix: (n g + b) W = n (diag(g) W) + b W
- 1 / sqrt(d_k), the unit of the logits, and a temperature per head -> W_Q   (the exponential below wants logits in twelves)
- W_in W_out, where nothing is between     -> one d x d matrix, fused in training or not
- alpha, beta and the residual (eq. 8)     -> X_out = X_SA W', W' = beta I + W_ffn / alpha   (no LayerNorm, no activation)
- the output projection, in such a model   -> X_out = [X, Y] [[W'], [W_O W']]: nothing nonlinear stands between two
  softmaxes but one matrix

The temperature per query position (eq. 9) does not fold: row i of Q is divided by t_i, which no matrix on the right of
X does. Dividing Q, T x d numbers, is the cheapest exact place; the logits are H x T x T.

program() is the model over those arrays, a list of small steps, each a pure function; forward() runs it in the clear,
bench_spu.py under MPC. x is one sequence (T, d), a head axis is written (H, T, .). The nonlinear functions come twice:
EXACT, and SECURE as an engine computes them cheaply, with the identity each rests on. Prices are bytes per element, both
directions, of SPU's Cheetah at 18 fraction bits: truncation 3, choice by a secret bit 16, comparison 82, square 147, product
of secrets 221.
"""
import json
import math
import os
from dataclasses import asdict
from functools import partial

import numpy as np
import torch

from configurator import configure, die

try:
    import jax
    import jax.numpy as jnp
except ImportError:
    die("jax is missing: it comes with spu, which needs Python 3.10 or 3.11; then pip install -r requirements.txt")
from model import GPT, load_checkpoint

ckpt = "out/ckpt.pt"  # a checkpoint of train.py
out = "out/private"   # folder for server.npz and public.json


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


def fold_block(block, c):
    """One block's arrays: q, k, v, then "out" in a softmax-only model, else "o", "ffn" or "in" and "up", each W with its b."""
    d = c.n_embd
    W, b = matrix(block.attn.qk)
    Wv, bv = matrix(block.attn.v)
    scale = np.repeat([1 / (LOGIT_UNIT * math.sqrt(d // c.n_head)), 1.0], d)  # over Q's columns alone
    inverse_t = 1 / block.attn.temperature.detach().double().numpy() if c.learnable_temperature else None  # (H, T) or (H, 1)
    if c.learnable_temperature and c.temperature_per_head:
        scale[:d] *= np.repeat(inverse_t, d // c.n_head)
    arrays = {"qkv": after_norm(block.ln_1, np.hstack((W * scale, Wv)), np.hstack((b * scale, bv)))}
    if c.learnable_temperature and not c.temperature_per_head:
        arrays["inverse_t"] = (inverse_t[:, :, None],)
    o, bo = matrix(block.attn.o)
    alpha, beta = (block.alpha.item(), block.beta.item()) if c.learnable_ffn_scale else (1.0, 1.0)
    if c.use_gelu or c.use_relu:
        W_out, b_out = matrix(block.ffn.w_out)
        arrays |= {"o": (o, bo), "in": after_norm(block.ln_2, *matrix(block.ffn.w_in)), "up": (W_out / alpha, b_out / alpha)}
    else:
        W, b = matrix(block.ffn.w_ffn if c.fuse_ffn else block.ffn.w_in)
        if not c.fuse_ffn:
            W_out, b_out = matrix(block.ffn.w_out)
            W, b = W @ W_out, b @ W_out + b_out
        W, b = after_norm(block.ln_2, W / alpha, b / alpha)
        if c.use_layernorm:
            arrays |= {"o": (o, bo), "ffn": (W, b)}
        else:
            W = beta * np.eye(d) + W
            arrays["out"] = (np.vstack((W, o @ W)), bo @ W + b)
    if "out" not in arrays and c.learnable_ffn_scale:
        arrays["beta"] = (np.array(beta),)
    return named(arrays)


def named(pairs):
    """{name: (W, b) or (W,)} as {name: W, name_b: b}."""
    return {name + suffix: a for name, pair in pairs.items() for suffix, a in zip(("", "_b"), pair)}


def export(model, dtype=np.float32):
    """
    A trained GPT as a tree of arrays: {"wte" (V, d), "wpe" (T, d), "head" (d, V), "head_b" (V,), "blocks": [L dicts]}.
    Biases that are zero throughout (models without LayerNorm and biases have them on Q and K alone) are left out.
    """
    wte = model.wte.weight.detach().double().numpy()
    head, head_b = after_norm(model.ln_f, wte.T, np.zeros(len(wte)))
    tree = {"wte": wte, "wpe": model.wpe.weight.detach().double().numpy(), "head": head, "head_b": head_b,
            "blocks": [fold_block(block, model.config) for block in model.blocks]}
    return jax.tree.map(lambda a: a.astype(dtype), {**drop_zero_biases(tree), "blocks": [drop_zero_biases(b) for b in tree["blocks"]]})


def drop_zero_biases(arrays):
    return {name: a for name, a in arrays.items() if not (name.endswith("_b") and not a.any())}


# ------------------------------------------------------------------------------------------------ nonlinear functions, exact
def normalise(x, square=lambda x: x * x):
    """LayerNorm without gain and bias, rows of (T, d)."""
    x = x - x.mean(-1, keepdims=True)
    return x * jax.lax.rsqrt(square(x).mean(-1, keepdims=True) + 1e-5)


def exponentials(s):
    """exp(logit - row maximum) of the causal logits s (H, T, T), given in units of LOGIT_UNIT; 0 above the diagonal."""
    s = jnp.where(np.tri(s.shape[-1], dtype=bool), LOGIT_UNIT * s, -jnp.inf)
    return jnp.exp(s - s.max(-1, keepdims=True))


# ------------------------------------------------------------------------------------------------ and as MPC affords them
def square(w):
    """w^2 for 147 bytes instead of a product's 221: with one iteration SPU's exp(x) is (1 + x/2)^2, and only exp lowers to the cheap square."""
    return jnp.exp(2 * (w - 1))


def causal_row_max(s):
    """Row maxima (H, T, 1) over the causal entries of s (H, T, T): a tree, all comparisons of a level in one call, none above the diagonal."""
    H, T, width = *s.shape[:2], s.shape[2]
    while width > 1:
        half = (width + 1) // 2
        row, left = np.nonzero(np.arange(T)[:, None] >= half + np.arange(width - half))  # pairs whose right half is not in the future
        larger = jnp.maximum(s[:, row, left], s[:, row, left + half])
        place = np.arange(T)[:, None] * width + np.arange(half)
        place[row, left] = T * width + np.arange(len(row))
        s, width = jnp.concatenate((s.reshape(H, -1), larger), 1)[:, place.ravel()].reshape(H, T, half), half
    return s


LOGIT_UNIT = 12.0  # the fit below holds on [-24, 0], which is [-2, 0] in this unit
FIT_Q = (0.61885925, -0.86263901, -0.51951347, 0.22931862, 0.44800865, 0.43307482, 0.28954129, 1.0338006)
FIT_E = (0.06264968, -0.10495227, -0.094475915, -0.046323682, -0.031739823, -0.068414771)


def secure_exp(u):
    """
    exp(12 (u - 1)) on [-1, 1] by four squares of linear combinations, least-squares fit, within 1e-3; each combination costs
    one truncation. SPU's own exp takes eight squares and is ten times less exact.
    """
    q, e = FIT_Q, FIT_E
    z1 = square(u)
    z2 = square(z1 + q[0] * u)
    z3 = square(z2 + q[1] * z1 + q[2] * u + q[3])
    z4 = square(z3 + q[4] * z2 + q[5] * z1 + q[6] * u + q[7])
    return e[0] * z4 + e[1] * z3 + e[2] * z2 + e[3] * z1 + e[4] * u + e[5]


def secure_exponentials(s):
    """exponentials() on the causal half alone: T(T+1)/2 entries are packed, exp'ed and put back among zeros. Logits more than 24 below their row's largest count as 24 below."""
    H, T, _ = s.shape
    i, j = np.tril_indices(T)
    e = secure_exp(jnp.maximum((s - causal_row_max(s))[:, i, j], -2.0) + 1)
    place = np.full((T, T), len(i))
    place[i, j] = np.arange(len(i))
    return jnp.concatenate((e, jnp.zeros((H, 1))), 1)[:, place.ravel()].reshape(H, T, T)


def secure_gelu(x):
    """
    GELU(x) = relu(x) + p(|x|): GELU(x) - relu(x) is even and vanishes past 3.3, so one quartic in |x| serves both sides, within 3e-3.
    Two comparisons (the sign also makes |x|), two squares: a quartic is c4 (t^2 + a t)^2 + a quadratic, a = c3 / (2 c4).
    """
    c0, c1, c2, c3, c4 = 0.0003172316654, -0.5316293706, 0.5334585992, -0.1804833714, 0.0204998243
    positive = x > 0
    relu = jnp.where(positive, x, 0.0)
    t, a = 2 * relu - x, c3 / (2 * c4)  # |x| = 2 relu(x) - x
    t2 = square(t)
    return relu + jnp.where(t < 3.3, c4 * square(t2 + a * t) + (c2 - c4 * a * a) * t2 + c1 * t + c0, 0.0)


def secure_argmax(x):
    """Indices (rows,) of the row maxima of x (rows, V): a tree of V - 1 comparisons, each with a choice of the value and of its index."""
    index = jnp.broadcast_to(jnp.arange(x.shape[-1], dtype=jnp.int32), x.shape)
    while (half := x.shape[-1] // 2):
        left = x[:, :half] >= x[:, half:2 * half]
        x, index = (jnp.hstack((jnp.where(left, a[:, :half], a[:, half:2 * half]), a[:, 2 * half:])) for a in (x, index))
    return index[:, 0]


EXACT = dict(normalise=normalise, exponentials=exponentials, gelu=partial(jax.nn.gelu, approximate=False), gelu_tanh=jax.nn.gelu, relu=jax.nn.relu)
SECURE = dict(normalise=lambda x: normalise(x, square), exponentials=secure_exponentials, gelu=secure_gelu, gelu_tanh=secure_gelu, relu=jax.nn.relu)


# ------------------------------------------------------------------------------------------------ the forward pass
def heads(qkv, n_head):
    """(T, 3d) -> q, k, v, each (H, T, d_k)."""
    T, d3 = qkv.shape
    return qkv.reshape(T, 3, n_head, d3 // 3 // n_head).transpose(1, 2, 0, 3)


def matmul(x, W, *b):
    return x @ W + b[0] if b else x @ W


def weights_in(arrays):
    """name -> the inputs that stand for it: the matrix, and its bias if it has one."""
    return lambda name: [f"W.{name}"] + [f"W.{name}_b"] * (name + "_b" in arrays)


def block_steps(c, block, f):
    """
    One block as steps (kind, output, function, inputs): outputs and inputs are names of values, a name that starts with "W."
    being one of the block's arrays. Splitting costs nothing under MPC, and shows what each kind of operation costs.
    """
    W = weights_in(block)

    def norm(x):
        return [("LayerNorm", "n", f["normalise"], [x])] if c.use_layernorm else []

    H, n = c.n_head, "n" if c.use_layernorm else "x"
    steps = norm("x") + [("matmul", "qkv", matmul, [n] + W("qkv"))]
    if "inverse_t" in block:
        steps += [("temperature", "qkv", lambda qkv, t: jnp.hstack((unheads(heads(qkv, H)[0] * t), qkv[:, qkv.shape[1] // 3:])), ["qkv", "W.inverse_t"])]
    steps += [("matmul", "s", lambda qkv: heads(qkv, H)[0] @ heads(qkv, H)[1].transpose(0, 2, 1), ["qkv"]),
              ("softmax", "e", f["exponentials"], ["s"]),
              ("matmul", "y", lambda e, qkv: e @ heads(qkv, H)[2], ["e", "qkv"]),  # normalised after: T x d quotients, not H x T x T
              ("softmax", "y", lambda y, e: unheads(y * (1 / e.sum(-1, keepdims=True))), ["y", "e"])]
    if "out" in block:
        return steps + [("matmul", "x", lambda x, y, *w: matmul(jnp.hstack((x, y)), *w), ["x", "y"] + W("out"))]
    steps += [("matmul", "x", lambda x, y, *w: x + matmul(y, *w), ["x", "y"] + W("o"))] + norm("x")
    last = W("ffn")
    if "in" in block:
        kind = "gelu" if c.use_gelu else "relu"
        steps += [("matmul", "h", matmul, [n] + W("in")),
                  ({"gelu": "GELU", "relu": "ReLU"}[kind], "h", f["gelu_tanh" if c.use_gelu and c.gelu_tanh else kind], ["h"])]
        n, last = "h", W("up")
    if "beta" in block:
        return steps + [("matmul", "x", lambda x, n, beta, *w: beta * x + matmul(n, *w), ["x", n, "W.beta"] + last)]
    return steps + [("matmul", "x", lambda x, n, *w: x + matmul(n, *w), ["x", n] + last)]


def unheads(y):
    """(H, T, d_k) -> (T, d)."""
    return y.transpose(1, 0, 2).reshape(y.shape[1], -1)


def head_steps(c, tree, f):
    """The logits of rows x."""
    n = "n" if c.use_layernorm else "x"
    return [("head", "n", f["normalise"], ["x"])] * c.use_layernorm + [("head", "logits", matmul, [n] + weights_in(tree)("head"))]


def run(steps, arrays, values):
    """Run steps in the clear: `values` is extended by every step's output."""
    for _, output, function, inputs in steps:
        values[output] = function(*(arrays[name[2:]] if name.startswith("W.") else values[name] for name in inputs))
    return values


def forward(tree, c, one_hot, f=EXACT, steps=(block_steps, head_steps)):
    """
    Logits (T, V) of one sequence. one_hot: (T, V), row i the token at position i; c: the GPTConfig; f: EXACT or SECURE,
    whose square() means what it says only where exp(x) is (1 + x/2)^2; steps: those that `tree` was exported for.
    """
    values = {"x": one_hot @ tree["wte"] + tree["wpe"][:len(one_hot)]}
    for block in tree["blocks"]:
        block = {k: v[:, :len(one_hot)] if k == "inverse_t" else v for k, v in block.items()}
        run(steps[0](c, block, f), block, values)
    return run(steps[1](c, tree, f), tree, values)["logits"]


# ------------------------------------------------------------------------------------------------ as one would write it first
def plain_export(model, dtype=np.float32):
    """The same model with nothing folded: every matrix as it was trained (norms resolved), what export() is measured against."""
    c = model.config

    def block(block):
        arrays = {name: matrix(getattr(block.attn, name)) for name in ("qk", "v", "o")}
        arrays |= {name: matrix(getattr(block.ffn, name)) for name in (["w_ffn"] if c.fuse_ffn else ["w_in", "w_out"])}
        if c.use_layernorm:
            arrays |= {name: gain_and_shift(getattr(block, name)) for name in ("ln_1", "ln_2")}
        if c.learnable_temperature:
            arrays["inverse_t"] = (1 / block.attn.temperature.detach().numpy()[:, :, None],)
        if c.learnable_ffn_scale:
            arrays |= {"inverse_alpha": (np.array(1 / block.alpha.item()),), "beta": (np.array(block.beta.item()),)}
        return named(arrays)

    top = {"ln_f": gain_and_shift(model.ln_f)} if c.use_layernorm else {}
    wte = model.wte.weight.detach().numpy()
    tree = {"wte": wte, "wpe": model.wpe.weight.detach().numpy(), "head": wte.T, **named(top), "blocks": [drop_zero_biases(block(b)) for b in model.blocks]}
    return jax.tree.map(lambda a: np.asarray(a, dtype), tree)


def layer_norm(x, gain, *shift):
    return normalise(x) * gain + sum(shift)


def plain_block_steps(c, block, f=None):
    """block_steps() over plain_export()'s arrays, with jax.nn's functions and the formulas of the paper as they stand."""
    W, H, n = weights_in(block), c.n_head, "n" if c.use_layernorm else "x"

    def norm(name):
        return [("LayerNorm", "n", layer_norm, ["x"] + W(name))] * c.use_layernorm

    def logits(qk, *inverse_t):
        q, k = qk.reshape(len(qk), 2, H, -1).transpose(1, 2, 0, 3)
        return (q * inverse_t[0] if inverse_t else q) @ k.transpose(0, 2, 1) / math.sqrt(q.shape[-1])

    def softmax(s):  # SPU's exp makes garbage of -inf, so that masked entries go after it
        return jax.nn.softmax(s, where=np.tri(s.shape[-1], dtype=bool))

    steps = norm("ln_1") + [("matmul", "qk", matmul, [n] + W("qk")), ("matmul", "v", matmul, [n] + W("v")),
                            ("matmul", "s", logits, ["qk"] + ["W.inverse_t"] * c.learnable_temperature), ("softmax", "a", softmax, ["s"]),
                            ("matmul", "y", lambda a, v: unheads(a @ v.reshape(len(v), H, -1).transpose(1, 0, 2)), ["a", "v"]),
                            ("matmul", "x", lambda x, y, *w: x + matmul(y, *w), ["x", "y"] + W("o"))] + norm("ln_2")
    if c.fuse_ffn:
        steps += [("matmul", "h", matmul, [n] + W("w_ffn"))]
    else:
        act = [("GELU", "h", partial(jax.nn.gelu, approximate=c.gelu_tanh), ["h"])] * c.use_gelu + [("ReLU", "h", jax.nn.relu, ["h"])] * c.use_relu
        steps += [("matmul", "h", matmul, [n] + W("w_in")), *act, ("matmul", "h", matmul, ["h"] + W("w_out"))]
    if c.learnable_ffn_scale:
        return steps + [("matmul", "x", lambda x, h, a, b: b * x + a * h, ["x", "h", "W.inverse_alpha", "W.beta"])]
    return steps + [("matmul", "x", lambda x, h: x + h, ["x", "h"])]


def plain_head_steps(c, tree, f=None):
    n, W = "n" if c.use_layernorm else "x", weights_in(tree)
    return [("head", "n", layer_norm, ["x"] + W("ln_f"))] * c.use_layernorm + [("head", "logits", matmul, [n] + W("head"))]


# ------------------------------------------------------------------------------------------------ files
def flatten(tree):
    """{"wte": ..., "blocks.0.qkv": ...}: the names under which server.npz holds the arrays."""
    return {**{k: v for k, v in tree.items() if k != "blocks"},
            **{f"blocks.{i}.{k}": v for i, block in enumerate(tree["blocks"]) for k, v in block.items()}}


def unflatten(arrays):
    tree = {k: v for k, v in arrays.items() if not k.startswith("blocks.")}
    tree["blocks"] = [{} for _ in range(1 + max(int(k.split(".")[1]) for k in arrays if k.startswith("blocks.")))]
    for k, v in arrays.items():
        if k.startswith("blocks."):
            _, i, name = k.split(".")
            tree["blocks"][int(i)][name] = v
    return tree


def load_weights(path):
    """The tree of a server.npz. ValueError if it is missing, damaged or something else."""
    try:
        with np.load(path, allow_pickle=False) as f:
            return unflatten({name: f[name] for name in f.files})
    except Exception as e:  # a zip that breaks does so in many ways
        raise ValueError(f"{path} is not a whole server.npz ({type(e).__name__}): make it again with python pi_export.py") from e


def write(model, tokenizer, folder, export=export):
    """server.npz and public.json of a model, its arrays made by `export`, into a folder. Returns the arrays written, flat."""
    arrays = flatten(export(model))
    public = {"config": asdict(model.config), "shapes": {name: a.shape for name, a in arrays.items()}, "tokenizer": tokenizer}
    os.makedirs(folder, exist_ok=True)
    write_whole(os.path.join(folder, "server.npz"), lambda f: np.savez(f, **arrays))
    write_whole(os.path.join(folder, "public.json"), lambda f: f.write(json.dumps(public).encode()))
    return arrays


def write_whole(path, put):
    """Have put(f) write a binary file under a temporary name and rename it: path is never half a file."""
    with open(path + ".tmp", "wb") as f:
        put(f)
    os.replace(path + ".tmp", path)


def main():
    configure(globals())
    try:
        checkpoint = load_checkpoint(ckpt)
        model = GPT.from_checkpoint(checkpoint)
        arrays = write(model, checkpoint.get("tokenizer"), out)
    except (OSError, ValueError) as e:
        die(e)
    print(f"{model.config.name}: {sum(p.numel() for p in model.parameters()):,} parameters in {ckpt} -> {len(arrays)} arrays of "
          f"{sum(a.size for a in arrays.values()):,} numbers (embedding and head apart) in {out}/server.npz, shapes and tokenizer in {out}/public.json")


if __name__ == "__main__":
    main()
