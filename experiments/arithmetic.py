"""
Does low entropy help arithmetic? Of attention, by the regularizer's thresholds, and of the choice
of tokens, as the paper's Appendix D supposes. Sums and products by digits.

    python experiments/arithmetic.py --into=results --jobs=14   # all, minutes on a GPU
    python experiments/arithmetic.py --tasks=add2r --archs=SM+LN+G --seeds=1 --thresholds=False

A task is its operation, the digits of its operands at most, and r where the answer is written from
its last digit on: add3 is 012+345=0357, add3r 012+345=7530, mul2r 12*34=8040. An eighth of the
problems, by a hash of both operands, is never trained on, and asked in the end.

Of every architecture, at the learning rate that its runs on a seed of their own chose, and of the
regularizer with its thresholds raised, lowered and frozen, and of none, at EReg's rate:

- exact match of whole answers, by the longer operand's digits: the likeliest token each; what
  sampling at temperature 1 would expect; and what sampling guided by entropy would, at temperature
  H / log V, H the entropy of the next token
- the head that looks most from an answer's digit to the operands' digits of the same place: its
  weight there, and its entropy at the answer

Writes arithmetic.json, which a rerun completes, and arithmetic.png.
"""
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "experiments")]
from configurator import configure, die, end_on_signals, within  # noqa: E402

end_on_signals()

import math  # noqa: E402
import re  # noqa: E402

import torch  # noqa: E402

import cells  # noqa: E402
import sweep  # noqa: E402
from draw import COLOURS, write_figure  # noqa: E402
from rows import lost, mean  # noqa: E402
from tables import EREG, NAMES, T as SM_T, TUNED, row  # noqa: E402

into = "out/questions"  # folder for arithmetic.json and arithmetic.png
tasks = "add3r,add3,mul2r"  # the most important first
archs = ""  # some of the architectures, comma-separated; all if empty
thresholds = True  # also EReg with other thresholds
rates = "0.001,0.003"  # learning rates tried on the tuning seed
seeds = 3  # seeds reported of each, at most 3
n_layer = 2  # layers
n_embd = 128  # width
n_head = 4  # heads
steps = 1000  # training steps of a cell, fewer where it solves the task
batch = 512  # problems a step
tested = 2048  # held-out problems of each length that are asked, fewer where there are fewer
jobs = 2  # cells side by side
seconds = 10**6  # no cell starts after so many

CHARACTERS = "0123456789+*="
HELD_OUT = 8  # one problem of so many
LOOKED_AT = 256  # problems whose attention is looked at
VARIANTS = {"threshold 0.2": dict(threshold_init=0.2), "threshold 0.8": dict(threshold_init=0.8),
            "frozen at 0.2": dict(threshold_init=0.2, threshold_frozen=True),
            "frozen at 0.5": dict(threshold_init=0.5, threshold_frozen=True),
            "frozen at 0.8": dict(threshold_init=0.8, threshold_frozen=True)}


# ---------------------------------------------------------------------------------------- the task
def parsed(task):
    """(operation, digits of an operand, digits of an answer, whether that is reversed)."""
    found = re.fullmatch(r"(add|mul)([1-6])(r?)", task)
    if not found:
        die(f"tasks must be like add3, add3r or mul2r, up to 6 digits, and one is {task!r}", 2)
    name, digits = found[1], int(found[2])
    return name, digits, digits + 1 if name == "add" else 2 * digits, found[3] == "r"


def held_out(a, b):
    """Whether a problem is one of those that are never trained on: a hash of both operands."""
    mixed = (a * 0x9E3779B1 + b * 0x85EBCA77 + 0x27D4EB2F) % 2**32
    mixed = (mixed ^ mixed >> 15) * 0x2C1B3C6D % 2**32
    return (mixed >> 16) % HELD_OUT == 0


def drawn(n, digits, generator):
    """Operands a and b (n,) below 10^length, where every length up to `digits` is as likely."""
    length = torch.randint(1, digits + 1, (n,), generator=generator)
    a, b = torch.rand(2, n, generator=generator, dtype=torch.float64) * 10 ** length
    return a.long(), b.long()


def places_of(number, n):
    """The last n decimal digits of number (N,), from the last one on: (N, n)."""
    return number[:, None] // 10 ** torch.arange(n) % 10


def written(task, a, b):
    """A task's problems with their answers, as tokens (N, T + 1)."""
    name, digits, length, backwards = parsed(task)
    answer = places_of(a + b if name == "add" else a * b, length)                   # (N, length)
    sign = torch.full((len(a), 1), CHARACTERS.index("+" if name == "add" else "*"))
    equals = torch.full_like(sign, CHARACTERS.index("="))
    a, b = places_of(a, digits).flip(1), places_of(b, digits).flip(1)               # (N, digits)
    return torch.cat((a, sign, b, equals, answer if backwards else answer.flip(1)), 1)


def split(task, whole):
    """x, y (N, T) of written problems: y is the answer's next digit, and -1 in the problem."""
    y = whole[:, 1:].clone()
    y[:, :-parsed(task)[2]] = -1
    return whole[:, :-1], y


def make(cell, n, generator):
    """x, y (n, T) of problems that are not held out."""
    a, b = drawn(2 * n + 100, parsed(cell["task"])[1], generator)
    kept = (~held_out(a, b)).nonzero()[:n, 0]
    return split(cell["task"], written(cell["task"], a[kept], b[kept]))


def asked(task, generator):
    """{length: held-out problems, each once}: their tokens (N, T + 1), by the longer operand."""
    digits = parsed(task)[1]
    a, b = drawn(HELD_OUT * tested * digits, digits, generator)
    a, b = torch.stack((a, b), 1)[held_out(a, b)].unique(dim=0).T
    larger = torch.maximum(a, b)
    found = {}
    for length in range(1, digits + 1):
        least = 10 ** (length - 1) if length > 1 else 0
        mine = (larger >= least) & (larger < 10 ** length)
        found[length] = written(task, a[mine], b[mine])
    return {length: whole for length, whole in found.items() if len(whole)}


# ---------------------------------------------------------------------------------------- measured
def matches(logits, wanted):
    """
    (greedy, sampled, guided): the chance of a whole answer, from logits (N, n, V) after the right
    prefixes and the right tokens `wanted` (N, n). A wrong token ends it, so that these suffice.
    """
    greedy = (logits.argmax(-1) == wanted).all(1).double().mean().item()
    log_p = logits.double().log_softmax(-1)                                        # (N, n, V)
    H = -(log_p.exp() * log_p).sum(-1, keepdim=True)                               # (N, n, 1)
    guided = (log_p / (H / math.log(logits.shape[-1])).clamp(min=1e-6)).log_softmax(-1)
    expected = [p.gather(2, wanted[..., None]).sum((1, 2)).exp().mean().item()
                for p in (log_p, guided)]
    return greedy, *expected


def aligned(task):
    """Positions of x at which an operand's places are answered, and the two digits: (n), (n, 2)."""
    _, digits, length, backwards = parsed(task)
    place = torch.arange(digits)
    step = place if backwards else length - 1 - place
    return 2 * digits + 1 + step, torch.stack((digits - 1 - place, 2 * digits - place), 1)


@torch.no_grad()
def study(cell, model):
    """Exact match by length on held-out problems, and the head that aligns digits."""
    task, device = cell["task"], model.wte.weight.device
    length = parsed(task)[2]
    problems = asked(task, torch.Generator().manual_seed(0))
    found = {}
    for digits, whole in problems.items():
        x, y = split(task, whole)
        logits = torch.cat([model(some.to(device))[0][:, -length:].float().cpu()
                            for some in x.split(cell["batch"])])
        found[digits] = matches(logits, y[:, -length:])
    x = split(task, problems[max(problems)][:LOOKED_AT])[0]
    queries, places = aligned(task)
    heads = cells.heads_on(model.cpu(), x, queries.expand(len(x), -1),
                           places.expand(len(x), -1, -1))
    names = ("greedy", "sampled", "guided")
    by_length = {name: {digits: values[i] for digits, values in found.items()}
                 for i, name in enumerate(names)}
    return {"score": found[max(found)][0], "asked": {k: len(v) for k, v in problems.items()},
            **by_length, "aligning": cells.best_head(*heads), "entropy": heads[1].tolist()}


def draw(groups, path):
    """Exact match of the longest problems against the mean entropy at the answer, by task."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, axes = plt.subplots(1, len(groups), figsize=(4.2 * len(groups) + 2, 4), squeeze=False,
                             layout="constrained")
    labels = list(sweep.by_label(told for rows in groups.values() for told in rows))
    for ax, (task, rows) in zip(axes[0], groups.items()):
        for told in (told for told in rows if told["event"] == "done"):
            place = labels.index(told["cell"]["label"])
            entropy = mean([mean(heads) for heads in told["entropy"]])
            ax.plot(entropy, 100 * told["score"], "osv"[place // len(COLOURS) % 3],
                    color=COLOURS[place % len(COLOURS)], markersize=5)
        ax.set(title=task, xlabel="mean entropy at the answer, nats", ylim=(-4, 104))
    for place, label in enumerate(labels):
        axes[0][-1].plot([], [], "osv"[place // len(COLOURS) % 3],
                         color=COLOURS[place % len(COLOURS)], label=label)
    axes[0][0].set_ylabel("exact match, longest held-out problems, %")
    axes[0][-1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    write_figure(fig, str(path))


def cell_of(r, task):
    _, digits, length, _ = parsed(task)
    size = dict(n_layer=n_layer, n_embd=n_embd, n_head=n_head, vocab_size=len(CHARACTERS),
                block_size=2 * digits + 1 + length)
    return {"task": task, "label": r["label"], "config": r["config"],
            "flags": r["flags"], "size": size, "steps": steps, "batch": batch}


def groups_of(names):
    """Every task's architectures, then every task's variants of EReg, as sweep() has them."""
    rows = cells.some_of(cells.architectures(n_layer), archs)
    found = [[(cell_of(r, task), cell_of(r, task)) for r in rows] for task in names]
    if not thresholds:
        return found
    ereg = row(NAMES[EREG], EREG, TUNED[EREG])
    others = [row(f"EReg {name}", EREG, TUNED[EREG], **flags) for name, flags in VARIANTS.items()]
    others.append(row(NAMES[SM_T], SM_T, TUNED[EREG]))
    return found + [[(cell_of(r, task), cell_of(ereg, task)) for r in others] for task in names]


def table(task, rows):
    print(f"\n{task:<28}{'rate':>8}  {'exact match, by digits':<26}{'steps':>6}{'sampled':>8}"
          f"{'guided':>8}  aligning head: weight, entropy")
    for label, mine in sweep.by_label(rows).items():
        done = [told for told in mine if told["event"] == "done"]
        if not done:
            print(f"{label:<28}  diverged")
            continue
        by_digits = [f"{k}: {mean([told['greedy'][k] for told in done]):.2f}"
                     for k in done[0]["greedy"]]
        taken = mean([told["history"][-1][0] for told in done])
        longest = max(done[0]["greedy"])
        others = [mean([told[key][longest] for told in done]) for key in ("sampled", "guided")]
        print(f"{label:<28}{done[0]['cell']['flags']['learning_rate']:>8g}  "
              f"{', '.join(by_digits):<26}{taken:>6.0f}{others[0]:>8.2f}{others[1]:>8.2f}  "
              f"{cells.tell_head(done[0]['aligning'])}{lost(mine)}")


def main():
    configure(globals())
    within(globals(), seeds=(1, 3), steps=(1, 10**6), batch=(1, 10**5), tested=(16, 10**5),
           n_layer=(2, 64), jobs=(1, 1024), seconds=(0, 10**9))
    names = tasks.split(",")
    for task in names:
        parsed(task)
    tried = cells.numbers(rates, "rates")
    scale = {key: globals()[key] for key in ("tasks", "n_layer", "n_embd", "n_head", "steps",
                                             "batch")}
    results = sweep.Results(Path(into) / "arithmetic.json", scale)
    found = sweep.sweep(groups_of(names), tried, seeds, results, make, study, jobs, seconds)
    merged = {task: sum(found[place::len(names)], []) for place, task in enumerate(names)}
    for task, rows in merged.items():
        table(task, rows)
    try:
        draw(merged, Path(into) / "arithmetic.png")
    except OSError as e:
        die(e)


if __name__ == "__main__":
    main()
