"""
Perplexity and bits per byte of a trained model on any text, by its own tokenizer.

    python evaluate.py --text=FILE                            # of out/ckpt.pt
    python evaluate.py --text=FILE --ckpt=gpt2 --block_size=128

Perplexities compare only between models of one tokenizer, bits per byte between any.
"""
from configurator import configure, die, end_on_signals, within

end_on_signals()

import math

import torch
from tqdm import tqdm

from machine import choose_device
from pretrained import open_pretrained, read_tokens

text = ""  # a file in UTF-8
ckpt = "out/ckpt.pt"  # a checkpoint of train.py, or GPT-2: its hub id, folder or .safetensors file
tokenizer = ""  # of GPT-2: a tokenizer.json; if empty the one beside its weights, else tiktoken's
block_size = 0  # tokens of context at most, 0: the model's
stride = 0  # tokens from one window to the next, 0: block_size, as in train.py; fewer see further
device = "auto"  # auto | cpu | cuda | mps

LARGEST = 2**26  # logits of one batch, 256 MB in float32


@torch.no_grad()
def cross_entropy(model, tokens, T, stride):
    """
    Sum over all tokens but the first of -log p(token | what is before it in its window), nats: each
    is predicted once, in the first of the windows of T tokens, `stride` apart, that has it.
    """
    n, device = len(tokens) - 1, model.wte.weight.device
    many = max(1, LARGEST // (T * model.config.vocab_size))
    starts = list(range(0, max(1, n - T + stride), stride))
    total = 0.0
    for i in tqdm(range(0, len(starts), many), desc="evaluate", leave=False, delay=10):
        x = torch.zeros(len(starts[i:i + many]), T, dtype=torch.long)
        y = torch.full_like(x, -1)
        for row, start in enumerate(starts[i:i + many]):
            window = tokens[start:start + T + 1]
            x[row, :len(window) - 1] = window[:-1]
            old = T - stride if start else 0  # predicted by the window before
            y[row, old:len(window) - 1] = window[1 + old:]
        loss = model(x.to(device), y.to(device))[1].item()
        total += loss * (y >= 0).sum().item()
    return total


def main():
    configure(globals())
    try:
        name = choose_device(device)
        model, encoding = open_pretrained(ckpt, tokenizer)
        longest = model.config.block_size
        T = block_size or longest
        within(globals(), block_size=(0, longest), stride=(0, T))
        tokens, size = read_tokens(text, encoding, model.config.vocab_size)
        nats = cross_entropy(model.to(name), torch.from_numpy(tokens), T, stride or T)
    except (OSError, ValueError) as e:
        die(e)
    n = len(tokens) - 1
    print(f"{text}: {n:,} tokens, {size:,} bytes; {model.config.name}, context {T}: "
          f"perplexity {math.exp(min(nats / n, 700)):.2f} a token, cross-entropy {nats / n:.4f} "
          f"nats, {nats / math.log(2) / size:.4f} bits per byte")


if __name__ == "__main__":
    main()
