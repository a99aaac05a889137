"""experiments/schemes.py and beyond.py: prices of toys on the real engine, and what follows."""
import json
import sys

import numpy as np
import pytest
from conftest import ROOT, run

pytest.importorskip("spu", reason="spu needs Python 3.10 or 3.11")

sys.path.insert(0, str(ROOT / "experiments"))
import beyond  # noqa: E402
import schemes  # noqa: E402

TOY = ["--n_layer=2", "--n_head=2", "--n_embd=32", "--block_size=16", "--vocab_size=100",
       "--measure_layers=0"]


def test_a_scheme_is_run_and_put_beside_earlier_runs(tmp_path):
    table_2 = ROOT / "results" / "private_table2.json"
    out = run("experiments/schemes.py", *TOY, "--archs=sm_ln_g,sm_scfuffn", f"--into={tmp_path}",
              "--schemes=semi2k", f"--also={table_2}")
    results = json.loads((tmp_path / "schemes.json").read_text())
    assert results[2:] == json.loads(table_2.read_text())
    full, fused = results[:2]
    assert fused["bytes_total"] < full["bytes_total"] and fused["rounds"] < full["rounds"]
    assert full["max_abs_err"] < 0.05 and "--protocol=semi2k " in full["command"]
    for scheme, (full, fused) in (("semi2k", results[:2]), ("cheetah", results[2::2])):
        ratio = f"{full['bytes_total'] / fused['bytes_total']:.2f}x"
        assert ratio in next(line for line in out.splitlines() if f"| {scheme} SM+Sc" in line)
    assert (tmp_path / "schemes.png").stat().st_size > 1000


def test_a_slow_link_is_bounded_by_messages_and_bytes():
    waits, bits = schemes.at_most({"rounds": 100, "bytes_total": 25 * 10**6}, "wan")
    assert waits == pytest.approx(8.0) and bits == pytest.approx(2.0)


def test_an_unknown_scheme_is_one_line():
    assert run("experiments/schemes.py", "--schemes=spdz", status=2).count("\n") == 1
    assert run("experiments/beyond.py", "--shapes=70B", status=2).count("\n") == 1


def test_the_parts_add_up_to_a_run_of_the_whole(tmp_path):
    """A toy's parts, its matrices by some of their columns, and bench_spu.py's whole pass."""
    out = run("experiments/beyond.py", "--shapes=toy", "--block_size=16", "--weights=1024",
              f"--into={tmp_path}")
    measured = json.loads((tmp_path / "beyond.json").read_text())["toy"]
    L, d, H, V = beyond.SHAPES["toy"]
    run("bench_spu.py", "--archs=sm_scfuffn", f"--n_layer={L}", f"--n_embd={d}", f"--n_head={H}",
        f"--vocab_size={V}", "--block_size=16", f"--json={tmp_path / 'whole.json'}")
    [whole] = json.loads((tmp_path / "whole.json").read_text())
    found = beyond.passes("toy", measured["parts"])
    first = found["first token"]
    assert first[beyond.BYTES] == pytest.approx(whole["bytes_total"], rel=0.05)
    assert first[beyond.MESSAGES] == pytest.approx(whole["rounds"], rel=0.15)
    assert found["first token, half uniform"][beyond.BYTES] < first[beyond.BYTES]
    assert "| toy, first token |" in out
    assert min(measured["peak_memory_bytes"].values()) > 1e8


def test_a_links_minutes_are_computing_waiting_and_sending():
    cost = np.array([1e9, 5000, 99.0, 60.0 * beyond.CORES])
    assert beyond.minutes("toy", cost, (0, 0), 1e12, 0) == pytest.approx(1.0, rel=1e-3)
    assert beyond.minutes("toy", cost, (10, 30), 1e12, 1) == pytest.approx(2.0, rel=1e-3)
    assert beyond.minutes("toy", cost, (0, 0), 1e8, 0) == pytest.approx(1 + 40 / 60)


def test_round_trips_are_what_a_slow_link_adds_less_its_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(beyond, "into", str(tmp_path))
    assert beyond.round_trips() == {}
    kinds = {"matmul": 10, "softmax": 110, "head": 35}  # round trips
    near = {"seconds_by_kind": dict.fromkeys(kinds, 1.0),
            "bytes_by_kind": dict.fromkeys(kinds, 25 * 10**6)}  # a second both ways at 100 Mbps
    far = near | {"seconds_by_kind": {kind: 2 + 0.08 * n for kind, n in kinds.items()}}
    for file, one in zip(beyond.ROUNDS, (near, far)):
        told = [{"n_layer": 2, "replies": [{"passes": [one, one]}]}]
        (tmp_path / file).write_text(json.dumps(told))
    for layer, rest in beyond.round_trips().values():
        assert layer == pytest.approx(60) and rest == pytest.approx(35)
