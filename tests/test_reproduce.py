"""experiments/reproduce.py on a tiny model: it trains, doesn't train twice, and says what was not run."""
import json
import sys

from conftest import ROOT, run

sys.path.insert(0, str(ROOT / "experiments"))
from reproduce import PICTURES, SEEDS, TABLES, folder  # noqa: E402


def test_a_table_is_trained_once_and_tabulated(data_dir, tmp_path):
    tiny = ("--dataset=mine --n_layer=2 --n_head=2 --n_embd=32 --block_size=32 --batch_size=8 --max_iters=4 --eval_interval=2 --eval_windows=4 "
            "--sample_tokens=0 --plot=False")
    arguments = [f"--out_dir={tmp_path / 'out'}", f"--into={tmp_path}", f"--data_dir={data_dir}", f"--extra={tiny}"]
    out = run("experiments/reproduce.py", "--only=divergence", *arguments)
    assert "-s1337: validation perplexity" in out and "| SM, 12 x 768 | 1337 | 1,024 |" in out and "### Tolerance" not in out
    r = json.loads((tmp_path / "reproduction.json").read_text())["divergence"][0]["runs"][0]
    assert r["arch"] == "SM" and r["seed"] == 1337 and len(r["head_entropy"]) == 2 and r["val_ppl"] < 600 and r["size"]["n_embd"] == 32
    text = (tmp_path / "reproduction.md").read_text()
    assert "2 layers, width 32" in text and "| SM+LN+G | not run |" in text and (tmp_path / "divergence.png").stat().st_size > 20000
    assert "-s1337: validation" not in run("experiments/reproduce.py", "--only=divergence", *arguments)  # done: nothing is trained again
    alone = [f"--out_dir={tmp_path / 'sm'}", f"--data_dir={data_dir}", f"--extra={tiny} --learning_rate=1e9 --max_iters=20 --eval_interval=20"]
    assert "diverged at step" in run("experiments/reproduce.py", "--only=divergence", *alone)  # a result like any other, and here the only one
    assert "| SM, 12 x 768 | 1337 | 0 | diverged at step" in (tmp_path / "sm" / "reproduction.md").read_text()
    assert "only some of architectures" in run("experiments/reproduce.py", "--only=nothing", *arguments, status=2)


def test_pictures_show_runs_that_the_tables_train():
    trained = {folder(r["config"], r["flags"], seed) for _, _, rows in TABLES.values() for r in rows for seed in r["seeds"]}
    assert all(folder(config, flags, SEEDS[0]) in trained for runs in PICTURES.values() for config, flags in runs)
    assert all((ROOT / "config" / f"{r['config']}.py").exists() for _, _, rows in TABLES.values() for r in rows)
