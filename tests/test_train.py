"""train.py as a user runs it: real runs on real (small) data, and every way a run can go wrong."""
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from conftest import ROOT, refusals, run

from data.dataset import hash_bins, map_bins
from entropy import max_causal_entropy
from run import Run

TINY = ["--device=cpu", "--dataset=mine", "--n_layer=2", "--n_head=2", "--n_embd=32",
        "--block_size=32", "--eval_windows=16", "--sample_tokens=0", "--plot=False",
        "--dtype=float32"]  # auto would measure, and runs are compared bit by bit
EREG = ["config/ereg_sm_t_scfuffn.py", *TINY]
FOR_EVER = ["--max_iters=100000", "--log_interval=1"]


def records(out_dir):
    return [json.loads(line) for line in open(out_dir / "log.jsonl")]


def of_kind(event, out_dir):
    return [r for r in records(out_dir) if r["event"] == event]


def content(out_dir):
    return torch.load(out_dir / "ckpt.pt", weights_only=True)


def weights(out_dir):
    return {**content(out_dir)["model"], **content(out_dir)["regularizer"]}


def resume(out_dir, data_dir, *args, status=0):
    return run("train.py", "--device=cpu", f"--out_dir={out_dir}", f"--data_dir={data_dir}",
               "--init_from=resume", *args, status=status)


def start(out_dir, data_dir, *args):
    """A run that goes on for ever, for a test to break."""
    args = [sys.executable, "train.py", *args, f"--data_dir={data_dir}", f"--out_dir={out_dir}"]
    return subprocess.Popen([*args, *FOR_EVER], cwd=ROOT, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True)


def wait_for(process, text):
    for line in process.stdout:
        if text in line:
            return
    raise AssertionError(process.stderr.read())


def rest_of(process):
    """(what it still printed, its errors), once it has ended."""
    with process:
        return process.stdout.read(), process.stderr.read()


@pytest.fixture(scope="module")
def finished(data_dir, tmp_path_factory):
    """The out_dir of a run of two steps, to be copied by who breaks it."""
    out_dir = tmp_path_factory.mktemp("finished")
    run("train.py", *TINY, f"--data_dir={data_dir}", f"--out_dir={out_dir}", "--max_iters=2")
    return out_dir


@pytest.fixture
def out_dir(finished, tmp_path):
    """A copy of `finished`."""
    return shutil.copytree(finished, tmp_path / "out")


# ------------------------------------------------------------------------------------ what it does
def test_a_real_run_learns(data_dir, tmp_path):
    out = run("train.py", "config/sm_scfuffn.py", *TINY, f"--data_dir={data_dir}",
              f"--out_dir={tmp_path}", "--max_iters=50", "--eval_interval=25",
              "--learning_rate=1e-2", "--sample_tokens=5", "--plot=True", "--log_interval=10")
    assert out.startswith("SM+ScFuFFN: ")
    evals, steps = of_kind("eval", tmp_path), of_kind("step", tmp_path)
    assert [r["step"] for r in evals] == [0, 25, 50]
    assert evals[0]["val_ppl"] == pytest.approx(512, rel=0.05)  # uniform over the vocabulary
    assert evals[2]["val_ppl"] < evals[1]["val_ppl"] < 0.6 * evals[0]["val_ppl"]
    assert np.array(evals[2]["head_entropy"]).shape == (2, 2)
    assert [r["step"] for r in steps] == [10, 20, 30, 40, 50]
    assert all(r["entropy_term"] == 0 and r["loss"] == r["ce"] for r in steps)
    done = records(tmp_path)[-1]
    assert done["event"] == "done" and done["val_ppl"] == evals[2]["val_ppl"]
    assert done["arch"] == "SM+ScFuFFN" and done["tokens"] == 50 * 8 * 32
    assert done["sample"].startswith("def") and done["sample"] in out
    for text in ("device cpu", "unigram", "nonlinear ops: SM 4 x 32x32", "tok/s", "left"):
        assert text in out, out
    assert "entropy term" not in out  # there is none
    assert (tmp_path / "entropy.png").exists()


def test_entropy_regularization_is_trained(data_dir, tmp_path):
    out = run("train.py", *EREG, f"--data_dir={data_dir}", f"--out_dir={tmp_path}",
              "--max_iters=30", "--learning_rate=1e-2", "--warmup=0.05",
              "--log_interval=1")
    steps = of_kind("step", tmp_path)
    for r in steps:
        assert r["entropy_term"] > 0
        assert r["loss"] == pytest.approx(r["ce"] + r["entropy_term"], rel=1e-5)
    assert steps[-1]["entropy_term"] < 0.5 * steps[0]["entropy_term"]
    assert f"(ce {steps[-1]['ce']:.4f}, entropy term {steps[-1]['entropy_term']:.4f})" in out
    learned = weights(tmp_path)
    assert (learned["threshold"] != 0.5).all()
    assert (learned["blocks.0.attn.log_temperature"] != np.log(1e-2)).any()


def test_uniform_layers_are_left_out_of_the_regularizer(data_dir, tmp_path):
    """
    Nothing is penalised at thresholds of 0, temperatures that make rows nearly one-hot, and a wide
    margin, though the first layer's entropies are beyond it.
    """
    run("train.py", *EREG, f"--data_dir={data_dir}", f"--out_dir={tmp_path}", "--max_iters=1",
        "--uniform_layers=1", "--temperature_init=1e-6", "--threshold_init=0", "--gamma=0.8",
        "--log_interval=1", "--plot=True")
    entropies = of_kind("eval", tmp_path)[0]["head_entropy"]
    assert entropies[0] == pytest.approx([max_causal_entropy(32)] * 2, abs=1e-3)
    assert max(entropies[1]) < 0.8 * math.log(32) < math.log(31)
    assert of_kind("step", tmp_path)[0]["entropy_term"] == 0
    assert content(tmp_path)["regularizer"]["threshold"].shape == (1, 2)
    assert records(tmp_path)[-1]["arch"] == "EReg(SM(t)+ScFuFFN, 1 uniform layer)"
    assert (tmp_path / "entropy.png").exists()


@pytest.mark.parametrize("arch", ["ereg_sm_t_scfuffn", "sm_snorm_ffn"])  # thresholds; buffers
def test_resume_is_bit_for_bit(arch, data_dir, tmp_path):
    """20 straight steps against 10, a new process, and 10 more; gradient accumulation included."""
    args = [f"config/{arch}.py", *TINY, f"--data_dir={data_dir}", "--lr_decay_iters=20",
            "--grad_accum=2", "--log_interval=1"]
    run("train.py", *args, f"--out_dir={tmp_path / 'a'}", "--max_iters=20")
    run("train.py", *args, f"--out_dir={tmp_path / 'b'}", "--max_iters=10")
    out = resume(tmp_path / "b", data_dir, "--max_iters=20")
    assert "resuming at step 10 of 20" in out  # all other settings came from the checkpoint
    a, b = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    losses = [{r["step"]: r["loss"] for r in of_kind("step", tmp_path / d)} for d in "ab"]
    assert losses[0] == losses[1] and len(losses[0]) == 20


def test_an_earlier_run_is_moved_aside(out_dir, data_dir):
    args = [*TINY, f"--data_dir={data_dir}", f"--out_dir={out_dir}"]
    first = (out_dir / "ckpt.pt").read_bytes()
    assert "moved to" in run("train.py", *args, "--max_iters=3")
    second = (out_dir / "ckpt.pt").read_bytes()
    run("train.py", *args, "--max_iters=1")
    assert (out_dir / "ckpt.pt.old1").read_bytes() == first
    assert (out_dir / "ckpt.pt.old2").read_bytes() == second


def test_the_best_checkpoint_is_kept_beside_the_last(data_dir, tmp_path):
    """A learning rate that begins well and then is far too high; the best survives a resume."""
    change = tmp_path / "change.py"
    change.write_text("learning_rate = 0.5\nlr_decay_iters = 40\nwarmup = 1.0\nkeep_best = True\n")
    run("train.py", change, *TINY, f"--data_dir={data_dir}", f"--out_dir={tmp_path}/out",
        "--max_iters=20", "--eval_interval=2")
    resume(tmp_path / "out", data_dir, "--max_iters=24")
    losses = {r["step"]: r["val_ce"] for r in of_kind("eval", tmp_path / "out")}
    best = torch.load(tmp_path / "out" / "best.pt", weights_only=True)
    assert best["step"] == min(losses, key=losses.get) < content(tmp_path / "out")["step"] == 24


def test_resuming_mends_the_log_and_obeys_the_command_line(out_dir, data_dir):
    """The log had run ahead of the checkpoint, was damaged, and broke off within a line."""
    with open(out_dir / "log.jsonl", "ab") as f:
        f.write(b'{"event": "step", "step": 3, "loss": 9}\n\xff\xfe\n{"event": "step", "ste')
    out = resume(out_dir, data_dir, "--max_iters=4", "--log_interval=1", "--weight_decay=0.3",
                 "--beta1=0.8")
    assert "stretches the learning rate's decay" in out
    assert [r["step"] for r in of_kind("step", out_dir)] == [2, 3, 4]
    assert all(r["loss"] < 9 for r in of_kind("step", out_dir))
    group = content(out_dir)["optimizer"]["param_groups"][0]
    assert group["weight_decay"] == 0.3 and group["betas"] == (0.8, 0.999)


def test_a_checkpoint_from_before_final_layernorm_resumes(data_dir, tmp_path):
    """Then one flag stood for both; neither the settings nor the model's have the new one."""
    run("train.py", "config/sm.py", *TINY, "--final_layernorm=False", f"--data_dir={data_dir}",
        f"--out_dir={tmp_path}", "--max_iters=1")
    old = content(tmp_path)
    del old["settings"]["final_layernorm"], old["model_config"]["final_layernorm"]
    torch.save(old, tmp_path / "ckpt.pt")
    assert "SM, no ln_f: " in resume(tmp_path, data_dir, "--max_iters=2")


def test_pieces_are_trained_without_looking_over_their_edge(data_dir, source, tmp_path):
    run("data/prepare.py", f"--data_dir={tmp_path}", f"--train_source={source}", "--name=mine",
        "--vocab_size=300", "--piece=32")
    val, meta = tmp_path / "mine" / "val.bin", tmp_path / "mine" / "meta.json"
    val.write_bytes(val.read_bytes()[:2 * 32])  # one piece is one window, with nothing after it
    sha256 = hash_bins(map_bins(tmp_path / "mine"))
    changed = {"val_tokens": 32, "sha256": sha256}
    meta.write_text(json.dumps(json.loads(meta.read_text()) | changed))
    out_dir = tmp_path / "out"
    run("train.py", *TINY, f"--data_dir={tmp_path}", f"--out_dir={out_dir}", "--max_iters=5")
    run("plot.py", f"--out_dir={out_dir}")
    seen = json.loads((out_dir / "entropy.json").read_text())[0]["head_entropy"]
    last = of_kind("eval", out_dir)[-1]["head_entropy"]
    assert torch.allclose(torch.tensor(seen), torch.tensor(last), atol=1e-3)
    out = run("train.py", *TINY, "--block_size=16", f"--data_dir={tmp_path}",
              f"--out_dir={tmp_path / 'out2'}", status=1)
    assert "cut into pieces of 32 tokens and block_size is 16" in out


# ------------------------------------------------------------------------------------ how it ends
def test_a_signal_saves_and_the_run_goes_on(data_dir, tmp_path):
    """Stopped by one signal after the other, and gone on with each time."""
    args, step = EREG, 0
    for which in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        process = start(tmp_path, data_dir, *args)
        wait_for(process, f" {step + 7}/")
        process.send_signal(which)
        _, err = rest_of(process)
        assert process.returncode == 128 + which
        assert "go on with --init_from=resume" in err and "Traceback" not in err
        assert content(tmp_path)["step"] >= step + 7
        step = content(tmp_path)["step"]
        assert f"saved step {step}" in err
        args = ["--device=cpu", "--init_from=resume"]
    resume(tmp_path, data_dir, f"--max_iters={step + 3}")
    assert [r["step"] for r in of_kind("step", tmp_path)] == list(range(1, step + 4))


def test_a_signal_is_obeyed_within_an_evaluation(data_dir, tmp_path):
    process = start(tmp_path, data_dir, *TINY, "--eval_windows=100000", "--batch_size=1")
    wait_for(process, "training 100000 steps")
    process.send_signal(signal.SIGTERM)
    out, err = rest_of(process)
    assert process.returncode == 143 and "saved step 0" in err
    assert out == ""  # not even the first evaluation came to its end
    assert content(tmp_path)["step"] == 0


def test_a_reader_that_is_gone_saves_as_a_signal_does(data_dir, tmp_path):
    """What `python train.py | head -1` does, and a terminal that is closed."""
    process = start(tmp_path, data_dir, *TINY)
    wait_for(process, "training 100000 steps")
    process.stdout.close()
    assert "saved step" in process.stderr.read()
    assert process.wait() == 128 + signal.SIGPIPE
    assert content(tmp_path)["step"] >= 0


def test_a_removed_out_dir_loses_no_weights(data_dir, tmp_path):
    process = start(tmp_path / "out", data_dir, *TINY)
    wait_for(process, " 1/")
    shutil.rmtree(tmp_path / "out")
    process.send_signal(signal.SIGTERM)
    rest_of(process)
    assert process.returncode == 143 and content(tmp_path / "out")["step"] > 0


def test_a_second_run_in_one_out_dir_is_refused(data_dir, tmp_path):
    process = start(tmp_path, data_dir, *TINY)
    wait_for(process, " 1/")
    out = run("train.py", *TINY, f"--data_dir={data_dir}", f"--out_dir={tmp_path}", status=1)
    assert "another train.py is writing there" in out.strip().splitlines()[-1]
    process.send_signal(signal.SIGTERM)
    rest_of(process)
    steps = [r["step"] for r in of_kind("step", tmp_path)]
    assert steps == list(range(1, content(tmp_path)["step"] + 1))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ckpt.pt", "log.jsonl"]


def test_divergence_is_reported_and_the_last_good_checkpoint_kept(data_dir, tmp_path):
    """Softmax alone, 12 layers deep and too fast: deep layers collapse, the gradient overflows."""
    out = run("train.py", "config/sm.py", "--device=cpu", "--dataset=mine", "--n_layer=12",
              f"--data_dir={data_dir}", f"--out_dir={tmp_path}", "--n_head=4", "--n_embd=256",
              "--block_size=64", "--batch_size=2", "--learning_rate=1e-2", "--warmup=0",
              "--eval_windows=2", "--log_interval=1", "--max_iters=200", "--eval_interval=1000",
              status=3)
    last = out.strip().splitlines()[-1]
    assert last.startswith("diverged: the ") and "not finite at step" in last
    assert "lowest in layer" in last and "entropy collapse" in last and "stays in" in last
    record = records(tmp_path)[-1]
    entropies = record["entropy_by_layer"]
    assert record["event"] == "diverged" and len(entropies) == 12
    assert min(entropies) < 0.5 < max(entropies)  # collapsed below, while others still attend
    assert all(w.isfinite().all() for w in weights(tmp_path).values())


def test_a_huge_perplexity_is_not_80_digits(data_dir, tmp_path):
    out = run("train.py", *TINY, f"--data_dir={data_dir}", f"--out_dir={tmp_path}", "--max_iters=2",
              "--warmup=0", "--learning_rate=90")
    assert of_kind("eval", tmp_path)[-1]["val_ppl"] > 1e9
    assert not re.search(r"\d{12}\.", out), out


def test_a_character_that_the_terminal_lacks_ends_nothing(data_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    out = run("train.py", *TINY, f"--data_dir={data_dir}", f"--out_dir={tmp_path}", "--max_iters=1",
              "--sample_tokens=1", "--sample_prompt=é")
    assert "--- a sample\n?" in out
    assert records(tmp_path)[-1]["sample"].startswith("é")


# ---------------------------------------------------------------------------------- what it refuses
MISTAKES = [
    (["--n_layers=3"], 2, "unknown key 'n_layers', did you mean 'n_layer'?"),
    (["--n_layer=three"], 2, "n_layer must be int"),
    (["config/sm_scfuffn.py", "--use_gelu=True"], 2, "fuse_ffn needs an FFN without activation"),
    (["--n_embd=50", "--n_head=3"], 2, "cannot be split"),
    (["--uniform_layers=3"], 2, "uniform_layers must be at least 0 and at most n_layer=2"),
    (["--uniform_layers=2", "--entropy_reg=True"], 2, "leave it one, --uniform_layers and "),
    (["--lr_decay=step"], 2, "lr_decay must be one of 'linear', 'cosine'"),
    (["--reduction=max"], 2, "reduction must be one of"),
    (["--batch_size=0"], 2, "batch_size must be at least 1"),
    (["--grad_clip=-1"], 2, "grad_clip must be at least 0"),
    (["--beta2=1"], 2, "beta2 must be at least 0 and at most 0.999999999"),
    (["--max_iters=1e999"], 2, "max_iters must be int"),
    (["--seed=1e30"], 2, "seed must be at least 0 and at most 9223372036854775807"),
    (["--n_layer=1e9"], 2, "n_layer must be at least 1 and at most 1024"),
    (["--n_embd=1e20"], 2, "n_embd must be at least 1 and at most 65536"),
    (["--vocab_size=1e30"], 2, "vocab_size must be at least 1 and at most 16777216"),
    (["--batch_size=1e9"], 2, "batch_size must be at least 1 and at most 1048576"),
    (["--warmup=5"], 2, "warmup must be at least 0 and at most 1, and is 5.0"),
    (["--warmup=1e308"], 2, "warmup must be at least 0 and at most 1"),
    (["--learning_rate=nan"], 2, "learning_rate must be float"),
    (["--n_layer=1000", "--n_embd=65536"], 2, "n_embd=65536 and batch_size=8 take 824,"),
    (["--batch_size=1048576", "--vocab_size=16777216"], 2, "GB at least, and cpu has"),
    (["--sample_tokens=5", "--sample_prompt="], 2, "sample_prompt must be a word"),
    (["--fsdp=yes"], 2, "fsdp=yes shards the model among several processes: start them by "),
    (["--init_from=nowhere.pt"], 1, "init_from=nowhere.pt: no checkpoint at nowhere.pt"),
    (["--init_from=resume"], 1, "no checkpoint at"),
    (["--dataset=nowhere"], 1, "--name=nowhere --train_source=FOLDER --data_dir="),
    (["--dataset=codeparrot_t256", "--block_size=256"], 1,
     "--corpus=codeparrot --piece=256 --name=codeparrot_t256"),
    (["--dataset=pycode2k"], 1, "data/prepare.py --name=pycode2k --vocab_size=TOKENS"),
    (["--dataset=languini_2"], 1, "--corpus=languini --name=languini_2"),
    (["--vocab_size=100"], 1, "ends at 99: leave vocab_size=0"),
    (["--block_size=100000"], 1, "one window takes 100001"),
    (["--device=cuda:99"], 1, "device 'cuda:99' can't be used"),
    (["--out_dir=/dev/null/out"], 1, "can't write to /dev/null/out"),
]
if find_spec("tensorboard") is None:
    MISTAKES.append((["--log_to=tensorboard"], 1, "pip install tensorboard"))


def test_one_line_says_what_is_wrong(data_dir, tmp_path):
    usual = [*TINY, f"--data_dir={data_dir}", f"--out_dir={tmp_path}"]
    told = refusals("train.py", [[*usual, *args] for args, _, _ in MISTAKES])
    for (args, status, line), (code, err) in zip(MISTAKES, told):
        assert code == status, (args, err)
        assert err.startswith("error: ") and err.count("\n") == 1 and line in err, (args, err)
    assert not (tmp_path / "ckpt.pt").exists()


def limited(folder, resource, most):
    """A config file that limits train.py's process; `used` in `most` is its bytes by then."""
    path = folder / "limited.py"
    path.write_text("import resource as _r\n"
                    "_pages = int(open('/proc/self/statm').read().split()[0])\n"
                    "_most = lambda used: " + most + "\n"
                    f"_r.setrlimit(_r.{resource}, (_most(_pages * _r.getpagesize()),) * 2)\n")
    return path


def test_too_little_memory_is_one_line(data_dir, tmp_path):
    little = limited(tmp_path, "RLIMIT_AS", "used + 2**29")
    out = run("train.py", little, *TINY, f"--data_dir={data_dir}", f"--out_dir={tmp_path}",
              "--batch_size=10000", status=1)
    assert "error: out of memory: a smaller batch_size" in out.strip().splitlines()[-1]


def test_a_full_disk_loses_nothing(out_dir, data_dir):
    """/dev/full stands in for the disk: every write to it fails as on a full one."""
    before = (out_dir / "ckpt.pt").read_bytes()
    (out_dir / "ckpt.pt.tmp").symlink_to("/dev/full")
    last = resume(out_dir, data_dir, "--max_iters=4", status=1).strip().splitlines()[-1]
    assert last.startswith("error: can't write ") and "ckpt.pt: No space left on device" in last
    assert f"The last good checkpoint stays in {out_dir}/ckpt.pt" in last
    assert (out_dir / "ckpt.pt").read_bytes() == before


def test_a_disk_full_from_the_start_claims_no_checkpoint(data_dir, tmp_path):
    command = [sys.executable, "train.py", *TINY, f"--data_dir={data_dir}", f"--out_dir={tmp_path}"]
    done = subprocess.run(["bash", "-c", 'ulimit -f 100; exec "$@"', "bash", *command], cwd=ROOT,
                          capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == (f"error: can't write {tmp_path}/ckpt.pt: File too large. "
                           "No checkpoint was written yet\n")
    assert [p.name for p in tmp_path.iterdir()] == ["log.jsonl"]  # and no ckpt.pt.tmp


def test_a_log_that_cannot_be_written_is_one_line(data_dir, tmp_path):
    out = run("train.py", limited(tmp_path, "RLIMIT_FSIZE", "0"), *TINY, f"--data_dir={data_dir}",
              f"--out_dir={tmp_path / 'out'}", status=1)
    assert out.splitlines()[-1] == (f"error: can't write {tmp_path}/out/log.jsonl: File too large. "
                                    "No checkpoint was written yet")


def test_damaged_data_are_named(out_dir, data_dir, tmp_path):
    """Tokens moved on, and their hash corrected; a meta.json with nothing in it; half a file."""
    told = ["not as it was prepared", "was trained on other data", "is damaged", "is damaged"]
    folders = [shutil.copytree(data_dir / "mine", tmp_path / f"{i}" / "mine") for i in range(4)]
    moved, hashed, empty, half = folders
    for mine in (moved, hashed):
        train = (mine / "train.bin").read_bytes()
        (mine / "train.bin").write_bytes(train[2:] + train[:2])  # as long as before
    meta = json.loads((hashed / "meta.json").read_text()) | {"sha256": hash_bins(map_bins(hashed))}
    (hashed / "meta.json").write_text(json.dumps(meta))
    (empty / "meta.json").write_text("{}")
    with open(half / "train.bin", "r+b") as f:
        f.truncate(1000)
    tries = [["--device=cpu", f"--out_dir={out_dir}", f"--data_dir={mine.parent}",
              "--init_from=resume"] for mine in folders]
    for line, (code, err) in zip(told, refusals("train.py", tries)):
        assert code == 1 and err.count("\n") == 1 and line in err, err


# What a checkpoint may be damaged into, or made into by someone hostile: {key: value}, the line
DAMAGED = [
    *(({key: None}, f"has no {key!r}") for key in
      ("settings", "optimizer", "regularizer", "rng", "step", "data_sha256")),
    ({"settings": 5}, "'int' object is not a mapping"),
    ({"settings": {"max_iters": "x"}}, "max_iters must be int"),
    ({"settings": {"learning_rate": 1e30}}, "learning_rate must be at least 0 and at most"),
    ({"step": -1}, "can't be resumed from (ValueError: step -1)"),
    ({"step": "x"}, "can't be resumed from"),
    ({"rng": torch.zeros(3)}, "can't be resumed from"),
    ({"optimizer": {}}, "can't be resumed from"),
    ({"optimizer": {"state": {}}}, "can't be resumed from"),
    ({"optimizer": {"state": {0: {"step": torch.tensor(2.0), "exp_avg": torch.zeros(3),
                                  "exp_avg_sq": torch.zeros(3)}}}}, "can't be resumed from"),
]


def test_a_checkpoint_that_cannot_be_resumed_is_one_line(finished, data_dir, tmp_path):
    tries = []
    for i, (changes, _) in enumerate(DAMAGED):
        whole = content(finished) | changes
        os.mkdir(tmp_path / str(i))
        torch.save({k: v for k, v in whole.items() if v is not None}, tmp_path / str(i) / "ckpt.pt")
        tries.append(["--device=cpu", f"--out_dir={tmp_path / str(i)}", f"--data_dir={data_dir}",
                      "--init_from=resume"])
    for (changes, line), (code, err) in zip(DAMAGED, refusals("train.py", tries)):
        assert code in (1, 2), (changes, err)
        assert err.startswith("error: ") and err.count("\n") == 1 and line in err, (changes, err)


def test_what_a_checkpoint_fixes_is_not_changed_by_a_flag(out_dir, data_dir):
    out = resume(out_dir, data_dir, "--n_embd=64", status=2)
    assert "trained with n_embd=32: resume can't change it to 64" in out


def test_a_hostile_checkpoint_overwrites_nothing(out_dir, data_dir, tmp_path):
    """Its settings name a file of the user's for every global that is a path, or was one once."""
    victim = tmp_path / "victim"
    victim.write_text("mine")
    hostile = content(out_dir)
    paths = ("out_dir", "ckpt_path", "log_path", "plot_path", "data_dir", "run", "HERE", "save")
    hostile["settings"] |= {key: str(victim) for key in paths}
    torch.save(hostile, out_dir / "ckpt.pt")
    resume(out_dir, data_dir, "--max_iters=3")
    assert victim.read_text() == "mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "victim"]
    assert content(out_dir)["step"] == 3


def test_a_line_tells_that_it_goes_on_where_nothing_was_said_for_long(tmp_path, capsys):
    quiet = Run(str(tmp_path))
    quiet.still("at once")
    quiet.said -= 11
    quiet.still("after eleven seconds")
    quiet.still("and again")
    assert capsys.readouterr().out == "after eleven seconds\n"


def test_a_terminal_writes_over_that_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    quiet = Run(str(tmp_path))
    texts = "evaluating, window 8 of 256", "step 7/1000"
    for text in texts:
        quiet.said -= 2
        quiet.still(text)
    quiet.say("the next line of a log")
    lines = capsys.readouterr().out.split("\r")
    assert len(lines[1]) >= len(lines[0])  # so that nothing of the longer one stays
    assert [line.rstrip() for line in lines] == [*texts, "the next line of a log"]
