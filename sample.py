"""
Text from a checkpoint of train.py, which carries its tokenizer, or from GPT-2.

    python sample.py --prompt="def add(a, b):"          # from out/ckpt.pt
    python sample.py --gpt2=gpt2 --prompt="Once upon a"  # a hub id, or a folder with GPT-2's files
"""
from configurator import configure, die, end_on_signals, within

end_on_signals()

import torch

from machine import choose_device
from pretrained import open_pretrained

ckpt = "out/ckpt.pt"  # a checkpoint of train.py
gpt2 = ""  # in its place GPT-2: a hub id such as gpt2-medium, a folder, or a .safetensors file
tokenizer = ""  # of GPT-2: a tokenizer.json; if empty the one beside its weights, else tiktoken's
prompt = "def"  # what the samples begin with
num_samples = 1  # how many
max_new_tokens = 100  # length of each
temperature = 0.8  # of the softmax over the vocabulary, 0: always the likeliest token
top_k = 50  # among so many of the likeliest tokens, 0: all
seed = 1337  # of the choice of tokens
device = "auto"  # auto | cpu | cuda | mps


def sample(model, encoding, prompt, max_new_tokens, temperature, top_k, generator):
    """`prompt` and max_new_tokens more tokens, as text. Raises what GPT.generate raises."""
    ids = torch.tensor([encoding.encode_ordinary(prompt)], device=model.wte.weight.device)
    tokens = model.generate(ids.long(), max_new_tokens, temperature, top_k, generator)[0].tolist()
    return encoding.decode([t for t in tokens if t < encoding.n_vocab])  # V may be padded beyond


def main():
    configure(globals())
    within(globals(), num_samples=(1, 2**20), max_new_tokens=(1, 2**20), temperature=(0, 1e6),
           top_k=(0, 2**24), seed=(0, 2**63 - 1))
    try:
        name = choose_device(device)
        model, encoding = open_pretrained(gpt2 or ckpt, tokenizer)
        model.to(name)
        generator = torch.Generator(name).manual_seed(seed)
        for _ in range(num_samples):
            print(sample(model, encoding, prompt, max_new_tokens, temperature, top_k, generator))
            print("---", flush=True)
    except (OSError, ValueError) as e:
        die(e)


if __name__ == "__main__":
    main()
