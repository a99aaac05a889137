"""data/prepare.py on small folders and on local files in the hub datasets' formats."""
import base64
import gzip
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT, refusals, run

from data import prepare
from data.dataset import open_dataset
from data.sources import read_source
from data.tokenizer import (EOT, GPT2_PATTERN, LONGEST_SPACE, encode_batch, load_tokenizer, parts,
                            train_tokenizer)


def read(folder):
    """(meta.json, the tokenizer, train tokens, validation tokens) of a dataset."""
    meta = json.loads((folder / "meta.json").read_text())
    bins = (np.fromfile(folder / f"{part}.bin", np.uint16) for part in ("train", "val"))
    return meta, load_tokenizer(str(folder / "tokenizer.json")), *bins


def texts_of(tokenizer, *bins):
    """The documents that the bins hold, sorted."""
    return sorted(text for tokens in bins
                  for text in tokenizer.decode(tokens.tolist()).split(EOT)[:-1])


def test_every_file_of_a_folder_is_in_one_part_whole(source, data_dir):
    meta, tokenizer, train, val = read(data_dir / "mine")
    assert texts_of(tokenizer, train, val) == sorted(p.read_text() for p in source.iterdir())
    assert (len(train), len(val)) == (meta["train_tokens"], meta["val_tokens"])
    assert meta["vocab_size"] == tokenizer.n_vocab == 512
    assert max(train.max(), val.max()) < 512
    assert meta["val_documents"] >= 1
    assert not [p for p in os.listdir(data_dir) if p.startswith(".")]  # nothing half-made is left


def test_same_files_same_bins_and_a_rerun_does_nothing(source, data_dir, tmp_path):
    again = (f"--data_dir={tmp_path}", f"--train_source={source}", "--name=mine",
             "--vocab_size=512")
    run("data/prepare.py", *again)
    for file in ("train.bin", "val.bin", "tokenizer.json"):
        assert (tmp_path / "mine" / file).read_bytes() == (data_dir / "mine" / file).read_bytes()
    assert read(tmp_path / "mine")[0]["sha256"] == read(data_dir / "mine")[0]["sha256"]
    before = (tmp_path / "mine" / "train.bin").stat().st_mtime_ns
    assert "nothing to do" in run("data/prepare.py", *again)
    out = run("data/prepare.py", *again[:3], "--vocab_size=600", status=1)
    assert "exists, made with vocab_size=512" in out and "--name" in out
    assert (tmp_path / "mine" / "train.bin").stat().st_mtime_ns == before


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def hub_files(source, folder):
    """The two codeparrot datasets as local files: jsonl as that repository has it, and parquet."""
    import pandas
    rows = [dict(repo_name="a/b", path=p.name, copies="1", size=str(p.stat().st_size),
                 content=p.read_text(), license="mit") for p in sorted(source.iterdir())]
    (folder / "train").mkdir()
    (folder / "valid").mkdir()
    (folder / "train" / "README.md").write_text("# what a downloaded hub repository brings along")
    (folder / "train" / ".cache").mkdir()
    (folder / "train" / ".cache" / "state.json").write_text("{}")
    write_lines(folder / "train" / "ds_train.jsonl", rows[5:])
    pandas.DataFrame(rows[:5]).to_parquet(folder / "valid" / "ds_valid.parquet")
    return [row["content"] for row in rows[5:]], [row["content"] for row in rows[:5]]


def hugging_face_tokenizer(path, texts):
    """
    A tokenizer.json as `tokenizers` writes a trained byte-level BPE: EOT first, then bytes, then
    merges in order.
    """
    spec = train_tokenizer(texts, 400)
    in_order = sorted(spec["ranks"], key=spec["ranks"].get)
    tokens = [base64.b64decode(token) for token in in_order]
    ranges = ("!", "~"), ("¡", "¬"), ("®", "ÿ")
    printable = [b for first, last in ranges for b in range(ord(first), ord(last) + 1)]
    others = [b for b in range(256) if b not in printable]
    char = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}
    vocab, merges = {EOT: 0}, []
    ranks = {t: i for i, t in enumerate(tokens)}
    for token in tokens:
        vocab["".join(char[b] for b in token)] = len(vocab)
        parts = [bytes([b]) for b in token]
        while len(parts) > 2:  # the two halves that BPE last merged
            pairs = [ranks.get(a + b, 1e9) for a, b in zip(parts, parts[1:])]
            i = pairs.index(min(pairs))
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2:
            merges.append(" ".join("".join(char[b] for b in part) for part in parts))
    path.write_text(json.dumps({
        "added_tokens": [{"id": 0, "content": EOT}],
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False},
        "model": {"type": "BPE", "vocab": vocab, "merges": merges}}))
    return spec


def test_codeparrot_from_local_files(source, tmp_path):
    train_texts, val_texts = hub_files(source, tmp_path)
    spec = hugging_face_tokenizer(tmp_path / "tokenizer.json", train_texts)
    run("data/prepare.py", "--corpus=codeparrot", f"--data_dir={tmp_path}", "--piece=32",
        f"--train_source={tmp_path / 'train'}", f"--val_source={tmp_path / 'valid'}",
        f"--tokenizer={tmp_path / 'tokenizer.json'}")
    meta, tokenizer, train, val = read(tmp_path / "codeparrot")
    assert meta["piece"] == 32
    assert tokenizer.n_vocab == 400
    assert tokenizer.encode_single_token(EOT) == 0
    # the same merges as the tokenizer it was made from, ids one higher, GPT-2's split
    ours = load_tokenizer(spec | {"pattern": GPT2_PATTERN})
    wanted = [[i + 1 for i in ours.encode_ordinary(text)] for text in val_texts]
    assert [tokenizer.encode_ordinary(text) for text in val_texts] == wanted
    whole = [ids[:len(ids) // 32 * 32] for ids in wanted]
    assert val.tolist() == sum(whole, [])  # whole pieces only, no end-of-text between
    assert len(train) % 32 == 0 and len(train) == meta["train_tokens"] > 0


def test_languini_style_books_from_local_files(source, tmp_path):
    train_texts, _ = hub_files(source, tmp_path)
    (tmp_path / "wiki").mkdir()
    write_lines(tmp_path / "wiki" / "wiki.jsonl", [{"text": text} for text in train_texts[:10]])
    run("data/prepare.py", "--corpus=languini", f"--data_dir={tmp_path}", "--column=content",
        f"--train_source={tmp_path / 'train'}", f"--tokenizer_source={tmp_path / 'wiki'}",
        "--vocab_size=300")
    meta, tokenizer, train, val = read(tmp_path / "languini")
    assert (meta["vocab_size"], meta["piece"]) == (300, 0)
    assert (train == tokenizer.encode_single_token(EOT)).sum() == meta["train_documents"]


def test_a_table_with_holes_and_one_without_text(source, tmp_path):
    rows = [{"text": p.read_text(), "size": 1} for p in sorted(source.iterdir())]
    (tmp_path / "t").mkdir()
    write_lines(tmp_path / "t" / "t.jsonl", [{"text": None, "size": 0}, *rows])
    args = (f"--data_dir={tmp_path}", f"--train_source={tmp_path / 't'}", "--name=mine",
            "--vocab_size=300")
    out = run("data/prepare.py", *args, "--column=size", status=1)
    assert re.search("column 'size' of .* not text: set --column", out)
    run("data/prepare.py", *args)
    _, tokenizer, train, val = read(tmp_path / "mine")
    assert texts_of(tokenizer, train, val) == sorted(row["text"] for row in rows)


@pytest.mark.parametrize("args, line", [
    (["--corpus=codeparrot"], "cannot load huggingface-course/codeparrot-ds-train"),
    (["--corpus=languini"], "pass its folder: --train_source=FOLDER"),
    (["--corpus=languini", "--train_source={source}"], "its folder: --tokenizer_source=FOLDER"),
    (["--train_source={source}", "--name=x", "--tokenizer=gpt2"],
     "tiktoken could not download its encoding 'gpt2'"),
    (["--train_source={source}", "--name=x", "--tokenizer=no/tokenizer"],
     "no file no/tokenizer, and the hub did not give"),
    (["--train_source=/no/such/folder", "--name=x"], "no file or folder /no/such/folder"),
])
def test_what_is_out_of_reach_is_named(args, line, source, tmp_path):
    out = run("data/prepare.py", f"--data_dir={tmp_path}", "--vocab_size=300",
              *(a.format(source=source) for a in args), status=1)
    last = out.strip().splitlines()[-1]
    assert last.startswith("error: ") and line in last
    assert not list(tmp_path.iterdir())


def test_settings_that_cannot_be_are_refused(source, tmp_path):
    own = [f"--data_dir={tmp_path}", f"--train_source={source}", "--name=x"]
    tries = {
        "pycode has its own source": own[:2] + ["--corpus=pycode"],
        "corpus must be one of pycode, own, codeparrot, languini": ["--corpus=c4"],
        "your own text needs --train_source=FOLDER and --name=NAME": own[:2],
        "vocab_size must be at least 257": own + ["--vocab_size=200"],
        "at most 65536, and is 1000000": own + ["--vocab_size=1e6"],
        "did you mean 'vocab_size'?": own + ["--vocabsize=300"],
        "piece must be at least 0": own + ["--piece=-5"],
        "name must be a folder's name without slashes": own + ["--name=.."],
        "validating on training text says nothing": own + [f"--val_source={source}"],
    }
    for line, (status, error) in zip(tries, refusals("data/prepare.py", tries.values())):
        assert status == 2
        assert error.startswith("error: ") and line in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_nothing_of_the_users_is_deleted(source, tmp_path):
    """The nanoGPT habit of keeping the input in data/<name>/ itself."""
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "input.txt").write_text("precious")
    out = run("data/prepare.py", f"--data_dir={tmp_path}", f"--train_source={mine}", "--name=mine",
              status=1)
    assert "holds other files" in out
    assert (mine / "input.txt").read_text() == "precious"


def last_lines(*tries):
    """The line on stderr that prepare.py ends with, for each list of arguments."""
    results = refusals("data/prepare.py", tries)
    assert all(status == 1 for status, _ in results)
    return [error.splitlines()[-1] for _, error in results]


def test_damage_and_emptiness_are_named(source, tmp_path):
    (tmp_path / "mix").mkdir()
    (tmp_path / "mix" / "a.txt").write_text("text")
    (tmp_path / "mix" / "b.json").write_text("{}")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "meta.json").write_text("{")
    args = [f"--data_dir={tmp_path}", "--vocab_size=300", f"--train_source={source}"]
    pieces, mix, damaged, nowhere = last_lines(
        [*args, "--name=mine", "--piece=1000000"],
        [*args, "--name=mine", f"--train_source={tmp_path / 'mix'}"],
        [*args, "--name=damaged"],
        [*args, "--name=mine", "--data_dir=/dev/null/x"])
    assert "not one token, as no document has 1000000" in pieces
    assert "both b.json and a.txt" in mix
    assert "meta.json is damaged" in damaged
    assert "can't prepare mine: " in nowhere
    assert sorted(path.name for path in tmp_path.iterdir()) == ["damaged", "mix"]


def test_foreign_tokenizers_are_refused(source, tmp_path):
    path = tmp_path / "tokenizer.json"
    args = [f"--data_dir={tmp_path}", f"--train_source={source}", "--name=x"]
    hugging_face_tokenizer(path, [p.read_text() for p in source.iterdir()])
    whole = path.read_text()
    reversed_merges, without_bytes = json.loads(whole), json.loads(whole)
    reversed_merges["model"]["merges"].reverse()
    for letter in "xyz":
        del without_bytes["model"]["vocab"][letter]
    without_bytes["model"]["merges"] = []
    cases = {
        "not a byte-level BPE": json.dumps({"model": {"type": "Unigram"}}),
        "not a whole byte-level BPE tokenizer.json (JSONDecodeError": whole[:1000],
        "not a whole byte-level BPE tokenizer.json (KeyError": whole.replace('"def"', '"d\u4e00f"'),
        "not in the order of its merges": json.dumps(reversed_merges),
        "lacks 3 of the 256 bytes": json.dumps(without_bytes),
    }
    tries = []
    for number, text in enumerate(cases.values()):
        (tmp_path / f"{number}.json").write_text(text)
        tries.append([*args, f"--tokenizer={tmp_path / str(number)}.json"])
    for sentence, line in zip(cases, last_lines(*tries)):
        assert sentence in line


@pytest.mark.parametrize("change", [
    lambda spec: spec["ranks"].popitem(),
    lambda spec: spec["ranks"].update({"YWFhYWFh": 0}),
    lambda spec: spec["ranks"].update({"YWFhYWFh": "1"}),
    lambda spec: spec["special"].update({EOT: 0}),
    lambda spec: spec.update(pattern="("),
    lambda spec: spec.pop("pattern"),
], ids=["a byte lacks", "an id twice", "an id as text", "a special id twice", "a broken pattern",
        "no pattern"])
def test_a_broken_tokenizer_is_a_value_error_and_no_panic(change):
    ranks = {base64.b64encode(bytes([b])).decode(): b for b in range(256)}
    spec = {"pattern": r"\s+|\S+", "ranks": ranks, "special": {EOT: 256}}
    assert load_tokenizer(spec).n_vocab == 257
    change(spec)
    with pytest.raises(ValueError):
        load_tokenizer(spec)


def test_a_million_spaces_are_tokenized():
    """The Rust libraries panic on them, in one piece."""
    text = "def f():" + " " * 1_000_000 + "pass" + " \t" * 500_000
    spec = train_tokenizer([text, "some words " * 100], 300)
    tokenizer = load_tokenizer(spec)
    ids, short, none = encode_batch(tokenizer, [text, "a b", ""], 2)
    assert tokenizer.decode(ids) == text
    assert (tokenizer.decode(short), none) == ("a b", [])


def test_only_long_white_space_is_cut():
    for text in ("", "a b", "x" * 10**6, (" " * 1000 + "x") * 1000, " " * LONGEST_SPACE):
        assert parts(text) == [text]
    text = "a" + " " * 3 * LONGEST_SPACE + "b"
    assert "".join(parts(text)) == text
    assert all(part.count(" ") <= 2 * LONGEST_SPACE for part in parts(text))


def test_files_that_are_no_text_are_counted_and_named(tmp_path, capsys):
    """Gzipped text is text, a carriage return stays, UTF-16 without a mark is no UTF-8."""
    (tmp_path / "a.txt").write_bytes(b"one\r\ntwo\r")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress("drei, für".encode()))
    (tmp_path / "c.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR")
    (tmp_path / "d.txt").write_text("utf-16", encoding="utf-16")
    (tmp_path / "e.txt").write_text("utf-16", encoding="utf-16-le")
    (tmp_path / "f.txt").write_text("für", encoding="latin-1")
    (tmp_path / "g.txt").write_text(" \n")
    (tmp_path / "README.md").write_text("read me")
    documents, dropped = read_source(str(tmp_path), "text", "train", "train_source")
    assert documents == ["read me", "one\r\ntwo\r", "drei, für"]
    assert dropped == {"empty": 1, "not_text": 4}
    assert "left out 4 of 8 files that are no UTF-8 text: c.png, d.txt" in capsys.readouterr().out


def test_a_half_gzip_file_is_named(tmp_path):
    (tmp_path / "a.txt.gz").write_bytes(gzip.compress(b"text" * 1000)[:-10])
    with pytest.raises(ValueError, match="a.txt.gz is no whole gzip file"):
        read_source(str(tmp_path), "text", "train", "train_source")


def test_an_unreadable_folder_is_an_error(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError, match=str(tmp_path)):
        read_source(str(tmp_path), "text", "train", "train_source")


def test_compressed_tables_are_read(tmp_path):
    pytest.importorskip("datasets")
    (tmp_path / "t.csv.gz").write_bytes(gzip.compress(b"text,n\nfirst,1\nsecond,2\n"))
    documents, _ = read_source(str(tmp_path), "text", "train", "train_source")
    assert list(documents) == ["first", "second"]


@pytest.mark.parametrize("name, content, cause", [
    ("half.jsonl", b'{"text": "whole"}\n{"text": "ha', "JSON parse error"),
    ("broken.parquet", b"PAR1 and nothing", "Parquet"),
    ("ragged.csv", b"text,n\na,1\nb,2,3,4\n", "Expected 2 fields in line 3"),
])
def test_a_broken_table_is_named_with_its_reason(name, content, cause, tmp_path):
    """And not the hub's reachability."""
    pytest.importorskip("datasets")
    (tmp_path / f"a{name[name.index('.'):]}").write_bytes(content)
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"can't read {tmp_path}/a?[a-z]*.* as .*{cause}"):
        read_source(str(path), "text", "train", "train_source")


def test_disk_space_is_checked_first(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare.shutil, "disk_usage", lambda path: type("", (), {"free": 1000}))
    with pytest.raises(ValueError, match="free some space"):
        prepare.need_disk(tmp_path, 2000)


def test_a_full_disk_is_named_and_leaves_nothing(source, tmp_path):
    """A limit on the size of a file, with Python's handling of it, stands for the disk."""
    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    done = subprocess.run(
        [sys.executable, "data/prepare.py", f"--data_dir={tmp_path}", f"--train_source={source}",
         "--name=mine", "--vocab_size=300"],
        cwd=ROOT, preexec_fn=limit, capture_output=True, text=True, timeout=240)
    last = done.stderr.splitlines()[-1]
    assert done.returncode == 1
    assert re.search("can't write .*/train.bin: File too large", last)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def at_work(tmp_path):
    """A prepare.py with seconds of work before it, on the dataset "mine" in tmp_path / "data"."""
    (tmp_path / "text").mkdir()
    for i in range(2):
        (tmp_path / "text" / f"{i}.txt").write_text(f"{i} " + "some words of some text\n" * 200_000)
    process = subprocess.Popen(
        [sys.executable, "data/prepare.py", f"--data_dir={tmp_path / 'data'}", "--vocab_size=300",
         f"--train_source={tmp_path / 'text'}", f"--val_source={tmp_path / 'text' / '1.txt'}",
         "--name=mine"], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "data" / ".mine.part").exists():
        assert process.poll() is None
        time.sleep(0.01)
    yield process
    process.kill()
    process.communicate()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_leaves_nothing_half_made(number, at_work, tmp_path):
    at_work.send_signal(number)
    _, error = at_work.communicate(timeout=60)
    assert at_work.returncode == 128 + number
    assert "stopped; nothing half-made is left" in error and "Traceback" not in error
    assert not list((tmp_path / "data").iterdir())


def test_what_a_killed_run_left_is_removed_by_the_next(at_work, source, tmp_path):
    at_work.kill()
    at_work.communicate()
    (tmp_path / "data" / ".mine.part" / "half.bin").write_bytes(b"half")
    run("data/prepare.py", f"--data_dir={tmp_path / 'data'}", f"--train_source={source}",
        "--name=mine", "--vocab_size=300")
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["mine"]
    assert len(list((tmp_path / "data" / "mine").iterdir())) == 4


def test_two_runs_do_not_make_the_same_dataset(source, tmp_path):
    with prepare.half_made(tmp_path / "mine"):
        [line] = last_lines([f"--data_dir={tmp_path}", f"--train_source={source}", "--name=mine"])
        assert f"another prepare.py is making {tmp_path}/mine" in line
        assert (tmp_path / ".mine.part").exists()


# ---------------------------------------------------------------------------------- opened again
@pytest.fixture
def copied(data_dir, tmp_path):
    """A copy of the dataset "mine" to damage."""
    (tmp_path / "mine").mkdir()
    for path in (data_dir / "mine").iterdir():
        (tmp_path / "mine" / path.name).write_bytes(path.read_bytes())
    return tmp_path / "mine"


def test_tokens_changed_at_equal_size_are_refused(copied):
    open_dataset(str(copied.parent), "mine", 32)
    tokens = np.fromfile(copied / "train.bin", np.uint16)
    tokens[[0, -1]] = tokens[[-1, 0]]
    tokens.tofile(copied / "train.bin")
    with pytest.raises(ValueError, match="train.bin or val.bin is not as it was prepared"):
        open_dataset(str(copied.parent), "mine", 32)


def test_large_bins_are_hashed_only_if_newer_than_their_meta(copied, monkeypatch):
    monkeypatch.setattr("data.dataset.ALWAYS_HASHED", 0)
    hashed = []
    monkeypatch.setattr("data.dataset.hash_bins", lambda bins: hashed.append(bins) or "another")
    os.utime(copied / "meta.json", (2e9, 2e9))
    open_dataset(str(copied.parent), "mine", 32)
    assert not hashed
    os.utime(copied / "meta.json", (1e9, 1e9))
    with pytest.raises(ValueError, match="is not as it was prepared"):
        open_dataset(str(copied.parent), "mine", 32)


@pytest.mark.parametrize("damage, sentence", [
    (lambda folder: (folder / "val.bin").unlink(), "lacks val.bin"),
    (lambda folder: (folder / "val.bin").write_bytes(b"12"), "meta.json tells of"),
    (lambda folder: (folder / "meta.json").write_text("[]"), "damaged"),
    (lambda folder: (folder / "tokenizer.json").write_text("{}"), "damaged .*no whole tokenizer"),
    (lambda folder: (folder / "meta.json").unlink(), "no dataset in .*--name=mine"),
])
def test_a_damaged_dataset_is_named(damage, sentence, copied):
    damage(copied)
    with pytest.raises((ValueError, OSError), match=sentence):
        open_dataset(str(copied.parent), "mine", 32)


def test_an_unreadable_bin_is_no_damage(copied, monkeypatch):
    def refuse(path, **_):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(np, "memmap", refuse)
    with pytest.raises(OSError, match="can't read the dataset in .*Permission denied"):
        open_dataset(str(copied.parent), "mine", 32)
