"""machine.py: the type of the matrix products is what was measured to be faster."""
import math

import pytest
import torch
from conftest import run
from test_train import TINY, of_kind

import machine

WIDE, NARROW = torch.float32, torch.bfloat16


@pytest.mark.parametrize("asked, seconds, taken", [
    ("auto", {WIDE: 3e-3, NARROW: 2e-3}, NARROW),
    ("auto", {WIDE: 2e-3, NARROW: 3e-3}, WIDE),
    ("float32", {WIDE: 3e-3, NARROW: 2e-3}, WIDE),
    ("bfloat16", {WIDE: 2e-3, NARROW: 3e-3}, NARROW),
])
def test_a_cpu_takes_the_faster_type_unless_told(asked, seconds, taken, monkeypatch):
    monkeypatch.setattr(machine, "matmul_seconds", lambda dtype, rows, d: seconds[dtype])
    device, dtype, compiled, told = machine.choose_machine("cpu", asked, "auto", 500, 500)
    assert (device, dtype, compiled) == ("cpu", taken, False)
    if asked == "auto":  # of 2 * 500 * 500 * 2000 FLOPs
        speeds = {2e-3: "0.50", 3e-3: "0.33"}
        assert (f"{speeds[seconds[WIDE]]} TFLOP/s in float32, "
                f"{speeds[seconds[NARROW]]} in bf16") in told


def test_a_type_that_the_cpu_only_emulates_is_not_tried_for_long(monkeypatch):
    seconds, tried = {WIDE: 3e-3, NARROW: 3.0}, []

    def product(dtype, rows, d):
        tried.append(dtype)
        return seconds[dtype]
    monkeypatch.setattr(machine, "matmul_seconds", product)
    assert not machine.bf16_is_faster(500, 500)[0] and len(tried) == 4
    tried.clear()
    seconds[NARROW] = 4e-3
    assert not machine.bf16_is_faster(500, 500)[0] and len(tried) == 20


def test_it_is_measured_here():
    assert 0 < machine.matmul_seconds(WIDE, 256, 64) < 10
    assert "TFLOP/s in float32" in machine.bf16_is_faster(256, 64)[1]


def test_a_resumed_run_keeps_its_type(data_dir, tmp_path):
    here = f"--data_dir={data_dir}", f"--out_dir={tmp_path}"
    out = run("train.py", *TINY, *here, "--dtype=bfloat16", "--max_iters=2")
    assert "bfloat16 matmuls" in out
    out = run("train.py", "--init_from=resume", *here, "--device=cpu", "--max_iters=3")
    assert "bfloat16 matmuls" in out


def test_float16_trains_as_float32_does(data_dir, tmp_path):
    """With the loss scaled, and less after a gradient that overflows: no divergence."""
    args = ["config/ereg_sm_t_scfuffn.py", *TINY, f"--data_dir={data_dir}", "--max_iters=6",
            "--log_interval=1"]
    for name, flags in (("wide", []), ("half", ["--dtype=float16"]),
                        ("large", ["--dtype=float16", "--lambda_entropy=4e3"])):
        run("train.py", *args, *flags, f"--out_dir={tmp_path / name}")
    wide, half, large = (of_kind("step", tmp_path / name) for name in ("wide", "half", "large"))
    assert [r["ce"] for r in half] == pytest.approx([r["ce"] for r in wide], abs=1e-3)
    norms = [r["grad_norm"] for r in large]
    assert not math.isfinite(norms[0]) and math.isfinite(norms[-1])
    run("train.py", f"--data_dir={data_dir}", f"--out_dir={tmp_path / 'large'}",
        "--init_from=resume", "--device=cpu", "--max_iters=7")
    resumed = of_kind("step", tmp_path / "large")[-1]["grad_norm"]
    assert math.isfinite(resumed)  # the scale is in the checkpoint
