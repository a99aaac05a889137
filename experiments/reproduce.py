"""
Train what the paper's tables and figures are about, and tabulate it.

    python experiments/reproduce.py                            # all that isn't done yet, two days
    python experiments/reproduce.py --only=quick               # the smallest table, ten minutes
    python experiments/reproduce.py --only=architectures,gamma # some of the tables
    python experiments/reproduce.py --only=paper_size          # the one that needs a GPU
    python experiments/reproduce.py --only=none                # tables of what is there
    python experiments/reproduce.py --scale=gpu --jobs=1       # GPT-2 small, into out/reproduce_gpu
    python experiments/reproduce.py --into=results --docs=docs # how results/ and docs/ got theirs

Writes reproduction.json and pictures into `into`, reproduction.md into `docs`; both are out_dir if
empty. A run lives in out_dir/<configuration>-<settings>-s<seed>; one that has finished is not run
again, one that was interrupted is resumed, one that two tables share is run once. Runs of one seed
see the same data in the same order. tables.py says what is trained.
"""
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "experiments")]
from configurator import configure, die, end_on_signals, on_signals, one_of, within  # noqa: E402

end_on_signals()

import json  # noqa: E402
import math  # noqa: E402
import os  # noqa: E402
import statistics  # noqa: E402
import subprocess  # noqa: E402
import time  # noqa: E402
from concurrent.futures import ThreadPoolExecutor  # noqa: E402

import torch  # noqa: E402

from data.dataset import open_dataset  # noqa: E402
from draw import COLOURS, draw, draw_history, write_figure, write_whole  # noqa: E402
from entropy import max_causal_entropy, quartile_distribution  # noqa: E402
from machine import machine_and_commit  # noqa: E402
from model import load_checkpoint  # noqa: E402
from plot import look, read_log  # noqa: E402
from tables import NAMED_ONLY, PAPER_RATE, PAPER_SHAPE, PICTURES, SEEDS  # noqa: E402
from tables import SMALL_ONLY, TABLES  # noqa: E402
from rows import breaks, heading, markdown, mean  # noqa: E402

only = ""  # tables to train for, comma-separated, or none; all but paper_size if empty
scale = "cpu"  # cpu: 1M parameters, 10.8M tokens | gpu: GPT-2 small
gpu_steps = 4000  # scale gpu: steps of every run, 8192 tokens each
jobs = 2  # runs side by side, each with its share of the cores
out_dir = "out/reproduce"  # where the runs live
data_dir = "data"  # where datasets lie
into = ""  # folder for reproduction.json and pictures; out_dir if empty
docs = ""  # folder for reproduction.md; `into` if empty
extra = ""  # further flags of every train.py run; to be kept apart by out_dir

# bfloat16 whatever the processor does fastest: tables are to compare.
BASE = {
    "cpu": dict(dataset="pycode2k", n_layer=4, n_head=4, n_embd=128, batch_size=32, max_iters=2640,
                eval_interval=330, eval_windows=256, log_interval=50, warmup=0.1,
                dtype="bfloat16", compile="no"),
    "gpu": dict(**PAPER_SHAPE, batch_size=64, warmup=0.05, eval_windows=512,
                eval_interval=500, log_interval=50),
}
DATASET = ["--corpus=pycode", "--name=pycode2k", "--vocab_size=2048"]  # prepare.py's, for the CPU


# ---------------------------------------------------------------------------------------- training
def at_scale(flags):
    """A run's settings: GPT-2 small keeps the paper's learning rate, ours suit a width of 128."""
    return flags | {"learning_rate": PAPER_RATE} if scale == "gpu" else flags


def script(flags):
    """The script of a run and its first argument: train.py, or with another regularizer."""
    name = flags.get("regularizer")
    return ["experiments/regularizers.py", name] if name else ["train.py"]


def train_flags(settings):
    return [f"--{key}={value}" for key, value in settings.items() if key != "regularizer"]


def folder(config, flags, seed):
    settings = [f"{key}={value}" for key, value in at_scale(flags).items()]
    return Path(out_dir) / "-".join([config, *settings, f"s{seed}"])


def is_over(log):
    return bool(log) and log[-1]["event"] in ("done", "diverged")


def command(config, flags, seed):
    """The command of a run, from its script on: a fresh one, or one that goes on."""
    path = folder(config, flags, seed)
    settings = BASE[scale] | at_scale(flags) | {"seed": seed, "data_dir": data_dir, "out_dir": path}
    if scale == "gpu":
        settings = {"max_iters": gpu_steps} | settings
    start = [f"config/{config}.py"]
    if (path / "ckpt.pt").exists():
        start = ["--init_from=resume"]
        settings = {key: settings[key] for key in ("out_dir", "data_dir", "dtype", "compile")
                    if key in settings}
    return [*script(flags), *start, *train_flags(settings), *extra.split()]


class Runs:
    """Runs of train.py side by side, until a signal stops them all."""

    def __init__(self, deadline):
        self.running = []
        self.signal = None
        self.deadline = deadline

    def stop(self, number, frame=None):
        self.signal = number
        for process in self.running:
            process.terminate()  # it saves, and the next call resumes it

    def train(self, path, arguments):
        """Run or resume the run in `path`, unless it is over. A divergence is a result like any."""
        late = time.time() > self.deadline
        if self.signal or late or is_over(read_log(path / "log.jsonl")):
            return
        path.mkdir(parents=True, exist_ok=True)
        if not (path / "made.json").exists():
            write_whole(str(path / "made.json"), json.dumps(machine_and_commit()).encode())
        environment = dict(os.environ)
        if scale == "cpu":
            environment["OMP_NUM_THREADS"] = str(max(1, os.cpu_count() // jobs))
        with open(path / "stdout.log", "a") as f:
            # a session of its own: a Ctrl-C is ours to pass on, once
            process = subprocess.Popen([sys.executable, *arguments],
                                       cwd=ROOT, env=environment, stdout=f,
                                       stderr=subprocess.STDOUT, start_new_session=True)
            self.running.append(process)
            if self.signal:
                process.terminate()
            status = process.wait()
        if self.signal:
            return
        log = read_log(path / "log.jsonl")
        if not is_over(log):
            said = (path / "stdout.log").read_text(errors="replace").strip().splitlines()[-1:]
            raise RuntimeError(f"{path.name} ended with status {status}: {''.join(said)}")
        if log[-1]["event"] == "done":
            told = f"validation perplexity {log[-1]['val_ppl']:.2f}"
        else:
            told = f"diverged at step {log[-1]['step']}"
        print(f"{path.name}: {told}", flush=True)


def everything():
    """The tables that are trained where none is named."""
    left_out = NAMED_ONLY if scale == "cpu" else SMALL_ONLY
    return [name for name in TABLES if name not in left_out]


def runs_of(names):
    """(configuration, flags, seed) of every run of these tables, each once, seed by seed."""
    todo = {}
    for name in names:
        for r in TABLES[name][2]:
            for seed in r["seeds"]:
                run = r["config"], r["flags"], seed
                todo[folder(*run)] = run
    return sorted(todo.values(), key=lambda run: SEEDS.index(run[2]) if run[2] in SEEDS else 0)


def train_all(todo, seconds=math.inf):
    """
    Train what isn't done yet, or exit: with a line where a run fails, saved on a signal. No run
    starts after so many seconds.
    """
    own_data = "--dataset=" in extra
    meta = os.path.join(data_dir, BASE[scale].get("dataset", "pycode"), "meta.json")
    if todo and not own_data and not os.path.exists(meta):  # else two runs would both prepare it
        prepare = [sys.executable, ROOT / "data" / "prepare.py", f"--data_dir={data_dir}"]
        if scale == "cpu":
            prepare += DATASET
        if subprocess.run(prepare).returncode:
            die("data/prepare.py failed, see above")
    side_by_side([(folder(*run), command(*run)) for run in todo], seconds)


def side_by_side(todo, seconds):
    """Train (folder, arguments of python) of each, as train_all does."""
    runs = Runs(time.time() + seconds)
    on_signals(runs.stop)
    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(runs.train, *run) for run in todo]
        try:
            for future in futures:
                future.result()
        except (RuntimeError, OSError, ValueError) as e:
            runs.stop(1)
            die(e)
    end_on_signals()
    if runs.signal:
        print("stopped, every run saved: the same command goes on", file=sys.stderr)
        sys.exit(128 + runs.signal)


# ---------------------------------------------------------------------------------------- results
def result(config, flags, seed):
    """What a finished run's log tells, or None."""
    log = read_log(folder(config, flags, seed) / "log.jsonl")
    if not is_over(log):
        return None
    last = log[-1]
    told = ("event", "arch", "step", "tokens", "val_ppl", "entropy_by_layer", "parameters", "torch",
            "data_sha256", "machine", "unigram_ppl")
    heads = [r for r in log if r["event"] == "eval"][-1]["head_entropy"]
    rates = [r["tokens_per_s"] for r in log if r["event"] == "step"]
    shape = ("n_layer", "n_embd", "n_head", "block_size", "vocab_size")
    size = {key: last["settings"][key] for key in shape}
    causal = max_causal_entropy(size["block_size"])
    made = json.loads((folder(config, flags, seed) / "made.json").read_text())
    return {key: last.get(key) for key in told} | made | {
        "seed": seed, "size": size, "learning_rate": last["settings"]["learning_rate"],
        "quartiles": quartile_distribution(heads),
        "quartiles_of_causal_maximum": quartile_distribution(heads, causal),
        "collapse_and_jump": breaks(log, size["block_size"]),
        "tokens_per_s": round(statistics.median(rates)) if rates else 0, "head_entropy": heads,
        "command": " ".join(["python", *fresh_command(config, flags, seed)])}


def trained(r, windows, seed=SEEDS[0]):
    """
    (checkpoint, x, y) of a row's run with a seed: x and y (N, T), at most so many windows of
    validation text and what follows each token. None if it isn't trained.
    """
    run = r["config"], r["flags"], seed
    path = folder(*run) / "ckpt.pt"
    if not path.exists() or not result(*run):
        return None
    checkpoint = load_checkpoint(path)
    T = checkpoint["model_config"]["block_size"]
    _, tokens, *_ = open_dataset(data_dir, BASE["cpu"]["dataset"], T)
    n = min(windows, (len(tokens) - 1) // T)
    text = torch.tensor(tokens[:n * T + 1].astype(int))
    return checkpoint, text[:-1].view(n, T), text[1:].view(n, T)


def fresh_command(config, flags, seed):
    """What one would type to get this run, its folders left out."""
    settings = BASE[scale] | at_scale(flags) | {"seed": seed}
    return [*script(flags), f"config/{config}.py", *train_flags(settings), *extra.split()]


# ---------------------------------------------------------------------------------------- pictures
def draw_chosen(chosen, path):
    """The runs of a picture side by side, if all of them are over."""
    checkpoints = [folder(config, flags, SEEDS[0]) / "ckpt.pt" for config, flags in chosen]
    for checkpoint, (config, flags) in zip(checkpoints, chosen):
        if not checkpoint.exists() or not result(config, flags, SEEDS[0]):
            return
    seen = []
    for checkpoint, (_, flags) in zip(checkpoints, chosen):
        run = look(str(checkpoint))
        if flags:
            run["arch"] += "".join(f"\n{key} {value}" for key, value in flags.items())
        seen.append(run)
    draw(seen, str(path))


def draw_divergence(log, path):
    """Loss and every layer's entropy, step by step, until softmax alone breaks."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    evals = [r for r in log if r["event"] == "eval"]
    steps = [r for r in log if r["event"] == "step"]
    fig, (upper, lower) = plt.subplots(2, 1, figsize=(7, 5.5), sharex=True, layout="constrained",
                                       height_ratios=[1, 1.6])
    upper.plot([r["step"] for r in evals], [r["val_ce"] for r in evals], "o-", color="black",
               markersize=4, label="validation loss")
    upper.plot([r["step"] - 1 for r in steps], [r["ce"] for r in steps], "x--", color="0.5",
               markersize=4, label="training loss")  # of the weights before that step's update
    upper.set(ylabel="cross-entropy, nats", yscale="log")
    upper.yaxis.set_major_formatter("{x:g}")
    upper.yaxis.set_minor_formatter("{x:g}")
    draw_history(lower, [[r["step"], [mean(heads) for heads in r["head_entropy"]]] for r in evals])
    for ax in (upper, lower):
        if log[-1]["event"] == "diverged":
            ax.axvline(log[-1]["step"], color="black", linestyle=":", label=log[-1]["what"])
        ax.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    write_figure(fig, str(path))


def draw_depth(rows, path):
    """Entropy by layer of the first run of each row, dashed where it diverged."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, ax = plt.subplots(figsize=(8, 4), layout="constrained")
    for place, r in enumerate(rows):
        run = r["runs"][0]
        broken = run["event"] == "diverged"
        told = f"diverged at step {run['step']}" if broken else f"perplexity {run['val_ppl']:.1f}"
        entropy = [math.nan if e is None else e for e in run["entropy_by_layer"]]
        marker = "os"[place // len(COLOURS) % 2]
        ax.plot(range(1, len(entropy) + 1), entropy, marker + ("--" if broken else "-"),
                color=COLOURS[place % len(COLOURS)], markersize=4, linewidth=1.2,
                label=f"{r['label']}: {told}")
    most = max_causal_entropy(rows[0]["runs"][0]["size"]["block_size"])
    ax.axhline(most, color="0.6", linestyle=":", linewidth=1)
    ax.set(xlabel="layer", ylabel="mean entropy, nats", ylim=(-0.1, 1.05 * most))
    ax.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    write_figure(fig, str(path))


def collected():
    """{table: its rows with the "runs" that are over}. Dies if none is, or the data differ."""
    tables = {}
    for name, (_, _, rows) in TABLES.items():
        tables[name] = []
        for r in rows:
            runs = [result(r["config"], r["flags"], seed) for seed in r["seeds"]]
            tables[name].append(r | {"runs": [x for x in runs if x]})
    found = {x["data_sha256"] for rows in tables.values() for r in rows for x in r["runs"]}
    if not found:
        die(f"no finished run in {out_dir}")
    if len(found) > 1:
        die(f"the runs in {out_dir} are of several data_sha256 and can't be compared: delete the "
            "older ones and run again")
    return tables


def main():
    global out_dir, data_dir
    given = configure(globals())
    one_of(globals(), scale=BASE)
    within(globals(), jobs=(1, 1024), gpu_steps=(1, 10**9))
    wanted = only.split(",") if only else everything()
    if only == "none":
        wanted = []
    if set(wanted) - set(TABLES):
        die(f"only some of {', '.join(TABLES)}, or none", 2)
    suffix = "_gpu" if scale == "gpu" else ""
    out_dir, data_dir = os.path.abspath(out_dir + suffix), os.path.abspath(data_dir)
    into_folder = Path(into or out_dir)
    docs_folder = Path(docs) if docs else into_folder
    try:
        for path in (into_folder, docs_folder):
            path.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        die(f"can't write into {path}: {e.strerror}", 2)
    train_all(runs_of(wanted))
    tables = collected()
    runs = [x for rows in tables.values() for r in rows for x in r["runs"]]
    told = [f"--{key}={given[key]!r}" for key in ("scale", "gpu_steps", "extra") if key in given]
    head = heading(runs, " ".join(["python experiments/reproduce.py", *told]))
    parts = {name: markdown(name, rows) for name, rows in tables.items()
             if sum(bool(r["runs"]) for r in rows) > 1}  # one run alone is in the JSON
    print(head + "\n".join(parts[name] for name in wanted or parts if name in parts))
    text = head + "\n".join(parts.values())
    if missing := ", ".join(name for name in tables if name not in parts):
        text += f"\nNot run: {missing}.\n"
    made = json.dumps(tables, indent=0) + "\n"
    try:
        write_whole(str(into_folder / f"reproduction{suffix}.json"), made.encode())
        write_whole(str(docs_folder / f"reproduction{suffix}.md"), text.encode())
        for name, chosen in PICTURES.items():
            draw_chosen(chosen, into_folder / name.replace(".png", f"{suffix}.png"))
        alone = folder("sm", TABLES["divergence"][2][0]["flags"], SEEDS[0]) / "log.jsonl"
        log = read_log(alone)
        if log:
            draw_divergence(log, into_folder / f"divergence{suffix}.png")
        deep = [r for r in tables["paper_size"] if r["runs"]
                and r["flags"]["learning_rate"] == PAPER_RATE]
        if deep:
            draw_depth(deep, into_folder / f"paper_size{suffix}.png")
    except (OSError, ValueError) as e:
        die(e)


if __name__ == "__main__":
    main()
