"""data/prepare.py on small folders and on local files in the hub datasets' formats."""
import base64
import gzip
import json
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, refusals, run

from data import dataset, prepare
from data.dataset import open_dataset
from data.prepare import load_tokenizer
from data.sources import read_source
from data.tokenizer import EOT, GPT2_PATTERN, encode_batch, train_tokenizer


def read(folder):
    """meta.json, the tokenizer, train.bin and val.bin of a dataset."""
    meta = json.loads((folder / "meta.json").read_text())
    bins = [np.fromfile(folder / f"{part}.bin", np.uint16) for part in ("train", "val")]
    return meta, load_tokenizer(str(folder / "tokenizer.json")), *bins


def texts_of(folder):
    """All documents of a dataset without pieces, sorted."""
    _, tokenizer, *bins = read(folder)
    return sorted(t for part in bins for t in tokenizer.decode(part.tolist()).split(EOT)[:-1])


def own(folder, source, *more, **how):
    """Prepare the text of `source` as the dataset folder/mine; returns what is printed."""
    return run("data/prepare.py", f"--data_dir={folder}", f"--train_source={source}", "--name=mine",
               "--vocab_size=300", *more, **how)


# ---------------------------------------------------------------------------------- text
def test_a_folder_of_text(source, data_dir):
    meta, tokenizer, train, val = read(data_dir / "mine")
    assert (len(train), len(val)) == (meta["train_tokens"], meta["val_tokens"])
    assert meta["vocab_size"] == tokenizer.n_vocab == 512
    assert max(train.max(), val.max()) < 512
    # every file is in exactly one part, whole
    texts = texts_of(data_dir / "mine")
    assert texts == sorted(path.read_text() for path in source.iterdir())
    assert len(texts) == meta["train_documents"] + meta["val_documents"]
    assert meta["val_documents"] >= 1
    assert [path.name for path in data_dir.iterdir()] == ["mine"]  # nothing half-made is left


def test_same_files_same_bins_and_a_rerun_does_nothing(source, data_dir, tmp_path):
    own(tmp_path, source, "--vocab_size=512")
    for file in ("train.bin", "val.bin", "tokenizer.json"):
        assert (tmp_path / "mine" / file).read_bytes() == (data_dir / "mine" / file).read_bytes()
    assert read(tmp_path / "mine")[0]["sha256"] == read(data_dir / "mine")[0]["sha256"]
    before = (tmp_path / "mine" / "train.bin").stat().st_mtime_ns
    assert "nothing to do" in own(tmp_path, source, "--vocab_size=512")
    out = own(tmp_path, source, "--vocab_size=600", status=1)
    assert "exists, made with vocab_size=512" in out and "--name" in out
    assert (tmp_path / "mine" / "train.bin").stat().st_mtime_ns == before


def test_text_goes_in_as_it_is_and_other_files_are_counted(source, tmp_path):
    mix = shutil.copytree(source, tmp_path / "mix")
    (mix / "windows.txt").write_bytes(b"one\r\ntwo\r\n")
    (mix / "packed.txt.gz").write_bytes(gzip.compress("gzipped \u00e9".encode()))
    texts = sorted([*(p.read_text() for p in source.iterdir()), "one\r\ntwo\r\n", "gzipped \u00e9"])
    (mix / "picture.png").write_bytes(b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR")
    (mix / "utf16.txt").write_bytes("sixteen bits".encode("utf-16-le"))
    (mix / "latin1.txt").write_bytes("caf\u00e9".encode("latin-1"))
    (mix / "empty.txt").write_text(" \n")
    out = own(tmp_path, mix)
    assert f"left out 3 of {len(texts) + 4} files that are no UTF-8 text: latin1.txt" in out
    assert read(tmp_path / "mine")[0]["dropped_files"] == {"empty": 1, "not_text": 3}
    assert texts_of(tmp_path / "mine") == texts


@pytest.mark.parametrize("text", [
    "old Mac\rno newline\r\r\ttab\rend",
    "\ufeffbyte order mark\r\nWindows \r\n\r\n mixed\n\r \x85\u2028\u2029\v\f\x1c\x01\x7f \r",
    f"{EOT} written out, {EOT}e\u0301 \U0001f469\u200d\U0001f4bb \ue000\u0378\uffff\ufffd \n "],
    ids=["CR", "CRLF", "odd characters"])
def test_odd_text_comes_back_byte_for_byte(text, data_dir, tmp_path):
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "plain.txt").write_bytes(text.encode())
    (tmp_path / "t" / "zipped.gz").write_bytes(gzip.compress(text.encode()))
    documents, dropped = read_source(str(tmp_path / "t"), "text", "train", "train_source")
    tokenizer = read(data_dir / "mine")[1]
    dataset.write_bin(tmp_path / "t.bin", documents, tokenizer, 0)
    tokens = np.fromfile(tmp_path / "t.bin", np.uint16)
    assert tokenizer.decode_bytes(tokens.tolist()) == 2 * (text + EOT).encode()
    assert dropped == {"empty": 0, "not_text": 0}


def test_a_million_spaces_are_a_document(source, tmp_path):
    wide = shutil.copytree(source, tmp_path / "wide")
    (wide / "wide.txt").write_text("a" + " " * 1_000_000 + "b")
    own(tmp_path, wide)
    assert "a" + " " * 1_000_000 + "b" in texts_of(tmp_path / "mine")


@pytest.mark.parametrize("text", [
    "x = f(1)\n" * 6000, "a" * 49_999 + ")\n", "\n" * 49_999, "a" + " " * 49_999 + "b"])
def test_ordinary_text_is_tokenized_whole(text, data_dir):
    tokenizer = read(data_dir / "mine")[1]
    assert encode_batch(tokenizer, [text], 1) == [tokenizer.encode_ordinary(text)]


def test_a_folder_that_cannot_be_read_is_named(source, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", refuse)  # tests may run as root, who may read all
    with pytest.raises(PermissionError, match=str(source)):
        read_source(str(source), "text", "train", "train_source")


# ---------------------------------------------------------------------------------- tables
def hub_files(source, folder):
    """The two codeparrot datasets as local files: jsonl as that repository has it, and parquet."""
    import pandas
    rows = [dict(repo_name="a/b", path=p.name, copies="1", size=str(p.stat().st_size),
                 content=p.read_text(), license="mit") for p in sorted(source.iterdir())]
    (folder / "train" / ".cache").mkdir(parents=True)
    (folder / "valid").mkdir()
    (folder / "train" / "README.md").write_text("# what a downloaded hub repository brings along")
    (folder / "train" / ".cache" / "state.json").write_text("{}")
    write_rows(folder / "train" / "ds_train.jsonl", rows[5:])
    pandas.DataFrame(rows[:5]).to_parquet(folder / "valid" / "ds_valid.parquet")
    return [row["content"] for row in rows[5:]], [row["content"] for row in rows[:5]]


def write_rows(path, rows):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def hugging_face_tokenizer(path, texts):
    """
    A tokenizer.json as `tokenizers` writes a trained byte-level BPE: <|endoftext|> first, then
    bytes, then merges in order.
    """
    spec = train_tokenizer(texts, 400)
    ranks = {base64.b64decode(token): rank for token, rank in spec["ranks"].items()}
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1),
                 *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in printable]
    char = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}
    vocab, merges = {EOT: 0}, []
    for token in sorted(ranks, key=ranks.get):
        vocab["".join(char[b] for b in token)] = len(vocab)
        parts = [bytes([b]) for b in token]
        while len(parts) > 2:  # the two halves that BPE last merged
            i = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], 1e9))
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
    run("data/prepare.py", "--corpus=codeparrot", f"--data_dir={tmp_path}",
        f"--train_source={tmp_path / 'train'}", f"--val_source={tmp_path / 'valid'}",
        f"--tokenizer={tmp_path / 'tokenizer.json'}", "--piece=32")
    meta, tokenizer, train, val = read(tmp_path / "codeparrot")
    assert meta["piece"] == 32
    assert tokenizer.n_vocab == 400 and tokenizer.encode_single_token(EOT) == 0
    # the same merges as the tokenizer it was made from, ids one higher, GPT-2's split
    ours = load_tokenizer(spec | {"pattern": GPT2_PATTERN})
    wanted = [[i + 1 for i in ours.encode_ordinary(text)] for text in val_texts]
    assert [tokenizer.encode_ordinary(text) for text in val_texts] == wanted
    whole = [ids[:len(ids) // 32 * 32] for ids in wanted]
    assert val.tolist() == sum(whole, [])  # whole pieces only, no end-of-text between
    assert len(train) % 32 == 0 and len(train) == meta["train_tokens"] > 0


def test_languini_style_books_from_local_files(source, tmp_path):
    train_texts, _ = hub_files(source, tmp_path)
    write_rows(tmp_path / "wiki" / "wiki.jsonl", [{"text": text} for text in train_texts[:10]])
    run("data/prepare.py", "--corpus=languini", f"--data_dir={tmp_path}", "--column=content",
        f"--train_source={tmp_path / 'train'}", f"--tokenizer_source={tmp_path / 'wiki'}",
        "--vocab_size=300")
    meta, tokenizer, train, val = read(tmp_path / "languini")
    assert meta["vocab_size"] == 300 and meta["piece"] == 0
    assert (train == tokenizer.encode_single_token(EOT)).sum() == meta["train_documents"]


def test_a_table_with_holes_and_one_without_text(source, tmp_path):
    rows = [{"text": p.read_text(), "size": 1} for p in sorted(source.iterdir())]
    write_rows(tmp_path / "t" / "t.jsonl", [{"text": None, "size": 0}, *rows])
    out = own(tmp_path, tmp_path / "t", "--column=size", status=1)
    assert "column 'size' of" in out and "not text: set --column" in out
    own(tmp_path, tmp_path / "t")
    assert texts_of(tmp_path / "mine") == sorted(row["text"] for row in rows)


def test_a_gzipped_csv_is_a_table(tmp_path):
    table = "text\n" + "".join(f"row {i} of it\n" for i in range(60))
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "t.csv.gz").write_bytes(gzip.compress(table.encode()))
    own(tmp_path, tmp_path / "t")
    assert texts_of(tmp_path / "mine") == sorted(table.splitlines()[1:])


BROKEN = [
    ("b.jsonl", b'{"text": "whole"}\n{"text": "ha', "b.jsonl as json: ArrowInvalid: JSON parse"),
    ("b.parquet", b"not a parquet file", "b.parquet as parquet: "),
    ("b.csv.gz", gzip.compress(b"text\n" + os.urandom(500).hex().encode())[:-300], "b.csv.gz as c"),
    ("b.jsonl", b"", "b.jsonl is empty"),
    ("b.txt.gz", gzip.compress(b"text")[:-3], "b.txt.gz is no whole gzip file")]


def test_a_broken_file_is_named_with_its_fault(tmp_path):
    tries = []
    for i, (file, content, _) in enumerate(BROKEN):
        (tmp_path / f"{i}").mkdir()
        (tmp_path / f"{i}" / file).write_bytes(content)
        tries.append([f"--data_dir={tmp_path}", f"--train_source={tmp_path}/{i}", "--name=mine"])
    for (_, _, line), (status, err) in zip(BROKEN, refusals("data/prepare.py", tries)):
        last = err.splitlines()[-1]
        assert status == 1 and last.startswith("error: ") and line in last
        assert "hub" not in last


# ---------------------------------------------------------------------------------- refusals
MISSING = [
    (["--corpus=codeparrot"], "cannot load huggingface-course/codeparrot-ds-train"),
    (["--corpus=languini"], "pass its folder: --train_source=FOLDER"),
    (["--corpus=languini", "--train_source={}"], "pass its folder: --tokenizer_source=FOLDER"),
    (["--train_source=/no/such/folder", "--name=x"], "no file or folder /no/such/folder"),
    (["--train_source={}", "--name=x", "--tokenizer=gpt2"], "not download its encoding 'gpt2'"),
    (["--train_source={}", "--name=x", "--tokenizer=no/tokenizer"],
     "no file no/tokenizer, and the hub did not give"),
]


def test_one_line_says_what_is_missing(source, tmp_path):
    tries = [[f"--data_dir={tmp_path}", *(argument.format(source) for argument in args)]
             for args, _ in MISSING]
    for (_, line), (status, err) in zip(MISSING, refusals("data/prepare.py", tries)):
        last = err.splitlines()[-1]
        assert status == 1 and last.startswith("error: ") and line in last
    assert not list(tmp_path.iterdir())


def test_one_line_says_which_setting_is_wrong(source, tmp_path):
    mine = [f"--train_source={source}", "--name=x"]
    wrong = [
        (["--corpus=pycode", f"--train_source={source}"], "pycode has its own source"),
        (["--corpus=c4"], "corpus must be one of pycode, own, codeparrot, languini"),
        (mine[:1], "your own text needs --train_source=FOLDER and --name=NAME"),
        ([*mine, "--name=.."], "without slashes"),
        ([*mine, "--vocabsize=300"], "did you mean 'vocab_size'?"),
        ([*mine, f"--val_source={source}"], "validating on training text says nothing"),
        ([*mine, "--vocab_size=200"], "vocab_size must be at least 257"),
        ([*mine, "--vocab_size=1e30"], "vocab_size must be at least 257 and at most 65536"),
        ([*mine, "--vocab_size=nan"], "vocab_size must be int"),
        ([*mine, "--piece=-5"], "piece must be at least 0"),
        ([*mine, "--piece=1e12"], "piece must be at least 0 and at most")]
    answers = refusals("data/prepare.py", [[f"--data_dir={tmp_path}", *args] for args, _ in wrong])
    for (args, line), (status, said) in zip(wrong, answers, strict=True):
        assert (status, said.count("\n")) == (2, 1), (args, said)
        assert line in said
    assert not list(tmp_path.iterdir())


def test_nothing_of_the_users_is_deleted(tmp_path):
    """The nanoGPT habit of keeping the input in data/<name>/ itself."""
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "input.txt").write_text("precious")
    assert "holds other files" in own(tmp_path, mine, status=1)
    assert (mine / "input.txt").read_text() == "precious"


def test_damage_and_emptiness_are_named(source, tmp_path):
    out = own(tmp_path, source, "--piece=1000000", status=1)
    assert "not one token, as no document has 1000000" in out and not list(tmp_path.iterdir())
    (tmp_path / "mix").mkdir()
    (tmp_path / "mix" / "a.txt").write_text("text")
    (tmp_path / "mix" / "b.json").write_text("{}")
    assert "both b.json and a.txt" in own(tmp_path, tmp_path / "mix", status=1)
    assert "can't prepare" in own("/dev/null/x", source, status=1)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "meta.json").write_text("{")
    assert "meta.json is damaged" in own(tmp_path, source, status=1)


def test_foreign_tokenizers_are_refused(source, tmp_path):
    path = tmp_path / "tokenizer.json"

    def refused():
        out = own(tmp_path, source, f"--tokenizer={path}", status=1)
        assert out.count("\n") == 1
        return out

    path.write_text(json.dumps({"model": {"type": "Unigram"}}))
    assert "not a byte-level BPE" in refused()
    hugging_face_tokenizer(path, [p.read_text() for p in source.iterdir()])
    whole = path.read_text()
    path.write_text(whole[:1000])
    assert "not a whole byte-level BPE tokenizer.json (JSONDecodeError" in refused()
    path.write_text(whole.replace('"def"', '"d\u4e00f"'))
    assert "not a whole byte-level BPE tokenizer.json (KeyError" in refused()
    spec = json.loads(whole)
    del spec["model"]["vocab"]["q"]
    path.write_text(json.dumps(spec))
    assert "lacks 1 of the 256 bytes, b'q' among them" in refused()
    spec = json.loads(whole)
    spec["model"]["merges"].reverse()
    path.write_text(json.dumps(spec))
    assert "not in the order of its merges" in refused()


@pytest.mark.parametrize("part, value", [
    ("ranks", {}), ("ranks", []), ("special", {EOT: 5}), ("special", {EOT: -1}),
    ("special", {EOT: 1.5}), ("pattern", "("), ("pattern", None)])
def test_a_tokenizer_that_is_none_raises_value_error(part, value, data_dir):
    spec = json.loads((data_dir / "mine" / "tokenizer.json").read_text())
    with pytest.raises(ValueError):
        load_tokenizer(spec | {part: value})


# ---------------------------------------------------------------------------------- the disk
def test_disk_space_is_checked_first(tmp_path, monkeypatch):
    usage = type("usage", (), {"free": 1000})
    monkeypatch.setattr(prepare.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ValueError, match="free some space"):
        prepare.need_disk(tmp_path, 2000)


def test_a_full_disk_is_named_and_nothing_is_left(source, tmp_path):
    command = f"ulimit -f 8; exec {sys.executable} data/prepare.py --data_dir={tmp_path} " \
              f"--train_source={source} --name=mine --vocab_size=300"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "/train.bin: File too large" in done.stderr.splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written_is_found_before_the_tokenizer_is_trained(source, tmp_path):
    out = own(tmp_path, source, f"--name={'x' * 250}", status=1)  # too long with the process's id
    assert "File name too long" in out and "training a tokenizer" not in out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_leaves_nothing_half_made(number, source, tmp_path):
    code = "import os, data.prepare as p\n" \
           f"p.make_tokenizer = lambda documents: os.kill(os.getpid(), {int(number)})\n" \
           "p.main()"
    arguments = [f"--data_dir={tmp_path}", f"--train_source={source}", "--name=mine"]
    done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True,
                          text=True, timeout=60)
    assert done.returncode == 128 + number
    assert done.stderr.strip() == f"stopped by {number.name}; nothing half-made is left"
    assert not list(tmp_path.iterdir())


def test_what_a_killed_run_left_is_removed_by_the_next(source, tmp_path):
    dead = subprocess.Popen(["true"])
    dead.wait()
    for name in (f".mine.{dead.pid}", f".mine.{os.getpid()}", f".other.{dead.pid}", ".mine.notes"):
        (tmp_path / name).mkdir()
    own(tmp_path, source)
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"mine", f".mine.{os.getpid()}", f".other.{dead.pid}", ".mine.notes"}


# ---------------------------------------------------------------------------------- opening it
@pytest.fixture
def mine(data_dir, tmp_path):
    """A copy of the dataset "mine"."""
    return shutil.copytree(data_dir / "mine", tmp_path / "mine")


def swap(path):
    """Change the file, but neither its size nor its time."""
    before, content = path.stat(), path.read_bytes()
    path.write_bytes(content[2:] + content[:2])
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("part", ["train", "val"])
def test_a_dataset_changed_at_equal_size_is_refused(part, mine):
    swap(mine / f"{part}.bin")
    with pytest.raises(ValueError, match="not as it was prepared: meta.json tells of sha256"):
        open_dataset(mine.parent, "mine", 32)


def test_large_bins_are_hashed_where_they_are_newer_than_their_meta_json(mine, monkeypatch):
    monkeypatch.setattr(dataset, "ALWAYS_HASHED", 0)
    swap(mine / "train.bin")
    for name, seconds in (("train.bin", 1), ("val.bin", 1), ("meta.json", 2)):
        os.utime(mine / name, (seconds, seconds))
    open_dataset(mine.parent, "mine", 32)  # no word: hashing takes minutes, and the time is kept
    os.utime(mine / "train.bin", (3, 3))
    with pytest.raises(ValueError, match="not as it was prepared"):
        open_dataset(mine.parent, "mine", 32)


@pytest.mark.parametrize("change", [{"piece": 0.5}, {"piece": -1}, {"vocab_size": 511}])
def test_a_meta_json_that_does_not_fit_is_damage(change, mine):
    meta = json.loads((mine / "meta.json").read_text())
    (mine / "meta.json").write_text(json.dumps(meta | change))
    with pytest.raises(ValueError, match="is damaged"):
        open_dataset(mine.parent, "mine", 32)


@pytest.mark.parametrize("file", ["meta.json", "tokenizer.json", "train.bin", "val.bin"])
def test_a_lacking_file_is_named(file, mine):
    (mine / file).unlink()
    with pytest.raises(OSError, match=file.replace("meta.json", "no dataset in")):
        open_dataset(mine.parent, "mine", 32)


def test_a_bin_that_may_not_be_read_is_not_called_damaged(mine, monkeypatch):
    def refuse(path, **how):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(np, "memmap", refuse)  # tests may run as root, who may read all
    with pytest.raises(OSError, match="^can't read the dataset in .*Permission denied.*train.bin"):
        open_dataset(mine.parent, "mine", 32)
