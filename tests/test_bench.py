"""bench.py, experiments/nanogpt.py: every case is timed; the numbers are the machine's."""
import json

import pytest
from conftest import refusals, run

CASES = ["SM+LN+G", "SM+ScFuFFN", "SM(t)+ScFuFFN", "EReg, explicit", "EReg"]
TINY = ["--block_sizes=16,24", "--tokens=48", "--rounds=2", "--n_layer=2", "--n_head=2",
        "--n_embd=32", "--vocab_size=64", "--device=cpu"]


def test_every_case_is_timed(tmp_path):
    out = run("bench.py", *TINY, f"--json={tmp_path / 'r.json'}")
    rows = json.loads((tmp_path / "r.json").read_text())["rows"]
    assert [(r["case"], r["T"]) for r in rows] == [(case, T) for T in (16, 24) for case in CASES]
    for r in rows:
        assert len(r["seconds"]) == 2
        assert r["share_of_peak"] > 0
        assert r["peak_memory_bytes"] > 1e8
        # a step is of 3 x 16 or of 2 x 24 tokens
        assert r["tokens_per_s"] * r["ms_per_step"] / 1e3 == pytest.approx(48)
        assert (r["step_against_no_entropy"] is None) == ("EReg" not in r["case"])
        assert out.count(f"{r['case']:<16}{r['T']:>6}") == 2
        assert sum(r["parts"].values()) == pytest.approx(1)
        assert r["parts"]["products by weights"] > 0.02 and r["parts"]["AdamW"] > 0


MISTAKES = {
    "--device=tpu": "device must be one of auto, cpu, cuda",
    "--dtype=bf16": "dtype must be one of auto, float32, bfloat16",
    "--n_head=5": "cannot be split",
    "--block_sizes=16,a": "invalid literal for int",
    "--json=no/r.json": "a folder that exists",
    "--rounds=1e30": "rounds must be at least 1 and at most",
    "--tokens=1e9": "GB at least",
}


def test_one_line_says_what_is_wrong():
    found = refusals("bench.py", [[argument] for argument in MISTAKES])
    for line, (status, said) in zip(MISTAKES.values(), found):
        assert status == 2 and said.startswith("error: ") and line in said, said
        assert said.count("\n") == 1, said


STAND_IN = """
nullcontext, device_type = int, 'cpu'
ctx = nullcontext() if device_type == 'cpu' else 20
for i in range(12):
    print(f"iter {i}: loss 1.0000, time {40 - ctx:.2f}ms, mfu -100.00%")
"""


def test_nanogpt_is_compared_run_by_run(data_dir, tmp_path):
    """By a script that prints what nanoGPT's prints, and takes 20 ms less under autocast."""
    (tmp_path / "train.py").write_text(STAND_IN)
    out = run("experiments/nanogpt.py", f"--nanogpt={tmp_path}", f"--json={tmp_path / 'r.json'}",
              f"--data_dir={data_dir}", "--dataset=mine", "--dtypes=float32", "--rounds=1",
              "--steps=12", "--n_layer=2", "--n_head=2", "--n_embd=32", "--block_size=32")
    told = json.loads((tmp_path / "r.json").read_text())
    ours, plain, autocast = (row["tokens_per_s"] for row in told["runs"])
    assert (plain, autocast) == pytest.approx((8 * 32 / 0.04, 8 * 32 / 0.02))
    assert told["train.py, float32 over"] == pytest.approx(
        {"nanoGPT, float32": ours / plain, "nanoGPT, bfloat16 autocast": ours / autocast})
    assert "float32 matmuls" in told["runs"][0]["machine"]
    assert f"is {ours / plain:.2f} times as fast as nanoGPT, float32" in out
    assert str(tmp_path) not in json.dumps(told["commands"])


def test_what_is_no_clone_of_nanogpt_is_named(tmp_path):
    out = run("experiments/nanogpt.py", f"--nanogpt={tmp_path}", status=2)
    assert f"nanogpt must be a clone of nanoGPT: can't read {tmp_path}/train.py" in out
