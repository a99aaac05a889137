"""
OpenAI's GPT-2, as Hugging Face's files hold it, read as the flags and the weights of model.py.

    from model import GPT
    model = GPT.from_gpt2("gpt2-medium")  # a hub id, a folder, or a .safetensors file

The config.json beside the weights is obeyed, or refused where this GPT can't do what it asks for: a
model that gives other logits than the original's is worse than none.
"""
import json
import math
import os
from glob import glob

import torch

# config.json's activation_function, as flags of GPTConfig
ACTIVATION_FLAGS = {
    "gelu_new": {"gelu_tanh": True},
    "gelu_pytorch_tanh": {"gelu_tanh": True},
    "gelu": {},
    "relu": {"use_gelu": False, "use_relu": True},
    "linear": {"use_gelu": False},
}
WHOLE = ("wte.weight", "wpe.weight", "ln_f.weight", "ln_f.bias")  # named alike there and here
# A block's parts, there and here; but for its attn.c_attn, which is attn.qk and attn.v here
PARTS = {"ln_1": "ln_1", "attn.c_proj": "attn.o", "ln_2": "ln_2", "mlp.c_fc": "ffn.w_in",
         "mlp.c_proj": "ffn.w_out"}
BUFFERS = (".attn.bias", ".attn.masked_bias")  # older files hold the causal mask as well


def read_gpt2(path):
    """
    (keyword arguments of GPTConfig, state dict of GPT in float32) of a .safetensors file, a folder
    with a model.safetensors or one in shards, or a hub id. Raises FileNotFoundError if there is no
    such file and the hub cannot be reached, ValueError if it is damaged, no GPT-2, or one that this
    GPT can't be.
    """
    if os.path.isdir(path):
        if not glob(os.path.join(path, "*.safetensors*")):
            raise FileNotFoundError(f"the folder {path} has no model.safetensors: name one that "
                                    "has, or a checkpoint, as out/ckpt.pt is")
        path = os.path.join(path, "model.safetensors")
    elif not path.endswith(".safetensors"):
        path = download(path)
    beside, settings = os.path.join(os.path.dirname(path), "config.json"), {}
    try:
        if os.path.exists(beside):
            with open(beside, encoding="utf-8") as file:
                settings = json.load(file)
        tensors = read_tensors(path)
        flags = config_flags(tensors, settings)
        return flags, state_dict(tensors, flags, settings)
    except FileNotFoundError:
        raise
    except Exception as e:  # a missing key, a wrong shape, a damaged file: all one to the user
        reason = e if type(e) is ValueError else f"{type(e).__name__}: {e}"
        raise ValueError(f"{path} does not hold a GPT-2 that this GPT can be: {reason}") from e


def read_tensors(path):
    """{name: float32 tensor} of a .safetensors file, or of the shards that stand for it."""
    from safetensors.torch import load_file

    paths, index = [path], path + ".index.json"
    if not os.path.exists(path) and os.path.exists(index):
        with open(index, encoding="utf-8") as file:
            shards = sorted(set(json.load(file)["weight_map"].values()))
        paths = [os.path.join(os.path.dirname(path), os.path.basename(shard)) for shard in shards]
    tensors = {}
    for path in paths:
        tensors |= load_file(path)
    return {name.removeprefix("transformer."): t.float() for name, t in tensors.items()}


def download(hub_id):
    """Local path of a hub model's weights, its config.json beside them, or FileNotFoundError."""
    from huggingface_hub import hf_hub_download
    try:
        hf_hub_download(hub_id, "config.json")
        return hf_hub_download(hub_id, "model.safetensors")
    except Exception as e:  # no such model, no network, no permission
        raise FileNotFoundError(
            f"no file or folder {hub_id!r}, and the Hugging Face hub did not give it "
            f"({type(e).__name__}): download model.safetensors and config.json of {hub_id} "
            "yourself and pass their folder") from e


def config_flags(tensors, settings):
    """GPTConfig's arguments. `settings`: what config.json holds. Raises ValueError if none fit."""
    V, d = tensors["wte.weight"].shape
    T = len(tensors["wpe.weight"])
    L = 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("h."))
    possible = {
        "model_type": ["gpt2"], "vocab_size": [V], "n_positions": [T],
        "n_layer": [L], "n_embd": [d], "n_inner": [None, 4 * d],
        "activation_function": list(ACTIVATION_FLAGS), "layer_norm_epsilon": [1e-5],
        "add_cross_attention": [False], "tie_word_embeddings": [True],
    }
    for key, values in possible.items():
        if settings.get(key, values[0]) not in values:
            allowed = " or ".join(map(repr, values))
            raise ValueError(f"its {key} is {settings[key]!r}, and can only be {allowed} here")
    activation = ACTIVATION_FLAGS[settings.get("activation_function", "gelu_new")]
    heads = settings.get("n_head", d // 64)  # of 64 in every GPT-2 that OpenAI released
    sizes = dict(block_size=T, vocab_size=V, n_layer=L, n_head=heads, n_embd=d)
    return sizes | activation | {"bias": True}


def state_dict(tensors, flags, settings):
    """
    The tensors under our names. Theirs are (in, out) matrices with q, k and v in one, ours are
    (out, in). A scale of the logits that config.json asks for goes into q.
    """
    d, d_k = flags["n_embd"], flags["n_embd"] // flags["n_head"]
    theirs = {name: t for name, t in tensors.items() if not name.endswith(BUFFERS)}
    ours = {name: theirs.pop(name) for name in WHOLE}
    if not torch.equal(theirs.pop("lm_head.weight", ours["wte.weight"]), ours["wte.weight"]):
        raise ValueError("its output matrix is not its embedding, and this GPT ties the two")
    for i in range(flags["n_layer"]):
        scale = 1.0 if settings.get("scale_attn_weights", True) else math.sqrt(d_k)
        if settings.get("scale_attn_by_inverse_layer_idx", False):
            scale /= i + 1
        for kind in ("weight", "bias"):
            def take(name):
                return theirs.pop(f"h.{i}.{name}.{kind}").t()  # t() leaves a vector as it is

            q, k, v = take("attn.c_attn").split(d)
            block = {our: take(their) for their, our in PARTS.items()}
            block |= {"attn.qk": torch.cat((scale * q, k)), "attn.v": v}
            ours |= {f"blocks.{i}.{name}.{kind}": tensor for name, tensor in block.items()}
    if theirs:
        raise ValueError(f"this GPT has no place for {', '.join(sorted(theirs)[:3])}")
    return ours
