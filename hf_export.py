"""
A checkpoint as a folder of safetensors, config.json and tokenizer, in float32.

    python hf_export.py --ckpt=out/ckpt.pt --out=out/gpt2

    from transformers import AutoTokenizer, GPT2LMHeadModel
    model = GPT2LMHeadModel.from_pretrained("out/gpt2")
    tokenizer = AutoTokenizer.from_pretrained("out/gpt2")

SM+LN+G, SM+LN+R and SM+LN become Hugging Face's GPT-2. The other architectures have parts that
GPT-2 has no place for: their folder has our own tensors and settings, which every script here
takes as a checkpoint, and transformers reads the tokenizer alone.
"""
from configurator import configure, die, end_on_signals

if __name__ == "__main__":
    end_on_signals()

import json  # noqa: E402
import os  # noqa: E402
from dataclasses import asdict  # noqa: E402

import torch  # noqa: E402
from safetensors.torch import save  # noqa: E402

from data.tokenizer import EOT, byte_level  # noqa: E402
from draw import write_whole  # noqa: E402
from gpt2 import PARTS, WHOLE  # noqa: E402
from model import GPT, GPTConfig, load_checkpoint  # noqa: E402
from pretrained import OWN  # noqa: E402

ckpt = "out/ckpt.pt"  # a checkpoint of train.py
out = "out/gpt2"  # the folder

ACTIVATION = {"gelu": "gelu", "gelu_tanh": "gelu_new", "relu": "relu", "none": "linear"}
# The fields of GPTConfig that GPT-2 can have otherwise than by default, or that say nothing then
FREE = {"block_size", "vocab_size", "n_layer", "n_head", "n_embd", "bias", "use_gelu", "use_relu",
        "gelu_tanh", "temperature_init"}


def lacking(c):
    """The parts of a GPTConfig that GPT-2 has no place for, in words; "" if it has for all."""
    default = GPTConfig()
    others = [f"{key}={value}" for key, value in vars(c).items()
              if key not in FREE and value != getattr(default, key)]
    if c.activation not in ACTIVATION:
        others.append(f"the activation {c.activation}")
    return ", ".join(others)


def gpt2_settings(c):
    """config.json of a GPTConfig that GPT-2 has a place for."""
    return {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "vocab_size": c.vocab_size,
            "n_positions": c.block_size, "n_embd": c.n_embd, "n_layer": c.n_layer,
            "n_head": c.n_head, "activation_function": ACTIVATION[c.activation],
            "layer_norm_epsilon": 1e-5, "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0,
            "tie_word_embeddings": True, "bos_token_id": None, "eos_token_id": None}


def gpt2_tensors(model):
    """
    The model's tensors under GPT-2's names: matrices (in, out) with q, k and v in one, and a bias
    of zeros where the model has none.
    """
    ours = model.state_dict()
    theirs = {name: ours[name] for name in WHOLE}
    for i in range(model.config.n_layer):
        for kind in ("weight", "bias"):
            def take(name):
                weight = ours[f"blocks.{i}.{name}.weight"]
                zeros = weight.new_zeros(len(weight))
                return ours.get(f"blocks.{i}.{name}.{kind}", zeros).t()

            block = {their: take(our) for their, our in PARTS.items()}
            block["attn.c_attn"] = torch.cat((take("attn.qk"), take("attn.v")), -1)
            theirs |= {f"h.{i}.{name}.{kind}": tensor for name, tensor in block.items()}
    return {f"transformer.{name}": t.float().contiguous() for name, t in theirs.items()}


def write_json(path, content):
    write_whole(path, json.dumps(content, indent=1).encode())


def export(model, folder, tokenizer=None):
    """
    Write config.json and model.safetensors, and with a tokenizer's spec tokenizer.json and
    tokenizer_config.json. Returns what has been written, a phrase. Raises OSError if it can't.
    """
    c = model.config
    os.makedirs(folder, exist_ok=True)
    if lacking(c):
        settings, tensors = {"model_type": OWN} | asdict(c), model.state_dict()
        tensors = {name: tensor.float().contiguous() for name, tensor in tensors.items()}
        told = f"{c.name}, in this repository's own layout: GPT-2 has no place for {lacking(c)}"
    else:
        settings, tensors = gpt2_settings(c), gpt2_tensors(model)
        told = f"{c.name}, as Hugging Face's GPT-2"
    weights = save(tensors, metadata={"format": "pt"})
    write_whole(os.path.join(folder, "model.safetensors"), weights)
    if tokenizer:
        write_json(os.path.join(folder, "tokenizer.json"), byte_level(tokenizer))
        write_json(os.path.join(folder, "tokenizer_config.json"),
                   {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": EOT,
                    "model_max_length": c.block_size, "clean_up_tokenization_spaces": False})
    write_json(os.path.join(folder, "config.json"), settings)  # the last: it says all is there
    return told


def main():
    configure(globals())
    folder = os.path.expanduser(out)
    if os.path.exists(folder) and not os.path.isdir(folder):
        die(f"out must be a folder, and {out} is a file", 2)
    try:
        checkpoint = load_checkpoint(ckpt)
        told = export(GPT.from_checkpoint(checkpoint), folder, checkpoint.get("tokenizer"))
    except (OSError, ValueError) as e:
        die(e)
    print(f"{folder}: {told}")


if __name__ == "__main__":
    main()
