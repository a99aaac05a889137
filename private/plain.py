"""
The baseline of private inference: the same model under MPC as one would write it first, with
jax.nn's functions, the formulas of the paper as they stand, and nothing folded. bench_spu.py
--plain=True or --baseline=True runs it; what pi_export.py and block.py save is measured against it.

Shapes and op() are block.py's.
"""
import math

import jax
import jax.numpy as jnp
import numpy as np

from model import Attention, PositionalAttention
from pi_export import flat, gain_and_shift, matrix, named
from private.block import (activation_kind, add_linear, causal_means, join_heads, linear, logits,
                           mix_by_position)
from private.nonlinear import EXACT


def plain_export(model, dtype=np.float32):
    """The model's arrays with nothing folded: every matrix as it was trained, norms resolved."""
    c = model.config

    def plain_block_arrays(block):
        of_text = isinstance(block.attn, Attention)
        names = ("qk", "v", "o") if of_text else ("v", "o")
        arrays = {name: matrix(getattr(block.attn, name)) for name in names}
        for name in ["w_ffn"] if c.fuse_ffn else ["w_in", "w_out"]:
            arrays[name] = matrix(getattr(block.ffn, name))
        if c.use_layernorm:
            arrays["ln_1"] = gain_and_shift(block.ln_1)
            arrays["ln_2"] = gain_and_shift(block.ln_2)
        if isinstance(block.attn, PositionalAttention):
            arrays["pattern"] = (block.attn.pattern(c.block_size).detach().numpy(),)
        if c.learnable_temperature and of_text:
            arrays["inverse_t"] = (1 / block.attn.temperature.detach().numpy()[:, :, None],)
        if c.learnable_ffn_scale:
            arrays["inverse_alpha"] = (np.array(1 / block.alpha.item()),)
            arrays["beta"] = (np.array(block.beta.item()),)
        return named(arrays)

    wte, wpe = (e.weight.detach().numpy() for e in (model.wte, model.wpe))
    top = {"wte": wte, "wpe": wpe, "head": wte.T}
    if c.final_layernorm:
        top |= named({"ln_f": gain_and_shift(model.ln_f)})
    return flat(top, map(plain_block_arrays, model.blocks), dtype)


def plain_block(op, x, w, c):
    """One block, eq. 1 and 8, over plain_export()'s arrays: x (T, d) -> (T, d)."""
    n = op("LayerNorm", layer_norm, x, *w["ln_1"]) if c.use_layernorm else x   # (T, d)
    v = op("matmul", linear, n, *w["v"])                                       # (T, d)
    if "qk" in w:
        qk = op("matmul", linear, n, *w["qk"])                                 # (T, 2 d)
        inverse_t = w["inverse_t"] if c.learnable_temperature else ()
        s = op("matmul", plain_scores, qk, *inverse_t, n_head=c.n_head)        # (H, T, T)
        a = op("softmax", plain_softmax, s)                                    # (H, T, T)
        y = op("matmul", plain_mix, a, v)                                      # (T, d)
    elif "pattern" in w:
        y = op("pattern", mix_by_position, *w["pattern"], v)                   # (T, d)
    else:
        y = op("average", causal_means, v, layers=1)                           # (T, d)
    x = op("matmul", add_linear, x, y, *w["o"])                                # (T, d)
    h = op("LayerNorm", layer_norm, x, *w["ln_2"]) if c.use_layernorm else x   # (T, d)
    if c.fuse_ffn:
        h = op("matmul", linear, h, *w["w_ffn"])                               # (T, d)
    else:
        h = op("matmul", linear, h, *w["w_in"])                                # (T, 4 d)
        if c.activation != "none":
            h = op(activation_kind(c), EXACT.activation[c.activation], h)      # (T, 4 d)
        h = op("matmul", linear, h, *w["w_out"])                               # (T, d)
    if c.learnable_ffn_scale:
        return op("matmul", scale_both, x, h, *w["beta"], *w["inverse_alpha"])  # (T, d)
    return op("matmul", jnp.add, x, h)                                         # (T, d)


def plain_head(op, x, w, c):
    """The logits of rows x: (rows, d) -> (rows, V)."""
    if c.final_layernorm:
        x = op("head", layer_norm, x, *w["ln_f"])                              # (rows, d)
    return op("head", logits, x, *w["head"])                                   # (rows, V)


def layer_norm(x, gain, shift=None):
    y = EXACT.normalise(x) * gain
    return y if shift is None else y + shift


def plain_scores(qk, inverse_t=None, *, n_head):
    """Q K^T / sqrt(d_k), row i divided by t_i where there are temperatures, eq. 9."""
    q, k = qk.reshape(len(qk), 2, n_head, -1).transpose(1, 2, 0, 3)
    if inverse_t is not None:
        q = q * inverse_t
    return q @ k.transpose(0, 2, 1) / math.sqrt(q.shape[-1])


def plain_softmax(s):
    """Its mask goes after exp(): SPU's makes garbage of -inf."""
    return jax.nn.softmax(s, where=np.tri(s.shape[-1], dtype=bool))


def plain_mix(a, v):
    """A V, heads side by side."""
    H, T, _ = a.shape
    return join_heads(a @ v.reshape(T, H, -1).transpose(1, 0, 2))


def scale_both(x, h, beta, inverse_alpha):
    """beta x + h / alpha, eq. 8."""
    return beta * x + inverse_alpha * h
