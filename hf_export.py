"""
A checkpoint of SM+LN+G, SM+LN+R or SM+LN as a folder of Hugging Face's GPT-2, in float32.

    python hf_export.py --ckpt=out/ckpt.pt --out=out/gpt2

    from transformers import GPT2LMHeadModel
    model = GPT2LMHeadModel.from_pretrained("out/gpt2")

The other architectures have parts that GPT-2 has no place for. The tokenizer isn't written: what a
checkpoint keeps of it is its token ids, and not the merges that Hugging Face's files list.
"""
from configurator import configure, die, end_on_signals

if __name__ == "__main__":
    end_on_signals()

import json  # noqa: E402
import os  # noqa: E402

import torch  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from gpt2 import PARTS, WHOLE  # noqa: E402
from model import GPT, GPTConfig  # noqa: E402

ckpt = "out/ckpt.pt"  # a checkpoint of train.py
out = "out/gpt2"  # the folder

ACTIVATION = {"gelu": "gelu", "gelu_tanh": "gelu_new", "relu": "relu", "none": "linear"}
# The fields of GPTConfig that GPT-2 can have otherwise than by default, or that say nothing then
FREE = {"block_size", "vocab_size", "n_layer", "n_head", "n_embd", "bias", "use_gelu", "use_relu",
        "gelu_tanh", "temperature_init"}


def gpt2_settings(c):
    """config.json of a GPTConfig. ValueError if GPT-2 has no place for one of its parts."""
    default = GPTConfig()
    others = [f"{key}={value}" for key, value in vars(c).items()
              if key not in FREE and value != getattr(default, key)]
    if c.activation not in ACTIVATION:
        others.append(f"the activation {c.activation}")
    if others:
        raise ValueError(f"Hugging Face's GPT-2 has no place for {c.name}: {', '.join(others)}")
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


def export(model, folder):
    """Write config.json and model.safetensors. Raises ValueError as above, OSError if it can't."""
    settings = gpt2_settings(model.config)
    os.makedirs(folder, exist_ok=True)
    with open(os.path.join(folder, "config.json"), "w", encoding="utf-8") as file:
        json.dump(settings, file, indent=1)
    path = os.path.join(folder, "model.safetensors")
    save_file(gpt2_tensors(model), path, metadata={"format": "pt"})


def main():
    configure(globals())
    folder = os.path.expanduser(out)
    try:
        export(GPT.from_checkpoint(ckpt), folder)
    except (OSError, ValueError) as e:
        die(e)
    print(f"{folder}/model.safetensors, {folder}/config.json")


if __name__ == "__main__":
    main()
