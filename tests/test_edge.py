"""experiments/edge.py: an ensemble's members are models trained alone; edges are told rightly."""
import json
import math
import runpy
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, run

sys.path.insert(0, str(ROOT / "experiments"))
import cells  # noqa: E402
import edge  # noqa: E402
import ensemble  # noqa: E402
import sweep  # noqa: E402
from entropy import attention_with_entropy  # noqa: E402
from tables import EREG, LN_G, SC, SEEDS, SM_R, TUNED, row  # noqa: E402

SIZE = {"n_layer": 2, "n_embd": 32, "n_head": 2, "block_size": 16, "vocab_size": 40}
ROWS = [row("", config, TUNED[config]) for config in (LN_G, SM_R, SC, EREG)]
ROWS.append(row("half uniform", EREG, TUNED[EREG], uniform_layers=1))


def group_of(r, rates=(1e-3, 2e-2), seeds=(1, 2), steps=6):
    base = {"task": "edge", "label": r["label"], "config": r["config"], "flags": r["flags"],
            "size": SIZE, "steps": steps, "batch": 3, "std": 0.02, "warmup": 0.5}
    return [sweep.at_rate(base, rate, seed) for seed in seeds for rate in rates]


def trained(group, deadline=math.inf):
    return ensemble.train(group, edge.make, edge.held_out(group[0]), "cpu", deadline)


@pytest.fixture
def text(monkeypatch):
    """Random tokens to train on, and few windows to look at."""
    tokens = np.random.default_rng(0).integers(0, 40, 2000).astype(np.uint16)
    monkeypatch.setattr(edge, "BINS", [tokens, tokens[:500]])
    monkeypatch.setattr(edge, "tested", 5)


@pytest.mark.parametrize("told", ["entropy", "logit"])
def test_attention_is_that_of_the_model(told):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 2, 8, 4)                                    # (B, H, T, d_k)
    y, entropy = attention_with_entropy(q, k, v)
    mine, seen = ensemble.attention(told, q, k, v)
    torch.testing.assert_close(mine, y)
    logit = (q @ k.mT / 2).tril().abs().amax(-1)
    torch.testing.assert_close(seen, entropy if told == "entropy" else logit)


@pytest.mark.parametrize("r", ROWS, ids=lambda r: r["label"] or r["config"])
def test_a_member_is_the_model_trained_alone(r, text):
    group = group_of(r)
    models, looks = trained(group)
    assert [step for step, *_ in looks] == [0, 1, 2, 3, 4, 5, 6]
    for place, cell in enumerate(group):
        model, regularizer, _ = cells.train(cell, edge.make, "cpu")
        alone = [*model.parameters(), *(regularizer.parameters() if regularizer else [])]
        whole = torch.nn.utils.parameters_to_vector(alone).detach()
        start = ensemble.Ensemble([cell], "cpu").P[0].detach()
        # Adam turns the rounding of a gradient near 0 into one of a whole step, in a few weights.
        off = (models.P[place] - whole).norm() / (whole - start).norm()
        assert off < 2e-3, off
        x, y = edge.held_out(cell)
        with torch.no_grad():
            _, ce, entropy = model(x, y, return_entropy=True)
        _, loss, _, layers = looks[-1]
        assert math.isclose(loss[place], ce, rel_tol=1e-4)
        wanted = entropy[-model.config.softmax_layers:].mean((1, 2, 3))
        torch.testing.assert_close(layers[place], wanted, rtol=1e-3, atol=1e-3)


def test_the_first_weights_are_those_of_train_py(text):
    member = ensemble.Member(group_of(ROWS[0])[0])
    assert math.isclose(member.model.wte.weight.std().item(), 0.02, rel_tol=0.1)


@pytest.mark.parametrize("r", ROWS[1::2], ids=lambda r: r["config"])
def test_a_member_that_diverges_leaves_the_others_as_they_are(r, text):
    good, bad = (group_of(r, rates, seeds=(1,)) for rates in ((1e-3, 2e-3), (1e-3, 1e30)))
    with_good, _ = trained(good)
    with_bad, _ = trained(bad)
    assert torch.equal(with_good.P[0], with_bad.P[0]) and with_bad.P[0].isfinite().all()
    assert not with_bad.P[1].isfinite().all()
    rows = edge.finish(bad, math.inf)
    assert [told["event"] for told in rows] == ["done", "diverged"]
    assert math.isfinite(rows[0]["history"][-1][1])


def test_a_group_without_time_gives_way(text, monkeypatch):
    monkeypatch.setattr(cells, "LOOK", 2)
    assert edge.finish(group_of(ROWS[2]), 0) == []
    assert trained(group_of(ROWS[2], steps=10**6), time.time() + 5) is None


def told_of(rate, loss, seed=SEEDS[0], size=SIZE, label="one"):
    event = "done" if loss is not None else "diverged"
    cell = sweep.at_rate({"label": label, "flags": {}, "size": size}, rate, seed)
    last = math.nan if loss is None else loss
    return {"cell": cell, "event": event, "parameters": 9, "history": [
        [0, 7.0, 2.0, [2.0, 1.8]], [6, last, math.nan, [1.0, 0.1]]]}


@pytest.mark.parametrize("losses, best, edge_at, at_least, sensitivity", [
    ([5.0, 3.0, 3.4, 3.6], 2, 8, False, (2 + 0 + 0.4 + 0.6) / 4),  # a rate too low breaks nothing
    ([5.0, 3.0, None, 3.1], 2, 4, False, (2 + 0 + 4 + 0.1) / 4),
    ([5.0, 4.0, 3.0, 9.0], 4, 8, False, (2 + 1 + 0 + 4) / 4),      # no more than the loss at first
    ([5.0, 4.0, 3.5, 3.0], 8, 16, True, (2 + 1 + 0.5 + 0) / 4),
    ([None, None, None, None], 1, 1, False, 0.0)])
def test_edge_and_sensitivity(losses, best, edge_at, at_least, sensitivity):
    tried = [1, 2, 4, 8]
    found = edge.measured([told_of(*pair) for pair in zip(tried, losses)][::-1], tried)
    assert (found["best"], found["edge"], found["at_least"]) == (best, edge_at, at_least)
    assert math.isclose(found["sensitivity"], sensitivity, abs_tol=1e-9)
    assert edge.at_edge(found["row"])[0] == 2.0  # of the last look that was finite


def test_the_slope_is_that_of_a_made_table(tmp_path, capsys):
    chosen = {"2x32x16": SIZE, "2x64x16": SIZE | {"n_embd": 64}}
    table = {}
    for text, losses in zip(chosen, ([3.0, 3.1, 3.2, 9.0], [3.0, 3.1, 9.0, None])):
        for seed in SEEDS[:2]:
            rows = [told_of(rate, loss, seed, chosen[text])
                    for rate, loss in zip((1, 2, 4, 8), losses)]
            table.setdefault(("one", text), {})[seed] = edge.measured(rows, [1, 2, 4, 8])
    assert edge.slopes(table, "one", "n_embd", chosen) == [(pytest.approx(-1.0), 2)] * 2
    edge.report(table, {"n_embd": chosen})
    told = capsys.readouterr().out.splitlines()[-1]
    assert told.split(maxsplit=1) == ["one", "-1.00 of 2 sizes, -1.00 of 2 sizes"]
    series = {"n_embd": chosen, "n_layer": chosen}
    edge.draw(table, series, [1, 2, 4, 8], tmp_path / "edge.png")
    assert (tmp_path / "edge.png").stat().st_size > 1000


def test_a_rerun_completes_the_file(data_dir, tmp_path, monkeypatch, capsys):
    arguments = [f"--data_dir={data_dir}", "--dataset=mine", f"--into={tmp_path}",
                 "--sizes=2x32x16", "--archs=SM+ScFuFFN", "--rates=0.001,0.1", "--steps=2",
                 "--batch=2", "--tested=2", "--jobs=1"]
    out = run("experiments/edge.py", *arguments, "--seeds=1")
    assert out.count(": done, loss") == 2
    monkeypatch.setattr(sys, "argv", ["edge.py", *arguments, "--seeds=2"])
    runpy.run_path(str(ROOT / "experiments" / "edge.py"), run_name="__main__")
    assert capsys.readouterr().out.count(": done, loss") == 2  # the second seed's
    told = json.loads((tmp_path / "edge.json").read_text())
    assert [r["cell"]["seed"] for r in told["rows"]] == [*SEEDS[:1] * 2, *SEEDS[1:2] * 2]
    assert told["scale"]["data_sha256"] and told["rows"][0]["at_once"] == 2
    step, loss, logit, entropy = told["rows"][0]["history"][0]
    assert step == 0 and loss == round(loss, 4) and len(entropy) == 2
    assert entropy == [round(e, 2) for e in entropy] and logit == float(f"{logit:.3g}") > 0


def test_a_look_is_kept_in_few_digits():
    look = (torch.tensor(z) for z in (2.123456, [1.0, 1234.5], [0.126, 3.878168]))
    assert edge.short(600, *look) == [600, 2.1235, 1230.0, [0.13, 3.88]]
    look = (torch.tensor(z) for z in (math.nan, [1.0, math.nan], [math.nan, 1.0]))
    _, loss, logit, (first, _) = edge.short(600, *look)
    assert math.isnan(loss) and math.isnan(logit) and math.isnan(first)


@pytest.mark.parametrize("setting", [
    "--sizes=2x33x64", "--rates=fast", "--rates=0.01", "--archs=SM", "--seeds=4", "--broken=-1",
    "--dataset=none"])
def test_a_bad_setting_is_one_line(setting, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["edge.py", setting, f"--into={tmp_path}"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(ROOT / "experiments" / "edge.py"), run_name="__main__")
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1
