"""experiments/recall.py, arithmetic.py and transfer.py: their tasks are right, a cell runs once."""
import json
import math
import runpy
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import ROOT, run

sys.path.insert(0, str(ROOT / "experiments"))
import arithmetic  # noqa: E402
import cells  # noqa: E402
import recall  # noqa: E402
import sweep  # noqa: E402
import transfer  # noqa: E402
from tables import EREG, LN_G, SC, SEEDS, TUNED, row  # noqa: E402

SIZE = {"n_layer": 2, "n_embd": 32, "n_head": 2, "block_size": 32, "vocab_size": 40}
CELL = {"task": "recall", "label": "tiny", "config": LN_G, "flags": {"learning_rate": 1e-2},
        "size": SIZE, "seed": 1, "steps": 4, "batch": 8}


def test_every_answer_of_recall_follows_from_its_context():
    x, y = recall.make(CELL, 64, torch.Generator().manual_seed(0))
    counts = set()
    for tokens, answers in zip(x.tolist(), y.tolist()):
        pairs = answers.count(-1) // 2
        counts.add(pairs)
        told = dict(zip(tokens[0:2 * pairs:2], tokens[1:2 * pairs:2]))
        assert len(told) == pairs and answers[:2 * pairs] == [-1] * (2 * pairs)
        assert all(key < 20 <= value for key, value in told.items())
        assert [told[key] for key in tokens[2 * pairs:]] == answers[2 * pairs:]
    assert counts == set(range(1, 9))
    _, hardest = recall.make(CELL, 8, torch.Generator().manual_seed(0), least=None)
    assert (hardest == -1).sum(1).tolist() == [16] * 8


@pytest.mark.parametrize("T, steps", [(32, 1500), (64, 4000)])
def test_a_longer_context_has_more_steps(T, steps):
    r = row("SM+LN+G", LN_G, 3e-3)
    assert recall.cell_of(r, SIZE | {"block_size": T})["steps"] == steps


@pytest.mark.parametrize("task, a, b, text", [
    ("add3", 12, 345, "012+345=0357"), ("add3r", 12, 345, "012+345=7530"),
    ("add2r", 99, 99, "99+99=891"), ("mul2r", 12, 34, "12*34=8040"), ("mul2", 0, 7, "00*07=0000")])
def test_problems_are_written_as_the_docstring_says(task, a, b, text):
    whole = arithmetic.written(task, torch.tensor([a]), torch.tensor([b]))
    assert "".join(arithmetic.CHARACTERS[i] for i in whole[0]) == text
    x, y = arithmetic.split(task, whole)
    answer = text.partition("=")[2]
    assert "".join(arithmetic.CHARACTERS[i] for i in y[0] if i >= 0) == answer
    queries, places = arithmetic.aligned(task)
    for place, (query, (first, second)) in enumerate(zip(queries.tolist(), places.tolist())):
        assert x[0, first] == a // 10 ** place % 10 and x[0, second] == b // 10 ** place % 10
        value = a + b if "add" in task else a * b
        assert y[0, query] == value // 10 ** place % 10


def test_held_out_problems_are_asked_and_never_trained_on():
    cell = CELL | {"task": "add2"}
    x, y = arithmetic.make(cell, 2000, torch.Generator().manual_seed(0))
    assert len(x) == len(y) == 2000
    trained = {tuple(problem) for problem in x[:, :6].tolist()}
    asked = arithmetic.asked("add2", torch.Generator().manual_seed(0))
    problems = [tuple(problem) for whole in asked.values() for problem in whole[:, :6].tolist()]
    assert len(set(problems)) == len(problems) and not trained & set(problems)
    assert 0.08 < len(asked[2]) / (10**4 - 100) < 0.14


def test_sampling_is_expected_to_fail_as_often_as_the_probabilities_say():
    p = torch.tensor([[[0.75, 0.25], [0.5, 0.5]]])
    greedy, sampled, guided = arithmetic.matches(p.log(), torch.tensor([[0, 0]]))
    assert greedy == 1.0 and math.isclose(sampled, 0.75 * 0.5, rel_tol=1e-6)
    assert sampled < guided < 1.0


@pytest.mark.parametrize("r, frozen", [
    (row("", EREG, TUNED[EREG], threshold_init=0.8), False),
    (row("", EREG, TUNED[EREG], threshold_init=0.8, threshold_frozen=True), True),
    (row("", SC, TUNED[SC], uniform_layers=2), None)])
def test_a_cell_trains_and_its_heads_are_told(r, frozen, monkeypatch):
    monkeypatch.setattr(recall, "tested", 16)
    monkeypatch.setattr(cells, "LOOK", 4)  # steps of data at a time
    cell = CELL | {"config": r["config"], "flags": r["flags"]}
    model, regularizer, history = cells.train(cell, recall.make, "cpu")
    assert [step for step, *_ in history] == [4] and math.isfinite(history[-1][1])
    told = recall.study(cell, model)
    assert 0 <= told["score"] <= 1 and told["to_value"]["entropy"] > 0
    if frozen is None:  # uniform: position i, counted from 1, looks at each of i alike
        mean = sum(1 / i for i in range(17, 33)) / 16
        assert regularizer is None and math.isclose(told["to_value"]["weight"], mean, rel_tol=1e-4)
    else:
        moved = (regularizer.threshold.detach() - 0.8).abs().max() > 1e-4
        assert moved == (not frozen)


def test_the_best_rate_is_chosen_and_a_divergence_is_not(tmp_path):
    results = sweep.Results(tmp_path / "r.json", {})
    for rate, score, event in ((1e-3, 0.5, "done"), (1e-2, 0.9, "done"), (1.0, 1.0, "diverged")):
        results.add({"cell": sweep.at_rate(CELL, rate, 1), "score": score, "event": event,
                     "history": [[4, 1.0, score]]})
    assert sweep.chosen_rate(CELL, [1e-3, 1e-2, 1.0], results) == 1e-2
    again = sweep.Results(tmp_path / "r.json", {})
    [first, *_] = sweep.reported([(CELL, CELL)], [1e-3, 1e-2], 3, again)
    assert first["seed"] == SEEDS[0] and first["flags"]["learning_rate"] == 1e-2


def test_a_tiny_cell_is_trained_once(tmp_path, monkeypatch, capsys):
    arguments = [f"--into={tmp_path}", "--tasks=add2r", "--archs=SM+LN+G", "--seeds=1",
                 "--rates=0.01", "--steps=2", "--batch=4", "--tested=16", "--n_embd=32",
                 "--thresholds=False", "--jobs=1"]
    out = run("experiments/arithmetic.py", *arguments)
    assert out.count("done at step 2") == 2  # the tuning and the reported seed
    told = json.loads((tmp_path / "arithmetic.json").read_text())
    assert [r["cell"]["seed"] for r in told["rows"]] == [1, SEEDS[0]]
    assert told["scale"]["steps"] == 2 and told["rows"][0]["device"] and told["rows"][0]["torch"]
    assert (tmp_path / "arithmetic.png").stat().st_size > 1000
    monkeypatch.setattr(sys, "argv", ["experiments/arithmetic.py", *arguments])
    runpy.run_path(str(ROOT / "experiments" / "arithmetic.py"), run_name="__main__")
    again = capsys.readouterr().out
    assert "done at step" not in again and again.splitlines()[-1] in out


def test_fine_tuning_starts_from_the_seeds_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(transfer, "out_dir", str(tmp_path))
    monkeypatch.setattr(transfer.reproduce, "out_dir", str(tmp_path))
    r = row("SM+LN+G", LN_G, 3e-3)
    for seed, start in ((SEEDS[1], SEEDS[1]), (1, SEEDS[0])):  # the tuning seed has none
        command = transfer.command(transfer.cell(r, "pretrained", 0.3, seed))
        assert f"--init_from={tmp_path}/sm_ln_g-learning_rate=0.003-s{start}/ckpt.pt" in command
        assert {"--learning_rate=0.0009", f"--seed={seed}", "--max_iters=264"} < set(command)
    assert not any("init_from" in flag
                   for flag in transfer.command(transfer.cell(r, "scratch", 1, 1)))


def test_a_checkpoint_of_half_a_run_is_none_to_start_from(tmp_path, monkeypatch):
    monkeypatch.setattr(transfer.reproduce, "out_dir", str(tmp_path))
    monkeypatch.setattr(transfer, "pretrain", False)
    monkeypatch.setattr(transfer, "seeds", 1)
    r = row("SM+LN+G", LN_G, 3e-3)
    folder = transfer.reproduce.folder(r["config"], r["flags"], SEEDS[0])
    folder.mkdir()
    (folder / "ckpt.pt").touch()
    for event, rows in (("eval", []), ("done", [r])):
        (folder / "log.jsonl").write_text(json.dumps({"event": event, "step": 330}) + "\n")
        assert transfer.checkpoints([r]) == rows


def test_a_cell_that_fails_loses_no_other(tmp_path, monkeypatch, capsys):
    def finish(cell, *rest):
        if cell["seed"] == 1:
            raise RuntimeError("CUDA out of memory")
        return [{"cell": cell, "event": "done", "score": 1.0, "seconds": 1.0,
                 "history": [[4, 0.0, 1.0]]}]

    monkeypatch.setattr(sweep, "finish", finish)
    monkeypatch.setattr(sweep, "ProcessPoolExecutor", lambda jobs, *rest: ThreadPoolExecutor(jobs))
    results = sweep.Results(tmp_path / "r.json", {})
    cells_of_all = [sweep.at_rate(CELL, 1e-3, seed) for seed in (1, 2, 3)]
    with pytest.raises(SystemExit):
        sweep.run(cells_of_all, results, None, None, 1, math.inf)
    assert capsys.readouterr().err == "error: a cell failed (RuntimeError: CUDA out of memory)\n"
    kept = sweep.Results(tmp_path / "r.json", {})
    assert [bool(kept.of(cell)) for cell in cells_of_all] == [False, True, True]


def test_recall_tells_every_row_and_draws_them(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(recall, "tested", 16)
    model = cells.build(CELL)[0].eval()
    done = {"cell": CELL, "event": "done", "history": [[4, 1.0, 0.5]], **recall.study(CELL, model)}
    lost = {"cell": CELL | {"label": "lost"}, "event": "diverged", "history": [[50, math.nan, 0.0]],
            "score": 0.0}
    groups = {"2x32x32": [done, done | {"score": 1.0}, lost]}
    recall.table(groups)
    _, first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("2x32x32 tiny ") and f"({done['score']:.2f} to 1.00)" in first
    assert cells.tell_head(done["to_value"]) in first and second.endswith("diverged")
    recall.draw(groups, tmp_path / "recall.png")
    assert (tmp_path / "recall.png").stat().st_size > 1000


def test_transfer_tells_what_its_runs_logged(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(transfer, "out_dir", str(tmp_path))
    r = row("SM+LN+G", LN_G, 3e-3)
    known = dict.fromkeys(("parameters", "entropy_by_layer", "torch", "machine", "data_sha256"))

    def leave(run, event, losses):
        folder = transfer.folder(run)
        folder.mkdir(parents=True)
        log = [{"event": "eval", "step": step, "val_ce": ce} for step, ce in losses.items()]
        ppl = math.exp(log[-1]["val_ce"])
        log.append({"event": event, "step": log[-1]["step"], "val_ppl": ppl, **known})
        (folder / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in log))
        (folder / "made.json").write_text("{}")

    for factor, event, last in ((0.3, "done", 3.0), (1, "done", 2.0), (2, "diverged", 1.0)):
        leave(transfer.cell(r, "scratch", factor, 1), event, {0: 7.0, 264: last})
    runs = transfer.reported(r, "scratch", [0.3, 1, 2])
    assert runs == [transfer.cell(r, "scratch", 1, seed) for seed in SEEDS]
    leave(runs[0], "done", {0: 7.0, 26: 4.0, 52: 3.0, 264: 2.5})
    leave(runs[1], "diverged", {0: 7.0})
    groups = {"SM+LN+G": {"pretrained": transfer.outcomes(runs), "scratch": []}}
    transfer.table(groups)
    _, first, second = capsys.readouterr().out.splitlines()
    assert "7.000 4.000 2.500" in first and first.endswith("; 1 of 2 diverged")
    assert second.endswith("diverged, or not run")
    transfer.draw(groups, tmp_path / "transfer.png")
    assert (tmp_path / "transfer.png").stat().st_size > 1000


@pytest.mark.parametrize("script, setting", [
    ("recall", "--sizes=2x33x64"), ("recall", "--sizes=2x32x0"), ("recall", "--rates=fast"),
    ("recall", "--archs=SM+LN"), ("recall", "--seeds=4"), ("arithmetic", "--tasks=div2"),
    ("arithmetic", "--rates=0"), ("transfer", "--factors=-1"), ("transfer", "--dataset=none")])
def test_a_bad_setting_is_one_line(script, setting, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [script, setting, f"--into={tmp_path}"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(ROOT / "experiments" / f"{script}.py"), run_name="__main__")
    error = capsys.readouterr().err
    assert stopped.value.code in (1, 2)
    assert error.startswith("error: ") and error.count("\n") == 1
