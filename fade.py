"""
Take the LayerNorms, and then the activations, out of a trained model one by one, while it trains.

    python fade.py --init_from=out/ckpt.pt --out=out/faded.pt               # SM+LN+G to SM+G
    python fade.py --init_from=out/ckpt.pt --activation=True                # and on to SM
    python data/prepare.py --name=mine --train_source=FOLDER --tokenizer=gpt2
    python fade.py --init_from=gpt2 --dataset=mine --block_size=128         # GPT-2's

The order is that of arXiv 2507.02559: from the first block to the last the LayerNorm before the
FFN, then in the same order the one before attention. Each first divides by every row's deviation
sigma, and at the end of its turn by one number, the geometric mean of sigma over a batch: an affine
map, which folds into the next matrix. (There each goes at a stroke, the one before V after the one
before Q and K.) An activation becomes, unit by unit, the straight line that fits it best. The final
LayerNorm stays. What is left is a checkpoint for train.py --init_from, where --fuse_ffn=True makes
one matrix of an FFN without activation. Ctrl-C keeps how far it came beside --out, and the same
command goes on from there.
"""
from configurator import configure, die, end_on_signals, on_signals, one_of, setting_names, within

if __name__ == "__main__":
    end_on_signals()  # before the heavy imports

import math
import os
import sys
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import torch
import torch.nn as nn

from data.dataset import open_dataset
from machine import choose_machine
from model import NORMS, GPT, GPTConfig, save_checkpoint
from pretrained import check_tokenizer, read_pretrained, start_from

init_from = "out/ckpt.pt"  # a checkpoint, hf_export.py's folder, or GPT-2: hub id or folder
out = "out/faded.pt"  # the checkpoint that is left
activation = False  # take the activations of the FFNs out, too, after the LayerNorms
one_by_one = True  # False: all of them in the first one's turn, to compare with
turn = 20  # steps in which one of them fades
settle = 200  # steps after the last one, in which the learning rate falls to 0
dataset = "pycode"  # folder under data_dir, made by data/prepare.py
data_dir = "data"  # where datasets lie
block_size = 0  # tokens of context, 0: the model's, or fewer
batch_size = 32  # sequences a forward pass
grad_accum = 1  # forward passes a step
learning_rate = 1e-3  # after a warmup of one turn
weight_decay = 0.1  # on matrices and embeddings
grad_clip = 1.0  # largest gradient norm
eval_windows = 256  # validation windows, the same as train.py's
seed = 1337  # of the data order
device = "auto"  # auto | cpu | cuda | mps
dtype = "auto"  # auto | float32 | bfloat16: type of the matrix products

SETTINGS = setting_names(globals())
HERE = {"out", "data_dir", "device", "dtype"}  # may be written otherwise when a run goes on


class FadingLayerNorm(nn.Module):
    """w (x - mean) / s + b, log s from log sigma of the row (left = 1) to a number (left = 0)."""

    def __init__(self, norm):
        super().__init__()
        self.weight, self.bias, self.eps = norm.weight, norm.bias, norm.eps
        self.left = 1.0
        self.register_buffer("log_s", torch.zeros(()))

    def forward(self, x):
        x = x.float() - x.float().mean(-1, keepdim=True)                         # (B, T, d)
        log_sigma = (x.square().mean(-1, keepdim=True) + self.eps).log() / 2     # (B, T, 1)
        if self.left == 1:
            self.log_s = log_sigma.detach().mean()
        log_s = self.left * log_sigma + (1 - self.left) * self.log_s
        return self.weight * x / log_s.exp() + self.bias

    def affine(self):
        """(A, b) of the map x -> A x + b that it is at the end."""
        d = len(self.weight)
        centre = torch.eye(d, device=self.weight.device) - 1 / d
        return (self.weight / self.log_s.exp())[:, None] * centre, self.bias


class FadingActivation(nn.Module):
    """act(x) (left = 1) to slope x + offset (left = 0), in each unit the line of least squares."""

    def __init__(self, act, units):
        super().__init__()
        self.act, self.left = act, 1.0
        self.register_buffer("slope", torch.zeros(units))
        self.register_buffer("offset", torch.zeros(units))

    def forward(self, x):
        y = self.act(x)
        if self.left == 1:
            X, Y = x.detach().float().flatten(0, -2), y.detach().float().flatten(0, -2)  # (B T, 4d)
            var, mean = torch.var_mean(X, 0, correction=0)
            self.slope = ((X - mean) * Y).mean(0) / (var + 1e-9)
            self.offset = Y.mean(0) - self.slope * mean
        line = self.slope * x + self.offset
        return (self.left * y + (1 - self.left) * line).to(x.dtype)


def fading_parts(model):
    """Put fading LayerNorms, and maybe activations, into a GPT; returns them in order."""
    parts = []
    for name in ("ln_2", "ln_1"):
        for block in model.blocks:
            if model.config.use_layernorm:
                setattr(block, name, FadingLayerNorm(getattr(block, name)))
                parts.append(getattr(block, name))
    for block in model.blocks:
        if activation and model.config.activation != "none":
            block.ffn.act = FadingActivation(block.ffn.act, 4 * model.config.n_embd)
            parts.append(block.ffn.act)
    return parts


@torch.no_grad()
def folded(model):
    """The GPT without the parts that have faded, which are in its matrices and biases."""
    c = model.config
    flags = dict(use_layernorm=False, bias=True)
    if activation:
        flags |= {f"use_{name}": False for name in c.activations}
    ours = {name: p.clone() for name, p in model.state_dict().items() if ".ln_" not in name}

    def after(name, A, b):
        """Let the linear `name` take A x + b in the place of x."""
        W = ours[f"{name}.weight"]
        ours[f"{name}.bias"] = ours.get(f"{name}.bias", 0) + W @ b
        ours[f"{name}.weight"] = W @ A

    for i, block in enumerate(model.blocks):
        place = f"blocks.{i}"
        if c.use_layernorm:
            for name in ("attn.qk", "attn.v", "ffn.w_in", "ffn.w_ffn"):
                if f"{place}.{name}.weight" in ours:
                    norm = block.ln_1 if name.startswith("attn") else block.ln_2
                    after(f"{place}.{name}", *norm.affine())
        if activation and c.activation != "none":
            after(f"{place}.ffn.w_out", block.ffn.act.slope.diag(), block.ffn.act.offset)
    bare = GPT(replace(c, **flags)).to(model.wte.weight.device)
    bare.load_state_dict({name: ours.get(name, torch.zeros_like(p))  # a bias that stays 0
                          for name, p in bare.state_dict().items()})
    return bare.eval()


def left_at(step, i):
    """How much of part i is left at a step: all before its turn, nothing after."""
    start = turn * (1 + i if one_by_one else 1)
    return 1 - min(max(step + 1 - start, 0), turn) / turn


def lr_at(step, steps):
    """Linear warmup during the first turn, in which nothing fades, and decay while all settles."""
    return learning_rate * min((step + 1) / turn, 1, (steps - step) / (settle + 1))


def batch(tokens, numbers, T, piece, device):
    """x, y (B, T) of windows, on the device; in pieces the last token has nothing ahead: -1."""
    rows = np.stack([tokens[n * T:(n + 1) * T] for n in numbers]).astype(np.int64)
    ahead = [-1 if piece else int(tokens[(n + 1) * T]) for n in numbers]
    x = torch.from_numpy(rows).to(device)
    return x, torch.cat((x[:, 1:], x.new_tensor(ahead)[:, None]), 1)


def opened():
    """The model, what open_dataset gives, and what choose_machine gives. OSError or ValueError."""
    source = read_pretrained(init_from)
    config = GPTConfig(**source["model_config"])
    config = replace(config, block_size=block_size or config.block_size)
    normed = [key for key in NORMS if getattr(config, key) != "none"]
    if normed:
        raise ValueError(f"{init_from} has {normed[0]}, into which nothing folds")
    if not config.use_layernorm and not (activation and config.activation != "none"):
        raise ValueError(f"{init_from} is {config.name}, which has nothing that could fade")
    model = GPT(config)
    start_from(source, model, None)
    data = open_dataset(data_dir, dataset, config.block_size)
    check_tokenizer(init_from, source, data[3], data[2]["vocab_size"])
    rows = batch_size * config.block_size
    return model, data, choose_machine(device, dtype, "no", rows, config.n_embd)


def main():
    global out
    configure(globals())
    out = os.path.expanduser(out)
    one_of(globals(), repr, dtype=("auto", "float32", "bfloat16"))
    most = 2**31 - 1
    within(globals(), turn=(1, most), settle=(0, most), block_size=(0, 2**20), seed=(0, most),
           batch_size=(1, 2**20), grad_accum=(1, 2**20), eval_windows=(1, most),
           learning_rate=(0, most), weight_decay=(0, most), grad_clip=(1e-9, most))
    if os.path.isdir(out) or not os.path.isdir(os.path.dirname(out) or "."):
        die(f"out must be a file in a folder that exists, and is {out!r}", 2)
    try:
        model, (tokens, val, meta, spec, _), (place, kind, _, told) = opened()
        print(f"{init_from}: {model.config.name}; {told}")
        bare = fade(model, tokens, val, meta["piece"], place, kind)
        kept = dict(data_dir=data_dir, dataset=dataset, seed=seed)
        save_checkpoint(out, bare, tokenizer=spec, settings=kept, data_sha256=meta["sha256"])
        if os.path.exists(f"{out}.stopped"):
            os.remove(f"{out}.stopped")
    except (OSError, ValueError) as e:
        die(e)
    print(f"{out}: {bare.config.name}")


def go_on(model, optimizer):
    """
    Model and optimizer as a run was stopped with, if one was. Returns the steps done. ValueError if
    its settings were others, or if its file is damaged.
    """
    if not os.path.exists(f"{out}.stopped"):
        return 0
    try:
        stopped = torch.load(f"{out}.stopped", map_location="cpu", weights_only=True)
        for key, was in stopped["settings"].items():
            if key not in HERE and was != globals()[key]:
                raise ValueError(f"it has {key}={was!r}")
        model.load_state_dict(stopped["model"])
        optimizer.load_state_dict(stopped["optimizer"])
        return stopped["step"]
    except Exception as e:  # torch raises whatever a damaged file makes it raise
        raise ValueError(f"can't go on from {out}.stopped ({type(e).__name__}: {e}): delete it to "
                         "start anew") from e


def keep(model, optimizer, step):
    """Leave what go_on() needs after so many steps."""
    save_checkpoint(f"{out}.stopped", model, optimizer=optimizer.state_dict(), step=step,
                    settings={key: globals()[key] for key in SETTINGS})
    print(f"stopped after step {step}: the same command goes on from {out}.stopped")


@torch.no_grad()
def evaluate(model, batches, autocast):
    """Validation loss and perplexity, as text, over batches of x and y (B, T)."""
    model.eval()
    total, n = 0.0, sum(len(x) for x, _ in batches)
    for x, y in batches:
        with autocast:
            total += model(x, y)[1].item() * len(x) / n
    model.train()
    return f"validation ce {total:.4f}  perplexity {math.exp(min(total, 700)):.2f}"


def fade(model, tokens, val, piece, place, kind):
    """Train and let the parts fade; returns folded(). ValueError if the loss is not finite."""
    T, parts = model.config.block_size, fading_parts(model)
    model.to(place)
    steps = turn * (1 + (len(parts) if one_by_one else 1)) + settle
    autocast = nullcontext()
    if kind == torch.bfloat16:
        autocast = torch.autocast(torch.device(place).type, torch.bfloat16)
    optimizer = torch.optim.AdamW(model.param_groups(weight_decay), lr=learning_rate)
    n, n_val = ((len(some) - (0 if piece else 1)) // T for some in (tokens, val))  # windows
    order = np.random.default_rng(seed).permutation(n)
    chosen = np.linspace(0, n_val - 1, min(eval_windows, n_val)).round().astype(int)
    held_out = [batch(val, some, T, piece, place)
                for some in np.array_split(chosen, math.ceil(len(chosen) / batch_size))]
    done = go_on(model, optimizer)
    start = f"going on after step {done}:"
    if not done:
        start = f"before: {evaluate(model, held_out, autocast)};"
    print(f"{start} {len(parts)} parts, {steps} steps of {grad_accum * batch_size} x {T} tokens",
          flush=True)
    signals = []

    def stop(number, frame):
        if signals:
            sys.exit(128 + number)  # asked twice
        signals.append(number)

    on_signals(stop)
    for step in range(done, steps):
        for i, part in enumerate(parts):
            part.left = left_at(step, i)
        for group in optimizer.param_groups:
            group["lr"] = lr_at(step, steps)
        ce = 0.0
        for micro in range(step * grad_accum, (step + 1) * grad_accum):
            numbers = order.take(range(micro * batch_size, (micro + 1) * batch_size), mode="wrap")
            with autocast:
                loss = model(*batch(tokens, numbers, T, piece, place))[1] / grad_accum
            loss.backward()
            ce += loss.item()
        if not math.isfinite(ce):
            raise ValueError(f"the loss is not finite at step {step}: a lower learning_rate, or a "
                             "longer turn")
        nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if signals and step + 1 < steps:  # before a line, for which the terminal may be gone
            keep(model, optimizer, step + 1)
            sys.exit(128 + signals[0])
        if (step + 1) % turn == 0 or step + 1 == steps:
            gone = sum(part.left == 0 for part in parts)
            print(f"step {step + 1:>6}/{steps}  ce {ce:.4f}  {gone} of {len(parts)} gone",
                  flush=True)
    print(f"after: {evaluate(model, held_out, autocast)}")
    bare = folded(model)
    print(f"folded: {evaluate(bare, held_out, autocast)}")
    return bare


if __name__ == "__main__":
    main()
