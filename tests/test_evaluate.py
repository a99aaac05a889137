"""evaluate.py: perplexity and bits per byte of any text, against sums made token by token."""
import math
import re

import pytest
import torch
from conftest import refusals, run
from test_gpt2 import gpt2_file
from test_sample import byte_tokenizer
from test_train import TINY, content, of_kind

from data.tokenizer import load_tokenizer
from evaluate import cross_entropy
from model import GPT
from pretrained import read_tokens

TEXT = "def héllo(x):\n    return x + 1\n\n\nclass Ünïcode:\n    pass\n" * 3


@pytest.fixture(scope="module")
def out_dir(data_dir, tmp_path_factory):
    out_dir = tmp_path_factory.mktemp("evaluated")
    run("train.py", *TINY, f"--data_dir={data_dir}", f"--out_dir={out_dir}", "--max_iters=3",
        "--eval_windows=100000")
    return out_dir


def numbers(out):
    """Tokens, bytes, perplexity, nats a token and bits per byte that evaluate.py printed."""
    found = re.search(r": ([\d,]+) tokens, ([\d,]+) bytes; .* perplexity ([\d.]+) a token, "
                      r"cross-entropy ([\d.]+) nats, ([\d.]+) bits per byte\n", out)
    return [float(number.replace(",", "")) for number in found.groups()]


def one_after_another(model, ids, T, stride):
    """
    The cross-entropy in nats of ids but the first, with a forward pass for each: in the last window
    of T tokens, `stride` apart, that begins early enough to have it predicted.
    """
    nats = 0.0
    for i in range(1, len(ids)):
        start = 0 if i <= T else -(-(i - T) // stride) * stride
        nats -= model(torch.tensor([ids[start:i]]))[0][0, -1].log_softmax(-1)[ids[i]].item()
    return nats


def test_line_ends_are_scored_as_they_are(out_dir, tmp_path):
    encoding = load_tokenizer(content(out_dir)["tokenizer"])
    (tmp_path / "text").write_bytes(b"x = 1\r\ny = 2\r\n")
    ids, size = read_tokens(tmp_path / "text", encoding, 512)
    assert encoding.decode(ids.tolist()) == "x = 1\r\ny = 2\r\n"
    assert size == 14 - len(encoding.decode_single_token_bytes(ids[0]))


def test_numbers_are_those_of_one_token_after_another(out_dir, tmp_path):
    (tmp_path / "text").write_text(TEXT, encoding="utf-8")
    encoding = load_tokenizer(content(out_dir)["tokenizer"])
    model = GPT.from_checkpoint(str(out_dir / "ckpt.pt"))
    ids = encoding.encode_ordinary(TEXT)
    for stride in (32, 8, 1):
        wanted = one_after_another(model, ids, 32, stride)
        assert cross_entropy(model, torch.tensor(ids), 32, stride) == pytest.approx(wanted)
    nats, n = one_after_another(model, ids, 32, 32), len(ids) - 1
    size = len(TEXT.encode()) - len(encoding.decode([ids[0]]).encode())
    out = run("evaluate.py", f"--ckpt={out_dir}/ckpt.pt", f"--text={tmp_path}/text", "--device=cpu")
    wanted = [n, size, math.exp(nats / n), nats / n, nats / math.log(2) / size]
    assert numbers(out) == pytest.approx(wanted, rel=1e-4)


def test_as_train_evaluates(out_dir, data_dir):
    """On all windows of the validation set train.py's own number, as far as it is in bfloat16."""
    model = GPT.from_checkpoint(str(out_dir / "ckpt.pt"))
    tokens = torch.frombuffer(bytearray((data_dir / "mine" / "val.bin").read_bytes()),
                              dtype=torch.uint16).long()
    n = (len(tokens) - 1) // 32 * 32
    ours = cross_entropy(model, tokens[:n + 1], 32, 32) / n
    assert ours == pytest.approx(of_kind("eval", out_dir)[-1]["val_ce"], abs=1e-3)


def test_gpt2_on_a_text(tmp_path):
    gpt2_file(tmp_path, V=257, T=32)
    byte_tokenizer(tmp_path / "tokenizer.json")
    (tmp_path / "text").write_text(TEXT, encoding="utf-8")
    out = run("evaluate.py", f"--ckpt={tmp_path}", f"--text={tmp_path}/text", "--device=cpu",
              "--block_size=16")
    tokens, size, _, nats, bits = numbers(out)
    assert tokens == size == len(TEXT.encode()) - 1  # a token a byte
    assert bits == pytest.approx(nats / math.log(2), abs=1e-3)


def test_one_line_says_what_is_wrong(out_dir, tmp_path):
    (tmp_path / "text").write_text(TEXT, encoding="utf-8")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "empty").write_bytes(b"")
    ckpt, text = f"--ckpt={out_dir}/ckpt.pt", f"--text={tmp_path}/text"
    mistakes = [
        ([ckpt], 1, "no text file '': name one by --text=FILE"),
        ([ckpt, f"--text={tmp_path}/binary"], 1, "is no text in UTF-8"),
        ([ckpt, f"--text={tmp_path}/empty"], 1, "has 0 tokens: two are needed"),
        ([ckpt, text, "--block_size=33"], 2, "block_size must be at least 0 and at most 32"),
        ([ckpt, text, "--stride=33"], 2, "stride must be at least 0 and at most 32"),
        (["--ckpt=nowhere.pt", text], 1, "no checkpoint at nowhere.pt"),
    ]
    told = refusals("evaluate.py", [["--device=cpu", *args] for args, _, _ in mistakes])
    for (args, status, line), (code, err) in zip(mistakes, told):
        assert code == status, (args, err)
        assert err.startswith("error: ") and err.count("\n") == 1 and line in err, (args, err)
    encoding = load_tokenizer(content(out_dir)["tokenizer"])
    with pytest.raises(ValueError, match="outside the model's 2"):
        read_tokens(tmp_path / "text", encoding, 2)
