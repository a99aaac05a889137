"""
Tokenizers for prepare.py: trained, or converted from elsewhere, and used through tiktoken.

A tokenizer is kept as a spec, which is what tokenizer.json, a checkpoint and public.json hold:
{"pattern": the regular expression that splits a text, "ranks": {base64 of a token: its id},
"special": {text: id}}.
"""
import base64
import json
from itertools import chain, islice
from pathlib import Path

import tiktoken

EOT = "<|endoftext|>"
BPE_SAMPLE = 32e6  # characters that a tokenizer is trained on: more of them change few merges
LONGEST_SPACE = 50_000  # characters; the Rust libraries panic at about a million
# The split of Hugging Face's ByteLevel:
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def load_tokenizer(spec):
    """
    A tiktoken.Encoding from what tokenizer.json holds: a path to it, or its dict.

    Raises OSError if it can't be read, ValueError if it is no whole tokenizer.
    """
    if not isinstance(spec, dict):
        spec = json.loads(Path(spec).read_text(encoding="utf-8"))
    try:
        ranks = {base64.b64decode(token): rank for token, rank in spec["ranks"].items()}
        pattern, special = spec["pattern"], dict(spec["special"])
        check(ranks, special)
        return tiktoken.Encoding("corpus", pat_str=pattern, mergeable_ranks=ranks,
                                 special_tokens=special)
    except (KeyError, TypeError, AttributeError) as e:
        raise ValueError(f"no whole tokenizer ({type(e).__name__}: {e})") from e


def check(ranks, special):
    """ValueError unless each token has an id of its own and each byte is one: tiktoken panics."""
    ids = [*ranks.values(), *special.values()]
    if not all(type(i) is int and 0 <= i < 2**32 for i in ids) or len(set(ids)) != len(ids):
        raise ValueError("a tokenizer whose token ids are no different whole numbers from 0 on")
    lacking = [b for b in range(256) if bytes([b]) not in ranks]
    if lacking:
        raise ValueError(f"a tokenizer that lacks {len(lacking)} of the 256 bytes, "
                         f"{bytes(lacking[:1])} among them, so that it can't write every text")


def tokenizer_spec(pattern, ranks, special):
    encoded = {base64.b64encode(token).decode(): rank for token, rank in ranks.items()}
    return {"pattern": pattern, "special": special, "ranks": encoded}


def parts(text):
    """
    The text in parts that the Rust libraries bear: they panic on a million spaces in a row.

    Only white space of LONGEST_SPACE characters or more is cut, so that the tokens of ordinary
    text are what they are without this.
    """
    blocks = range(0, len(text) - LONGEST_SPACE + 1, LONGEST_SPACE)
    blank = [i for i in blocks if text[i:i + LONGEST_SPACE].isspace()]
    cuts = sorted({0, len(text), *blank, *(i + LONGEST_SPACE for i in blank)})
    return [text[a:b] for a, b in zip(cuts, cuts[1:])]


def encode_batch(encoding, texts, threads):
    """The token ids of each text."""
    split = [parts(text) for text in texts]
    ids = iter(encoding.encode_ordinary_batch(list(chain(*split)), num_threads=threads))
    return [list(chain(*islice(ids, len(some)))) for some in split]


def train_tokenizer(documents, size):
    """The spec of byte-level BPE of size - 1 tokens and EOT, trained on BPE_SAMPLE characters."""
    import rustbpe

    def sample():
        seen = 0
        for text in documents:
            yield from parts(text or "")
            seen += len(text or "")
            if seen > BPE_SAMPLE:
                return

    bpe = rustbpe.Tokenizer()
    bpe.train_from_iterator(sample(), size - 1)
    ranks = {bytes(token): rank for token, rank in bpe.get_mergeable_ranks()}
    return tokenizer_spec(bpe.get_pattern(), ranks, {EOT: len(ranks)})


def convert_tokenizer(source):
    """
    The spec of a tiktoken encoding, by its name, of another dataset here, by its folder, or of a
    Hugging Face byte-level tokenizer.json: a file, a folder or a hub id. ValueError if tiktoken
    can't stand in for it.
    """
    if source in tiktoken.list_encoding_names():
        try:
            encoding = tiktoken.get_encoding(source)
        except Exception as e:
            raise ValueError(f"tiktoken could not download its encoding {source!r} "
                             f"({type(e).__name__}): train one with --tokenizer=train, or pass a "
                             "tokenizer.json") from e
        ranks, special = encoding._mergeable_ranks, encoding._special_tokens
        return tokenizer_spec(encoding._pat_str, ranks, special)
    path = Path(source).expanduser()
    path = path / "tokenizer.json" if path.is_dir() else path
    if not path.exists():
        path = hub_tokenizer(source)
    try:
        spec = json.loads(path.read_text(encoding="utf-8"))
        if "ranks" not in spec:  # so it isn't one that write_dataset() left
            spec = convert_byte_level(spec)
        load_tokenizer(spec)
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise ValueError(f"{path} is not a whole byte-level BPE tokenizer.json "
                         f"({type(e).__name__}: {e})") from e
    return spec


def hub_tokenizer(source):
    from huggingface_hub import hf_hub_download
    try:
        return Path(hf_hub_download(source, "tokenizer.json"))
    except Exception as e:
        raise ValueError(f"no file {source}, and the hub did not give {source}'s tokenizer.json "
                         f"({type(e).__name__}): download it elsewhere and pass "
                         "--tokenizer=PATH") from e


def byte_characters():
    """
    {byte: the character that Hugging Face's ByteLevel writes it as}: itself if that is printable,
    else the next one from 256 on.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}


def pattern_of(split):
    """The regular expression of a byte-level pre_tokenizer. ValueError if it is another kind."""
    steps = split["pretokenizers"] if split.get("type") == "Sequence" else [split]
    last = steps[-1]
    if last.get("type") == "ByteLevel" and not last.get("add_prefix_space"):
        if len(steps) == 1 and last.get("use_regex", True):
            return GPT2_PATTERN
        first = steps[0]
        isolated = first.get("behavior") == "Isolated" and not first.get("invert")
        if len(steps) == 2 and not last.get("use_regex", True) and isolated:
            return first["pattern"]["Regex"]
    raise ValueError("not a byte-level BPE tokenizer without prefix space, the only kind that "
                     "tiktoken can stand in for")


def convert_byte_level(theirs):
    """The spec of a Hugging Face tokenizer.json, read. ValueError if it is of another kind."""
    model = theirs.get("model", {})
    pattern = pattern_of(theirs.get("pre_tokenizer") or {})
    if model.get("type") != "BPE":
        raise ValueError(f"its model is {model.get('type')}, and tiktoken's are BPE")
    byte = {character: b for b, character in byte_characters().items()}
    special = {token["content"]: token["id"] for token in theirs.get("added_tokens", [])}
    vocab = model["vocab"]
    ranks = {bytes(byte[c] for c in t): i for t, i in vocab.items() if t not in special}
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    order = [vocab["".join(merge)] for merge in merges]
    if order != sorted(order):  # tiktoken merges in the order of the ids
        raise ValueError("its token ids are not in the order of its merges, so that tiktoken would "
                         "tokenize differently")
    if EOT not in special:
        raise ValueError(f"it has no {EOT} token")
    return tokenizer_spec(pattern, ranks, special)


def byte_level(spec):
    """
    A spec as what Hugging Face's tokenizer.json holds: convert_byte_level() the other way round.

    tiktoken merges any two neighbours that make a token, the lowest id first, and a tokenizer.json
    lists its merges: so each way of splitting a token into two is one, in the order of the ids.
    """
    ranks = {base64.b64decode(token): rank for token, rank in spec["ranks"].items()}
    character = byte_characters()

    def written(token):
        return "".join(character[b] for b in token)

    merges = []
    for token in sorted(ranks, key=ranks.get):
        splits = [(token[:i], token[i:]) for i in range(1, len(token))]
        merges += [[written(a), written(b)] for a, b in splits if a in ranks and b in ranks]
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
             "special": True}
    coding = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
              "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": spec["pattern"]}, "behavior": "Isolated",
             "invert": False}
    return {
        "version": "1.0", "truncation": None, "padding": None, "normalizer": None,
        "added_tokens": [{"id": i, "content": text} | plain for text, i in spec["special"].items()],
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, coding]},
        "post_processor": None, "decoder": coding,
        "model": {"type": "BPE", "dropout": None, "unk_token": None,
                  "continuing_subword_prefix": None, "end_of_word_suffix": None, "fuse_unk": False,
                  "byte_fallback": False, "ignore_merges": True,  # a word that is a token stays one
                  "vocab": {written(token): rank for token, rank in ranks.items()},
                  "merges": merges}}
