"""
Does taking nonlinearities away cost recall? Multi-query associative recall (arXiv 2312.04927).

    python experiments/recall.py --into=results --jobs=14                  # all, minutes on a GPU
    python experiments/recall.py --sizes=2x64x32 --archs=SM+LN+G --seeds=1  # the smallest cell

A sequence tells pairs, key and value, T/4 of them, and then asks for one of the keys at every
position: the token to predict there is the value that followed the key at first. Keys and values
are drawn anew for each sequence, so that nothing but the context tells the answer. In training a
sequence has 1 to T/4 pairs; accuracy is measured on T/4.

Of every architecture, at the learning rate that its runs on a seed of their own chose: accuracy on
new sequences; the head that looks most at the answer, from the query to the value that follows the
key's first occurrence, with its weight there and its entropy at the queries; and the head that
looks most from a value to its key, by which the value comes to know the key. Uniform heads look at
all positions alike: the last row has no others.

Writes recall.json, which a rerun completes, and recall.png.
"""
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "experiments")]
from configurator import configure, die, end_on_signals, within  # noqa: E402

end_on_signals()

import torch  # noqa: E402

import cells  # noqa: E402
import sweep  # noqa: E402
from draw import COLOURS, write_figure  # noqa: E402
from tables import NAMES, SC, TUNED, row  # noqa: E402

into = "out/questions"  # folder for recall.json and recall.png
sizes = "2x64x32,4x64x32,2x128x32,2x128x64"  # layers x width x context, the most important first
archs = ""  # some of the architectures, comma-separated; all if empty
rates = "0.001,0.003"  # learning rates tried on the tuning seed
seeds = 3  # seeds reported of each, at most 3
steps = 1500  # training steps of a cell, fewer where it solves the task
long_steps = 4000  # the same where the context is longer than 32
batch = 128  # sequences a step
tokens = 32  # V, half of them keys and half values
tested = 1024  # new sequences that accuracy is measured on
jobs = 2  # cells side by side
seconds = 10**6  # no cell starts after so many

WIDTH_OF_HEAD = 32
LOOKED_AT = 64  # sequences whose attention is looked at


# ---------------------------------------------------------------------------------------- the task
def generated(n, T, V, generator, least=None):
    """
    (x, pair, told) of n sequences: x (n, T); the pair (n, T) that a position asks for, its key
    at 2 * pair and its value behind; and whether a position still tells a pair, (n, T). A sequence
    holds from `least` to T/4 pairs, T/4 where that is None.
    """
    most = T // 4
    keys = torch.rand(n, V // 2, generator=generator).argsort(1)[:, :most]           # (n, T/4)
    values = torch.randint(V // 2, V, (n, most), generator=generator)                # (n, T/4)
    pairs = torch.randint(least or most, most + 1, (n, 1), generator=generator)      # (n, 1)
    pair = (torch.rand(n, T, generator=generator) * pairs).long()                    # (n, T)
    position = torch.arange(T)
    both = torch.stack((keys, values), 2).flatten(1)                                 # (n, T/2)
    told = position < 2 * pairs                                                      # (n, T)
    x = torch.where(told, both[:, position % (2 * most)], keys.gather(1, pair))      # (n, T)
    return x, pair, told


def make(cell, n, generator, least=1):
    """x, y (n, T): y is the answer where x asks, and -1 elsewhere. Few pairs help to learn many."""
    T, V = cell["size"]["block_size"], cell["size"]["vocab_size"]
    x, pair, told = generated(n, T, V, generator, least)
    return x, torch.where(told, -1, x.gather(1, 2 * pair + 1))


# ---------------------------------------------------------------------------------------- measured
@torch.no_grad()
def study(cell, model):
    """Accuracy on new sequences of the most pairs, and the heads that carry recall."""
    generator = torch.Generator().manual_seed(0)
    device = model.wte.weight.device
    T, V = cell["size"]["block_size"], cell["size"]["vocab_size"]
    right, asked = 0, 0
    x, y = make(cell, tested, generator, least=None)
    for some, wanted in zip(x.split(cell["batch"]), y.split(cell["batch"])):
        guess = model(some.to(device))[0].argmax(-1).cpu()             # (B, T)
        right += (guess == wanted)[wanted >= 0].sum().item()
        asked += (wanted >= 0).sum().item()
    x, pair, _ = generated(LOOKED_AT, T, V, generator)
    told = T // 2
    queries = torch.arange(told, T).expand(LOOKED_AT, -1)              # (N, T/2)
    to_value = cells.heads_on(model.cpu(), x, queries, 2 * pair[:, told:, None] + 1)
    values = torch.arange(1, told, 2).expand(LOOKED_AT, -1)            # (N, T/4)
    to_key = cells.heads_on(model, x, values, values[..., None] - 1)
    return {"score": right / asked, "to_value": cells.best_head(*to_value),
            "to_key": cells.best_head(*to_key), "weight_on_value": to_value[0].tolist(),
            "entropy_at_query": to_value[1].tolist()}


def draw(groups, path):
    """
    Every seed's accuracy and steps by architecture, a colour for each size; weight by entropy.
    """
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, (left, middle, right) = plt.subplots(1, 3, figsize=(14, 4.5), layout="constrained")
    labels = list(sweep.by_label(told for rows in groups.values() for told in rows))
    for place, (size, rows) in enumerate(groups.items()):
        colour = COLOURS[place % len(COLOURS)]
        for told in rows:
            height = labels.index(told["cell"]["label"]) + 0.15 * (place - (len(groups) - 1) / 2)
            left.plot(100 * told["score"], height, "o", color=colour, markersize=4)
            middle.plot(told["history"][-1][0], height, "o", color=colour, markersize=4)
            if told["event"] == "done":
                head = told["to_value"]
                right.plot(head["entropy"], 100 * head["weight"], "o", color=colour, markersize=4)
        right.plot([], [], "o", color=colour, label=size)
    left.set(xlabel="accuracy at the queries, %", xlim=(-3, 103), yticks=range(len(labels)))
    left.set_yticklabels(labels)
    middle.set(xlabel="steps until it was solved or ended", yticks=range(len(labels)),
               yticklabels=[])
    middle.set_xscale("log", base=2)
    middle.xaxis.set_major_formatter("{x:.0f}")
    for ax in (left, middle):
        ax.set_ylim(len(labels) - 0.5, -0.5)
        ax.grid(axis="y", linewidth=0.3)
    right.set(xlabel="its entropy at the queries, nats", ylabel="weight on the right value, %",
              title="the head that looks most at the answer")
    right.legend(fontsize=8, title="layers x width x T", loc="upper right")
    write_figure(fig, str(path))


def rows_of(size):
    """Every architecture at a size, and one whose heads are all uniform."""
    uniform = row(f"{NAMES[SC]} all uniform", SC, TUNED[SC], uniform_layers=size["n_layer"])
    return [*cells.architectures(size["n_layer"]), uniform]


def cell_of(r, size):
    mine = steps if size["block_size"] <= 32 else long_steps
    return {"task": "recall", "label": r["label"], "config": r["config"], "flags": r["flags"],
            "size": size, "steps": mine, "batch": batch}


def table(groups):
    print(f"{'':<34}{'rate':>7}  {'accuracy':<21}{'steps':<20}"
          f"{'query to value: head, weight, entropy':<39}value to key")
    for size, rows in groups.items():
        for label, mine in sweep.by_label(rows).items():
            heads = [cells.tell_head(mine[0].get(key)) for key in ("to_value", "to_key")]
            accuracy = sweep.spread([told["score"] for told in mine])
            taken = sweep.spread([told["history"][-1][0] for told in mine], "{:.0f}")
            rate = mine[0]["cell"]["flags"]["learning_rate"]
            print(f"{size + ' ' + label:<34}{rate:>7g}  {accuracy:<21}{taken:<20}{heads[0]:<39}"
                  f"{heads[1]}")


def main():
    configure(globals())
    within(globals(), seeds=(1, 3), steps=(1, 10**6), long_steps=(1, 10**6), batch=(1, 10**5),
           tokens=(4, 2**16), tested=(1, 10**6), jobs=(1, 1024), seconds=(0, 10**9))
    tried = cells.numbers(rates, "rates")
    results = sweep.Results(Path(into) / "recall.json",
                            {"sizes": sizes, "steps": steps, "long_steps": long_steps,
                             "batch": batch, "vocabulary": tokens})
    named = {}
    for text in sizes.split(","):
        size = cells.size_of(text, WIDTH_OF_HEAD) | {"vocab_size": tokens}
        if size["block_size"] not in range(4, 2 * tokens + 1, 4):
            die(f"sizes: a context must be a multiple of 4, at most {2 * tokens} with "
                f"tokens={tokens}, and is {size['block_size']}", 2)
        chosen = cells.some_of(rows_of(size), archs)
        named[text] = [(cell_of(r, size), cell_of(r, size)) for r in chosen]
    found = sweep.sweep(list(named.values()), tried, seeds, results, make, study, jobs, seconds)
    table(dict(zip(named, found)))
    try:
        draw(dict(zip(named, found)), Path(into) / "recall.png")
    except OSError as e:
        die(e)


if __name__ == "__main__":
    main()
