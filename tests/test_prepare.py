"""data/prepare.py on small folders and on local files in the hub datasets' formats."""
import base64
import json
import os

import numpy as np
import pytest
from conftest import run

from data.prepare import EOT, GPT2_PATTERN, load_tokenizer, train_tokenizer


def read(folder):
    meta = json.loads((folder / "meta.json").read_text())
    return meta, load_tokenizer(str(folder / "tokenizer.json")), *(np.fromfile(folder / f"{part}.bin", np.uint16) for part in ("train", "val"))


def test_a_folder_of_text(source, data_dir):
    meta, tokenizer, train, val = read(data_dir / "mine")
    assert (len(train), len(val)) == (meta["train_tokens"], meta["val_tokens"]) and meta["vocab_size"] == tokenizer.n_vocab == 512
    assert max(train.max(), val.max()) < 512
    # every file is in exactly one part, whole
    texts = [text for part in (train, val) for text in tokenizer.decode(part.tolist()).split(EOT)[:-1]]
    assert sorted(texts) == sorted(path.read_text() for path in source.iterdir())
    assert len(texts) == meta["train_documents"] + meta["val_documents"] and meta["val_documents"] >= 1
    assert not [p for p in os.listdir(data_dir) if p.startswith(".")]  # nothing half-made is left


def test_same_files_same_bins_and_a_rerun_does_nothing(source, data_dir, tmp_path):
    again = (f"--data_dir={tmp_path}", f"--train_source={source}", "--name=mine", "--vocab_size=512")
    run("data/prepare.py", *again)
    for file in ("train.bin", "val.bin", "tokenizer.json"):
        assert (tmp_path / "mine" / file).read_bytes() == (data_dir / "mine" / file).read_bytes()
    assert read(tmp_path / "mine")[0]["sha256"] == read(data_dir / "mine")[0]["sha256"]
    before = (tmp_path / "mine" / "train.bin").stat().st_mtime_ns
    assert "nothing to do" in run("data/prepare.py", *again)
    out = run("data/prepare.py", *again[:3], "--vocab_size=600", status=1)
    assert "exists, made with vocab_size=512" in out and "--name" in out
    assert (tmp_path / "mine" / "train.bin").stat().st_mtime_ns == before


def hub_files(source, folder):
    """The two codeparrot datasets as local files: jsonl as that hub repository has it, and parquet."""
    import pandas
    rows = [dict(repo_name="a/b", path=p.name, copies="1", size=str(p.stat().st_size), content=p.read_text(), license="mit")
            for p in sorted(source.iterdir())]
    (folder / "train").mkdir()
    (folder / "valid").mkdir()
    (folder / "train" / "README.md").write_text("# what a downloaded hub repository brings along")
    (folder / "train" / ".cache").mkdir()
    (folder / "train" / ".cache" / "state.json").write_text("{}")
    (folder / "train" / "ds_train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[5:]))
    pandas.DataFrame(rows[:5]).to_parquet(folder / "valid" / "ds_valid.parquet")
    return [row["content"] for row in rows[5:]], [row["content"] for row in rows[:5]]


def hugging_face_tokenizer(path, texts):
    """A tokenizer.json as `tokenizers` writes a trained byte-level BPE: <|endoftext|> first, then bytes, then merges in order."""
    spec = train_tokenizer(texts, 400)
    tokens = [base64.b64decode(t) for t, _ in sorted(spec["ranks"].items(), key=lambda item: item[1])]
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [b for b in range(256) if b not in printable]
    char = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}
    vocab, merges = {EOT: 0}, []
    ranks = {t: i for i, t in enumerate(tokens)}
    for token in tokens:
        vocab["".join(char[b] for b in token)] = len(vocab)
        parts = [bytes([b]) for b in token]
        while len(parts) > 2:  # the two halves that BPE last merged
            i = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], 1e9))
            parts[i:i + 2] = [parts[i] + parts[i + 1]]
        if len(parts) == 2:
            merges.append(" ".join("".join(char[b] for b in part) for part in parts))
    path.write_text(json.dumps({"added_tokens": [{"id": 0, "content": EOT}], "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False},
                                "model": {"type": "BPE", "vocab": vocab, "merges": merges}}))
    return spec


def test_codeparrot_from_local_files(source, tmp_path):
    train_texts, val_texts = hub_files(source, tmp_path)
    spec = hugging_face_tokenizer(tmp_path / "tokenizer.json", train_texts)
    run("data/prepare.py", "--corpus=codeparrot", f"--data_dir={tmp_path}", f"--train_source={tmp_path / 'train'}",
        f"--val_source={tmp_path / 'valid'}", f"--tokenizer={tmp_path / 'tokenizer.json'}", "--piece=32")
    meta, tokenizer, train, val = read(tmp_path / "codeparrot")
    assert meta["piece"] == 32 and tokenizer.n_vocab == 400 and tokenizer.encode_single_token(EOT) == 0
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
    (tmp_path / "wiki" / "wiki.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in train_texts[:10]))
    run("data/prepare.py", "--corpus=languini", f"--data_dir={tmp_path}", f"--train_source={tmp_path / 'train'}", "--column=content",
        f"--tokenizer_source={tmp_path / 'wiki'}", "--vocab_size=300")
    meta, tokenizer, train, val = read(tmp_path / "languini")
    assert meta["vocab_size"] == 300 and meta["piece"] == 0 and (train == tokenizer.encode_single_token(EOT)).sum() == meta["train_documents"]


def test_a_table_with_holes_and_one_without_text(source, tmp_path):
    rows = [{"text": p.read_text(), "size": 1} for p in sorted(source.iterdir())]
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [{"text": None, "size": 0}, *rows]))
    args = (f"--data_dir={tmp_path}", f"--train_source={tmp_path / 't'}", "--name=mine", "--vocab_size=300")
    assert "column 'size' of" in (out := run("data/prepare.py", *args, "--column=size", status=1)) and "not text: set --column" in out
    run("data/prepare.py", *args)
    meta, tokenizer, train, val = read(tmp_path / "mine")
    texts = [text for part in (train, val) for text in tokenizer.decode(part.tolist()).split(EOT)[:-1]]
    assert sorted(texts) == sorted(row["text"] for row in rows)


@pytest.mark.parametrize("args, line", [
    (["--corpus=codeparrot"], "cannot load huggingface-course/codeparrot-ds-train"),
    (["--corpus=languini"], "pass its folder: --train_source=FOLDER"),
    (["--corpus=languini", "--train_source={source}"], "pass its folder: --tokenizer_source=FOLDER"),
    (["--corpus=pycode", "--train_source={source}"], "pycode has its own source"),
    (["--corpus=c4"], "corpus must be one of pycode, own, codeparrot, languini"),
    (["--train_source=/no/such/folder", "--name=x"], "no file or folder /no/such/folder"),
    (["--train_source={source}"], "your own text needs --train_source=FOLDER and --name=NAME"),
    (["--train_source={source}", "--name=x", "--vocab_size=200"], "vocab_size must be at least 257"),
    (["--train_source={source}", "--name=x", "--tokenizer=gpt2"], "tiktoken could not download its encoding 'gpt2'"),
    (["--train_source={source}", "--name=x", "--tokenizer=no/tokenizer"], "no file no/tokenizer, and the hub did not give"),
    (["--train_source={source}", "--name=x", "--vocabsize=300"], "did you mean 'vocab_size'?"),
    (["--train_source={source}", "--name=x", "--piece=-5"], "piece must be at least 0"),
    (["--train_source={source}", "--name=x", "--val_source={source}"], "validating on training text says nothing"),
])
def test_one_line_says_what_is_wrong(args, line, source, tmp_path):
    status = 2 if any(word in line for word in ("must be one", "needs --train", "did you mean", "its own source", "at least 0", "says nothing")) else 1
    out = run("data/prepare.py", f"--data_dir={tmp_path}", *(a.format(source=source) for a in args), status=status)
    last = out.strip().splitlines()[-1]
    assert last.startswith("error: ") and line in last
    assert not list(tmp_path.iterdir())


def test_nothing_of_the_users_is_deleted(source, tmp_path):
    """The nanoGPT habit of keeping the input in data/<name>/ itself."""
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "input.txt").write_text("precious")
    out = run("data/prepare.py", f"--data_dir={tmp_path}", f"--train_source={mine}", "--name=mine", status=1)
    assert "holds other files" in out and (mine / "input.txt").read_text() == "precious"
    assert "without slashes" in run("data/prepare.py", f"--data_dir={tmp_path}", f"--train_source={mine}", "--name=..", status=2)


def test_damage_and_emptiness_are_named(source, data_dir, tmp_path):
    args = (f"--data_dir={tmp_path}", "--name=mine", "--vocab_size=300")
    out = run("data/prepare.py", *args, f"--train_source={source}", "--piece=1000000", status=1)
    assert "not one token, as no document has 1000000" in out and not list(tmp_path.iterdir())
    (tmp_path / "mix").mkdir()
    (tmp_path / "mix" / "a.txt").write_text("text")
    (tmp_path / "mix" / "b.json").write_text("{}")
    assert "both b.json and a.txt" in run("data/prepare.py", *args, f"--train_source={tmp_path / 'mix'}", status=1)
    assert "can't prepare" in run("data/prepare.py", "--data_dir=/dev/null/x", *args[1:], f"--train_source={source}", status=1)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "meta.json").write_text("{")
    assert "meta.json is damaged" in run("data/prepare.py", *args, f"--train_source={source}", status=1)


def test_foreign_tokenizers_are_refused(source, tmp_path):
    path = tmp_path / "tokenizer.json"
    args = (f"--data_dir={tmp_path}", f"--train_source={source}", "--name=x", f"--tokenizer={path}")
    path.write_text(json.dumps({"model": {"type": "Unigram"}}))
    assert "not a byte-level BPE" in run("data/prepare.py", *args, status=1)
    hugging_face_tokenizer(path, [p.read_text() for p in source.iterdir()])
    whole = path.read_text()
    path.write_text(whole[:1000])
    assert "not a whole byte-level BPE tokenizer.json (JSONDecodeError" in run("data/prepare.py", *args, status=1)
    path.write_text(whole.replace('"def"', '"d\u4e00f"'))
    assert "not a whole byte-level BPE tokenizer.json (KeyError" in run("data/prepare.py", *args, status=1)
    spec = json.loads(whole)
    spec["model"]["merges"].reverse()
    path.write_text(json.dumps(spec))
    assert "not in the order of its merges" in run("data/prepare.py", *args, status=1)


def test_disk_space_is_checked_first(source, tmp_path, monkeypatch, capsys):
    from data import prepare
    monkeypatch.setattr(prepare.shutil, "disk_usage", lambda path: type("usage", (), {"free": 1000}))
    with pytest.raises(SystemExit):
        prepare.need_disk(tmp_path, 2000)
    assert "free some space" in capsys.readouterr().err
