"""
What recall.py, arithmetic.py and edge.py share: small GPTs trained on sequences, many of them.

A cell is one training run, a dict of plain values that determine it:

    label, config, flags       a row of tables.py: its name, its file in config/, its settings
    size                       fields of GPTConfig
    task, seed, steps, batch
    std                        of the matrices at first; 1/sqrt(width) where it isn't there
    warmup                     share of the steps; WARMUP where it isn't there

It is trained as train.py does, but in float32 (on a GPU its products in TF32), on sequences that
are generated, or drawn, as it goes on. sweep.py trains many.
"""
import math
from dataclasses import fields
from pathlib import Path

import torch

from configurator import die, run_file
from entropy import EntropyRegularizer, attention_entropy
from model import GPT, GPTConfig
from plot import weights_of
from tables import EREG, LN_G, LN_R, NAMES, SC, SM_G, SM_R, TUNED, row

ROOT = Path(__file__).resolve().parents[1]
LOOK = 50  # steps of data generated at a time, and between two looks at the loss
WARMUP = 0.1  # share of the steps, as in reproduce.py
LAMBDA = 0.164  # weight of the regularizer, train.py's
WEIGHT_DECAY = 0.1  # on matrices and embeddings, train.py's
CLIP = 1.0  # largest gradient norm, train.py's
SOLVED = 0.005  # nats: a loss below it, twice in a row, ends a cell


# ---------------------------------------------------------------------------------------- settings
def architectures(n_layer):
    """The rows that are compared; the last two have half of their layers without softmax."""
    half = n_layer // 2
    return [*(row(NAMES[config], config, TUNED[config])
              for config in (LN_G, SM_G, SC, EREG, LN_R, SM_R)),
            row("EReg half uniform", EREG, TUNED[EREG], uniform_layers=half),
            row("SM+ScFuFFN half positional", SC, TUNED[SC], positional_layers=half)]


def some_of(rows, archs):
    """The rows that `archs` names, all if it is empty; dies with a line if one isn't there."""
    labels = [r["label"] for r in rows]
    wanted = archs.split(",") if archs else labels
    missing = [name for name in wanted if name not in labels]
    if missing:
        die(f"archs: no {missing[0]!r} among {'; '.join(labels)}", 2)
    return [r for r in rows if r["label"] in wanted]


def numbers(text, key):
    """The numbers in a setting's text, comma-separated; dies with a line if they are none."""
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(0 < value < math.inf for value in found):
        die(f"{key} must be positive numbers with commas between, and is {text!r}", 2)
    return found


def size_of(text, width_of_head):
    """GPTConfig's sizes of "2x64x128": layers, width and context, with heads of one width."""
    parts = text.split("x")
    if len(parts) != 3 or not all(part.isdigit() for part in parts):
        die(f"sizes must be like 2x64x128, layers x width x context, and one is {text!r}", 2)
    n_layer, n_embd, T = map(int, parts)
    if n_layer < 2 or n_embd < width_of_head or n_embd % width_of_head:
        die(f"sizes: {text} must have two layers at least, and a width that {width_of_head} "
            "divides", 2)
    return dict(n_layer=n_layer, n_embd=n_embd, n_head=n_embd // width_of_head, block_size=T)


# ---------------------------------------------------------------------------------------- training
def build(cell):
    """(GPT, EntropyRegularizer or None) of a cell, as its seed has it at first."""
    flags = run_file(str(ROOT / "config" / f"{cell['config']}.py"), {}) | cell["flags"]
    flags |= cell["size"]
    known = {field.name for field in fields(GPTConfig)}
    config = GPTConfig(**{key: value for key, value in flags.items() if key in known})
    torch.manual_seed(cell["seed"])
    model, regularizer = GPT(config), None
    # GPT-2's 0.02 suits a width of 2500: without LayerNorm narrow models would hardly begin.
    std = cell.get("std", config.n_embd ** -0.5)
    for p in model.param_groups(0.0)[0]["params"]:
        p.data *= std / 0.02
    if flags.get("entropy_reg") and config.softmax_layers:
        regularizer = EntropyRegularizer(config.softmax_layers, config.n_head,
                                         threshold_init=flags.get("threshold_init", 0.5))
        regularizer.requires_grad_(not flags.get("threshold_frozen", False))
    return model, regularizer


def schedule(step, steps, warmup=WARMUP):
    """The share of the learning rate at a step: linear warmup, then linear decay to 0."""
    warm = math.ceil(warmup * steps)
    return (step + 1) / warm if step < warm else (steps - step) / max(1, steps - warm)


def is_solved(history):
    last = [ce for _, ce, _ in history[-2:]]
    return len(last) == 2 and max(last) < SOLVED


def train(cell, make, device):
    """
    (model, regularizer, history) of a cell: history has [step, cross-entropy, accuracy] of a fresh
    batch every LOOK steps, and ends early where the task is solved or the loss is no number any
    more. make(cell, n, generator) generates x, y (n, T), y -1 where there is nothing to predict.
    """
    model, regularizer = build(cell)
    model.to(device)
    groups = model.param_groups(WEIGHT_DECAY)
    if regularizer:
        learned = [p for p in regularizer.to(device).parameters() if p.requires_grad]
        groups.append({"params": learned, "weight_decay": 0.0})
    parameters = [p for group in groups for p in group["params"]]
    optimizer = torch.optim.AdamW(groups, lr=0.0, fused=True)
    generator = torch.Generator().manual_seed(cell["seed"])
    history, softmax_layers = [], model.config.softmax_layers
    for step in range(cell["steps"]):
        if step % LOOK == 0:
            whole = make(cell, LOOK * cell["batch"], generator)
            x, y = (z.to(device).split(cell["batch"]) for z in whole)       # LOOK of (B, T) each
        share = schedule(step, cell["steps"], cell.get("warmup", WARMUP))
        for group in optimizer.param_groups:
            group["lr"] = share * cell["flags"]["learning_rate"]
        wanted = y[step % LOOK]
        logits, ce, entropy = model(x[step % LOOK], wanted, return_entropy=regularizer is not None)
        loss = ce
        if regularizer:
            loss = ce + LAMBDA * regularizer(entropy[-softmax_layers:])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % LOOK == 0 or step + 1 == cell["steps"]:
            asked = wanted >= 0
            right = (logits.argmax(-1) == wanted)[asked].float().mean().item()
            history.append([step + 1, ce.item(), right])
            if not math.isfinite(loss.item()) or is_solved(history):
                break
    return model.eval(), regularizer, history


@torch.no_grad()
def heads_on(model, x, queries, places):
    """
    (L, H) each: mean attention weight of the positions `queries` on `places`, and their mean
    entropy in nats. x (N, T); queries (N, n); places (N, n, m), whose weights are added up.
    """
    weight, entropy = [], []
    for A in weights_of(model)(x):                                           # (N, H, T, T)
        index = queries[:, None, :, None].expand(-1, A.shape[1], -1, A.shape[-1])
        rows = A.gather(2, index)                                            # (N, H, n, T)
        places_of_all = places[:, None].expand(-1, A.shape[1], -1, -1)       # (N, H, n, m)
        weight.append(rows.gather(3, places_of_all).sum(-1).mean((0, 2)))
        entropy.append(attention_entropy(rows).mean((0, 2)))
    return torch.stack(weight), torch.stack(entropy)


def best_head(weight, entropy):
    """The head that looks there most: its layer and number, its weight there, its entropy, nats."""
    place = divmod(weight.argmax().item(), weight.shape[1])
    return {"layer_and_head": place, "weight": weight[place].item(),
            "entropy": entropy[place].item()}


def tell_head(head):
    """A head of best_head() in a few words, or what there is to say of a run that diverged."""
    if not head:
        return "diverged"
    layer, number = head["layer_and_head"]
    return f"{layer}.{number}, {head['weight']:.2f}, {head['entropy']:.2f}"
