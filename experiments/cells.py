"""
What recall.py and arithmetic.py share: small GPTs trained on generated sequences, many of them.

A cell is one training run, a dict of plain values that determine it:

    label, config, flags   a row of tables.py: its name, its file in config/, its settings
    size                   fields of GPTConfig
    seed, steps, batch     and what the task adds

Each cell is a row in the script's JSON as soon as it is done, and isn't trained again. Every cell
trains as train.py does, but in float32, from matrices of standard deviation 1/sqrt(width), on
sequences that are generated and seen once.
"""
import ctypes
import json
import math
import multiprocessing
import platform
import signal
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import fields
from pathlib import Path

import torch

from configurator import die, on_signals, run_file
from draw import write_whole
from entropy import EntropyRegularizer, attention_entropy
from machine import choose_device, machine_and_commit
from model import GPT, GPTConfig
from plot import weights_of
from tables import EREG, LN_G, LN_R, NAMES, SC, SEEDS, SM_G, SM_R, TUNED, TUNING_SEED, row

ROOT = Path(__file__).resolve().parents[1]
LOOK = 50  # steps of data generated at a time, and between two looks at the loss
WARMUP = 0.1  # share of the steps, as in reproduce.py
LAMBDA = 0.164  # weight of the regularizer, train.py's
WEIGHT_DECAY = 0.1  # on matrices and embeddings, train.py's
CLIP = 1.0  # largest gradient norm, train.py's


# ---------------------------------------------------------------------------------------- settings
def architectures(n_layer):
    """The rows that are compared; the last two have half of their layers without softmax."""
    half = n_layer // 2
    return [*(row(NAMES[config], config, TUNED[config])
              for config in (LN_G, SM_G, SC, EREG, LN_R, SM_R)),
            row("EReg half uniform", EREG, TUNED[EREG], uniform_layers=half),
            row("SM+ScFuFFN half positional", SC, TUNED[SC], positional_layers=half)]


def numbers(text, key):
    """The numbers in a setting's text, comma-separated; dies with a line if they are none."""
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(0 < value < math.inf for value in found):
        die(f"{key} must be positive numbers with commas between, and is {text!r}", 2)
    return found


def size_of(text, width_of_head, key="sizes"):
    """GPTConfig's sizes of "2x64x128": layers, width and context, with heads of one width."""
    parts = text.split("x")
    if len(parts) != 3 or not all(part.isdigit() for part in parts):
        die(f"{key} must be like 2x64x128, layers x width x context, and is {text!r}", 2)
    n_layer, n_embd, T = map(int, parts)
    if n_layer < 2 or n_embd < width_of_head or n_embd % width_of_head:
        die(f"{key}: {text} must have two layers at least, and a width that {width_of_head} divides",
            2)
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
    for p in model.param_groups(0.0)[0]["params"]:
        p.data *= config.n_embd ** -0.5 / 0.02
    if flags.get("entropy_reg") and config.softmax_layers:
        regularizer = EntropyRegularizer(config.softmax_layers, config.n_head,
                                         threshold_init=flags.get("threshold_init", 0.5))
        regularizer.requires_grad_(not flags.get("threshold_frozen", False))
    return model, regularizer


def schedule(step, steps):
    """The share of the learning rate at a step: linear warmup, then linear decay to 0."""
    warm = math.ceil(WARMUP * steps)
    return (step + 1) / warm if step < warm else (steps - step) / max(1, steps - warm)


def train(cell, make, device):
    """
    (model, regularizer, history) of a cell: history has [step, cross-entropy, accuracy] of a fresh
    batch every LOOK steps, and ends early where the loss is no number any more. make(cell, n,
    generator) generates x, y (n, T), y -1 where there is nothing to predict.
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
        for group in optimizer.param_groups:
            group["lr"] = cell["flags"]["learning_rate"] * schedule(step, cell["steps"])
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
            if not math.isfinite(loss.item()):
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


# ---------------------------------------------------------------------------------------- many cells
def finish(cell, make, study, deadline):
    """
    Train a cell and study it, in a process of its own: a row of the results, or None where it is
    too late to start. study(cell, model) measures a trained model, on the CPU, as a dict
    with a "score", the higher the better.
    """
    if time.time() > deadline:
        return None
    started, device = time.time(), choose_device()
    torch.set_float32_matmul_precision("high")
    model, regularizer, history = train(cell, make, device)
    name = torch.cuda.get_device_name() if device == "cuda" else platform.machine()
    told = {"cell": cell, "event": "done", "parameters": sum(p.numel() for p in model.parameters()),
            "device": name, "torch": torch.__version__, "history": history}
    if not math.isfinite(history[-1][1]):
        return told | {"event": "diverged", "score": 0.0, "seconds": time.time() - started}
    told |= study(cell, model)
    if regularizer:
        told["threshold"] = regularizer.threshold.tolist()
    return told | {"seconds": time.time() - started}


def start_worker():
    """Have a worker end with the script that forked it, without a word."""
    on_signals(signal.SIG_DFL)
    torch.set_num_threads(1)
    try:
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG, on Linux
    except (OSError, AttributeError):
        return


def identity(cell):
    return json.dumps(cell, sort_keys=True)


class Results:
    """The rows of a JSON file: read at the start, written whole after every cell."""

    def __init__(self, path, scale):
        self.path, self.rows, self.made = path, {}, machine_and_commit()
        self.head = {"command": " ".join(["python", *sys.argv]), "scale": scale}
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists():
                rows = json.loads(path.read_text())["rows"]
                self.rows = {identity(r["cell"]): r for r in rows}
        except (OSError, ValueError, KeyError, TypeError) as e:
            die(f"can't go on from {path} ({type(e).__name__}): move it away")

    def of(self, cell):
        return self.rows.get(identity(cell))

    def add(self, told):
        told = json.loads(json.dumps(told | self.made))  # as a rerun will read it
        self.rows[identity(told["cell"])] = told
        whole = self.head | self.made | {"rows": list(self.rows.values())}
        write_whole(str(self.path), (json.dumps(whole) + "\n").encode())


def run(cells, results, make, study, jobs, deadline):
    """Train the cells that `results` lacks, so many side by side. Dies with a line if one fails."""
    todo = [cell for cell in cells if not results.of(cell)]
    # Forked workers share the imports; no CUDA call may come before.
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("fork"), start_worker) as pool:
        futures = [pool.submit(finish, cell, make, study, deadline) for cell in todo]
        try:
            for future in as_completed(futures):
                told = future.result()
                if told:
                    results.add(told)
                    print(line(told), flush=True)
        except Exception as e:  # a worker raises whatever torch or the disk makes it raise
            pool.shutdown(cancel_futures=True)
            die(f"a cell failed ({type(e).__name__}: {e})")


def line(told):
    cell = told["cell"]
    shape = "x".join(str(cell["size"][key]) for key in ("n_layer", "n_embd", "block_size"))
    return (f"{cell['task']} {cell['label']}, {shape}, rate {cell['flags']['learning_rate']:g}, "
            f"seed {cell['seed']}: {told['event']} at step {told['history'][-1][0]}, score "
            f"{told['score']:.3f}, {told['seconds']:.0f} s")


# ---------------------------------------------------------------------------------------- a study
def at_rate(cell, rate, seed):
    return cell | {"seed": seed, "flags": cell["flags"] | {"learning_rate": rate}}


def chosen_rate(cell, rates, results):
    """The rate of the best run on the tuning seed, the lower loss among equals; None without."""
    runs = [results.of(at_rate(cell, rate, TUNING_SEED)) for rate in rates]
    runs = [told for told in runs if told]
    if not runs:
        return None

    def quality(told):
        loss = told["history"][-1][1]
        return told["event"] == "done", round(told["score"], 2), -loss

    return max(runs, key=quality)["cell"]["flags"]["learning_rate"]


def reported(pairs, rates, seeds, results):
    """The cells that are reported: every seed of each, at the rate that was chosen for its base."""
    found = []
    for cell, base in pairs:
        rate = chosen_rate(base, rates, results)
        if rate:
            found += [at_rate(cell, rate, seed) for seed in SEEDS[:seeds]]
    return found


def sweep(groups, rates, seeds, results, make, study, jobs, seconds):
    """
    Train groups of cells, the most important first. A group is pairs (cell, base): every rate of a
    base on the tuning seed, and then the cell with the seeds that are reported, beside the next
    group's tuning. No cell starts after so many seconds. Returns the rows of each group.
    """
    deadline, before = time.time() + seconds, []
    for pairs in [*groups, []]:
        bases = {identity(base): base for _, base in pairs}.values()
        tuning = [at_rate(base, rate, TUNING_SEED) for base in bases for rate in rates]
        run(reported(before, rates, seeds, results) + tuning, results, make, study, jobs, deadline)
        before = pairs
    found = []
    for pairs in groups:
        rows = [results.of(cell) for cell in reported(pairs, rates, seeds, results)]
        found.append([told for told in rows if told])
    return found


def by_label(rows):
    """{label: its rows}, in the order of the first of each."""
    found = {}
    for told in rows:
        found.setdefault(told["cell"]["label"], []).append(told)
    return found


def spread(values, form="{:.2f}"):
    """The mean of the seeds' values, and their range where there are several."""
    middle = form.format(sum(values) / len(values))
    if len(values) == 1:
        return middle
    return f"{middle} ({form.format(min(values))} to {form.format(max(values))})"


def tell_head(head):
    """A head of best_head() in a few words, or what there is to say of a run that diverged."""
    if not head:
        return "diverged"
    layer, number = head["layer_and_head"]
    return f"{layer}.{number}, {head['weight']:.2f}, {head['entropy']:.2f}"


def some_of(rows, archs):
    """The rows that `archs` names, all if it is empty; dies with a line if one isn't there."""
    labels = [r["label"] for r in rows]
    wanted = archs.split(",") if archs else labels
    missing = [name for name in wanted if name not in labels]
    if missing:
        die(f"archs: no {missing[0]!r} among {'; '.join(labels)}", 2)
    return [r for r in rows if r["label"] in wanted]
