"""train.py in several processes under torchrun: one training, shared out, by gloo on a CPU."""
import os
import re
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, run
from test_train import TINY, content, of_kind, records, resume, wait_for, weights

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
ARGS = [*TINY, "--grad_accum=4", "--batch_size=2", "--log_interval=1", "--eval_interval=10"]

FSDP = "--fsdp=yes"

# A config file, by which each process leaves what it holds at the end in `rank0.pt`, `rank1.pt`
LEAVE = """
import atexit as _atexit
def _leave():
    import os, sys, torch
    m = sys.modules["__main__"]
    held = {**m.model.state_dict(), **(m.regularizer.state_dict() if m.regularizer else {})}
    held = {name: getattr(t, "_local_tensor", t) for name, t in held.items()}
    torch.save(held, f"FOLDER/rank{os.environ['RANK']}.pt")
_atexit.register(_leave)
"""


def start_two(*args):
    return subprocess.Popen([*TORCHRUN, "train.py", *map(str, args)], cwd=ROOT, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"})


def two(*args, status=0):
    """What two processes print together, which must end so."""
    with start_two(*args) as process:
        out = process.communicate(timeout=240)[0]
    assert process.returncode == status, out
    return out


# Thresholds and temperatures; and spectral norm's buffers, which each process moves on by half as
# many power iterations as one process alone.
@pytest.mark.parametrize("arch, within", [("ereg_sm_t_scfuffn", 1e-5), ("sm_snorm_ffn", 1e-2)])
def test_two_processes_train_what_one_does(arch, within, data_dir, tmp_path):
    """
    20 steps: both hold the same bits, or by FSDP halves of them, at the losses of one process with
    as many passes. (AdamW makes whole steps of rounding errors where a gradient is zero, so that
    weights do differ.)
    """
    leave = tmp_path / "leave.py"
    leave.write_text(LEAVE.replace("FOLDER", str(tmp_path)))
    args = [f"config/{arch}.py", *ARGS, f"--data_dir={data_dir}", "--max_iters=20"]
    run("train.py", *args, f"--out_dir={tmp_path / 'one'}")
    for flag, *more in (["--fsdp=no"], [FSDP, "--sample_tokens=3", "--plot=True"]):
        out = two(leave, *args, flag, *more, f"--out_dir={tmp_path / flag}")
        assert out.count("step     20/20") == 1 and "2 processes" in out  # one of them speaks
        first, second = (torch.load(tmp_path / f"rank{r}.pt") for r in (0, 1))
        saved = weights(tmp_path / flag)
        assert saved.keys() == first.keys()
        if flag == FSDP:
            assert out.count("--- a sample\ndef") == 1 and "entropy.png" in out
            shards = {name for name in saved if first[name].shape != saved[name].shape}
            assert shards == {name for name, whole in saved.items()
                              if whole.dim() and not name.endswith(("._u", "._v"))}
            for name in shards:
                first[name] = second[name] = torch.cat((first[name], second[name]))
        for name, whole in saved.items():
            assert torch.equal(first[name], whole) and torch.equal(second[name], whole)
        for kind, numbers in (("step", ("ce", "entropy_term", "grad_norm")), ("eval", ("val_ce",))):
            both = of_kind(kind, tmp_path / "one"), of_kind(kind, tmp_path / flag)
            for a, b in zip(*both, strict=True):
                wanted = [a[n] for n in numbers]
                assert [b[n] for n in numbers] == pytest.approx(wanted, abs=within, rel=0)


def test_another_number_of_processes_goes_on(data_dir, tmp_path):
    """
    Two, stopped by a signal to both; resumed as two shards, and stopped again; resumed by one, and
    by two once more.
    """
    here = f"--data_dir={data_dir}", f"--out_dir={tmp_path}"
    started, step = ("config/ereg_sm_t_scfuffn.py", *ARGS), 0
    for how in (started, ("--init_from=resume", "--device=cpu", FSDP)):
        process = start_two(*how, *here, "--max_iters=100000")
        wait_for(process, f" {step + 7}/")
        process.send_signal(signal.SIGTERM)
        out = process.communicate(timeout=120)[0]
        assert content(tmp_path)["step"] >= step + 7
        step = content(tmp_path)["step"]
        assert out.count(f"saved step {step}") == 1, out
    resume(tmp_path, data_dir, f"--max_iters={step + 3}")
    assert [r["step"] for r in of_kind("step", tmp_path)] == list(range(1, step + 4))
    two("--init_from=resume", "--device=cpu", *here, f"--max_iters={step + 5}")
    assert content(tmp_path)["step"] == step + 5


@pytest.mark.parametrize("flag", ["--fsdp=no", FSDP])
def test_a_divergence_ends_both_with_one_line(flag, data_dir, tmp_path):
    out = two("config/sm.py", *ARGS, flag, f"--data_dir={data_dir}", f"--out_dir={tmp_path}",
              "--learning_rate=1e9", "--grad_clip=0", "--warmup=0", status=1)  # torchrun's own
    assert len(re.findall("^diverged: ", out, re.M)) == 1
    assert records(tmp_path)[-1]["event"] == "diverged"


def test_a_process_that_is_gone_ends_the_other_with_one_line(data_dir, tmp_path):
    process = start_two(*ARGS, f"--data_dir={data_dir}", f"--out_dir={tmp_path}",
                        "--max_iters=100000")
    wait_for(process, " 7/")
    children = open(f"/proc/{process.pid}/task/{process.pid}/children").read().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    lines = process.communicate(timeout=120)[0].splitlines()
    assert process.returncode == 1
    assert [line for line in lines if line.startswith("error: ")] == [
        f"error: another process of this run has ended. The last good checkpoint stays in "
        f"{tmp_path}/ckpt.pt, for --init_from=resume"]


def test_passes_that_cannot_be_shared_out_are_refused(data_dir, tmp_path):
    out = two(*TINY, f"--data_dir={data_dir}", f"--out_dir={tmp_path}", status=1)
    assert "grad_accum=1 passes a step can't be shared out among 2 processes: --grad_accum=2" in out
