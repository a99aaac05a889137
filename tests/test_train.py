"""train.py as a user runs it: real runs on real (small) data, and every way a run can go wrong."""
import json
import os
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from conftest import ROOT, run

TINY = ["--device=cpu", "--dataset=mine", "--n_layer=2", "--n_head=2", "--n_embd=32", "--block_size=32", "--eval_windows=16", "--sample_tokens=0", "--plot=False"]
EREG = ["config/ereg_sm_t_scfuffn.py", *TINY]


def records(out_dir):
    return [json.loads(line) for line in open(out_dir / "log.jsonl")]


def weights(out_dir):
    checkpoint = torch.load(out_dir / "ckpt.pt", weights_only=True)
    return {**checkpoint["model"], **checkpoint["regularizer"]}


def test_a_real_run_learns(data_dir, tmp_path):
    out = run("train.py", "config/sm_scfuffn.py", *TINY, f"--data_dir={data_dir}", f"--out_dir={tmp_path}", "--max_iters=50",
              "--eval_interval=25", "--learning_rate=1e-2", "--sample_tokens=5", "--plot=True")
    log = records(tmp_path)
    evals = [r for r in log if r["event"] == "eval"]
    assert [r["step"] for r in evals] == [0, 25, 50]
    assert evals[0]["val_ppl"] == pytest.approx(512, rel=0.05)  # nothing learned: uniform over the vocabulary
    assert evals[2]["val_ppl"] < evals[1]["val_ppl"] < 0.6 * evals[0]["val_ppl"]
    assert np.array(evals[2]["head_entropy"]).shape == (2, 2)
    steps = [r for r in log if r["event"] == "step"]
    assert [r["step"] for r in steps] == [10, 20, 30, 40, 50] and all(r["entropy_term"] == 0 and r["loss"] == r["ce"] for r in steps)
    done = log[-1]
    assert done["event"] == "done" and done["val_ppl"] == evals[2]["val_ppl"] and done["arch"] == "SM+ScFuFFN" and done["tokens"] == 50 * 8 * 32
    assert done["sample"].startswith("def") and done["sample"] in out
    for text in ("device cpu", "SM+ScFuFFN", "unigram", "nonlinear ops: SM 4 x 32x32", "tok/s", "left"):
        assert text in out, out


def test_entropy_regularization_is_trained(data_dir, tmp_path):
    run("train.py", *EREG, f"--data_dir={data_dir}", f"--out_dir={tmp_path}", "--max_iters=30", "--learning_rate=1e-2", "--log_interval=1")
    steps = [r for r in records(tmp_path) if r["event"] == "step"]
    assert all(r["entropy_term"] > 0 and r["loss"] == pytest.approx(r["ce"] + r["entropy_term"], rel=1e-5) for r in steps)
    assert steps[-1]["entropy_term"] < 0.5 * steps[0]["entropy_term"]
    learned = weights(tmp_path)
    assert (learned["threshold"] != 0.5).all() and (learned["blocks.0.attn.log_temperature"] != np.log(1e-2)).any()


@pytest.mark.parametrize("arch", ["ereg_sm_t_scfuffn", "sm_snorm_ffn"])  # thresholds; power-iteration buffers
def test_resume_is_bit_for_bit(arch, data_dir, tmp_path):
    """20 straight steps against 10, a new process, and 10 more; gradient accumulation included."""
    args = [f"config/{arch}.py", *TINY, f"--data_dir={data_dir}", "--lr_decay_iters=20", "--grad_accum=2", "--log_interval=1"]
    run("train.py", *args, f"--out_dir={tmp_path / 'a'}", "--max_iters=20")
    run("train.py", *args, f"--out_dir={tmp_path / 'b'}", "--max_iters=10")
    out = run("train.py", f"--out_dir={tmp_path / 'b'}", f"--data_dir={data_dir}", "--device=cpu", "--init_from=resume", "--max_iters=20")
    assert "resuming at step 10 of 20" in out  # all other settings came from the checkpoint
    a, b = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    losses = [{r["step"]: r["loss"] for r in records(tmp_path / d) if r["event"] == "step"} for d in "ab"]
    assert losses[0] == losses[1] and len(losses[0]) == 20


@pytest.mark.parametrize("which, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_the_run_goes_on(which, status, data_dir, tmp_path):
    args = [sys.executable, "train.py", *EREG, f"--data_dir={data_dir}", f"--out_dir={tmp_path}", "--max_iters=100000", "--log_interval=1"]
    with subprocess.Popen(args, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"}) as p:
        for line in p.stdout:
            if line.startswith("step") and line.split()[1].startswith("7/"):
                p.send_signal(which)
                break
        p.stdout.read()
        err = p.stderr.read()
    assert p.returncode == status and "go on with --init_from=resume" in err and "Traceback" not in err
    step = torch.load(tmp_path / "ckpt.pt", weights_only=True)["step"]
    assert step >= 7 and f"saved step {step}" in err
    run("train.py", f"--out_dir={tmp_path}", f"--data_dir={data_dir}", "--device=cpu", "--init_from=resume", f"--max_iters={step + 3}")
    assert [r["step"] for r in records(tmp_path) if r["event"] == "step"] == list(range(1, step + 4))


def test_a_removed_out_dir_loses_no_weights(data_dir, tmp_path):
    out_dir = tmp_path / "out"
    args = [sys.executable, "train.py", *TINY, f"--data_dir={data_dir}", f"--out_dir={out_dir}", "--max_iters=100000", "--log_interval=1"]
    with subprocess.Popen(args, cwd=ROOT, stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"}) as p:
        next(line for line in p.stdout if line.startswith("step"))
        shutil.rmtree(out_dir)
        p.send_signal(signal.SIGTERM)
        p.stdout.read()
    assert p.returncode == 143 and torch.load(out_dir / "ckpt.pt", weights_only=True)["step"] > 0


def test_divergence_is_reported_and_the_last_good_checkpoint_kept(data_dir, tmp_path):
    """Softmax alone, 12 layers deep and too fast: deep layers collapse and the gradient overflows within seconds."""
    out = run("train.py", "config/sm.py", "--device=cpu", "--dataset=mine", f"--data_dir={data_dir}", f"--out_dir={tmp_path}", "--n_layer=12", "--n_head=4",
              "--n_embd=256", "--block_size=64", "--batch_size=2", "--learning_rate=1e-2", "--warmup=0", "--eval_windows=2", "--log_interval=1",
              "--max_iters=200", "--eval_interval=1000", status=3)
    last = out.strip().splitlines()[-1]
    assert last.startswith("diverged: the ") and "not finite at step" in last and "lowest in layer" in last
    assert "entropy collapse" in last and "stays in" in last
    record = records(tmp_path)[-1]
    assert record["event"] == "diverged" and len(record["entropy_by_layer"]) == 12
    assert min(record["entropy_by_layer"]) < 0.5 < max(record["entropy_by_layer"])  # collapsed below, while others still attend
    assert all(w.isfinite().all() for w in weights(tmp_path).values())


def test_pieces_are_trained_without_looking_over_their_edge(data_dir, source, tmp_path):
    run("data/prepare.py", f"--data_dir={tmp_path}", f"--train_source={source}", "--name=mine", "--vocab_size=300", "--piece=32")
    val = tmp_path / "mine" / "val.bin"
    val.write_bytes(val.read_bytes()[:2 * 32])  # one piece is one window: what follows it is no one's to know
    meta = tmp_path / "mine" / "meta.json"
    meta.write_text(json.dumps(json.loads(meta.read_text()) | {"val_tokens": 32}))
    run("train.py", *TINY, f"--data_dir={tmp_path}", f"--out_dir={tmp_path / 'out'}", "--max_iters=5", "--plot=False")
    run("plot.py", f"--out_dir={tmp_path / 'out'}")
    seen, last = json.loads((tmp_path / "out" / "entropy.json").read_text())[0], [r for r in records(tmp_path / "out") if r["event"] == "eval"][-1]
    assert torch.allclose(torch.tensor(seen["head_entropy"]), torch.tensor(last["head_entropy"]), atol=1e-3)
    out = run("train.py", *TINY, "--block_size=16", f"--data_dir={tmp_path}", f"--out_dir={tmp_path / 'out2'}", status=1)
    assert "cut into pieces of 32 tokens and block_size is 16" in out


def test_an_earlier_run_is_moved_aside(data_dir, tmp_path):
    args = [*TINY, f"--data_dir={data_dir}", f"--out_dir={tmp_path}"]
    run("train.py", *args, "--max_iters=2")
    first = (tmp_path / "ckpt.pt").read_bytes()
    assert "moved to" in run("train.py", *args, "--max_iters=3")
    second = (tmp_path / "ckpt.pt").read_bytes()
    run("train.py", *args, "--max_iters=1", "--eval_interval=1")
    assert (tmp_path / "ckpt.pt.old1").read_bytes() == first and (tmp_path / "ckpt.pt.old2").read_bytes() == second
    # going on with another length: said, and the log keeps one line a step although it had run ahead and broken off
    with open(tmp_path / "log.jsonl", "a") as f:
        f.write('{"event": "step", "step": 1, "loss": 9')
    out = run("train.py", f"--out_dir={tmp_path}", f"--data_dir={data_dir}", "--device=cpu", "--init_from=resume", "--max_iters=4", "--log_interval=1",
              "--weight_decay=0.3", "--beta1=0.8")
    assert "stretches the learning rate's decay" in out
    assert [r["step"] for r in records(tmp_path) if r["event"] == "step"] == [1, 2, 3, 4]
    group = torch.load(tmp_path / "ckpt.pt", weights_only=True)["optimizer"]["param_groups"][0]
    assert group["weight_decay"] == 0.3 and group["betas"] == (0.8, 0.999)  # what the command line says is what is used


MISTAKES = [
    (["--n_layers=3"], 2, "unknown key 'n_layers', did you mean 'n_layer'?"),
    (["--n_layer=three"], 2, "n_layer must be int"),
    (["config/sm_scfuffn.py", "--use_gelu=True"], 2, "fuse_ffn needs an FFN without activation"),
    (["--n_embd=50", "--n_head=3"], 2, "cannot be split"),
    (["--lr_decay=step"], 2, "lr_decay must be one of 'linear', 'cosine'"),
    (["--reduction=max"], 2, "reduction must be one of"),
    (["--batch_size=0"], 2, "batch_size must be at least 1"),
    (["--grad_clip=-1"], 2, "grad_clip must be at least 0"),
    (["--beta2=1"], 2, "beta2 must be at least 0 and below 1"),
    (["--max_iters=1e999"], 2, "max_iters must be int"),
    (["--sample_tokens=5", "--sample_prompt="], 2, "sample_prompt is empty"),
    (["--init_from=gpt2"], 2, "init_from must be scratch or resume"),
    (["--init_from=resume"], 1, "no checkpoint at"),
    (["--dataset=nowhere"], 1, "--name=nowhere --train_source=FOLDER --data_dir="),
    (["--dataset=codeparrot_t256", "--block_size=256"], 1, "--corpus=codeparrot --piece=256 --name=codeparrot_t256"),
    (["--vocab_size=100"], 1, "ends at 99: leave vocab_size=0"),
    (["--block_size=100000"], 1, "one window takes 100001"),
    (["--device=cuda:99"], 1, "device 'cuda:99' can't be used"),
    (["--vocab_size=2000000000"], 1, "out of memory: a smaller batch_size"),
    (["--out_dir=/dev/null/out"], 1, "can't write to /dev/null/out"),
] + [(["--log_to=tensorboard"], 1, "pip install tensorboard")] * (find_spec("tensorboard") is None)


def test_one_line_says_what_is_wrong(data_dir, tmp_path):
    def try_one(mistake):
        args, status, line = mistake
        out = run("train.py", *TINY, f"--data_dir={data_dir}", f"--out_dir={tmp_path}", *args, status=status)
        last = out.strip().splitlines()[-1]
        assert last.startswith("error: ") and line in last, (args, out)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(try_one, MISTAKES))
    assert not (tmp_path / "ckpt.pt").exists()


def test_a_full_disk_loses_nothing(data_dir, tmp_path):
    """/dev/full stands in for the disk: every write to it fails as on a full one."""
    run("train.py", *TINY, f"--data_dir={data_dir}", f"--out_dir={tmp_path}", "--max_iters=2")
    before = (tmp_path / "ckpt.pt").read_bytes()
    (tmp_path / "ckpt.pt.tmp").symlink_to("/dev/full")
    out = run("train.py", "--device=cpu", f"--out_dir={tmp_path}", f"--data_dir={data_dir}", "--init_from=resume", "--max_iters=4", status=1)
    assert "error: can't write" in out and "untouched" in out and (tmp_path / "ckpt.pt").read_bytes() == before


def test_damaged_files_are_named(data_dir, tmp_path):
    mine = tmp_path / "mine"
    shutil.copytree(data_dir / "mine", mine)
    args = [*TINY, f"--data_dir={tmp_path}", f"--out_dir={tmp_path / 'out'}"]
    run("train.py", *args, "--max_iters=2")
    resume = ["--device=cpu", f"--out_dir={tmp_path / 'out'}", f"--data_dir={tmp_path}", "--init_from=resume"]
    assert "trained with n_embd=32: resume can't change it to 64" in run("train.py", *resume, "--n_embd=64", status=2)
    # other data than the checkpoint's
    meta = json.loads((mine / "meta.json").read_text())
    (mine / "meta.json").write_text(json.dumps(meta | {"sha256": "0" * 64}))
    assert "was trained on other data" in run("train.py", *resume, status=1)
    (mine / "meta.json").write_text("{}")
    assert "is damaged (KeyError" in run("train.py", *resume, status=1)
    (mine / "meta.json").write_text(json.dumps(meta))
    # a truncated bin, then a truncated checkpoint
    with open(mine / "train.bin", "r+b") as f:
        f.truncate(1000)
    assert "is damaged" in run("train.py", *resume, status=1)
    with open(tmp_path / "out" / "ckpt.pt", "r+b") as f:
        f.truncate(5000)
    assert "not a whole checkpoint" in run("train.py", *resume, status=1)
