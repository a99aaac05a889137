"""gpt2.py: GPT-2 files give GPT-2's logits, by an implementation of its own, or are refused."""
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from gpt2 import read_gpt2
from model import GPT

IDX = np.arange(12) * 5


def gpt2_file(folder, prefix="", d=128, V=60, T=12, L=2):
    """
    A small random GPT-2 in Hugging Face's layout: matrices (in, out), q, k and v in one, mask
    buffers beside them. Returns its tensors in float64.
    """
    g = torch.Generator().manual_seed(0)

    def random(*shape):
        return 0.1 * torch.randn(*shape, generator=g)

    t = {"wte.weight": random(V, d), "wpe.weight": random(T, d),
         "ln_f.weight": 1 + random(d), "ln_f.bias": random(d)}
    for i in range(L):
        for name, a, b in (("attn.c_attn", d, 3 * d), ("attn.c_proj", d, d),
                           ("mlp.c_fc", d, 4 * d), ("mlp.c_proj", 4 * d, d)):
            t |= {f"h.{i}.{name}.weight": random(a, b), f"h.{i}.{name}.bias": random(b)}
        for name in ("ln_1", "ln_2"):
            t |= {f"h.{i}.{name}.weight": 1 + random(d), f"h.{i}.{name}.bias": random(d)}
        t[f"h.{i}.attn.bias"] = torch.ones(T, T).tril().view(1, 1, T, T)
    save_file({prefix + name: tensor.contiguous() for name, tensor in t.items()},
              folder / "model.safetensors")
    return {name: tensor.double().numpy() for name, tensor in t.items()}


def gelu_new(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def gelu(x):
    return 0.5 * x * (1 + torch.erf(torch.from_numpy(x) / 2**0.5).numpy())


def relu(x):
    return np.maximum(x, 0)


def gpt2_by_numpy(t, idx, n_head, act=gelu_new, scale=lambda i, d_k: d_k**-0.5, L=2):
    """GPT-2's forward pass on that layout, in float64 NumPy. scale: of layer i's logits."""
    def norm(x, p):
        x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
        return x * t[p + ".weight"] + t[p + ".bias"]

    def dense(x, p):
        return x @ t[p + ".weight"] + t[p + ".bias"]

    x = t["wte.weight"][idx] + t["wpe.weight"][:len(idx)]
    for i in range(L):
        heads = []
        qkv = np.split(dense(norm(x, f"h.{i}.ln_1"), f"h.{i}.attn.c_attn"), 3, -1)
        for q, k, v in zip(*(np.split(z, n_head, -1) for z in qkv)):
            s = q @ k.T * scale(i, q.shape[-1]) - 1e10 * (1 - np.tri(len(idx)))
            a = np.exp(s - s.max(-1, keepdims=True))
            heads.append(a / a.sum(-1, keepdims=True) @ v)
        x = x + dense(np.concatenate(heads, -1), f"h.{i}.attn.c_proj")
        x = x + dense(act(dense(norm(x, f"h.{i}.ln_2"), f"h.{i}.mlp.c_fc")), f"h.{i}.mlp.c_proj")
    return norm(x, "ln_f") @ t["wte.weight"].T


def configured(folder, **settings):
    (folder / "config.json").write_text(json.dumps(settings))
    return str(folder)


def logits(path):
    return GPT.from_gpt2(str(path))(torch.tensor(IDX)[None])[0][0].detach().numpy()


@pytest.mark.parametrize("prefix", ["", "transformer."])
def test_gpt2_weights(tmp_path, prefix):
    theirs = gpt2_file(tmp_path, prefix)
    wanted = gpt2_by_numpy(theirs, IDX, n_head=2)  # heads of 64, as in every released GPT-2
    for path in (tmp_path, tmp_path / "model.safetensors"):
        assert np.abs(logits(path) - wanted).max() < 1e-4
    config = GPT.from_gpt2(str(tmp_path)).config
    assert config.n_head == 2 and config.bias and config.block_size == 12


@pytest.mark.parametrize("settings, oracle", [
    (dict(n_head=4), dict(n_head=4)),
    (dict(activation_function="gelu_new", n_inner=None), {}),
    (dict(activation_function="gelu_pytorch_tanh", n_inner=512), {}),
    (dict(activation_function="gelu"), dict(act=gelu)),
    (dict(activation_function="relu"), dict(act=relu)),
    (dict(scale_attn_weights=False), dict(scale=lambda i, d_k: 1)),
    (dict(scale_attn_by_inverse_layer_idx=True), dict(scale=lambda i, d_k: d_k**-0.5 / (i + 1))),
    (dict(reorder_and_upcast_attn=True), {}),  # the same in another order
])
def test_config_json_is_obeyed(settings, oracle, tmp_path):
    wanted = gpt2_by_numpy(gpt2_file(tmp_path), IDX, **{"n_head": 2, **oracle})
    assert np.abs(logits(configured(tmp_path, **settings)) - wanted).max() < 1e-4


@pytest.mark.parametrize("settings, sentence", [
    (dict(activation_function="silu"), "its activation_function is 'silu', and can only be"),
    (dict(layer_norm_epsilon=1e-6), "its layer_norm_epsilon is 1e-06, and can only be 1e-05"),
    (dict(n_inner=256), "its n_inner is 256, and can only be None or 512"),
    (dict(add_cross_attention=True), "its add_cross_attention is True"),
    (dict(tie_word_embeddings=False), "its tie_word_embeddings is False"),
    (dict(model_type="gpt_neo"), "its model_type is 'gpt_neo'"),
    (dict(n_layer=1), "its n_layer is 1, and can only be 2"),
    (dict(n_head=3), "cannot be split among 3 heads"),
    (dict(n_head="2"), "TypeError"),
])
def test_a_config_json_that_cannot_be_obeyed_is_refused(settings, sentence, tmp_path):
    gpt2_file(tmp_path)
    with pytest.raises(ValueError, match=sentence):
        GPT.from_gpt2(configured(tmp_path, **settings))


@pytest.mark.parametrize("name, shape, sentence", [
    ("lm_head.weight", (60, 128), "its output matrix is not its embedding"),
    ("h.0.crossattention.c_attn.weight", (128, 256), "has no place for h.0.crossattention"),
    ("h.0.ln_1.bias", (64,), "does not hold a GPT-2"),
])
def test_tensors_that_are_not_this_gpts_are_refused(name, shape, sentence, tmp_path):
    gpt2_file(tmp_path)
    path = tmp_path / "model.safetensors"
    save_file(load_file(path) | {name: torch.ones(shape)}, path)
    with pytest.raises(ValueError, match=sentence):
        GPT.from_gpt2(str(tmp_path))


def test_an_output_matrix_that_is_the_embedding_is_taken(tmp_path):
    wanted = gpt2_by_numpy(gpt2_file(tmp_path), IDX, n_head=2)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    save_file(tensors | {"lm_head.weight": tensors["wte.weight"].clone()}, path)
    assert np.abs(logits(tmp_path) - wanted).max() < 1e-4


def test_other_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="has no model.safetensors: name one that has, or"):
        GPT.from_gpt2(str(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(ValueError, match="does not hold a GPT-2"):
        GPT.from_gpt2(str(tmp_path))
    save_file({"wte.weight": torch.zeros(4, 4)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="does not hold a GPT-2"):
        GPT.from_gpt2(str(tmp_path))


def test_a_hub_out_of_reach_is_a_sentence(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match="no-such/gpt2.*pass their folder"):
        read_gpt2("no-such/gpt2")
