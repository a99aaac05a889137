"""
The baseline of private inference: the same model under MPC as one would write it first, with jax.nn's functions, the formulas of
the paper as they stand, and nothing folded. What pi_export.py's forms are measured against (bench_spu.py --plain=True or --baseline=True).
"""
import math
from functools import partial

import jax
import numpy as np

from private.nonlinear import normalise
from pi_export import flat, gain_and_shift, logits, matmul, matrix, named, unheads, weights_in


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

    top = {"ln_f": gain_and_shift(model.ln_f)} if c.final_layernorm else {}
    wte = model.wte.weight.detach().numpy()
    return flat({"wte": wte, "wpe": model.wpe.weight.detach().numpy(), "head": wte.T, **named(top)}, map(block, model.blocks), dtype)


def layer_norm(x, gain, *shift):
    return normalise(x) * gain + sum(shift)


def plain_block_steps(c, block, f=None, last=False):
    """block_steps() over plain_export()'s arrays, with jax.nn's functions and the formulas of the paper as they stand; the last as the others."""
    W, H, n = weights_in(block), c.n_head, "n" if c.use_layernorm else "x"

    def norm(name):
        return [("LayerNorm", "n", layer_norm, ["x"] + W(name))] * c.use_layernorm

    def scores(qk, *inverse_t):
        q, k = qk.reshape(len(qk), 2, H, -1).transpose(1, 2, 0, 3)
        return (q * inverse_t[0] if inverse_t else q) @ k.transpose(0, 2, 1) / math.sqrt(q.shape[-1])

    def softmax(s):  # SPU's exp makes garbage of -inf, so that masked entries go after it
        return jax.nn.softmax(s, where=np.tri(s.shape[-1], dtype=bool))

    steps = norm("ln_1") + [("matmul", "qk", matmul, [n] + W("qk")), ("matmul", "v", matmul, [n] + W("v")),
                            ("matmul", "s", scores, ["qk"] + ["W.inverse_t"] * c.learnable_temperature), ("softmax", "a", softmax, ["s"]),
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


def plain_head_steps(c, arrays, f=None):
    n, W = "n" if c.final_layernorm else "x", weights_in(arrays)
    return [("head", "n", layer_norm, ["x"] + W("ln_f"))] * c.final_layernorm + [("head", "logits", logits, [n] + W("head"))]
