"""
The files of a private model: what pi_export.py writes and the parties read.

- public.json, for all parties: the configuration, the shape of every array, the units of the
  LayerNorms, the fraction bits of what is multiplied in pairs, the tokenizer, and a hash that
  binds them to one server.npz
- server.npz, for the server alone: the weights
- embedding.npz, for the client, if the embedding is public: "wte" (V, d) and "wpe" (T, d)

A file is written whole or not at all, a secret one with no permission for others. What is read is
checked before anything is computed or allocated from it; all that is wrong is a ValueError with a
sentence.
"""
import hashlib
import io
import json
import math
import os
import zipfile
from contextlib import suppress
from dataclasses import asdict, fields

import numpy as np

from model import GPTConfig

AGAIN = "make it again with python pi_export.py"
MOST = {"block_size": 2**14, "vocab_size": 2**22, "n_layer": 2**10, "n_embd": 2**15}  # or a mistake
PRODUCT = 2.0**26    # up to where the engine's fixed point holds a product, see nonlinear.py
EMBEDDING = 2.0**13  # and an embedding, two looked up as a 32-bit integer, of 2^-16: embed.py


# ----------------------------------------------------------------------------------------- writing
def write_whole(path, put, secret=False):
    """
    Have put(f) write a binary file under a temporary name and rename it: path is never half a file,
    and a failure leaves nothing. secret: the owner alone may read it. Raises OSError naming path.
    """
    temporary = path + ".tmp"
    permissions = 0o600 if secret else 0o666  # the latter less the umask

    def create(name, flags):
        return os.open(name, flags | os.O_EXCL, permissions)

    try:
        with suppress(FileNotFoundError):
            os.remove(temporary)  # of a run that was killed, and maybe readable to others
        with open(temporary, "wb", opener=create) as f:
            put(f)
        os.replace(temporary, path)
    except OSError as e:
        raise OSError(f"can't write {path}: {e.strerror or e}") from e
    finally:
        with suppress(FileNotFoundError):
            os.remove(temporary)


def save_arrays(f, arrays):
    """np.savez(f, **arrays), but that a full disk raises an OSError and nothing else."""
    with zipfile.ZipFile(f, "w") as archive:
        for name, a in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
                np.lib.format.write_array(entry, a, allow_pickle=False)


def write_files(folder, arrays, config, units, bits, tokenizer, embedding):
    """
    Write the two or three files. arrays: server.npz's; units, bits: see ranges.py; embedding:
    "private" or "public".
    """
    public = {
        "config": asdict(config),
        "shapes": {name: a.shape for name, a in arrays.items()},
        "layernorm_units": units,
        "bits": bits,
        "tokenizer": tokenizer,
        "embedding": "private",
    }
    os.makedirs(folder, exist_ok=True)
    write_whole(os.path.join(folder, "server.npz"), lambda f: save_arrays(f, arrays), secret=True)
    path = os.path.join(folder, "embedding.npz")
    if embedding == "public":
        data = io.BytesIO()
        save_arrays(data, {name: arrays[name] for name in ("wte", "wpe")})
        write_whole(path, lambda f: f.write(data.getvalue()))
        public["embedding"] = hashlib.sha256(data.getvalue()).hexdigest()
    else:
        with suppress(FileNotFoundError):
            os.remove(path)  # an earlier export's
    public["hash"] = fingerprint(public, arrays)
    write_whole(os.path.join(folder, "public.json"), lambda f: f.write(json.dumps(public).encode()))


def fingerprint(public, arrays):
    """
    A hash of the weights and of all that public.json says besides. The weights stay secret: who
    wants to try a guess by it must guess all of them.
    """
    rest = {key: value for key, value in public.items() if key != "hash"}
    h = hashlib.sha256(json.dumps(rest, sort_keys=True).encode())
    for name, a in sorted(arrays.items()):
        h.update(f"{name} {a.dtype} {a.shape}".encode())
        h.update(a.tobytes())
    return h.hexdigest()


# ----------------------------------------------------------------------------------------- reading
def load_public(path):
    """public.json's dict. ValueError if it isn't one, or asks for what no private run could do."""
    try:
        with open(path, "rb") as f:
            data = f.read()
    except OSError as e:
        raise ValueError(f"can't read {path}: {e.strerror}") from e
    try:
        public = json.loads(data)
        check_public(public)
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError) as e:
        raise ValueError(f"{path} is not a public.json ({type(e).__name__}: {e}): {AGAIN}") from e
    return public


def check_public(public):
    """Raise an error unless every key is there, of its type, in bounds, and goes with the rest."""
    config = public["config"]
    for field in fields(GPTConfig):
        value = config[field.name]
        kind = type(field.default)
        if type(value) is not kind and (kind, type(value)) != (float, int):
            raise ValueError(f"{field.name} is {value!r}")
        if field.name in MOST and value > MOST[field.name]:
            raise ValueError(f"{field.name} is {value}, more than {MOST[field.name]}")
    c = GPTConfig(**config)
    check_shapes(c, public["shapes"])
    units = public["layernorm_units"]
    if len(units) != 2 * c.n_layer + 1 or not all(map(is_power_of_two, units)):
        raise ValueError("layernorm_units are not 2 L + 1 powers of two")
    for name, pair in public["bits"].items():
        check_bits(c, public["shapes"], name, pair)
    tokenizer = public["tokenizer"]
    if tokenizer is not None and not {"pattern", "special", "ranks"} <= tokenizer.keys():
        raise ValueError("the tokenizer is not one of data/prepare.py")
    if public["embedding"] != "private":
        bytes.fromhex(public["embedding"])
    bytes.fromhex(public["hash"])


def check_bits(c, shapes, name, pair):
    """Raise ValueError unless these are fraction bits of a layer's product in pairs."""
    _, layer, step = name.split(".")
    is_step = step in ("scores", "divide") and int(layer) in range(c.n_layer)
    if not is_step and len(shapes[name]) != 2:
        raise ValueError(f"bits of {name}, which is no matrix")
    first, second = pair
    most = 27 if step == "scores" else 36  # or its steps to the clip don't fit into 32 bits
    whole = type(first) is type(second) is int
    if not whole or not 0 < first <= 18 or not 0 < second <= 18 or not 4 <= first + second <= most:
        raise ValueError(f"bits of {name} are {pair}")


def is_power_of_two(x):
    return type(x) is float and math.frexp(x)[0] == 0.5


def check_shapes(c, shapes):
    """Raise ValueError or KeyError unless `shapes` are those of the arrays of the GPTConfig c."""
    top, _ = possible_shapes(c)
    blocks = {}
    for name, shape in shapes.items():
        if name.startswith("blocks."):
            _, i, part = name.split(".")
            blocks.setdefault(i, {})[part] = shape
        else:
            check_shape(name, shape, top[name])
    layers = [i for i in range(c.n_layer) if str(i) in blocks]
    if len(layers) < len(blocks) or c.n_layer - 1 not in layers:
        raise ValueError(f"the arrays of {len(blocks)} layers where n_layer is {c.n_layer}")
    for before, i in zip([-1, *layers], layers):
        check_block(c, i, i - before, blocks[str(i)])
    if not {"wte", "wpe", "head"} <= shapes.keys():
        raise ValueError("the embedding or the head is missing")


def check_shape(name, shape, due):
    if shape != list(due):
        raise ValueError(f"{name} is {shape} where the configuration has {list(due)}")


def check_block(c, i, run, parts):
    """The same of layer i, which stands for `run` layers, those before it that have no arrays."""
    _, due = possible_shapes(c)
    plain = "v" in parts
    needed = {"v", "o"} if plain else {"o"}
    if c.activation != "none" and not plain:
        needed |= {"in", "up"}
    if i < c.uniform_layers:
        del due["qkv"], due["qk"], due["pattern"]
        due["o"] = run * c.n_embd, c.n_embd
    else:
        if i < c.n_layer - c.softmax_layers:
            needed |= {"pattern"} if plain else {"pattern", "value"}
        else:
            needed |= {"qk"} if plain else {"qkv"}
        if run > 1:
            raise ValueError(f"layer {i - 1} has no arrays")
    if not needed <= parts.keys():
        raise ValueError("a layer lacks arrays")
    for part, shape in parts.items():
        check_shape(f"blocks.{i}.{part}", shape, due[part])


def possible_shapes(c):
    """{name: shape} of all that pi_export.py and plain.py may export, at the top and in a block."""
    d, T, V, H = c.n_embd, c.block_size, c.vocab_size, c.n_head
    positions = 1 if c.temperature_per_head else T
    top = {"wte": (V, d), "wpe": (T, d), "head": (d, V), "head_b": (V,), "basis": (d, d)}
    top |= {"ln_f": (d,), "ln_f_b": (d,)}
    block = {name: (d, d) for name in ("v", "value", "o", "ffn", "w_ffn")}
    block |= {"qkv": (d, 3 * d), "qk": (d, 2 * d), "in": (d, 4 * d), "w_in": (d, 4 * d)}
    block |= {"up": (4 * d, d), "w_out": (4 * d, d)}
    block |= {name + "_b": (columns,) for name, (_, columns) in block.items()}
    block |= {"ln_1": (d,), "ln_1_b": (d,), "ln_2": (d,), "ln_2_b": (d,)}
    block |= {"beta": (), "inverse_alpha": (), "inverse_t": (H, positions, 1), "pattern": (H, T, T)}
    return top, block


def load_server(folder):
    """(public, weights) of a server's folder. ValueError if damaged or not of one export."""
    public = load_public(os.path.join(folder, "public.json"))
    path = os.path.join(folder, "server.npz")
    weights = load_weights(path)
    if fingerprint(public, weights) != public["hash"]:
        raise ValueError(f"{path} and public.json are not of one export, or were edited: {AGAIN}")
    check_weights(weights)
    return public, weights


def load_weights(path):
    """The arrays of a server.npz. ValueError if it is missing, damaged or something else."""
    try:
        with np.load(path, allow_pickle=False) as f:
            return dict(f)
    except Exception as e:  # a zip that breaks does so in many ways
        raise ValueError(f"{path} is not a whole server.npz ({type(e).__name__}): {AGAIN}") from e


def check_weights(arrays):
    """Raise ValueError if a weight is nothing that the engine's fixed point holds."""
    for name, a in arrays.items():
        limit = EMBEDDING if name in ("wte", "wpe") else PRODUCT
        largest = np.abs(a).max()
        if not largest < limit:  # NaN isn't
            raise ValueError(f"{name} has a {largest:.1e}, and the engine's fixed point holds less "
                             f"than {limit:.1e}: train with more weight decay or a lower rate")


def load_embedding(folder, public):
    """The client's {"wte": (V, d), "wpe": (T, d)}. ValueError if not what public.json names."""
    path = os.path.join(folder, "embedding.npz")
    try:
        with open(path, "rb") as f:
            data = f.read()
        if hashlib.sha256(data).hexdigest() != public["embedding"]:
            raise ValueError("another model's, or damaged")
        with np.load(io.BytesIO(data), allow_pickle=False) as f:
            return {name: f[name] for name in ("wte", "wpe")}
    except (OSError, ValueError) as e:
        raise ValueError(f"no {path} that belongs to public.json ({e}): "
                         "python pi_export.py --embedding=public makes both, copy both") from e
