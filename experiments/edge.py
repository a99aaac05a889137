"""
Do these architectures stay stable as they grow? The learning rate at which each breaks, by size.

    python experiments/edge.py --into=results --jobs=3  # all, on a GPU
    python experiments/edge.py --sizes=2x64x64 --archs=SM+LN+G --seeds=1  # the smallest cell

Small-scale proxies (arXiv 2309.14322): what makes large models unstable at the usual learning rate
makes small ones unstable at a higher one. So each architecture is trained at every rate of a grid,
at widths and at depths, on the same tokens of real text, with train.py's own initialisation,
batch and share of warmup. Of each, by seed:

- best rate: that of the lowest loss on held-out windows
- edge: the smallest rate above the best one whose run is broken, which is one that ends without a
  finite loss, or with one more than `broken` nats above the best rate's. Where none is, the edge is
  told as at least the next rate of the grid
- sensitivity: the mean over the rates of min(loss, loss at first) - lowest loss, nats
- and on the way, at a few steps: the largest absolute logit of attention and each layer's mean
  entropy. A layer collapses below a tenth of log(T!)/T nats, the most that a causal head reaches,
  and is overloaded above nine tenths of it

ensemble.py trains rates and seeds of one architecture and size at once.

Writes edge.json, which a rerun completes, and edge.png.
"""
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "experiments")]
from configurator import configure, die, end_on_signals, within  # noqa: E402

end_on_signals()

import math  # noqa: E402
import platform  # noqa: E402
import time  # noqa: E402

import numpy as np  # noqa: E402
import torch  # noqa: E402

import cells  # noqa: E402
import ensemble  # noqa: E402
import sweep  # noqa: E402
from data.dataset import open_dataset  # noqa: E402
from draw import COLOURS, MARKERS, write_figure  # noqa: E402
from entropy import max_causal_entropy  # noqa: E402
from machine import choose_device  # noqa: E402
from rows import mean  # noqa: E402
from tables import SEEDS  # noqa: E402

data_dir = "data"  # where datasets lie
dataset = "pycode2k"  # the text
into = "out/questions"  # folder for edge.json and edge.png
# Layers x width x context, the most important first; widths are compared at the depth of the first
# size, depths at its width.
sizes = "6x128x128,6x256x128,6x64x128,12x128x128,6x512x128,24x128x128,4x128x128"  # L x width x T
archs = ""  # some of the architectures, comma-separated; all if empty
rates = "0.0003,0.0006,0.0012,0.0025,0.005,0.01,0.02,0.04,0.08"  # learning rates, by about 2
seeds = 3  # at most 3
steps = 600  # training steps
batch = 8  # windows a step, train.py's
tested = 64  # held-out windows
warmup = 0.3  # share of the steps, train.py's
std = 0.02  # of matrices and embeddings at first, train.py's; 0: 1/sqrt(width), as in cells.py
broken = 0.5  # nats above the best rate's loss that make a run a broken one
at_once = 36  # models of 6 layers, width 128, trained at once; of larger ones fewer, whole seeds
jobs = 2  # such groups side by side
seconds = 10**6  # no group starts after so many, nor goes on that wouldn't be done by then

WIDTH_OF_HEAD = 32
BINS = []  # training and held-out tokens, which the workers inherit


# ---------------------------------------------------------------------------------------- training
def windows(tokens, starts, T):
    """x, y (n, T) of the windows that start there."""
    both = torch.from_numpy(tokens[starts[:, None] + np.arange(T + 1)].astype(np.int64))
    return both[:, :-1], both[:, 1:]


def make(cell, n, generator):
    """x, y (n, T) of training windows, drawn as cells.train() wants them."""
    T = cell["size"]["block_size"]
    starts = torch.randint(len(BINS[0]) - T, (n,), generator=generator)
    return windows(BINS[0], starts.numpy(), T)


def held_out(cell):
    """x, y (N, T): the same windows for all, spread over the held-out text."""
    T = cell["size"]["block_size"]
    starts = np.linspace(0, len(BINS[1]) - T - 1, tested).astype(np.int64)
    return windows(BINS[1], starts, T)


def short(step, loss, logit, entropy):
    """A look as it is kept, with the digits that are told: a thousand of them are a small file."""
    largest = float(f"{logit.max().item():.3g}")
    return [step, round(loss.item(), 4), largest, [round(e, 2) for e in entropy.tolist()]]


def finish(group, deadline):
    """Train a group, in a process of its own: its rows, none where there is no time for it."""
    if time.time() > deadline:
        return []
    began, device = time.time(), choose_device()
    if device == "cuda":
        torch.cuda.empty_cache()  # of the group before, which was of other sizes
    torch.set_float32_matmul_precision("high")
    trained = ensemble.train(group, make, held_out(group[0]), device, deadline)
    if not trained:
        return []
    models, looks = trained
    known = {"device": torch.cuda.get_device_name() if device == "cuda" else platform.machine(),
             "torch": torch.__version__, "parameters": models.P.shape[1], "at_once": len(group),
             "seconds": time.time() - began}
    sound = models.P.isfinite().all(1).tolist()
    rows = []
    for place, cell in enumerate(group):
        history = [short(step, *(z[place] for z in seen)) for step, *seen in looks]
        done = sound[place] and math.isfinite(history[-1][1])
        event = "done" if done else "diverged"
        rows.append({"cell": cell, "event": event, **known, "history": history})
    return rows


# ---------------------------------------------------------------------------------------- measured
def measured(rows, tried):
    """What one seed's rows of every rate say: best rate and loss, edge and its row, sensitivity."""
    rows = sorted(rows, key=lambda told: told["cell"]["flags"]["learning_rate"])
    first = rows[0]["history"][0][1]
    loss = [told["history"][-1][1] if told["event"] == "done" else math.inf for told in rows]
    best = loss.index(min(loss))
    limit = loss[best] + broken if math.isfinite(loss[best]) else 0.0  # broken at every rate
    beyond = [i for i in range(best, len(rows)) if loss[i] > limit]
    edge = tried[beyond[0]] if beyond else tried[-1] ** 2 / tried[-2]
    lost = [min(x, first) - min(loss[best], first) for x in loss]
    return {"best": tried[best], "loss": loss[best], "edge": edge, "at_least": not beyond,
            "row": rows[beyond[0]] if beyond else rows[-1], "losses": list(zip(tried, loss)),
            "sensitivity": mean(lost)}


def by_seed(results, base, tried):
    """{seed: what measured() says}, of the seeds whose runs of every rate are there."""
    found = {}
    for seed in SEEDS[:seeds]:
        rows = [results.of(sweep.at_rate(base, rate, seed)) for rate in tried]
        if all(rows):
            found[seed] = measured(rows, tried)
    return found


def slopes(table, label, along, chosen):
    """
    Each seed's slope of log edge over log size, -1 where the edge halves as the size doubles, and
    of how many sizes it is.
    """
    found = []
    for seed in SEEDS[:seeds]:
        points = [(math.log(size[along]), math.log(table[label, text][seed]["edge"]))
                  for text, size in chosen.items() if seed in table.get((label, text), {})]
        if len(points) > 1:
            found.append((np.polyfit(*zip(*points), 1)[0].item(), len(points)))
    return found


def at_edge(told):
    """Largest logit, lowest and highest entropy of a layer over log(T!)/T, when last finite."""
    most = max_causal_entropy(told["cell"]["size"]["block_size"])
    for _, _, logit, entropy in reversed(told["history"]):
        if all(map(math.isfinite, [logit, *entropy])):
            break
    return logit, min(entropy) / most, max(entropy) / most


def tell(told):
    return (f"{sweep.told_cell(told['cell'])}: {told['event']}, loss "
            f"{told['history'][-1][1]:.3f}, {told['seconds']:.0f} s for {told['at_once']}")


def report(table, series):
    """Print what was found of each architecture and size, and how the edge moves with size."""
    print(f"\n{'':<34}{'best rate, by seed':<22}{'loss':>7}  {'edge, by seed':<24}"
          f"{'sensitivity':<22}there: logit, lowest and highest entropy over the most")
    for (label, text), found in table.items():
        runs = list(found.values())
        best = " ".join(f"{told['best']:.3g}" for told in runs)
        edges = " ".join(f"{'>=' * told['at_least']}{told['edge']:.3g}" for told in runs)
        sensitivity = sweep.spread([told["sensitivity"] for told in runs])
        logit, low, high = at_edge(runs[0]["row"])
        loss = mean([told["loss"] for told in runs])
        state = " collapse" * (low < 0.1) + " overload" * (high > 0.9)
        print(f"{text + ' ' + label:<34}{best:<22}{loss:>7.3f}  {edges:<24}{sensitivity:<22}"
              f"{logit:.3g}, {low:.2f}, {high:.2f}{state}")
    for along, chosen in series.items():
        print(f"\nslope of the edge over {along}, both as logarithms, by seed")
        for label in dict.fromkeys(label for label, _ in table):
            found = slopes(table, label, along, chosen)
            if found:
                told = [f"{slope:+.2f} of {n} sizes" for slope, n in found]
                print(f"{label:<34}{', '.join(told)}")


def draw(table, series, tried, path):
    """The edge by width and by depth, a line an architecture; loss by rate at the largest size."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, axes = plt.subplots(1, 3, figsize=(14, 4.2), layout="constrained")
    weights = {text: told["row"]["parameters"]
               for (_, text), found in table.items() for told in found.values()}
    largest = max(weights, key=weights.get, default="")
    for place, label in enumerate(dict.fromkeys(label for label, _ in table)):
        colour, marker = COLOURS[place % len(COLOURS)], MARKERS[place % len(MARKERS)]
        for ax, (along, chosen) in zip(axes, series.items()):
            edges = {size[along]: [math.log(told["edge"]) for told in table[label, text].values()]
                     for text, size in chosen.items() if (label, text) in table}
            # Rates are of a grid, so that lines would hide each other if they didn't stand apart.
            points = [(1.02**place * size, math.exp(mean(some))) for size, some in edges.items()]
            ax.plot(*np.array(sorted(points)).reshape(-1, 2).T, color=colour, marker=marker,
                    markersize=5, label=label)
        for told in table.get((label, largest), {}).values():
            axes[2].plot(*np.array(told["losses"]).T, color=colour, marker=marker, markersize=4,
                         linewidth=1)
    shown = [told["edge"] for found in table.values() for told in found.values()] or tried
    for ax, (along, chosen) in zip(axes, series.items()):
        ax.set(xscale="log", yscale="log", ylabel="learning rate that breaks",
               xlabel="width" if along == "n_embd" else "layers")
        sides = sorted(size[along] for size in chosen.values())
        # The grid's rates are the only edges that one seed can have.
        for axis, ticks in ((ax.xaxis, sides), (ax.yaxis, tried)):
            axis.set_ticks(ticks, [f"{tick:g}" for tick in ticks])
            axis.set_ticks([], minor=True)
        ax.set_ylim(min(shown) / 1.2, max(shown) * 1.2)
    axes[2].set(xscale="log", xlabel="learning rate", ylabel="held-out loss, nats",
                title=f"{largest}: where a line ends, it diverged")
    axes[2].set_xticks(tried, [f"{rate:g}" for rate in tried], fontsize=7)
    axes[2].set_xticks([], minor=True)
    fig.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=7,
               frameon=False)
    write_figure(fig, str(path))


def groups_of(bases, results, tried):
    """The cells that `results` lacks, in groups: the first group of each base, then the second."""
    rounds = {}
    for base in bases:
        missing = [cell for seed in SEEDS[:seeds] for rate in tried
                   if not results.of(cell := sweep.at_rate(base, rate, seed))]
        room = at_once * 6 * 128 // (base["size"]["n_layer"] * base["size"]["n_embd"])
        most = max(1, room // len(tried)) * len(tried)
        for i in range(0, len(missing), most):
            rounds.setdefault(i, []).append(missing[i:i + most])
    return [group for i in sorted(rounds) for group in rounds[i]]


def main():
    configure(globals())
    within(globals(), seeds=(1, 3), steps=(1, 10**6), batch=(1, 10**5), tested=(1, 10**6),
           warmup=(0, 1), std=(0, 10), broken=(0, 100), at_once=(1, 10**4), jobs=(1, 1024),
           seconds=(0, 10**9))
    deadline = time.time() + seconds
    tried = sorted(set(cells.numbers(rates, "rates")))
    if len(tried) < 2:
        die("rates must be two at least", 2)
    shapes = {text: cells.size_of(text, WIDTH_OF_HEAD) for text in sizes.split(",")}
    try:
        longest = max(size["block_size"] for size in shapes.values())
        *BINS[:], meta, _, _ = open_dataset(data_dir, dataset, longest)
    except (OSError, ValueError) as e:
        die(e, 2)
    results = sweep.Results(Path(into) / "edge.json", {
        "sizes": sizes, "rates": tried, "steps": steps, "batch": batch, "dataset": dataset,
        "data_sha256": meta["sha256"], "vocabulary": meta["vocab_size"]})
    bases = {}
    for text, size in shapes.items():
        size |= {"vocab_size": meta["vocab_size"]}
        softmax_or_uniform = [r for r in cells.architectures(size["n_layer"])
                              if "positional_layers" not in r["flags"]]
        for r in cells.some_of(softmax_or_uniform, archs):
            bases[r["label"], text] = {
                "task": "edge", "label": r["label"], "config": r["config"], "flags": r["flags"],
                "size": size, "steps": steps, "batch": batch,
                "std": std or size["n_embd"] ** -0.5, "warmup": warmup}
    groups = groups_of(bases.values(), results, tried)
    sweep.carry_out([(finish, group, deadline) for group in groups], results, jobs, tell)
    table = {key: found for key, base in bases.items() if (found := by_seed(results, base, tried))}
    middle = next(iter(shapes.values()))
    series = {along: {text: size for text, size in shapes.items() if size[fixed] == middle[fixed]}
              for along, fixed in (("n_embd", "n_layer"), ("n_layer", "n_embd"))}
    report(table, series)
    try:
        draw(table, series, tried, Path(into) / "edge.png")
    except OSError as e:
        die(e)


if __name__ == "__main__":
    main()
