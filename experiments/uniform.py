"""
What first layers that average cost in perplexity, and save in bytes of one private next token.

    python experiments/reproduce.py --only=uniform   # trains the models: the first k layers uniform
    python experiments/uniform.py                    # runs them privately, converts trained ones
    python experiments/uniform.py --into=results     # how results/ got its uniform.json and .png

Each model of the first seed runs privately once, with its trained weights. Each configuration's
model without uniform layers is also converted (train.py --init_from --uniform_layers): its
perplexity right after the switch, and after 5% and 20% of its training again, each a schedule of
its own. What is there already, in the runs' folders, is not done again.
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
from plot import COLOURS, read_log, write_figure, write_whole  # noqa: E402
from tables import SEEDS, TABLES  # noqa: E402

out_dir = "out/reproduce"  # where reproduce.py's runs live
data_dir = "data"  # where datasets lie
into = ""  # folder for uniform.json and uniform.png; out_dir if empty
private = "results/private_uniform_*.json"  # bench_spu.py's --json at GPT-2 small's size, to draw

SHARES = (0.05, 0.2)  # of the training that a converted model gets again


def call(script, *flags):
    """Run a script of this repository, with its output where ours goes. Dies if it fails."""
    if subprocess.run([sys.executable, script, *map(str, flags)], cwd=ROOT).returncode:
        die(f"{script} failed, see above")


def private_run(folder):
    """bench_spu.py's result of the checkpoint in folder."""
    told = folder / "private.json"
    if not told.exists():
        call("bench_spu.py", f"--ckpt={folder / 'ckpt.pt'}", f"--json={told}")
    return json.loads(told.read_text())[0]


def evaluations(folder):
    return [r for r in read_log(folder / "log.jsonl") if r["event"] == "eval"]


def convert(folder, config, flags, k):
    """
    {share of the training again: perplexity} of the run in folder with its first k layers made
    uniform, 0 among the shares; None of one that diverges.
    """
    found = {}
    base = reproduce.BASE["cpu"]
    for share in SHARES:
        target = folder / f"uniform{k}_{share:g}"
        steps = round(share * base["max_iters"])
        settings = base | flags | {
            "init_from": folder / "ckpt.pt", "uniform_layers": k, "max_iters": steps,
            "eval_interval": steps, "seed": SEEDS[0], "out_dir": target, "data_dir": data_dir}
        if not reproduce.is_over(read_log(target / "log.jsonl")):
            call("train.py", f"config/{config}.py",
                 *(f"--{key}={value}" for key, value in settings.items()))
        first, *_, last = evaluations(target)
        found["0"] = first["val_ppl"]
        over = read_log(target / "log.jsonl")[-1]["event"] == "done"
        found[f"{share:g}"] = last["val_ppl"] if over else None
    return found


def seen(r):
    """A row of the table "uniform" with what it costs, or None if it isn't trained."""
    runs = [reproduce.result(r["config"], r["flags"], seed) for seed in r["seeds"]]
    runs = {run["seed"]: run["val_ppl"] for run in runs if run and run["event"] == "done"}
    folder = reproduce.folder(r["config"], r["flags"], SEEDS[0])
    k = r["flags"].get("uniform_layers", 0)
    if SEEDS[0] not in runs or not (folder / "ckpt.pt").exists():
        return None
    told = private_run(folder)
    keys = ("bytes_total", "rounds", "seconds", "bytes_by_kind", "max_abs_err")
    row = {"label": r["label"], "config": r["config"], "k": k, "val_ppl": runs,
           "private": {key: told[key] for key in keys}}
    trained = {key: value for key, value in r["flags"].items() if key != "uniform_layers"}
    if k:
        row["converted"] = convert(reproduce.folder(r["config"], trained, SEEDS[0]), r["config"],
                                   trained, k)
    return row


def draw(rows, large, path):
    """Perplexity against MB of one private token, a line each configuration; GPT-2 small's MB."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, (left, right) = plt.subplots(1, 2, figsize=(11, 4), width_ratios=(3, 2),
                                      layout="constrained")
    configs = list(dict.fromkeys(row["config"] for row in rows))
    for config, colour in zip(configs, COLOURS):
        mine = [row for row in rows if row["config"] == config]
        x = [row["private"]["bytes_total"] / 1e6 for row in mine]
        ys = [list(row["val_ppl"].values()) for row in mine]
        left.plot(x, [sum(y) / len(y) for y in ys], "o-", color=colour,
                  label=mine[0]["label"].partition(",")[0])
        for row, x_i, y in zip(mine, x, ys):
            left.plot([x_i] * len(y), y, "_", color=colour)
            left.annotate(str(row["k"]), (x_i, sum(y) / len(y)), xytext=(4, 4),
                          textcoords="offset points", color=colour, fontsize=8)
    left.set(xlabel="MB of one private next token", ylabel="validation perplexity, log scale",
             title="4 layers, width 128, V = 2048, k of them uniform", yscale="log")
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
    rows = [row for row in map(seen, TABLES["uniform"][2]) if row]
    if not rows:
        die(f"no trained model in {out_dir}: python experiments/reproduce.py --only=uniform")
    for row in rows:
        told = ", ".join(f"{value:.2f}" for value in row["val_ppl"].values())
        line = f"{row['label']:<28} {row['private']['bytes_total'] / 1e6:7.1f} MB  {told}"
        if "converted" in row:
            line += f"; converted {row['converted']}"
        print(line)
    files = sorted(glob(str(ROOT / private)))
    large = [r for file in files for r in json.loads(Path(file).read_text())]
    try:
        write_whole(str(folder / "uniform.json"), (json.dumps(rows, indent=1) + "\n").encode())
        draw(rows, large, folder / "uniform.png")
    except OSError as e:
        die(f"can't write into {folder}: {e.strerror}")


if __name__ == "__main__":
    main()
