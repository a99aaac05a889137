"""
Trained models to go on from, each with its tokenizer: checkpoints of train.py, the folders that
hf_export.py makes of them, and GPT-2.
"""
import json
import os
import re
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from data.tokenizer import convert_tokenizer, encode_batch, load_tokenizer
from distributed import load, shard_as
from model import GPT, GPTConfig, load_checkpoint

OWN = "entropy-guided-gpt"  # model_type in a config.json of GPTConfig's fields
SIZES = ("n_layer", "n_head", "n_embd", "vocab_size")  # what no flag changes in a trained model


def is_checkpoint(name):
    """Whether `name` is a checkpoint's, and not a folder, a .safetensors file or a hub id."""
    file = os.path.isfile(os.path.expanduser(name))
    return name.endswith(".pt") or file and not name.endswith(".safetensors")


def model_type(folder):
    """What config.json in a folder says of its model, "gpt2" where there is none or it can't."""
    try:
        text = (Path(folder).expanduser() / "config.json").read_text(encoding="utf-8")
        return json.loads(text).get("model_type", "gpt2")
    except (OSError, ValueError, AttributeError):
        return "gpt2"


def read_pretrained(name):
    """
    What load_checkpoint gives of a checkpoint; of a folder or GPT-2 "model" and "model_config".
    Raises what load_checkpoint, read_own and read_gpt2 raise.
    """
    name = os.path.expanduser(name)
    if is_checkpoint(name):
        return load_checkpoint(name)
    if model_type(name) == OWN:
        return read_own(name)
    model = GPT.from_gpt2(name)
    return {"model": model.state_dict(), "model_config": asdict(model.config)}


def read_own(folder):
    """"model" and "model_config" of a folder in our own layout. ValueError if it is damaged."""
    from safetensors.torch import load_file
    try:
        config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
        del config["model_type"]
        weights = load_file(os.path.join(folder, "model.safetensors"))
        with torch.device("meta"):  # names and shapes are compared, and nothing is computed
            GPT(GPTConfig(**config)).load_state_dict(weights, assign=True)
    except Exception as e:  # a file that is missing or damaged, a key or shape that is another
        raise ValueError(f"{folder} holds no whole model of hf_export.py's "
                         f"({type(e).__name__}: {e})") from e
    return {"model": weights, "model_config": config}


def open_pretrained(name, tokenizer=""):
    """
    (model in eval mode, tiktoken encoding) of a checkpoint or GPT-2. tokenizer: of GPT-2, where
    there is no tokenizer.json beside its weights. Raises OSError or ValueError, a sentence.
    """
    source = read_pretrained(name)
    return GPT.from_checkpoint(source), encoding_of(name, source, tokenizer)


def encoding_of(name, source, tokenizer=""):
    """The encoding of `name`, of which read_pretrained gave `source`: see open_pretrained."""
    if not is_checkpoint(name):
        return load_tokenizer(convert_tokenizer(tokenizer or beside(name) or "gpt2"))
    try:
        return load_tokenizer(source["tokenizer"])
    except (KeyError, TypeError, AttributeError, OSError, ValueError) as e:
        raise ValueError(f"{name} has no tokenizer of train.py's ({e!r})") from e


def read_tokens(path, encoding, vocab_size):
    """
    (tokens of a text file, the bytes that all but the first stand for). Raises OSError if it can't
    be read, ValueError if it is no UTF-8, shorter than two tokens, or beyond the vocabulary.
    """
    if not os.path.isfile(os.path.expanduser(path)):
        raise FileNotFoundError(f"no text file {path!r}: name one by --text=FILE")
    try:
        content = Path(path).expanduser().read_bytes().decode()  # with its line ends as they are
    except UnicodeDecodeError as e:
        raise ValueError(f"{path} is no text in UTF-8: {e}") from e
    [ids] = encode_batch(encoding, [content], 1)
    if len(ids) < 2:
        raise ValueError(f"{path} has {len(ids)} tokens: two are needed to predict one")
    if max(ids) >= vocab_size:
        raise ValueError(f"{path} has token {max(ids)}, outside the model's {vocab_size}")
    return np.array(ids), len(content.encode()) - len(encoding.decode_single_token_bytes(ids[0]))


def beside(name):
    """The tokenizer.json in a folder of GPT-2's, or ""."""
    path = os.path.join(os.path.expanduser(name), "tokenizer.json")
    return path if os.path.exists(path) else ""


def check_tokenizer(name, source, spec, vocab_size):
    """
    Raise ValueError unless the dataset's tokenizer, its `spec` and vocab_size, is the one of the
    trained model `name` that read_pretrained gave as `source`, as far as that can be told.
    """
    theirs = source.get("tokenizer")
    if not is_checkpoint(name) and beside(name):
        theirs = convert_tokenizer(beside(name))
    same = vocab_size == source["model_config"]["vocab_size"]
    if theirs:
        same = isinstance(theirs, dict) and theirs.get("ranks") == spec["ranks"]
    if not same:
        raise ValueError(f"the dataset's tokens are not those of {name}: prepare it by "
                         "data/prepare.py with that model's tokenizer, --tokenizer=gpt2 for GPT-2")


def restore(checkpoint, model, optimizer, regularizer, scaler):
    """
    Model, optimizer, regularizer (None: none), float16's scale of the loss and random numbers as
    the checkpoint has them. Returns the steps done. Raises whatever a damaged file makes torch
    raise.
    """
    done = checkpoint["step"]
    if type(done) is not int or not 0 <= done < 2**31:
        raise ValueError(f"step {done!r}")
    load(model, checkpoint["model"])
    if regularizer:
        load(regularizer, checkpoint["regularizer"])
    torch.set_rng_state(checkpoint["rng"])
    if checkpoint.get("scaler"):  # empty but in float16
        scaler.load_state_dict(checkpoint["scaler"])
    options = optimizer.state_dict()["param_groups"]  # the command line may have changed some
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state = {i: {key: shard_as(tensor, parameters[i]) for key, tensor in kept.items()}
             for i, kept in checkpoint["optimizer"]["state"].items()}
    optimizer.load_state_dict({"state": state, "param_groups": options})
    for p in parameters if done else []:
        kept = optimizer.state[p]
        shapes = kept["step"].shape, kept["exp_avg"].shape, kept["exp_avg_sq"].shape
        if shapes != ((), p.shape, p.shape):
            raise ValueError(f"the optimizer's state is of shapes {shapes}")
    return done


def start_from(source, model, regularizer):
    """
    Give `model` the weights of what read_pretrained gave, as far as its flags have a place for
    them, and a regularizer its thresholds: positions beyond block_size are cut off, and a fused FFN
    starts from W_in W_out. Returns a phrase that says what was left out and what is new. Raises
    ValueError if the two differ in size, or if a flag asks for a matrix that the source lacks.
    """
    c, was = model.config, GPTConfig(**source["model_config"])
    for key in SIZES:
        if getattr(c, key) != getattr(was, key):
            raise ValueError(f"it has {key}={getattr(was, key)}, which can't be changed to "
                             f"{getattr(c, key)}")
    if c.block_size > was.block_size:
        raise ValueError(f"it has block_size={was.block_size}, which can be cropped, and not "
                         f"stretched to {c.block_size}")
    theirs, ours = dict(source["model"]), model.state_dict()
    for name in [name for name in theirs if name.endswith(("log_temperature", "by_distance"))]:
        theirs[name] = theirs[name][:, :c.block_size]
    theirs["wpe.weight"] = theirs["wpe.weight"][:c.block_size]
    for i in range(c.n_layer):
        if c.fuse_ffn and not was.fuse_ffn:
            fuse(theirs, f"blocks.{i}.ffn.")
    for name in ours.keys() & theirs.keys():
        if ours[name].shape != theirs[name].shape:
            raise ValueError(f"its {name} is of shape {tuple(theirs[name].shape)}, and these flags "
                             f"have a place for {tuple(ours[name].shape)}")
    new, left_out = ours.keys() - theirs.keys(), theirs.keys() - ours.keys()
    for name in sorted(new):
        if name.endswith((".weight", ".original", ".original1")) and ".ln_" not in f".{name}":
            raise ValueError(f"it has no {name}: flags can take a matrix away from a trained "
                             "model, or its nonlinearities, and can't add a matrix")
    load(model, {name: theirs[name] for name in ours.keys() & theirs.keys()}, strict=False)
    if regularizer and source.get("regularizer"):
        thresholds = source["regularizer"]["threshold"]  # of the last layers, those with softmax
        load(regularizer, {"threshold": thresholds[-c.softmax_layers:]})
    told = [f"{word} {parts(names)}" for word, names in (("without", left_out), ("new", new))
            if names]
    return "; ".join([f"{len(ours) - len(new)} tensors", *told])


def fuse(weights, ffn):
    """Replace in a state dict an FFN's two matrices by their product, and its biases likewise."""
    if ffn + "w_in.weight" not in weights:
        return  # under weight or spectral norm
    w_out = weights.pop(ffn + "w_out.weight")
    weights[ffn + "w_ffn.weight"] = w_out @ weights.pop(ffn + "w_in.weight")
    if ffn + "w_in.bias" in weights:
        bias = w_out @ weights.pop(ffn + "w_in.bias") + weights.pop(ffn + "w_out.bias")
        weights[ffn + "w_ffn.bias"] = bias


def parts(names):
    """Names of a state dict, each once for all blocks."""
    return ", ".join(sorted({re.sub(r"^blocks\.\d+\.", "", name) for name in names}))
