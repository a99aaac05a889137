"""fade.py: LayerNorms and activations go one by one, and fold into the matrices behind them."""
import re

import pytest
import torch
from conftest import refusals, run
from test_gpt2 import gpt2_file
from test_train import of_kind

import fade
from fade import fading_parts, folded, left_at
from model import GPT, GPTConfig, load_checkpoint, save_checkpoint

SMALL = dict(block_size=12, vocab_size=50, n_layer=2, n_head=2, n_embd=16)
FUSED = dict(use_gelu=False, fuse_ffn=True, learnable_ffn_scale=True)


def build(**flags):
    """A small model whose every parameter is off its initial value, and tokens for it."""
    torch.manual_seed(1)
    model = GPT(GPTConfig(**SMALL | flags))
    for p in model.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    return model, torch.randint(0, 50, (4, 12))


@torch.no_grad()
@pytest.mark.parametrize("flags, name", [
    ({}, "SM"), (dict(bias=True, use_gelu=False, use_relu=True), "SM"), (FUSED, "SM+ScFuFFN"),
    (dict(uniform_layers=1), "SM, 1 uniform layer"), (dict(use_layernorm=False), "SM")])
def test_parts_are_what_they_were_at_first_and_fold_at_last(flags, name, monkeypatch):
    monkeypatch.setattr(fade, "activation", True)
    model, idx = build(**flags)
    before = model(idx)[0]
    parts = fading_parts(model)
    assert torch.allclose(model(idx)[0], before, atol=1e-5)
    for part in parts:
        part.left = 0.0
    bare = folded(model)
    assert torch.allclose(bare(idx)[0], model(idx)[0], atol=1e-4)
    assert bare.config.name == name and not bare.config.use_layernorm


@torch.no_grad()
def test_what_takes_its_place_is_of_the_same_size():
    """By far nearer to LayerNorm than nothing is, where the rows are of about one size."""
    model, idx = build()
    wanted = model.blocks[0].ln_2(model.wte(idx))
    [part, *_] = fading_parts(model)
    part(model.wte(idx))
    part.left = 0.0
    assert (part(model.wte(idx)) - wanted).std() < 0.3 * wanted.std()


def test_one_fades_after_the_other(monkeypatch):
    monkeypatch.setattr(fade, "turn", 4)
    assert [left_at(step, 0) for step in range(10)] == [1, 1, 1, 1, 0.75, 0.5, 0.25, 0, 0, 0]
    assert [left_at(step, 1) for step in range(7, 13)] == [1, 0.75, 0.5, 0.25, 0, 0]
    monkeypatch.setattr(fade, "one_by_one", False)
    assert left_at(4, 1) == 0.75


# A config file, by which the process sends itself Ctrl-C in its eighth step
STOP = """
import os as _os, sys as _sys
_main = _sys.modules["__main__"]
def _lr_at(step, steps, os=_os, lr_at=_main.lr_at, when=[7]):
    if step in when:
        when.clear()  # it is asked once for each group of parameters
        os.kill(os.getpid(), 2)
    return lr_at(step, steps)
_main.lr_at = _lr_at
"""


def test_gpt2_goes_to_softmax_alone_and_trains_on(data_dir, tmp_path):
    """
    A small file in GPT-2's layout, by one command; what is left is a checkpoint to fuse. Stopped
    and gone on with, it is the same.
    """
    gpt2_file(tmp_path, V=512, T=64)
    data = ["--dataset=mine", f"--data_dir={data_dir}", "--eval_windows=16", "--dtype=float32"]
    args = [*data, f"--init_from={tmp_path}", "--activation=True", "--block_size=32", "--turn=3",
            "--settle=3", "--batch_size=4", "--device=cpu"]
    out = run("fade.py", *args, f"--out={tmp_path}/faded.pt")
    gone = [int(n) for n in re.findall(r"(\d+) of \d+ gone", out)]
    assert gone == [0, *range(1, gone[-1] + 1), gone[-1]] and f"{gone[-1]} parts" in out
    after, bare = re.findall(r"(?:after|folded): validation ce (\S+)", out)
    assert float(after) == pytest.approx(float(bare), abs=1e-3)
    run("train.py", *data, f"--init_from={tmp_path}/faded.pt", f"--out_dir={tmp_path}/out",
        "--fuse_ffn=True", "--max_iters=1", "--sample_tokens=0", "--plot=False", "--device=cpu")
    first = of_kind("eval", tmp_path / "out")[0]
    assert first["val_ce"] == pytest.approx(float(bare), abs=1e-3)
    (tmp_path / "stop.py").write_text(STOP)
    args = [*args, f"--out={tmp_path}/again.pt"]
    assert "stopped after step 8: " in run("fade.py", tmp_path / "stop.py", *args, status=130)
    assert (tmp_path / "again.pt.stopped").exists() and not (tmp_path / "again.pt").exists()
    again = run("fade.py", *args)
    assert "going on after step 8: " in again and not (tmp_path / "again.pt.stopped").exists()
    straight, other = (load_checkpoint(f"{tmp_path}/{name}.pt") for name in ("faded", "again"))
    assert all(torch.equal(straight["model"][name], other["model"][name])
               for name in straight["model"])


def test_what_a_stopped_run_left_may_not_fit(tmp_path, monkeypatch):
    model, _ = build()
    optimizer = torch.optim.AdamW(model.param_groups(0.1))
    monkeypatch.setattr(fade, "out", f"{tmp_path}/a.pt")
    assert fade.go_on(model, optimizer) == 0
    torch.save({"settings": {"turn": 7}}, tmp_path / "a.pt.stopped")
    with pytest.raises(ValueError, match=r"a.pt.stopped \(ValueError: it has turn=7\): delete it"):
        fade.go_on(model, optimizer)
    (tmp_path / "a.pt.stopped").write_bytes(b"half")
    with pytest.raises(ValueError, match="delete it to start anew"):
        fade.go_on(model, optimizer)


def test_one_line_says_what_is_wrong(data_dir, tmp_path):
    for name, flags in (("bare", dict(use_layernorm=False)), ("normed", dict(weight_norm="ffn"))):
        save_checkpoint(f"{tmp_path}/{name}.pt", build(**flags)[0])
    tries = {f"--init_from={tmp_path}/bare.pt": "is SM+G, which has nothing that could fade",
             f"--init_from={tmp_path}/normed.pt": "has weight_norm, into which nothing folds",
             "--init_from=nowhere.pt": "no checkpoint at nowhere.pt",
             "--out=nowhere/a.pt": "out must be a file in a folder that exists",
             f"--out={tmp_path}": "out must be a file in a folder that exists"}
    told = refusals("fade.py", [[f"--out={tmp_path}/a.pt", flag] for flag in tries])
    for line, (code, err) in zip(tries.values(), told):
        assert code and err.startswith("error: ") and err.count("\n") == 1 and line in err, err
