"""sample.py: the text of a checkpoint, which is all it needs, and of GPT-2."""
import json

import pytest
import torch
from conftest import refusals, run
from test_gpt2 import gpt2_file
from test_train import TINY, content, records

from data.prepare import load_tokenizer
from model import GPT
from sample import sample


@pytest.fixture(scope="module")
def out_dir(data_dir, tmp_path_factory):
    """A run that ended with a sample of 20 tokens."""
    out_dir = tmp_path_factory.mktemp("sampled")
    run("train.py", *TINY, f"--data_dir={data_dir}", f"--out_dir={out_dir}", "--max_iters=2",
        "--sample_tokens=20")
    return out_dir


def greedy(model, encoding, prompt, n):
    """The n likeliest tokens after a prompt, one by one."""
    ids = encoding.encode_ordinary(prompt)
    for _ in range(n):
        ids.append(model(torch.tensor([ids]))[0][0, -1].argmax().item())
    return encoding.decode(ids)


def test_a_checkpoint_gives_the_sample_that_training_ended_with(out_dir):
    """Without the corpus: the checkpoint carries the tokenizer, and data_dir isn't a setting."""
    out = run("sample.py", f"--ckpt={out_dir}/ckpt.pt", "--max_new_tokens=20", "--device=cpu")
    assert out == records(out_dir)[-1]["sample"] + "\n---\n"


def test_samples_follow_the_settings(out_dir):
    out = run("sample.py", f"--ckpt={out_dir}/ckpt.pt", "--prompt=import", "--num_samples=2",
              "--max_new_tokens=5", "--temperature=0", "--device=cpu")
    encoding = load_tokenizer(content(out_dir)["tokenizer"])
    model = GPT.from_checkpoint(str(out_dir / "ckpt.pt"))
    assert out == 2 * (greedy(model, encoding, "import", 5) + "\n---\n")


def test_tokens_that_the_tokenizer_lacks_are_left_out(out_dir):
    encoding = load_tokenizer(content(out_dir)["tokenizer"])
    model = GPT.from_checkpoint(str(out_dir / "ckpt.pt"))
    model.generate = lambda ids, *_: torch.cat((ids, torch.tensor([[600]])), 1)
    assert sample(model, encoding, "def", 1, 1.0, 0, None) == "def"


def byte_tokenizer(path):
    """A tokenizer.json of Hugging Face's with a token for each byte, and no merges."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    characters = [chr(b) for b in printable] + [chr(256 + i) for i in range(len(others))]
    path.write_text(json.dumps({
        "model": {"type": "BPE", "vocab": {c: i for i, c in enumerate(characters)}, "merges": []},
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False},
        "added_tokens": [{"id": 256, "content": "<|endoftext|>"}]}))


@pytest.mark.parametrize("flag", ["", "--tokenizer={}/own.json"])
def test_gpt2_is_sampled_with_the_tokenizer_beside_it_or_named(flag, tmp_path):
    gpt2_file(tmp_path, V=257, T=32)
    byte_tokenizer(tmp_path / ("own.json" if flag else "tokenizer.json"))
    out = run("sample.py", f"--gpt2={tmp_path}", "--prompt=one", "--max_new_tokens=4",
              "--device=cpu", *([flag.format(tmp_path)] if flag else []))
    assert out.startswith("one") and out.endswith("\n---\n")


def test_one_line_says_what_is_wrong(out_dir, tmp_path):
    gpt2_file(tmp_path)
    byte_tokenizer(tmp_path / "own.json")
    without = content(out_dir)
    del without["tokenizer"]
    torch.save(without, tmp_path / "without.pt")
    torch.save(without | {"tokenizer": 5}, tmp_path / "five.pt")
    ckpt = f"--ckpt={out_dir}/ckpt.pt"
    mistakes = [
        (["--ckpt=nowhere.pt"], 1, "no checkpoint at nowhere.pt"),
        ([f"--ckpt={tmp_path}/without.pt"], 1, "without.pt has no tokenizer of train.py's"),
        ([f"--ckpt={tmp_path}/five.pt"], 1, "five.pt has no tokenizer of train.py's"),
        ([ckpt, "--prompt="], 1, "the prompt is empty"),
        ([ckpt, "--device=cuda:99"], 1, "device 'cuda:99' can't be used"),
        ([ckpt, "--temperature=-1"], 2, "temperature must be at least 0"),
        ([ckpt, "--max_new_tokens=1e30"], 2, "max_new_tokens must be at least 1"),
        ([f"--gpt2={tmp_path}"], 1, "--tokenizer"),
        ([f"--gpt2={tmp_path}", "--tokenizer=no/file"], 1, "no file no/file"),
        (["--gpt2=no/such", f"--tokenizer={tmp_path}/own.json"], 1, "'no/such'"),
    ]
    told = refusals("sample.py", [args for args, _, _ in mistakes])
    for (args, status, line), (code, err) in zip(mistakes, told):
        assert code == status, (args, err)
        assert err.startswith("error: ") and err.count("\n") == 1 and line in err, (args, err)
