"""
Many cells of cells.py side by side: for each architecture the learning rate that suits it on a seed
that isn't reported, then the seeds that are. Each cell is a row in a JSON file as soon as it is
done, and isn't trained again. A cell that diverges is a result like any other.
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
from contextlib import suppress

import torch

from cells import train
from configurator import die, on_signals
from draw import write_whole
from machine import choose_device, machine_and_commit
from tables import SEEDS, TUNING_SEED


# ---------------------------------------------------------------------------------------- one cell
def finish(cell, make, study, deadline):
    """
    Train a cell and study it, in a process of its own: its row of the results in a list, which is
    empty where it is too late to start. study(cell, model) measures a trained model as a dict with
    a "score", the higher the better.
    """
    if time.time() > deadline:
        return []
    started, device = time.time(), choose_device()
    torch.set_float32_matmul_precision("high")
    model, regularizer, history = train(cell, make, device)
    name = torch.cuda.get_device_name() if device == "cuda" else platform.machine()
    told = {"cell": cell, "event": "done", "parameters": sum(p.numel() for p in model.parameters()),
            "device": name, "torch": torch.__version__, "history": history}
    sound = all(p.isfinite().all() for p in model.parameters())
    if not sound or not math.isfinite(history[-1][1]):
        return [told | {"event": "diverged", "score": 0.0, "seconds": time.time() - started}]
    told |= study(cell, model)
    if regularizer:
        told["threshold"] = regularizer.threshold.tolist()
    return [told | {"seconds": time.time() - started}]


def start_worker():
    """Have a worker end with the script that forked it, without a word."""
    on_signals(signal.SIG_DFL)
    torch.set_num_threads(1)
    with suppress(OSError, AttributeError):  # which systems other than Linux raise
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


# ---------------------------------------------------------------------------------------- results
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
            die(f"can't go on from {path} ({type(e).__name__}: {e}): move it away, or name another "
                "folder by --into")

    def of(self, cell):
        return self.rows.get(identity(cell))

    def add(self, *rows):
        for told in rows:
            told = json.loads(json.dumps(told | self.made))  # as a rerun will read it
            self.rows[identity(told["cell"])] = told
        whole = self.head | self.made | {"rows": list(self.rows.values())}
        text = json.dumps(whole, separators=(",", ":")) + "\n"
        write_whole(str(self.path), text.encode())


# ------------------------------------------------------------------------------------- many cells
def carry_out(tasks, results, jobs, tell):
    """
    Do tasks, each a function and its arguments, so many side by side. What one returns are rows:
    they are kept at once, and told by the line tell(row). Dies with a line where one failed, after
    all the others.
    """
    failed = None
    # Forked workers share the imports; no CUDA call may come before.
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("fork"), start_worker) as pool:
        futures = [pool.submit(*task) for task in tasks]
        for future in as_completed(futures):
            try:
                rows = future.result()
                if rows:
                    results.add(*rows)
                    print("\n".join(map(tell, rows)), flush=True)
            except Exception as e:  # a worker raises whatever torch or the disk makes it raise
                failed = e
    if failed:
        die(f"a cell failed ({type(failed).__name__}: {failed})")


def run(cells, results, make, study, jobs, deadline):
    """Train the cells that `results` lacks."""
    todo = [cell for cell in cells if not results.of(cell)]
    tasks = [(finish, cell, make, study, deadline) for cell in todo]
    carry_out(tasks, results, jobs, line)


def told_cell(cell):
    """A cell in a few words: its row of the tables, its shape, its rate and its seed."""
    shape = "x".join(str(cell["size"][key]) for key in ("n_layer", "n_embd", "block_size"))
    return (f"{cell['label']}, {shape}, rate {cell['flags']['learning_rate']:g}, "
            f"seed {cell['seed']}")


def line(told):
    cell = told["cell"]
    return (f"{cell['task']} {told_cell(cell)}: {told['event']} at step "
            f"{told['history'][-1][0]}, score {told['score']:.3f}, {told['seconds']:.0f} s")


def at_rate(cell, rate, seed):
    return cell | {"seed": seed, "flags": cell["flags"] | {"learning_rate": rate}}


def chosen_rate(cell, rates, results):
    """The rate of the best run on the tuning seed, the faster one among equals; None without."""
    runs = [results.of(at_rate(cell, rate, TUNING_SEED)) for rate in rates]
    runs = [told for told in runs if told]
    if not runs:
        return None

    def quality(told):
        step, loss, _ = told["history"][-1]
        return told["event"] == "done", round(told["score"], 2), -step, -loss

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
