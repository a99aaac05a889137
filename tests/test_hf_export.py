"""hf_export.py: a folder that Hugging Face's GPT-2 reads, with our logits and tokens."""
import json

import numpy as np
import pytest
import torch
from conftest import refusals, run
from safetensors.torch import load_file
from test_gpt2 import gelu, gelu_new, gpt2_by_numpy, relu

from data.tokenizer import convert_tokenizer, load_tokenizer
from hf_export import export
from model import GPT, GPTConfig, save_checkpoint
from pretrained import read_pretrained

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


@torch.no_grad()
@pytest.mark.parametrize("flags, part", [
    (dict(use_layernorm=False, use_gelu=False, fuse_ffn=True, learnable_ffn_scale=True,
          learnable_temperature=True), "learnable_temperature=True"),
    (dict(final_layernorm=False), "final_layernorm=False"),
    (dict(weight_norm="ffn"), "weight_norm=ffn"),
])
def test_what_gpt2_has_no_place_for_comes_back_as_it_was(flags, part, tmp_path):
    model = build(**flags)
    assert part in export(model, tmp_path)
    again = GPT.from_checkpoint(read_pretrained(str(tmp_path)))
    idx = torch.tensor(IDX)[None]
    assert again.config == model.config and torch.equal(again(idx)[0], model(idx)[0])
    with pytest.raises(ValueError, match="does not hold a GPT-2"):
        GPT.from_gpt2(str(tmp_path))


def test_a_folder_is_sampled_and_evaluated_as_its_checkpoint(data_dir, tmp_path):
    """By the tokenizer that is written beside the tensors."""
    spec = json.loads((data_dir / "mine" / "tokenizer.json").read_text())
    model = GPT(GPTConfig(**SMALL | {"vocab_size": 512}, use_layernorm=False))
    save_checkpoint(f"{tmp_path}/ckpt.pt", model, tokenizer=spec)
    run("hf_export.py", f"--ckpt={tmp_path}/ckpt.pt", f"--out={tmp_path}/out")
    (tmp_path / "text").write_text("def add(a, b):\n    return a + b\n" * 20)
    told = [run("evaluate.py", f"--ckpt={name}", f"--text={tmp_path}/text")
            for name in (f"{tmp_path}/ckpt.pt", f"{tmp_path}/out")]
    assert told[0] == told[1] and "bits per byte" in told[0]
    (tmp_path / "out" / "model.safetensors").write_bytes(b"half")
    assert "holds no whole model" in run("sample.py", f"--ckpt={tmp_path}/out", status=1)


def test_the_tokenizer_gives_the_same_tokens(data_dir, source, tmp_path):
    """By our own reader, and by Hugging Face's libraries as far as they are installed."""
    spec = json.loads((data_dir / "mine" / "tokenizer.json").read_text())
    export(build(), tmp_path, spec)
    assert convert_tokenizer(str(tmp_path)) == spec
    texts = [path.read_text() for path in sorted(source.glob("*.py"))[:20]]
    texts.append(" \u00e9 \u6f22\u5b57 \r\n\t  x  \n\n   12345 I'LL\u00a0a aaaaaaa====------")
    wanted = [load_tokenizer(spec).encode_ordinary(text) for text in texts]
    tokenizers = pytest.importorskip("tokenizers")
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert [theirs.encode(text).ids for text in texts] == wanted
    assert [theirs.decode(ids) for ids in wanted] == texts
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs(texts)["input_ids"] == wanted and theirs.eos_token_id == 511


def test_one_line_says_what_is_wrong(tmp_path):
    (tmp_path / "file").write_text("mine")
    mistakes = [(["--ckpt=nowhere.pt"], 1, "error: no checkpoint at nowhere.pt"),
                ([f"--out={tmp_path}/file"], 2, "error: out must be a folder, and ")]
    told = refusals("hf_export.py", [args for args, _, _ in mistakes])
    for (_, status, line), (code, err) in zip(mistakes, told):
        assert code == status and err.startswith(line) and err.count("\n") == 1, err


def test_a_full_disk_leaves_the_folder_as_it_was(tmp_path):
    export(build(), tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    (tmp_path / "model.safetensors.tmp").symlink_to("/dev/full")
    with pytest.raises(OSError, match="can't write .*model.safetensors: No space left"):
        export(build(use_layernorm=False), tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
