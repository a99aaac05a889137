"""The files of data/<name>/: train.bin and val.bin, uint16 tokens, tokenizer.json, meta.json."""
import hashlib
import json
import os
from itertools import islice
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data.tokenizer import EOT, encode_batch, load_tokenizer

BATCH = 512  # documents tokenized at a time
ALWAYS_HASHED = 1e9  # bytes of bins that are hashed at every start: about two seconds


def write(path, blocks):
    """Write blocks of bytes to path. OSError that names path, as that of a full disk does not."""
    try:
        with open(path, "wb") as f:
            for block in blocks:
                f.write(block)
    except OSError as e:
        if e.filename:
            raise
        raise OSError(f"can't write {path}: {e.strerror or e}") from e


def write_bin(path, documents, encoding, piece):
    """
    Tokenize documents, a sequence of str, into uint16 tokens at path, in parallel and in order.

    piece > 0: cut each to whole pieces of so many tokens; 0: end each with EOT. Returns (tokens,
    utf-8 bytes). OSError if path can't be written, ValueError if there is not one token.
    """
    tokens = size = 0
    end = [encoding.encode_single_token(EOT)]
    bar = tqdm(total=len(documents), desc=f"tokenize {path.stem}", unit="doc", mininterval=1)

    def blocks():
        nonlocal tokens, size
        todo = iter(documents)
        while batch := list(islice(todo, BATCH)):
            texts = [text for text in batch if text is not None]
            for ids in encode_batch(encoding, texts, os.cpu_count()):
                ids = ids[:len(ids) // piece * piece] if piece else ids + end
                yield np.array(ids, dtype=np.uint16).tobytes()
                tokens += len(ids)
            size += sum(len(text.encode()) for text in texts)
            bar.update(len(batch))

    with bar:
        write(path, blocks())
    if not tokens:
        why = f", as no document has {piece}: set a smaller --piece" if piece else ""
        raise ValueError(f"{path.stem}: not one token{why}")
    return tokens, size


def map_bins(folder):
    """[train tokens, val tokens] as memory maps."""
    bins = [os.path.join(folder, f"{part}.bin") for part in ("train", "val")]
    return [np.memmap(path, dtype=np.uint16, mode="r") for path in bins]


def hash_bins(bins):
    """sha256 of train.bin and val.bin, one after the other."""
    sha = hashlib.sha256()
    for tokens in bins:
        sha.update(tokens)
    return sha.hexdigest()


def check_bins(folder, meta, bins):
    """
    ValueError unless the bins are those that meta.json tells of, by size and sha256.

    Bins above ALWAYS_HASHED are hashed only if one of them is newer than meta.json.
    """
    sizes, told = [len(tokens) for tokens in bins], [meta["train_tokens"], meta["val_tokens"]]
    if sizes != told:
        raise ValueError(f"meta.json tells of {told} tokens, train.bin and val.bin hold {sizes}")
    last, *times = [os.stat(os.path.join(folder, name)).st_mtime
                    for name in ("meta.json", "train.bin", "val.bin")]
    if sum(tokens.nbytes for tokens in bins) > ALWAYS_HASHED and max(times) <= last:
        return
    found = hash_bins(bins)
    if found != meta["sha256"]:
        raise ValueError("train.bin or val.bin is not as it was prepared: meta.json tells of "
                         f"sha256 {meta['sha256'][:16]}, they have {found[:16]}")


def how_to_prepare(data_dir, dataset, block_size):
    """The command that makes a dataset that isn't there."""
    where = "" if data_dir == "data" else f" --data_dir={data_dir}"
    corpus = dataset.split("_")[0]
    if dataset == "pycode":
        return f"run python data/prepare.py{where}"
    if dataset.startswith("pycode"):
        return f"run python data/prepare.py --name={dataset} --vocab_size=TOKENS{where}"
    if corpus not in ("codeparrot", "languini"):
        return ("prepare your own text with "
                f"python data/prepare.py --name={dataset} --train_source=FOLDER{where}")
    name = "" if dataset == corpus else f" --name={dataset}"
    if dataset.startswith("codeparrot_"):
        name = f" --piece={block_size}{name}"
    return (f"run python data/prepare.py --corpus={corpus}{name}{where} on a machine that reaches "
            f"the Hugging Face hub, and copy {data_dir}/{dataset} here if that is another one")


def open_dataset(data_dir, dataset, block_size):
    """
    What prepare.py wrote into data_dir/dataset: (train tokens, val tokens, meta.json,
    tokenizer.json, its tokenizer), the tokens as memory maps.

    Raises OSError if it is missing or can't be read, ValueError if it is damaged, changed since, or
    of no use to a model of block_size: a sentence that says which and what to do.
    """
    folder = os.path.join(data_dir, dataset)
    try:
        meta, spec = (json.loads(Path(folder, name).read_text(encoding="utf-8"))
                      for name in ("meta.json", "tokenizer.json"))
        bins = map_bins(folder)
        check_bins(folder, meta, bins)
        encoding = load_tokenizer(spec)
        piece, vocab_size = meta["piece"], meta["vocab_size"]
        if not (type(piece) is int and piece >= 0 and vocab_size == encoding.n_vocab):
            raise ValueError(f"meta.json tells of piece {piece!r} and vocab_size {vocab_size!r}")
    except OSError as e:
        if isinstance(e, FileNotFoundError) and os.path.basename(e.filename) == "meta.json":
            how = how_to_prepare(data_dir, dataset, block_size)
            raise FileNotFoundError(f"no dataset in {folder}: {how}") from e
        raise OSError(f"can't read the dataset in {folder}: {e}") from e
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise ValueError(f"the dataset in {folder} is damaged ({type(e).__name__}: {e}): delete "
                         "that folder and prepare it again") from e
    if piece not in (0, block_size):
        raise ValueError(f"{folder} is cut into pieces of {piece} tokens and block_size is "
                         f"{block_size}: prepare it with --piece={block_size}")
    shortest = min(len(tokens) for tokens in bins)
    least = block_size if piece else block_size + 1  # a piece has no next token
    if shortest < least:
        raise ValueError(f"{folder} has a part of only {shortest} tokens, and one window takes "
                         f"{least}: prepare more text")
    return *bins, meta, spec, encoding
