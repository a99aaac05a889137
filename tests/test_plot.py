"""plot.py: what it measures is what train.py measured, and its sentences name the paper's two failure modes."""
import json

import pytest
import torch
from conftest import run

from entropy import max_causal_entropy
from model import GPT, GPTConfig
from plot import describe, diagnosis


def test_a_picture_says_what_is_wrong(data_dir, tmp_path):
    """Two models that train.py trained: the script's entropies are those of their last evaluation, and one colour scale shows both."""
    small = ["--dataset=mine", f"--data_dir={data_dir}", "--n_layer=2", "--n_head=2", "--n_embd=32", "--block_size=32", "--eval_windows=16",
             "--sample_tokens=0", "--max_iters=20", "--eval_interval=10", "--learning_rate=1e-2", "--plot=False"]
    folders = [tmp_path / "sm", tmp_path / "ereg"]
    for folder, config in zip(folders, ("sm", "ereg_sm_t_scfuffn")):
        run("train.py", f"config/{config}.py", *small, f"--out_dir={folder}")
    out = run("plot.py", f"--out_dir={folders[0]},{folders[1]}", "--windows=16", f"--png={tmp_path / 'both.png'}")
    assert out.count("entropy overload:") == out.count("entropy collapse:") == 2 and "EReg(SM(t)+ScFuFFN)" in out
    seen = json.loads((tmp_path / "both.json").read_text())
    for r, folder in zip(seen, folders):
        evals = [x for x in map(json.loads, open(folder / "log.jsonl")) if x["event"] == "eval"]
        assert torch.allclose(torch.tensor(r["head_entropy"]), torch.tensor(evals[-1]["head_entropy"]), atol=1e-3)
        assert [step for step, _ in r["history"]] == [0, 10, 20] and r["val_ppl"] == evals[-1]["val_ppl"]
        assert r["largest"] <= r["max_causal_entropy"] == max_causal_entropy(32) and sum(r["quartiles"]) == pytest.approx(1)
    assert set(seen[1]) - set(seen[0]) == {"alpha", "beta", "temperature", "temperature_range", "threshold"}
    assert (tmp_path / "both.png").read_bytes()[:4] == b"\x89PNG" and (tmp_path / "both.png").stat().st_size > 20000
    folder.with_suffix(".png").mkdir()
    for arguments, status, sentence in ((["--out_dir=nowhere"], 1, "no checkpoint at nowhere/ckpt.pt"), (["--windows=0"], 2, "windows must be at least 1"),
                                        ([f"--out_dir={folders[0]}", "--png=nowhere/a.png"], 2, "png must be a .png in a folder that exists"),
                                        ([f"--out_dir={folders[0]}", f"--png={folder.with_suffix('.png')}"], 1, "can't write")):
        assert sentence in run("plot.py", *arguments, status=status)
    (tmp_path / "half.pt").write_bytes((folders[0] / "ckpt.pt").read_bytes()[:5000])
    assert "not a whole checkpoint" in run("plot.py", f"--ckpt={tmp_path / 'half.pt'}", status=1)
    meta = data_dir / "mine" / "meta.json"
    text = meta.read_text()
    meta.write_text(text.replace(json.loads(text)["sha256"], "0" * 64))
    try:
        assert "other data than" in run("plot.py", f"--out_dir={folders[0]}", status=1)
    finally:
        meta.write_text(text)


def test_overloaded_and_collapsed_heads_are_counted_as_in_the_paper():
    """M is the largest head's entropy: below M/4 collapsed, from 3M/4 on overloaded; a layer is either by half of its heads."""
    model = GPT(GPTConfig(n_layer=3, n_head=4, n_embd=16, block_size=128, vocab_size=50))
    r = describe("SM", model, [[3.8, 3.8, 3.0, 2.0], [0.5, 2.0, 2.0, 3.8], [0.0, 0.1, 2.0, 2.0]])
    assert (r["overloaded_heads"], r["overloaded_layers"], r["collapsed_heads"], r["collapsed_layers"]) == (4, [0], 3, [2])
    overload, collapse = diagnosis(r)
    assert overload == "entropy overload: 4 of 12 heads (33%) in the top quarter, 2.85 to 3.80 nats; half or more of layer 0; 3 within 5% of a causal head's maximum, 3.88"
    assert collapse == "entropy collapse: 3 of 12 heads (25%) in the bottom quarter, 0 to 0.95 nats; half or more of layer 2"
    with pytest.raises(ValueError, match="finite"):
        describe("SM", model, [[float("nan")] * 4] * 3)
