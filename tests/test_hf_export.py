"""hf_export.py: a folder that Hugging Face's GPT-2 reads, with our logits."""
import numpy as np
import pytest
import torch
from conftest import refusals
from safetensors.torch import load_file
from test_gpt2 import gelu, gelu_new, gpt2_by_numpy, relu

from hf_export import export
from model import GPT, GPTConfig, save_checkpoint

SMALL = dict(block_size=12, vocab_size=60, n_layer=2, n_head=2, n_embd=16)
IDX = np.arange(12) * 5


def build(**flags):
    """A small model whose every parameter is off its initial value."""
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SMALL, **flags)).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


@torch.no_grad()
@pytest.mark.parametrize("flags, act", [
    ({}, gelu),
    (dict(bias=True, gelu_tanh=True), gelu_new),
    (dict(use_gelu=False, use_relu=True), relu),
    (dict(use_gelu=False, bias=True), lambda x: x),
])
def test_logits_are_ours(flags, act, tmp_path):
    """By NumPy's GPT-2 on the files, and by our own reader."""
    model = build(**flags)
    export(model, tmp_path / "gpt2")
    wanted = model(torch.tensor(IDX)[None])[0][0].numpy()
    theirs = {name.removeprefix("transformer."): tensor.double().numpy()
              for name, tensor in load_file(tmp_path / "gpt2" / "model.safetensors").items()}
    assert np.abs(gpt2_by_numpy(theirs, IDX, 2, act) - wanted).max() < 1e-4
    again = GPT.from_gpt2(str(tmp_path / "gpt2"))
    assert again.config.activation == model.config.activation and again.config.bias
    assert np.abs(again(torch.tensor(IDX)[None])[0][0].numpy() - wanted).max() < 1e-5


@torch.no_grad()
def test_transformers_gives_our_logits(tmp_path):
    transformers = pytest.importorskip("transformers")
    idx = torch.tensor(IDX)[None]
    for flags in ({}, dict(bias=True, gelu_tanh=True), dict(use_gelu=False, use_relu=True)):
        model = build(**flags)
        export(model, tmp_path)
        theirs = transformers.GPT2LMHeadModel.from_pretrained(tmp_path).eval()
        assert torch.allclose(theirs(idx).logits, model(idx)[0], atol=1e-4)


def test_what_gpt2_has_no_place_for_is_one_line(tmp_path):
    tries = {"fused": (dict(use_layernorm=False, use_gelu=False, fuse_ffn=True),
                       "no place for SM+FuFFN: use_layernorm=False, fuse_ffn=True"),
             "temperature": (dict(learnable_temperature=True), "learnable_temperature=True"),
             "bare": (dict(final_layernorm=False), "final_layernorm=False"),
             "normed": (dict(weight_norm="ffn"), "weight_norm=ffn")}
    for name, (flags, _) in tries.items():
        save_checkpoint(f"{tmp_path}/{name}.pt", build(**flags))
    args = [[f"--ckpt={tmp_path}/{name}.pt", f"--out={tmp_path}/out"] for name in tries]
    told = refusals("hf_export.py", [*args, ["--ckpt=nowhere.pt"]])
    lines = [*(line for _, line in tries.values()), "no checkpoint at nowhere.pt"]
    for (code, err), line in zip(told, lines):
        assert code == 1 and err.startswith("error: ") and err.count("\n") == 1 and line in err
    assert not (tmp_path / "out").exists()
