"""bench.py: every case is timed and told; what the numbers are is the machine's affair."""
import json

import pytest
from conftest import run

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
        assert f"{r['case']:<16}{r['T']:>6}" in out


@pytest.mark.parametrize("argument, line", [
    ("--device=tpu", "device must be one of auto, cpu, cuda"),
    ("--dtype=bf16", "dtype must be one of auto, float32, bfloat16"),
    ("--n_head=5", "cannot be split"),
    ("--block_sizes=16,a", "invalid literal for int"),
    ("--json=no/r.json", "a folder that exists"),
    ("--rounds=1e30", "rounds must be at least 1 and at most"),
    ("--tokens=1e9", "GB at least"),
])
def test_one_line_says_what_is_wrong(argument, line):
    out = run("bench.py", argument, status=2)
    assert out.startswith("error: ") and line in out and out.count("\n") == 1
