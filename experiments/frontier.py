"""
What first layers without softmax cost in perplexity, and save in bytes of a private next token.

    python experiments/reproduce.py --only=frontier   # trains the models
    python experiments/frontier.py                    # runs them privately, converts trained ones
    python experiments/frontier.py --into=results     # how results/ got frontier.json and .png

Each model of the first seed runs privately once, with its trained weights. A trained model with
softmax everywhere is also converted, half of its layers (train.py --init_from): its perplexity
right after the switch, and after 5% and 20% of its training again, each a schedule of its own. What
is there already, in the runs' folders, is not done again.
"""
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "experiments")]
from configurator import configure, die, end_on_signals  # noqa: E402

end_on_signals()

import json  # noqa: E402
import os  # noqa: E402
import subprocess  # noqa: E402
from glob import glob  # noqa: E402

import reproduce  # noqa: E402
from draw import COLOURS, write_figure, write_whole  # noqa: E402
from plot import read_log  # noqa: E402
from rows import mean  # noqa: E402
from tables import SEEDS, TABLES  # noqa: E402

out_dir = "out/reproduce"  # where reproduce.py's runs live
data_dir = "data"  # where datasets lie
into = ""  # folder for frontier.json and frontier.png; out_dir if empty
private = "results/private_frontier_*.json"  # bench_spu.py's --json at GPT-2 small's size, to draw

DIVERGED = 3  # train.py's exit status
SHARES = (0.05, 0.2)  # of the training that a converted model gets again
MEANING = {"uniform_layers": "average", "positional_layers": "by position"}
STYLES = {"uniform_layers": "o:", "positional_layers": "s-"}


def call(script, *flags):
    """
    Run a script of this repository, with its output where ours goes. Dies if it fails; a run of
    train.py that diverged is a result.
    """
    status = subprocess.run([sys.executable, script, *map(str, flags)], cwd=ROOT).returncode
    if status and not (script == "train.py" and status == DIVERGED):
        die(f"{script} failed, see above")


def private_run(folder):
    """bench_spu.py's result of the checkpoint in folder."""
    told = folder / "private.json"
    if not told.exists():
        call("bench_spu.py", f"--ckpt={folder / 'ckpt.pt'}", f"--json={told}")
    return json.loads(told.read_text())[0]


def convert(folder, config, flags, without):
    """
    {share of the training again: perplexity} of the run in folder with layers made `without`
    softmax, {flag: k}; 0 is among the shares; None of one that diverges.
    """
    found = {}
    base = reproduce.BASE["cpu"]
    for share in SHARES:
        name = "".join(f"{key}{k}" for key, k in without.items())
        target = folder / f"{name}_{share:g}"
        steps = round(share * base["max_iters"])
        settings = base | flags | without | {
            "init_from": folder / "ckpt.pt", "max_iters": steps, "eval_interval": steps,
            "seed": SEEDS[0], "out_dir": target, "data_dir": data_dir}
        if not reproduce.is_over(read_log(target / "log.jsonl")):
            call("train.py", f"config/{config}.py",
                 *(f"--{key}={value}" for key, value in settings.items()))
        log = read_log(target / "log.jsonl")
        found["0"], *later = [r["val_ppl"] for r in log if r["event"] == "eval"]
        found[f"{share:g}"] = later[-1] if log[-1]["event"] == "done" else None
    return found


def seen(r):
    """A row of the table "frontier" with what it costs, or None if it isn't trained."""
    runs = [reproduce.result(r["config"], r["flags"], seed) for seed in r["seeds"]]
    runs = {run["seed"]: run["val_ppl"] for run in runs if run and run["event"] == "done"}
    folder = reproduce.folder(r["config"], r["flags"], SEEDS[0])
    without = {key: k for key, k in r["flags"].items() if key.endswith("_layers")}
    if SEEDS[0] not in runs or not (folder / "ckpt.pt").exists():
        return None
    told = private_run(folder)
    keys = ("bytes_total", "rounds", "seconds", "bytes_by_kind", "max_abs_err")
    row = {"label": r["label"], "config": r["config"], "without_softmax": without, "val_ppl": runs,
           "final_layernorm": r["flags"].get("final_layernorm", True),
           "private": {key: told[key] for key in keys}}
    trained = {key: value for key, value in r["flags"].items() if key not in without}
    if sum(without.values()) == reproduce.BASE["cpu"]["n_layer"] // 2 and row["final_layernorm"]:
        whole = reproduce.folder(r["config"], trained, SEEDS[0])
        row["converted"] = convert(whole, r["config"], trained, without)
    return row


def draw(rows, large, path):
    """
    Perplexity against MB of one private token, a line for each configuration and kind of layer; and
    the MB at GPT-2 small's size.
    """
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, (left, right) = plt.subplots(1, 2, figsize=(11, 4), width_ratios=(3, 2),
                                      layout="constrained")
    lines = {}
    for row in rows:
        for key in row["without_softmax"] or ("uniform_layers", "positional_layers"):
            lines.setdefault((row["config"], key, row["final_layernorm"]), []).append(row)
    configs = list(dict.fromkeys(row["config"] for row in rows))
    for (config, key, final_layernorm), mine in lines.items():
        colour = COLOURS[configs.index(config)]
        x = [row["private"]["bytes_total"] / 1e6 for row in mine]
        y = [mean(row["val_ppl"].values()) for row in mine]
        name = mine[0]["label"].partition(",")[0] + ("" if final_layernorm else ", no ln_f")
        left.plot(x, y, STYLES[key], color=colour, label=f"{name}: {MEANING[key]}",
                  fillstyle="full" if final_layernorm else "none")
        for row, x_i, y_i in zip(mine, x, y):
            left.plot([x_i] * len(row["val_ppl"]), list(row["val_ppl"].values()), "_", color=colour)
            k = sum(row["without_softmax"].values())
            left.annotate(str(k), (x_i, y_i), xytext=(4, 4), textcoords="offset points",
                          color=colour, fontsize=8)
    left.set(xlabel="MB of one private next token", ylabel="validation perplexity, log scale",
             title="4 layers, width 128, V = 2048;\nnumbers: layers without softmax",
             yscale="log")
    left.yaxis.set_major_formatter("{x:g}")
    left.yaxis.set_minor_formatter("{x:g}")
    left.legend(frameon=False)
    names = [r["arch"] for r in large]
    sizes = [r["bytes_total"] / 1e6 for r in large]
    right.barh(names, sizes, 0.6, color="0.5")
    for name, size in zip(names, sizes):
        right.text(size, name, f" {size:,.0f}", va="center")
    right.invert_yaxis()
    right.margins(x=0.2)
    right.spines[["top", "right"]].set_visible(False)
    right.set(xlabel="MB of one private next token", title="GPT-2 small's size, T = 128")
    write_figure(fig, str(path))


def main():
    global out_dir, data_dir
    configure(globals())
    out_dir, data_dir = os.path.abspath(out_dir), os.path.abspath(data_dir)
    reproduce.out_dir, reproduce.data_dir = out_dir, data_dir
    folder = Path(into or out_dir)
    rows = [row for row in map(seen, TABLES["frontier"][2]) if row]
    if not rows:
        die(f"no trained model in {out_dir}: python experiments/reproduce.py --only=frontier")
    for row in rows:
        told = ", ".join(f"{value:.2f}" for value in row["val_ppl"].values())
        line = f"{row['label']:<28} {row['private']['bytes_total'] / 1e6:7.1f} MB  {told}"
        if "converted" in row:
            line += f"; converted {row['converted']}"
        print(line)
    files = sorted(glob(str(ROOT / private)))
    large = [r for file in files for r in json.loads(Path(file).read_text())]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_whole(str(folder / "frontier.json"), (json.dumps(rows, indent=1) + "\n").encode())
        draw(rows, large, folder / "frontier.png")
    except OSError as e:
        die(e)


if __name__ == "__main__":
    main()
