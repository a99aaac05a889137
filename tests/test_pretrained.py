"""train.py --init_from: trained models, from checkpoints and GPT-2, less what flags take away."""
import json
import math

import pytest
import torch
from conftest import refusals, run
from safetensors.torch import load_file, save_file
from test_gpt2 import gpt2_file
from test_train import TINY, content, of_kind, records

from entropy import EntropyRegularizer
from model import GPT, GPTConfig
from pretrained import open_pretrained, start_from

HERE = ["--device=cpu", "--dtype=float32", "--eval_windows=16", "--sample_tokens=0",
        "--plot=False"]
SMALL = dict(block_size=12, vocab_size=50, n_layer=2, n_head=2, n_embd=16)
LINEAR = dict(use_layernorm=False, use_gelu=False)


def source(**flags):
    """What read_pretrained gives of a small random model with those flags, and the model."""
    torch.manual_seed(1)
    model = GPT(GPTConfig(**SMALL | flags)).eval()
    for p in model.parameters():
        p.data.add_(0.1 * torch.randn_like(p))
    config = {**SMALL, **flags}
    return {"model": model.state_dict(), "model_config": config}, model


def started(theirs, **flags):
    """(what start_from says, the model) of SMALL with those flags, started from `theirs`."""
    model = GPT(GPTConfig(**SMALL | flags)).eval()
    return start_from(theirs, model, None), model


@pytest.fixture(scope="module")
def trained(data_dir, tmp_path_factory):
    """A run of SM+LN+G that learned a little."""
    out_dir = tmp_path_factory.mktemp("trained")
    run("train.py", *TINY, f"--data_dir={data_dir}", f"--out_dir={out_dir}", "--max_iters=40",
        "--learning_rate=1e-2")
    return out_dir


# ------------------------------------------------------------------------------- what flags take
def test_the_same_flags_give_the_same_model():
    theirs, model = source()
    says, ours = started(theirs)
    idx = torch.arange(12)[None]
    assert torch.equal(ours(idx)[0], model(idx)[0]) and "without" not in says and "new" not in says


@pytest.mark.parametrize("was, flags, says", [
    ({}, dict(use_layernorm=False, final_layernorm=False),
     "without ln_1.bias, ln_1.weight, ln_2.bias, ln_2.weight, ln_f.bias, ln_f.weight"),
    (dict(bias=True), {}, "without attn.o.bias, attn.v.bias, ffn.w_in.bias, ffn.w_out.bias"),
    (LINEAR, LINEAR | dict(learnable_ffn_scale=True, learnable_temperature=True),
     "new alpha, attn.log_temperature, beta"),
])
def test_parts_go_and_scalars_come(was, flags, says):
    theirs, _ = source(**was)
    said, ours = started(theirs, **flags)
    assert said.endswith(f"; {says}")
    for name, tensor in ours.state_dict().items():
        if name in theirs["model"]:
            assert torch.equal(tensor, theirs["model"][name])


def test_patterns_come_new_and_are_cropped():
    """As an average, in place of the softmax of a trained model's first layer."""
    theirs, _ = source()
    said, ours = started(theirs, positional_layers=1)
    assert said.endswith("without attn.qk.bias, attn.qk.weight; new attn.by_distance")
    ours.blocks[0].attn.by_distance.data.normal_()
    theirs = {"model_config": ours.config.__dict__, "model": ours.state_dict()}
    _, short = started(theirs, positional_layers=1, block_size=5)
    idx = torch.arange(5)[None]
    assert torch.allclose(short(idx)[0], ours(idx)[0], atol=1e-6)


def test_softmaxes_are_taken_from_the_first_layers():
    """The other layers' matrices, temperatures and thresholds stay; a softmax can't come back."""
    theirs, _ = source(learnable_temperature=True)
    theirs["regularizer"] = {"threshold": torch.tensor([[0.1, 0.2], [0.3, 0.4]])}
    model = GPT(GPTConfig(**SMALL, learnable_temperature=True, uniform_layers=1))
    regularizer = EntropyRegularizer(1, 2)
    said = start_from(theirs, model, regularizer)
    assert said.endswith("without attn.log_temperature, attn.qk.bias, attn.qk.weight")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, theirs["model"][name])
    assert torch.equal(regularizer.threshold, torch.tensor([[0.3, 0.4]]))
    theirs, _ = source(uniform_layers=1)
    with pytest.raises(ValueError, match="it has no blocks.0.attn.qk.weight: flags can take"):
        started(theirs, uniform_layers=0)


@pytest.mark.parametrize("bias", [False, True])
def test_a_linear_ffn_is_fused_into_the_same_function(bias):
    theirs, model = source(**LINEAR, bias=bias)
    _, ours = started(theirs, **LINEAR, bias=bias, fuse_ffn=True, learnable_ffn_scale=True)
    idx = torch.arange(12)[None]
    assert torch.allclose(ours(idx)[0], model(idx)[0], atol=1e-4)


def test_a_shorter_context_crops_positions_and_temperatures():
    temperatures = dict(learnable_temperature=True, temperature_init=1.0)
    theirs, model = source(**temperatures)
    _, ours = started(theirs, **temperatures, block_size=5)
    idx = torch.arange(5)[None]
    assert torch.allclose(ours(idx)[0], model(idx)[0], atol=1e-6)


@pytest.mark.parametrize("was, flags, sentence", [
    ({}, dict(n_head=4), "it has n_head=2, which can't be changed to 4"),
    ({}, dict(block_size=24), "it has block_size=12, which can be cropped, and not stretched"),
    ({}, dict(weight_norm="ffn"), "has no blocks.0.ffn.w_in.parametrizations.weight.original1"),
    (LINEAR | dict(fuse_ffn=True), LINEAR, "it has no blocks.0.ffn.w_in.weight: flags can take"),
    (dict(learnable_temperature=True),
     dict(learnable_temperature=True, temperature_per_head=True), "log_temperature is of shape"),
])
def test_what_flags_cannot_change_is_refused(was, flags, sentence):
    with pytest.raises(ValueError, match=sentence):
        started(source(**was)[0], **flags)


# ---------------------------------------------------------------------------------- as a user does
def test_a_checkpoint_is_fine_tuned_on_its_own_schedule(trained, data_dir, tmp_path):
    """Less LayerNorm's affine parts at no step: the first evaluation is the source's last."""
    out = run("train.py", *HERE, f"--init_from={trained}/ckpt.pt", "--dataset=mine",
              f"--data_dir={data_dir}", f"--out_dir={tmp_path}", "--max_iters=10", "--warmup=0",
              "--log_interval=1")
    assert f"starting from {trained}/ckpt.pt: " in out
    first, last = of_kind("eval", tmp_path)
    assert first["step"] == 0 and last["step"] == 10
    assert first["val_ce"] == pytest.approx(of_kind("eval", trained)[-1]["val_ce"], abs=1e-5)
    assert of_kind("step", tmp_path)[0]["lr"] == 1e-3  # its own, not what the source's decayed to
    state = content(tmp_path)["optimizer"]["state"][0]
    assert state["step"] == 10


def test_layernorm_is_taken_from_a_trained_model(trained, data_dir, tmp_path):
    """By a config file, EReg and a crop included; the result resumes and is started from again."""
    args = [*HERE, "--dataset=mine", f"--data_dir={data_dir}"]
    out = run("train.py", "config/ereg_sm_t_scfuffn.py", *args, f"--init_from={trained}/ckpt.pt",
              "--temperature_init=1", "--block_size=16", f"--out_dir={tmp_path}/a",
              "--max_iters=30", "--learning_rate=3e-3")
    assert "without ffn" not in out and "without ln_1.bias" in out and "new alpha" in out
    first, last = of_kind("eval", tmp_path / "a")
    assert last["val_ce"] < first["val_ce"]
    out = run("train.py", *HERE, "--init_from=resume", f"--data_dir={data_dir}",
              f"--out_dir={tmp_path}/a", "--max_iters=31")
    assert "resuming at step 30" in out
    out = run("train.py", *args, f"--init_from={tmp_path}/a/ckpt.pt", "--entropy_reg=True",
              f"--out_dir={tmp_path}/b", "--max_iters=0")
    assert "EReg(SM(t)+ScFuFFN)" in out
    for part in ("model", "regularizer"):
        a, b = content(tmp_path / "a")[part], content(tmp_path / "b")[part]
        assert all(torch.equal(a[name], b[name]) for name in a)


def shards(folder, kind):
    """model.safetensors as two files of that type with an index, as large models come."""
    whole = folder / "model.safetensors"
    names = sorted(load_file(whole))
    of = {name: f"model-{1 + i % 2:05}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in set(of.values()):
        save_file({n: t.to(kind) for n, t in load_file(whole).items() if of[n] == file},
                  folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": of}))
    whole.unlink()


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_gpt2_in_shards_and_half_precision(kind, tmp_path):
    gpt2_file(tmp_path)
    whole = GPT.from_gpt2(str(tmp_path)).state_dict()
    shards(tmp_path, kind)
    ours = GPT.from_gpt2(str(tmp_path)).state_dict()
    for name, tensor in ours.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, whole[name].to(kind).float())
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises((OSError, ValueError), match="model-00002-of-00002"):
        GPT.from_gpt2(str(tmp_path))


def test_gpt2_is_fine_tuned(data_dir, tmp_path):
    """Shards in half precision, cropped, less its LayerNorms and GELU."""
    gpt2_file(tmp_path, V=512, T=64)  # the dataset's vocabulary
    shards(tmp_path, torch.bfloat16)
    out = run("train.py", *HERE, "--dataset=mine", f"--data_dir={data_dir}",
              f"--init_from={tmp_path}", "--block_size=32", "--use_layernorm=False",
              "--use_gelu=False", f"--out_dir={tmp_path}/out", "--max_iters=5", "--log_interval=1")
    assert "without ln_1.bias" in out and "context 32" in out and "bias" in out
    assert content(tmp_path / "out")["model_config"]["bias"] is True
    assert math.isfinite(records(tmp_path / "out")[-1]["val_ce"])
    _, encoding = open_pretrained(f"{tmp_path}/out/ckpt.pt")  # whose tokenizer is the dataset's
    assert encoding.decode(encoding.encode_ordinary("def")) == "def"


def test_one_line_says_what_is_wrong(trained, data_dir, tmp_path):
    gpt2_file(tmp_path, V=60, T=64)
    for name, spec in (("other", {"ranks": {}}), ("five", 5)):
        torch.save(content(trained) | {"tokenizer": spec}, tmp_path / f"{name}.pt")
    usual = [*HERE, "--dataset=mine", f"--data_dir={data_dir}", f"--out_dir={tmp_path}/out"]
    ckpt = f"--init_from={trained}/ckpt.pt"
    mistakes = [
        (["--init_from=nowhere.pt"], 1, "no checkpoint at nowhere.pt"),
        ([ckpt, "--n_layer=3"], 1, "it has n_layer=2, which can't be changed to 3"),
        ([ckpt, "--use_relu=True"], 2, "use_gelu and use_relu are both on"),
        ([ckpt, "--block_size=64"], 1, "it has block_size=32, which can be cropped"),
        ([f"--init_from={tmp_path}/other.pt"], 1, "the dataset's tokens are not those of"),
        ([f"--init_from={tmp_path}/five.pt"], 1, "the dataset's tokens are not those of"),
        ([f"--init_from={tmp_path}", "--block_size=32"], 1, "--tokenizer=gpt2 for GPT-2"),
        ([f"--init_from={tmp_path}/out.safetensors"], 1, "No such file"),
    ]
    told = refusals("train.py", [[*usual, *args] for args, _, _ in mistakes])
    for (args, status, line), (code, err) in zip(mistakes, told):
        assert code == status, (args, err)
        assert err.startswith("error: ") and err.count("\n") == 1 and line in err, (args, err)
