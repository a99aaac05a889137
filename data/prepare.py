"""
Turn a corpus into data/<name>/: train.bin and val.bin (uint16 tokens), tokenizer.json, meta.json.

    python data/prepare.py                                             # pycode, the default
    python data/prepare.py --corpus=codeparrot                         # the paper's, from the hub
    python data/prepare.py --corpus=codeparrot --piece=256 --name=codeparrot_t256
    python data/prepare.py --corpus=languini                           # books, 16,384 tokens
    python data/prepare.py --name=mine --train_source=~/notes          # any folder of text

- pycode: the Python files of the running interpreter's standard library and installed packages,
  without duplicates, generated files and files out of 256 B .. 200 KB; 5% of the files, by content
  hash, for validation.
- A source is a file or folder (UTF-8 text, one document a file, gzipped or not; or .json, .jsonl,
  .csv, .parquet, .arrow, which `datasets` reads, with the text in `column`), or a hub id,
  `id:config` where it has several configurations.
- The tokenizer is trained (byte-level BPE, rustbpe) or converted (a Hugging Face byte-level
  tokenizer.json, as a file, folder or hub id; or the name of a tiktoken encoding); either way
  tiktoken runs it.

Everything is written under a temporary name and renamed when whole; run again, it does nothing. The
same files give the same bins, and meta.json holds their hash.
"""
import sys
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from configurator import configure, die, end_on_signals, on_signals, one_of, within

if __name__ == "__main__":
    end_on_signals()  # before the heavy imports

import json
import os
import re
import shutil
import signal
from itertools import islice

from data.dataset import hash_bins, map_bins, write, write_bin
from data.sources import digest, python_files, read_source
from data.tokenizer import convert_tokenizer, load_tokenizer, train_tokenizer

corpus = "pycode"     # pycode, codeparrot, languini, or own: fills the settings left empty below
name = ""             # folder under data_dir; the corpus's name if empty
data_dir = ""         # where datasets lie; this script's folder if empty
train_source = ""     # where training documents come from (see above)
val_source = ""       # validation documents; if empty, 5% of the training documents by hash
column = ""           # the text column of a datasets source
tokenizer = ""        # "train", or a tokenizer to convert
tokenizer_source = ""  # documents to train the tokenizer on; the training documents if empty
vocab_size = 0        # tokens of a trained tokenizer, the end-of-text token included
piece = -1            # > 0: cut documents into whole pieces of so many tokens; 0: end each with EOT

RECIPES = {
    "pycode": dict(tokenizer="train", vocab_size=4096, piece=0),
    "own": dict(column="text", tokenizer="train", vocab_size=4096, piece=0),
    "codeparrot": dict(
        train_source="huggingface-course/codeparrot-ds-train",
        val_source="huggingface-course/codeparrot-ds-valid", column="content",
        tokenizer="huggingface-course/code-search-net-tokenizer", piece=128),
    # Languini's books3 is no longer distributed, and its vocabulary is SentencePiece: PG-19 and our
    # BPE stand in.
    "languini": dict(
        train_source="emozilla/pg19", val_source="emozilla/pg19", column="text",
        tokenizer_source="Salesforce/wikitext:wikitext-103-raw-v1",
        tokenizer="train", vocab_size=16384, piece=0),
}
VAL_SHARE = 0.05  # of documents, by hash, where the corpus has no validation set
SMALLEST_VOCABULARY = 257  # 256 bytes and EOT
LARGEST_VOCABULARY = 2**16  # of uint16 tokens


# ---------------------------------------------------------------------------------- settings
def complete_settings():
    """Fill the settings from the command line and the recipe; exit with a line if they can't be."""
    global corpus, name
    given = configure(globals())
    if train_source and "corpus" not in given:
        corpus = "own"
    one_of(globals(), corpus=RECIPES)
    recipe = dict(RECIPES[corpus])
    if "train_source" in given:
        recipe.pop("val_source", None)  # own documents are not validated on the recipe's
    globals().update({key: value for key, value in recipe.items() if key not in given})
    if corpus == "own" and not (train_source and name):
        die("your own text needs --train_source=FOLDER and --name=NAME", 2)
    if corpus == "pycode" and {"train_source", "val_source", "column"} & given.keys():
        die("pycode has its own source: leave out --corpus to prepare your own text", 2)
    smallest = SMALLEST_VOCABULARY if tokenizer == "train" else 0  # a converted one isn't asked
    within(globals(), piece=(0, 2**31), vocab_size=(smallest, LARGEST_VOCABULARY))
    name = name or corpus
    if name != os.path.basename(name) or name[0] == ".":
        die(f"name must be a folder's name without slashes, and is {name!r}", 2)


def recipe_of_settings():
    """The settings that the files depend on, for meta.json."""
    keys = ("corpus", "train_source", "val_source", "column", "tokenizer", "tokenizer_source",
            "vocab_size", "piece")
    return {key: globals()[key] for key in keys}


# ---------------------------------------------------------------------------------- files
def is_prepared(folder, recipe):
    """Whether folder is there, made by this recipe. ValueError if it holds anything else."""
    if not folder.exists() or not any(folder.iterdir()):
        return False
    if not (folder / "meta.json").exists():
        raise ValueError(f"{folder} holds other files: choose another --name, or empty it yourself")
    try:
        old = json.loads((folder / "meta.json").read_text())["recipe"]
        changed = [f"{key}={old.get(key)!r}" for key in recipe if old.get(key) != recipe[key]]
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise ValueError(f"{folder}/meta.json is damaged: delete {folder} and run again") from e
    if changed:
        raise ValueError(f"{folder} exists, made with {', '.join(changed)}: delete it, or choose "
                         "another --name")
    return True


@contextmanager
def half_made(folder):
    """A hidden folder that becomes `folder` if all goes well; it vanishes on errors and signals."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    hidden = folder.parent / f".{folder.name}.{os.getpid()}"  # beside it: one step renames it

    def stop(number, frame):
        shutil.rmtree(hidden, ignore_errors=True)
        line = f"\nstopped by {signal.Signals(number).name}; nothing half-made is left\n"
        os.write(2, line.encode())
        os._exit(128 + number)  # an exception might get lost in a library's callback

    on_signals(stop)
    try:
        hidden.mkdir()
        yield hidden
        os.rename(hidden, folder)
    finally:
        shutil.rmtree(hidden, ignore_errors=True)


def remove_leftovers(folder):
    """Remove what runs that were killed have left of half-made `folder`s."""
    for path in folder.parent.iterdir():
        left = re.fullmatch(rf"\.{re.escape(folder.name)}\.(\d+)", path.name)
        if left and not is_alive(int(left[1])):
            shutil.rmtree(path, ignore_errors=True)


def is_alive(pid):
    """Whether a process other than this one has that id."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return pid != os.getpid()


def need_disk(folder, size):
    """ValueError unless folder's disk has size bytes free."""
    free = shutil.disk_usage(folder).free
    if free < size:
        raise ValueError(f"{folder} has {free / 1e9:.1f} GB free and this corpus may need "
                         f"{size / 1e9:.1f} GB: free some space, or set --data_dir")


# ---------------------------------------------------------------------------------- documents
def read_parts(root):
    """
    ({"train": documents, "val": documents}, how many files were left out for what).

    ValueError if one of them is empty, both are the same, or root has no place for their tokens.
    """
    if corpus == "pycode":
        documents, dropped = python_files()
    else:
        documents, dropped = read_source(train_source, column, "train", "train_source")
    dropped = Counter(dropped)
    sample = [len(text or "") for text in islice(iter(documents), 1000)]
    need_disk(root, len(documents) * sum(sample) / max(1, len(sample)))
    if val_source:
        val, more_dropped = read_source(val_source, column, "validation", "val_source")
        dropped.update(more_dropped)
        parts = {"train": documents, "val": val}
    else:
        is_val = [share_of(text) < VAL_SHARE for text in documents]
        parts = {"train": [text for text, val in zip(documents, is_val) if not val],
                 "val": [text for text, val in zip(documents, is_val) if val]}
    for part, texts in parts.items():
        if not len(texts):
            raise ValueError(f"{train_source or corpus}: no document for {part}; give more "
                             "documents, or a --val_source")
    train, val = parts.values()
    if len(train) == len(val) and (train[0], train[-1]) == (val[0], val[-1]):
        die(f"train_source and val_source are the same text, {val_source}: validating on training "
            "text says nothing", 2)
    return parts, dropped


def share_of(text):
    """A number in [0, 1) that depends on the text alone: 32 bits of its hash."""
    return int.from_bytes(digest(text or "")[-4:], "big") / 2**32


def make_tokenizer(documents):
    """The tokenizer's spec, as data/tokenizer.py has it, trained on documents or converted."""
    if tokenizer != "train":
        return convert_tokenizer(tokenizer)
    print(f"training a tokenizer of {vocab_size} tokens", flush=True)
    if tokenizer_source:
        documents, _ = read_source(tokenizer_source, "text", "train", "tokenizer_source")
    return train_tokenizer(documents, vocab_size)


def write_dataset(folder, recipe):
    """Make the dataset's four files in folder, an empty one. Returns what meta.json says."""
    parts, dropped = read_parts(folder.parent)
    spec = make_tokenizer(parts["train"])
    encoding = load_tokenizer(spec)
    if encoding.n_vocab > LARGEST_VOCABULARY:
        raise ValueError(f"a vocabulary of {encoding.n_vocab} does not fit into uint16 tokens "
                         "(65,536 at most)")
    write(folder / "tokenizer.json", [json.dumps(spec).encode()])
    meta = dict(name=name, recipe=recipe, vocab_size=encoding.n_vocab, piece=piece)
    for part, texts in parts.items():
        tokens, size = write_bin(folder / f"{part}.bin", texts, encoding, piece)
        meta |= {f"{part}_documents": len(texts), f"{part}_bytes": size, f"{part}_tokens": tokens}
    if dropped:
        meta["dropped_files"] = dropped
    meta["sha256"] = hash_bins(map_bins(folder))
    write(folder / "meta.json", [json.dumps(meta, indent=1).encode()])
    return meta


def main():
    complete_settings()
    root = Path(data_dir).expanduser() if data_dir else Path(__file__).resolve().parent
    folder, recipe = root / name, recipe_of_settings()
    if is_prepared(folder, recipe):
        print(f"{folder} is there already, nothing to do")
        return
    with half_made(folder) as hidden:
        meta = write_dataset(hidden, recipe)
    documents = meta["train_documents"] + meta["val_documents"]
    print(f"{folder}: {meta['train_tokens']:,} training and {meta['val_tokens']:,} validation "
          f"tokens from {documents:,} documents, vocabulary {meta['vocab_size']}, "
          f"sha256 {meta['sha256'][:16]}")


if __name__ == "__main__":
    try:
        main()
    except (OSError, ValueError) as e:
        die(f"can't prepare {name or corpus}: {e}")
