"""plot.py measures what train.py measured, and names the paper's two failure modes."""
import json

import pytest
import torch
from conftest import refusals, run
from test_gpt2 import gpt2_file
from test_sample import byte_tokenizer

from data.dataset import hash_bins, map_bins
from draw import draw
from entropy import attention_entropy, max_causal_entropy
from model import GPT, GPTConfig
from plot import (aligned, averaging, describe, diagnosis, learned, measure, read_log,
                  weights_of)
from pretrained import open_pretrained

SMALL = ["--dataset=mine", "--n_layer=2", "--n_head=2", "--n_embd=32", "--block_size=32",
         "--eval_windows=16", "--sample_tokens=0", "--max_iters=20", "--eval_interval=10",
         "--learning_rate=1e-2", "--plot=False"]


@pytest.fixture(scope="module")
def trained(data_dir, tmp_path_factory):
    """Folders of two models that train.py trained: softmax only, and EReg."""
    folders = [tmp_path_factory.mktemp(config) for config in ("sm", "ereg_sm_t_scfuffn")]
    for folder, config in zip(folders, ("sm", "ereg_sm_t_scfuffn")):
        run("train.py", f"config/{config}.py", *SMALL, f"--data_dir={data_dir}",
            f"--out_dir={folder}")
    return folders


def test_entropies_are_those_of_the_last_evaluation(trained, tmp_path):
    arguments = f"--out_dir={trained[0]},{trained[1]}", f"--png={tmp_path / 'both.png'}"
    out = run("plot.py", *arguments, "--windows=16")
    assert out.count("entropy overload:") == out.count("entropy collapse:") == 2
    assert "EReg(SM(t)+ScFuFFN" in out
    seen = json.loads((tmp_path / "both.json").read_text())
    for r, folder in zip(seen, trained):
        evals = [x for x in read_log(folder / "log.jsonl") if x["event"] == "eval"]
        ours, theirs = (torch.tensor(x["head_entropy"]) for x in (r, evals[-1]))
        assert torch.allclose(ours, theirs, atol=1e-3)
        assert [step for step, _ in r["history"]] == [0, 10, 20]
        assert r["val_ppl"] == evals[-1]["val_ppl"]
        assert r["seed"] == 1337
        assert r["largest"] <= r["max_causal_entropy"] == max_causal_entropy(32)
        assert sum(r["quartiles"]) == pytest.approx(1)
    learned = {"alpha", "beta", "temperature", "temperature_range", "threshold"}
    assert set(seen[1]) - set(seen[0]) == learned
    assert is_a_picture(tmp_path / "both.png")


def is_a_picture(path):
    """A PNG of more than an empty axes."""
    return path.read_bytes()[:4] == b"\x89PNG" and path.stat().st_size > 20000


MISTAKES = [
    (["--out_dir=nowhere"], 1, "no checkpoint at nowhere/ckpt.pt"),
    (["--tolerance=2"], 2, "tolerance must be at least 0 and at most 1"),
    (["--windows=-1"], 2, "windows must be at least 1"),
    (["--out_dir={0}", "--png=nowhere/a.png"], 2, "png must be a .png in a folder that exists"),
    (["--out_dir={0}", "--png={0}/folder.png"], 1, "folder.png"),
    (["--ckpt={0}/half.pt"], 1, "not a whole checkpoint"),
]


def test_one_line_says_what_is_wrong(trained):
    folder = trained[0]
    (folder / "folder.png").mkdir(exist_ok=True)
    (folder / "half.pt").write_bytes((folder / "ckpt.pt").read_bytes()[:5000])
    tries = [["--windows=2", *(a.format(folder) for a in args)] for args, _, _ in MISTAKES]
    for (args, status, line), (code, err) in zip(MISTAKES, refusals("plot.py", tries)):
        assert code == status and line in err.splitlines()[-1], (args, err)
    assert not list(folder.glob("*.tmp"))


@pytest.fixture
def other_tokens(data_dir):
    """The dataset with its validation tokens in another order; as it was, afterwards."""
    path = data_dir / "mine" / "val.bin"
    whole = path.read_bytes()
    path.write_bytes(whole[2:] + whole[:2])
    yield data_dir / "mine"
    path.write_bytes(whole)


def test_data_that_was_changed_is_refused(trained, other_tokens):
    """At equal size, so that their hash alone tells."""
    out = run("plot.py", f"--out_dir={trained[0]}", status=1)
    assert "train.bin or val.bin is not as it was prepared" in out


def test_other_data_than_the_models_is_refused(trained, other_tokens):
    meta = other_tokens / "meta.json"
    told = meta.read_text()
    meta.write_text(told.replace(json.loads(told)["sha256"], hash_bins(map_bins(other_tokens))))
    try:
        assert "other data than" in run("plot.py", f"--out_dir={trained[0]}", status=1)
    finally:
        meta.write_text(told)


@pytest.mark.parametrize("damage", [b"\xff\xfe\n", b"3\n", b'{"event": "eval"}\n'])
def test_a_damaged_log_is_named_with_its_line(damage, tmp_path):
    log = tmp_path / "log.jsonl"
    log.write_bytes(b'{"event": "step", "step": 1}\n' + damage)
    with pytest.raises(ValueError, match=f"line 2 of {log}"):
        read_log(log)


def test_a_half_written_last_line_is_no_record(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"event": "step", "step": 1}\n{"event": "st')
    assert read_log(tmp_path / "log.jsonl") == [{"event": "step", "step": 1}]
    assert read_log(tmp_path / "none.jsonl") == []


def untrained(**flags):
    return GPT(GPTConfig(n_layer=3, n_head=4, n_embd=16, block_size=128, vocab_size=50, **flags))


def test_heads_are_counted_as_in_the_paper():
    """
    M is the largest head's entropy: below M/4 a head is collapsed, from 3M/4 on overloaded; a layer
    is either by half of its heads.
    """
    heads = [[3.8, 3.8, 3.0, 2.0], [0.5, 2.0, 2.0, 3.8], [0.0, 0.1, 2.0, 2.0]]
    r = describe("SM", 128, heads)
    assert (r["overloaded_heads"], r["overloaded_layers"]) == (4, [0])
    assert (r["collapsed_heads"], r["collapsed_layers"]) == (3, [2])
    overload, collapse = diagnosis(r)
    assert overload == ("entropy overload: 4 of 12 heads (33%) in the top quarter, 2.85 to 3.80 "
                        "nats; half or more of layer 0; "
                        "3 within 5% of a causal head's maximum, 3.88")
    assert collapse == ("entropy collapse: 3 of 12 heads (25%) in the bottom quarter, 0 to 0.95 "
                        "nats; half or more of layer 2")


def test_first_layers_that_average_are_named(tmp_path):
    """Q and K of 0 make the average: of layer 0 whole, of a head of layer 1 behind another."""
    torch.manual_seed(0)
    model = untrained(use_layernorm=False)
    with torch.no_grad():
        for i in (0, 1):
            Q_and_K = model.blocks[i].attn.qk
            Q_and_K.bias.zero_()
            Q_and_K.weight.mul_(0 if i == 0 else 1000)
        Q_and_K.weight[4:8] = 0  # the second head's of four
        model.blocks[2].attn.qk.weight.mul_(1000)
    tokens = torch.randint(0, 50, (512,)).numpy()
    entropy, first, distance = measure(weights_of(model), tokens, 4, 128)
    run = describe("SM", 128, entropy)
    run |= {"distance": distance.tolist(), "layers_without_softmax": 0}
    said = averaging(run, 0.05)
    assert said.startswith("averaging: 5 of 12 heads within 5% of 3.88 nats (layer 0: all, layer "
                           "1: 1), distance from the average by layer 0.00 0.")
    assert said.endswith("; --uniform_layers=1 would save 4 of 12 softmaxes")
    converted = untrained(use_layernorm=False, uniform_layers=1)
    converted.load_state_dict(model.state_dict(), strict=False)
    entropy_after, first_after, distance_after = measure(weights_of(converted), tokens, 4, 128)
    for before, after in ((entropy, entropy_after), (first, first_after),
                          (distance, distance_after)):
        assert torch.allclose(before, after, atol=1e-4)
    run |= {"layers_without_softmax": 1}
    assert averaging(run, 0.05).endswith("no further first layer could do without softmax")


def test_a_context_of_more_than_1024_is_measured_window_by_window():
    T = 1500
    entropy, first, distance = measure(lambda x: [torch.eye(T).expand(len(x), 1, T, T)],
                                       torch.zeros(2 * T).numpy(), 2, T)
    assert entropy == pytest.approx(0, abs=1e-4) and first == 0


def test_a_diverged_model_is_refused():
    with pytest.raises(ValueError, match="finite"):
        describe("SM", 128, [[float("nan")] * 4] * 3)


def test_one_model_and_four_are_drawn(tmp_path):
    """Temperatures as they start, all alike: their mean is off by rounding and their range is 0."""
    ereg = untrained(learnable_temperature=True, learnable_ffn_scale=True)
    r = describe("EReg", 128, torch.rand(3, 4)) | learned(ereg, torch.rand(3, 4))
    bare = describe("SM", 128, torch.rand(3, 4))
    draw([r], tmp_path / "one.png")
    draw([bare, bare, r, bare], tmp_path / "four.png")
    draw([bare], tmp_path / "bare.png")
    assert all(is_a_picture(tmp_path / f"{name}.png") for name in ("one", "four", "bare"))


def test_a_picture_that_cannot_be_written_leaves_nothing(tmp_path):
    (tmp_path / "a.png").mkdir()
    with pytest.raises(OSError):
        draw([describe("SM", 128, torch.rand(3, 4))], tmp_path / "a.png")
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_an_aligned_table():
    assert aligned([["", "bytes"], ["softmax", "12"]]) == "         bytes\nsoftmax     12"
    assert aligned([["a", "b"], ["1", "22"]], left=(1,)) == "a  b\n1  22"


@torch.no_grad()
def test_any_text_by_a_checkpoint_and_by_gpt2_beside_it(trained, tmp_path):
    """Entropies and attention to the first position, against the weights that the textbook has."""
    (tmp_path / "text").write_text("def add(a, b):\n    return a + b\n" * 20)
    gpt2_file(tmp_path, V=257, T=32)
    byte_tokenizer(tmp_path / "tokenizer.json")
    names = [str(trained[1] / "ckpt.pt"), str(tmp_path)]
    out = run("plot.py", f"--ckpt={','.join(names)}", f"--text={tmp_path}/text",
              f"--png={tmp_path}/a.png")
    assert "to the first position" in out
    for name, seen in zip(names, json.loads((tmp_path / "a.json").read_text())):
        model, encoding = open_pretrained(name)
        ids = encoding.encode_ordinary((tmp_path / "text").read_text())
        x = torch.tensor(ids[:len(ids) // 32 * 32]).view(-1, 32)
        weights = []

        def textbook(q, k, v):
            future = torch.ones(32, 32, dtype=torch.bool).triu(1)
            s = (q @ k.mT / q.shape[-1]**0.5).masked_fill(future, float("-inf"))
            weights.append(s.softmax(-1))
            return weights[-1] @ v, attention_entropy(weights[-1])

        for block in model.blocks:
            block.attn.with_entropy = textbook
        entropy = model(x, return_entropy=True)[2].mean((1, 3))
        first = torch.stack(weights)[..., 1:, 0].mean((1, 3))
        assert torch.allclose(torch.tensor(seen["head_entropy"]), entropy, atol=1e-3)
        assert torch.allclose(torch.tensor(seen["first_position"]), first, atol=1e-4)
    assert run("plot.py", f"--ckpt={tmp_path}", status=1).count("name a text to measure it on") == 1
