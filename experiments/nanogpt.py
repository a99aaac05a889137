"""
train.py against nanoGPT's on this CPU: tokens/s of one model on the same data, run after run.

    git clone https://github.com/karpathy/nanoGPT ~/nanoGPT
    python experiments/nanogpt.py --nanogpt=~/nanoGPT --json=results/nanogpt.json

Each trains a GPT with LayerNorm and GELU: nanoGPT as it comes, which on a CPU is float32, and again
with bfloat16 autocast, for which one line of a copy of its train.py is changed; this repository as
it comes (--dtype=auto) and in the types that `dtypes` names. A run's speed is the median of its
steps after the first WARM_UP, a ratio the median over the rounds. The clone is only read. The
dataset is one that train.py has prepared.
"""
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "experiments")]
from configurator import configure, die, end_on_signals, within  # noqa: E402

end_on_signals()

import os  # noqa: E402
import pickle  # noqa: E402
import re  # noqa: E402
import statistics  # noqa: E402
import subprocess  # noqa: E402
from json import dumps, loads  # noqa: E402
from tempfile import TemporaryDirectory  # noqa: E402

from draw import write_whole  # noqa: E402
from machine import machine_and_commit  # noqa: E402
from plot import read_log  # noqa: E402

nanogpt = ""  # a clone of nanoGPT
json = ""  # write the runs here as well
dtypes = "auto,float32,bfloat16"  # of this repository's runs; nanoGPT is compared with the first
rounds = 3  # times that all of them run in turn
steps = 60  # of a run
dataset = "pycode"  # folder under data_dir
data_dir = "data"  # where datasets lie
batch_size = 8  # sequences a step
block_size = 128  # T
n_layer = 6  # L
n_head = 6  # H
n_embd = 192  # d

WARM_UP = 10  # steps of a run that are not counted
THEIRS = {"nanoGPT, float32": "float32", "nanoGPT, bfloat16 autocast": "bfloat16"}
NO_AUTOCAST = "nullcontext() if device_type == 'cpu' else "  # in nanoGPT's train.py
KEYS = "batch_size", "block_size", "n_layer", "n_head", "n_embd"


def our_flags(dtype):
    return ["--device=cpu", f"--dtype={dtype}", f"--max_iters={steps}", "--log_interval=1",
            f"--eval_interval={steps}", f"--eval_windows={batch_size}", "--sample_tokens=0",
            "--plot=False"]


def their_flags(dtype):
    return ["--device=cpu", f"--dtype={dtype}", "--compile=False", f"--max_iters={steps - 1}",
            "--gradient_accumulation_steps=1", f"--eval_interval={steps + 1}", "--eval_iters=1",
            "--log_interval=1"]


def run_script(script, flags, cwd):
    """What it prints. Dies with its last line if it fails."""
    done = subprocess.run([sys.executable, script, *flags], cwd=cwd, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        die(f"{script} failed: {(done.stdout.strip().splitlines() or ['it says nothing'])[-1]}")
    return done.stdout


def our_run(flags, folder):
    """Tokens/s of every step, what the run says of its machine, and torch's version."""
    places = [f"--out_dir={folder}", f"--data_dir={Path(data_dir).resolve()}"]
    run_script("train.py", [*flags, *places], ROOT)
    log = read_log(folder / "log.jsonl")
    told = {"machine": log[-1]["machine"], "torch": log[-1]["torch"]}
    return [r["tokens_per_s"] for r in log if r["event"] == "step"], told


def their_run(flags, folder):
    """Tokens/s of every step; nothing else."""
    clone, data = Path(nanogpt), folder / "data" / dataset
    data.mkdir(parents=True)
    for name in ("configurator.py", "model.py"):
        (folder / name).symlink_to(clone / name)
    source = Path(data_dir, dataset).resolve()
    for name in ("train.bin", "val.bin"):
        (data / name).symlink_to(source / name)
    vocab_size = loads((source / "meta.json").read_text())["vocab_size"]
    (data / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": vocab_size}))
    text = (clone / "train.py").read_text()
    if "--dtype=bfloat16" in flags:
        text = text.replace(NO_AUTOCAST, "")
    (folder / "train.py").write_text(text)
    printed = run_script("train.py", flags, folder)
    ms = [float(time) for time in re.findall(r"^iter \d+: .* time ([\d.]+)ms", printed, re.M)]
    return [1e3 * batch_size * block_size / time for time in ms], {}


def contenders():
    """{name: (what runs it, its flags)}, this repository's first."""
    same = [f"--dataset={dataset}", *(f"--{key}={globals()[key]}" for key in KEYS)]
    ours = {f"train.py, {dtype}": (our_run, [*our_flags(dtype), *same])
            for dtype in dtypes.split(",")}
    theirs = {name: (their_run, [*their_flags(dtype), *same]) for name, dtype in THEIRS.items()}
    return ours | theirs


def measure(number, name):
    """One run of a contender as a row for the JSON."""
    how, flags = contenders()[name]
    load = os.getloadavg()[0]
    with TemporaryDirectory() as folder:
        rates, told = how(flags, Path(folder))
    if len(rates) != steps:
        die(f"{name} told of {len(rates)} steps, not {steps}")
    row = {"round": number, "name": name, "tokens_per_s": statistics.median(rates[WARM_UP:]),
           "load_before": load, **told}
    print(f"{number + 1}/{rounds}  {name:<28}{row['tokens_per_s']:>8,.0f} tokens/s  "
          f"{told.get('machine', '')}", flush=True)
    return row


def check_settings():
    """Fill the settings from the command line; exit with a line if they can't be."""
    global nanogpt
    configure(globals())
    within(globals(), rounds=(1, 1000), steps=(WARM_UP + 1, 10**6))
    nanogpt = os.path.abspath(os.path.expanduser(nanogpt))
    try:
        text = Path(nanogpt, "train.py").read_text()
    except OSError as e:
        die(f"nanogpt must be a clone of nanoGPT: can't read {e.filename}: {e.strerror}", 2)
    if text.count(NO_AUTOCAST) != 1:
        die(f"{nanogpt}/train.py is not nanoGPT's as of 3adf61e: it has no {NO_AUTOCAST!r}", 2)
    if not Path(data_dir, dataset, "meta.json").exists():
        die(f"no dataset in {data_dir}/{dataset}: python train.py makes pycode, data/prepare.py "
            "any other", 2)


def main():
    check_settings()
    rows = [measure(number, name) for number in range(rounds) for name in contenders()]
    speeds = {name: [r["tokens_per_s"] for r in rows if r["name"] == name] for name in contenders()}
    first = next(iter(speeds))
    ratios = {name: statistics.median(ours / other for ours, other in zip(speeds[first], values))
              for name, values in speeds.items() if name != first}
    for name, ratio in ratios.items():
        print(f"{first} is {ratio:.2f} times as fast as {name}")
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=nanogpt, capture_output=True, text=True)
    commands = {name: " ".join(["python train.py", *flags])
                for name, (_, flags) in contenders().items()}
    told = {**machine_and_commit(), "nanogpt_commit": git.stdout.strip(),
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", ""), "commands": commands,
            f"{first} over": ratios, "runs": rows}
    if json:
        try:
            write_whole(json, dumps(told, indent=1).encode())
        except OSError as e:
            die(e)


if __name__ == "__main__":
    main()
