"""experiments/reproduce.py on a tiny model: it trains once, resumes, and says what was not run."""
import json
import math
import sys

import pytest
import torch
from conftest import ROOT, run

sys.path.insert(0, str(ROOT / "experiments"))
from entropy import EntropyRegularizer  # noqa: E402
from gradients import by_layer, largest_logit  # noqa: E402
from model import GPT, GPTConfig  # noqa: E402
from plot import read_log  # noqa: E402
from regularizers import OneLayer, row_variance  # noqa: E402
from reproduce import PICTURES, SEEDS, TABLES, draw_depth, everything, folder  # noqa: E402
from rows import breaks, paired  # noqa: E402

TINY = ("--dataset=mine --n_layer=2 --n_head=2 --n_embd=32 --block_size=32 --batch_size=8 "
        "--max_iters=4 --eval_interval=2 --eval_windows=4 --sample_tokens=0 --plot=False")


def reproduce(*arguments, status=0):
    return run("experiments/reproduce.py", "--only=quick", *arguments, status=status)


def test_a_table_is_trained_once_and_tabulated(data_dir, tmp_path):
    arguments = [f"--out_dir={tmp_path / 'out'}", f"--into={tmp_path}", f"--data_dir={data_dir}",
                 f"--extra={TINY}"]
    out = reproduce(*arguments)
    assert "-s1: validation perplexity" in out
    assert "| SM+R | 0.001 | 1 | 1,024 |" in out
    assert "### Tolerance" not in out
    tables = json.loads((tmp_path / "reproduction.json").read_text())
    r = tables["quick"][0]["runs"][0]
    assert (r["arch"], r["seed"], len(r["head_entropy"])) == ("SM+G", 1, 2)
    assert r["val_ppl"] < 600 and r["size"]["n_embd"] == 32
    assert r["command"].startswith("python train.py config/sm_g.py --dataset=pycode2k --n_layer=4")
    assert r["cores"] >= 1 and len(r["commit"]) in (0, 40)
    text = (tmp_path / "reproduction.md").read_text()
    assert "2 layers, width 32" in text and "Not run: architectures, " in text
    assert "-s1: validation" not in reproduce(*arguments)  # nothing is trained again
    out = run("experiments/reproduce.py", "--only=nothing", *arguments, status=2)
    assert "only some of quick, architectures" in out


def test_a_divergence_is_a_result_like_any_other(data_dir, tmp_path):
    """And here the only one."""
    breaks = f"{TINY} --learning_rate=100 --max_iters=20 --eval_interval=20 --grad_clip=0"
    out = reproduce(f"--out_dir={tmp_path}", f"--data_dir={data_dir}", f"--extra={breaks}")
    assert "diverged at step" in out
    text = (tmp_path / "reproduction.md").read_text()
    assert "| SM+G | 100 | 1 |" in text and "| diverged at step" in text


def test_seeds_are_compared_in_pairs():
    def runs(*perplexities):
        return [{"seed": seed, "event": "done", "val_ppl": value}
                for seed, value in enumerate(perplexities)]

    first = runs(100, 200, 50)
    assert paired(first, first) == ""
    assert paired(runs(110, 220, 55), first) == "+10.0% (+10.0 to +10.0)"
    assert paired(runs(110), first) == "+10.0%"
    # log ratios 0 and 0.2: their mean is 0.1, its standard error 0.1, and 12.71 of them a side
    assert paired(runs(100, 200 * math.exp(0.2)), first) == "+10.5% (-69.0 to +293.9)"
    assert paired([{"seed": 0, "event": "diverged", "val_ppl": None}], first) == ""


def test_collapse_and_jump_are_told_of_the_same_weights():
    def evals(*values):  # (loss, entropy of the only head in each of two layers)
        return [{"event": "eval", "step": step, "val_ce": loss, "head_entropy": [[3.8], [entropy]]}
                for step, (loss, entropy) in enumerate(values)]

    assert breaks(evals((7.0, 3.8), (6.0, 3.8), (6.5, 0.9), (6.7, 0.1)), 128) == (2, 3)
    assert breaks(evals((7.0, 3.8), (math.nan, 3.8), (6.0, 1.0)), 128) == (None, 1)
    assert breaks(evals((7.0, 3.8), (6.0, 3.8)), 128) == (None, None)


def test_pictures_show_runs_that_the_tables_train():
    rows = [r for _, _, rows in TABLES.values() for r in rows]
    trained = {folder(r["config"], r["flags"], seed) for r in rows for seed in r["seeds"]}
    for runs in PICTURES.values():
        assert all(folder(config, flags, SEEDS[0]) in trained for config, flags in runs)
    assert all((ROOT / "config" / f"{r['config']}.py").exists() for r in rows)


def test_what_takes_a_gpu_is_trained_only_where_it_is_named():
    assert set(TABLES) - set(everything()) == {"paper_size"}


def test_frontier_py_says_what_to_train_first(tmp_path):
    out = run("experiments/frontier.py", f"--out_dir={tmp_path}", status=1)
    assert out == (f"error: no trained model in {tmp_path}: "
                   "python experiments/reproduce.py --only=frontier\n")


def test_in_context_py_finds_a_head_that_copies():
    """Attention that is one-hot on what followed a token's first occurrence has weight 1 there."""
    from in_context import heads_on, repeated
    from model import GPT, GPTConfig
    T = 16
    model = GPT(GPTConfig(n_layer=2, n_head=2, n_embd=16, vocab_size=50, block_size=T,
                          positional_layers=1))
    model.blocks[0].attn.by_distance.data[1, T // 2 - 1] = 100
    weight, entropy = heads_on(model, repeated(50, T)[:, :-1])
    assert weight[0, 1] > 0.999 and weight[0, 0] < 0.2
    assert 0 < entropy[0, 1] < entropy[0, 0]


def test_another_regularizer_trains_in_the_place_of_algorithm_1(data_dir, tmp_path):
    run("experiments/regularizers.py", "logit_variance", "config/ereg_sm_t_scfuffn.py",
        *TINY.split(), "--log_interval=1", f"--data_dir={data_dir}", f"--out_dir={tmp_path}")
    log = read_log(tmp_path / "log.jsonl")
    terms = [r["entropy_term"] for r in log if r["event"] == "step"]
    assert log[-1]["event"] == "done" and min(terms) > 0


def test_one_layer_pays_its_part_of_algorithm_1(monkeypatch):
    entropies = torch.rand(3, 2, 4, 16) * math.log(16)
    parts = []
    for layer in range(3):
        monkeypatch.setattr(OneLayer, "layer", layer)
        parts.append(OneLayer(3, 4)(entropies))
    assert min(parts) > 0
    torch.testing.assert_close(sum(parts), EntropyRegularizer(3, 4)(entropies))


def test_the_regularizer_is_named_first():
    out = run("experiments/regularizers.py", "config/sm.py", status=2)
    assert "name the regularizer first: logit_variance, or layer=3" in out


def test_a_layer_that_is_not_there_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(OneLayer, "layer", 4)
    with pytest.raises(SystemExit, match="2"):
        OneLayer(4, 2)
    assert "there is no layer=4 among 4 with softmax" in capsys.readouterr().err


def test_row_variance_is_that_of_the_keys_a_row_sees():
    q, k = torch.randn(2, 1, 3, 8, 4, dtype=torch.float64).unbind()
    s = q @ k.mT / 2
    expected = [s[..., i, :i + 1].var(-1, correction=0) for i in range(8)]
    torch.testing.assert_close(row_variance(q, k), torch.stack(expected, -1), atol=1e-6, rtol=1e-6)


def test_gradients_streams_and_logits_are_told_by_layer():
    q, k = torch.randn(2, 1, 3, 8, 4).unbind()
    s = q @ k.mT / 2
    above = [(s[..., i, :i + 1] - s[..., i, :i + 1].mean(-1, keepdim=True)).max() for i in range(8)]
    assert math.isclose(largest_logit(q, k), max(above), rel_tol=1e-5)

    model = GPT(GPTConfig(block_size=8, vocab_size=50, n_layer=3, n_head=2, n_embd=16))
    x = torch.randint(0, 50, (4, 8))
    found = by_layer(model, x, x)
    model(x, x)[1].backward()
    last = torch.stack([p.grad.norm() for p in model.blocks[-1].parameters()]).norm().item()
    assert math.isclose(found["gradient"][-1], last, rel_tol=1e-4)
    assert [len(values) for values in found.values()] == [3, 3, 3]


def test_entropies_by_layer_are_drawn_of_trained_and_of_diverged_runs(tmp_path):
    size = {"block_size": 8}
    rows = [{"label": "SM", "runs": [{"event": "diverged", "step": 3, "size": size,
                                      "entropy_by_layer": [1.2, None]}]},
            {"label": "SM+LN", "runs": [{"event": "done", "val_ppl": 20.0, "size": size,
                                         "entropy_by_layer": [1.2, 0.9]}]}]
    draw_depth(rows, tmp_path / "depth.png")
    assert (tmp_path / "depth.png").read_bytes().startswith(b"\x89PNG")
