"""
What a private inference engine should see of a model: few float32 matrices, and a forward pass of pure functions.

    python pi_export.py --ckpt=out/ckpt.pt --out=out/private

writes out/private/server.npz, the weights, which only the server may hold, and out/private/public.json, which both
parties hold: the configuration, the shape of every array and the tokenizer, nothing that was learned from data but it.

Under MPC a matrix product costs by its shape and every product of two secrets ends in a truncation, so whatever algebra
can do in the clear is done here, once, in float64:

- weight norm and spectral norm            -> the plain weight they stand for
- LayerNorm's gain and bias                -> the next matrix: (n g + b) W = n (diag(g) W) + b W
- 1 / sqrt(d_k)                            -> W_Q
- W_in W_out, where nothing is between     -> one d x d matrix, fused in training or not
- alpha, beta and the residual (eq. 8)     -> X_out = X_SA W', W' = beta I + W_ffn / alpha   (no LayerNorm, no activation)
- the output projection, in such a model   -> X_out = [X, Y] [[W'], [W_O W']]: nothing nonlinear stands between two
  softmaxes but one matrix

The temperature per query position (eq. 9) does not fold: row i of Q is divided by t_i, which no matrix on the right of
X does. Dividing Q, T x d numbers, is the cheapest exact place; the logits are H x T x T.

forward() is the model over those arrays; x is one sequence (T, d), a head axis is written (H, T, .).
"""
import json
import math
import os

import jax
import jax.numpy as jnp
import numpy as np
import torch

from configurator import configure, die
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
    gain, shift = ln.weight.detach().double().numpy(), ln.bias.detach().double().numpy()
    return gain[:, None] * W, shift @ W + b


def fold_block(block, c):
    """One block's arrays: q, k, v, then "out" in a softmax-only model, else "o", "ffn" or "in" and "up", each W with its b."""
    d = c.n_embd
    W, b = matrix(block.attn.qk)
    Wv, bv = matrix(block.attn.v)
    scale = np.repeat([1 / math.sqrt(d // c.n_head), 1.0], d)  # over Q's columns alone
    arrays = {"qkv": after_norm(block.ln_1, np.hstack((W * scale, Wv)), np.hstack((b * scale, bv)))}
    if c.learnable_temperature:
        arrays["inverse_t"] = (1 / block.attn.temperature.detach().double().numpy()[:, :, None],)
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
    return {name + suffix: a for name, pair in arrays.items() for suffix, a in zip(("", "_b"), pair)}


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


# ------------------------------------------------------------------------------------------------ the forward pass
def affine(arrays, name, x):
    y = x @ arrays[name]
    return y + arrays[name + "_b"] if name + "_b" in arrays else y


def normalise(x):
    """LayerNorm without gain and bias, rows of (T, d)."""
    x = x - x.mean(-1, keepdims=True)
    return x / jnp.sqrt((x * x).mean(-1, keepdims=True) + 1e-5)


def causal_softmax(s):
    """Softmax over keys j <= i of the logits (H, T, T), eq. 6."""
    return jax.nn.softmax(jnp.where(np.tri(s.shape[-1], dtype=bool), s, -jnp.inf), -1)


def attention(block, c, x):
    """Softmax attention before its output projection: x (T, d) -> Y (T, d). 1/sqrt(d_k) is in W_Q already."""
    T, d = x.shape
    q, k, v = affine(block, "qkv", x).reshape(T, 3, c.n_head, d // c.n_head).transpose(1, 2, 0, 3)
    if "inverse_t" in block:
        q = q * block["inverse_t"][:, :T]
    return (causal_softmax(q @ k.transpose(0, 2, 1)) @ v).transpose(1, 0, 2).reshape(T, d)


def softmax_only_block(block, c, x):
    """No LayerNorm, no activation: everything after the softmax is one matrix on [X, Y]."""
    return affine(block, "out", jnp.concatenate((x, attention(block, c, x)), 1))


def block_with_nonlinearities(block, c, x):
    """Eq. 1 and 8 with LayerNorm, GELU or ReLU, whichever the model keeps."""
    norm = normalise if c.use_layernorm else lambda x: x
    x = x + affine(block, "o", attention(block, c, norm(x)))
    if "ffn" in block:
        y = affine(block, "ffn", norm(x))
    else:
        h = affine(block, "in", norm(x))
        y = affine(block, "up", jax.nn.gelu(h, approximate=c.gelu_tanh) if c.use_gelu else jax.nn.relu(h))
    return block.get("beta", 1.0) * x + y


def forward(tree, c, one_hot):
    """
    Logits (T, V) of one sequence. one_hot: (T, V), row i the token at position i: under MPC the client's secret, and
    the lookup a matrix product with the server's. c: the GPTConfig.
    """
    x = one_hot @ tree["wte"] + tree["wpe"][:len(one_hot)]
    for block in tree["blocks"]:
        x = (softmax_only_block if "out" in block else block_with_nonlinearities)(block, c, x)
    return affine(tree, "head", normalise(x) if c.use_layernorm else x)


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


def main():
    configure(globals())
    try:
        checkpoint = load_checkpoint(ckpt)
        model = GPT.from_checkpoint(ckpt)
        tree = flatten(export(model))
        os.makedirs(out, exist_ok=True)
        public = {"config": checkpoint["model_config"], "shapes": {name: a.shape for name, a in tree.items()},
                  "tokenizer": checkpoint.get("tokenizer")}
        for name, write in (("server.npz", lambda f: np.savez(f, **tree)), ("public.json", lambda f: f.write(json.dumps(public).encode()))):
            with open(os.path.join(out, name + ".tmp"), "wb") as f:
                write(f)
            os.replace(f.name, os.path.join(out, name))
    except (OSError, ValueError) as e:
        die(e)
    before, after = (sum(n) for n in ((p.numel() for p in model.parameters()), (a.size for a in tree.values())))
    print(f"{model.config.name}: {before:,} parameters in {ckpt} -> {len(tree)} arrays of {after:,} numbers "
          f"(embedding and head apart) in {out}/server.npz, shapes and tokenizer in {out}/public.json")


if __name__ == "__main__":
    main()
