"""
Train what the paper's tables and figures are about, and tabulate it: out/reproduce/reproduction.{json,md} and pictures.

    python experiments/reproduce.py                            # everything that isn't done yet, about 6 hours on 2 cores
    python experiments/reproduce.py --only=architectures,gamma # some of the tables
    python experiments/reproduce.py --only=none                # nothing new: tables and pictures of what is there
    python experiments/reproduce.py --scale=gpu --jobs=1       # GPT-2 small, on one GPU, into out/reproduce_gpu
    python experiments/reproduce.py --extra="--batch_size=16" --out_dir=out/b16   # the same with other settings
    python experiments/reproduce.py --into=results --readme=True   # how results/ and README.md got theirs

A run lives in out/reproduce/<configuration>-<settings>-s<seed>; one that has finished is not run again, one that was
interrupted is resumed, one that two tables share is run once. Runs of one seed see the same data in the same order.
"""
import json
import math
import os
import signal
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT))
from configurator import configure, die  # noqa: E402
from entropy import quartile_distribution  # noqa: E402
from plot import draw, draw_history, look, read_log  # noqa: E402

only = ""               # tables to train for, comma-separated, or none; all if empty
scale = "cpu"           # cpu: train.py's defaults | gpu: GPT-2 small
gpu_steps = 4000        # scale gpu: steps of every run, 8192 tokens each
jobs = 2                # runs side by side, each with its share of the cores
out_dir = "out/reproduce"
data_dir = "data"
into = ""               # folder for tables and pictures; out_dir if empty
readme = False          # also put two of the tables into README.md
extra = ""              # further flags of every train.py run; to be kept apart by out_dir

GPU = dict(n_layer=12, n_head=12, n_embd=768, batch_size=64, eval_windows=512, eval_interval=500, log_interval=50)
SEEDS, TUNING_SEED = (1337, 1338, 1339), 1
EREG, T, SC = "ereg_sm_t_scfuffn", "sm_t_scfuffn", "sm_scfuffn"
TUNED_EREG = {"learning_rate": 4e-3, "temperature_init": 0.1}  # what the tuning seed chose for EReg
TUNED_LN = {"learning_rate": 2e-3, "warmup": 0.2}             # and for SM+LN+G


def row(label, config, published="", seeds=SEEDS[:1], **flags):
    """A row of a table: a configuration of config/ with settings of its own, trained with each seed. published: the paper's figure."""
    return {"label": label, "config": config, "flags": flags, "seeds": list(seeds), "published": published}


def norms(where, weight, spectral):
    return [row(f"SM+WNorm({where.upper()})", "sm", weight, weight_norm=where), row(f"SM+SNorm({where.upper()})", "sm", spectral, spectral_norm=where)]


def ablation(*more, learning_rate=None, **temperature):
    """Temperature and regularizer, each alone and together. more: rows for temperature alone at other settings."""
    lr = {} if learning_rate is None else {"learning_rate": learning_rate}
    return [row("neither: SM+ScFuFFN", SC, "3.48", **lr), row("temperature alone: SM(t)+ScFuFFN", T, **lr, **temperature), *more,
            row("regularizer alone: EReg(SM+ScFuFFN)", SC, **lr, entropy_reg=True), row("both: EReg(SM(t)+ScFuFFN)", EREG, "3.21", **lr, **temperature),
            row("per head alone: SM(th)+ScFuFFN", "sm_th_scfuffn", **lr, **temperature),
            row("per head, with the regularizer: EReg(SM(th)+ScFuFFN)", EREG, **lr, **temperature, temperature_per_head=True)]


UNREGULARIZED = [("SM+LN+G", "sm_ln_g", "2.69"), ("SM+LN+R", "sm_ln_r", "2.76"), ("SM+LN", "sm_ln", "3.38"), ("SM+G", "sm_g", "3.20"),
                 ("SM+R", "sm_r", "2.94"), ("SM", "sm", "NaN"), ("SM+ScFFN", "sm_scffn", "3.50"), ("SM+ScFuFFN", SC, "3.48")]  # name, configuration, published
FIVE = [UNREGULARIZED[7], ("EReg", EREG, "3.21"), *(UNREGULARIZED[i] for i in (0, 3, 4))]
TABLES = {  # name: (what it is, what the published column shows, rows); the first row of a table is what the others are compared with
    "architectures": ("The configurations of the perplexity tables", "PPL", [
        *(row(*architecture, SEEDS) for architecture in UNREGULARIZED), row("SM(t)+ScFuFFN", T, "", SEEDS),
        row("SM(t)+ScFuFFN, t from 0.1", T, "", SEEDS, temperature_init=0.1), row("EReg(SM(t)+ScFuFFN)", EREG, "3.21", SEEDS)]),
    "tuning": ("The learning rate and EReg's own settings, on a seed that no other table reports", "PPL", [
        *(row(f"{name}, lr {lr:g}", config, "", [TUNING_SEED], learning_rate=lr) for name, config in (("SM+ScFuFFN", SC), ("EReg", EREG), ("SM+LN+G", "sm_ln_g"))
          for lr in (1e-3, 2e-3, 4e-3)),
        row("SM+ScFuFFN, lr 0.008", SC, "", [TUNING_SEED], learning_rate=8e-3), row("SM+LN+G, lr 0.0005", "sm_ln_g", "", [TUNING_SEED], learning_rate=5e-4),
        *(row(f"{name}, lr {lr:g}, warmup 20%", config, "", [TUNING_SEED], learning_rate=lr, **flags, warmup=0.2) for name, config, lr, flags in (
            ("SM+LN+G", "sm_ln_g", 2e-3, {}), ("SM+LN+G", "sm_ln_g", 4e-3, {}), ("SM+ScFuFFN", SC, 4e-3, {}), ("EReg, t from 0.1", EREG, 4e-3, {"temperature_init": 0.1}))),
        row("SM(t)+ScFuFFN, lr 0.004, t from 0.1", T, "", [TUNING_SEED], **TUNED_EREG),
        *(row(f"EReg, lr 0.004, t from 0.1, lambda {x:g}", EREG, "", [TUNING_SEED], **TUNED_EREG, **({} if x == 0.164 else {"lambda_entropy": x}))
          for x in (0.164, 0.05, 0.5))]),
    "tuned": ("At the settings which the tuning seed chose, for each its own", "PPL", [
        row("SM+ScFuFFN, lr 0.004", SC, "3.48", SEEDS, learning_rate=4e-3), row("SM(t)+ScFuFFN, lr 0.004, t from 0.1", T, "", SEEDS, **TUNED_EREG),
        row("EReg(SM(t)+ScFuFFN), lr 0.004, t from 0.1", EREG, "3.21", SEEDS, **TUNED_EREG),
        row("SM+LN+G, lr 0.002, warmup 20%", "sm_ln_g", "2.69", SEEDS, **TUNED_LN)]),
    "gamma": ("Tolerance margin (Figures 6 and 7)", "heads in the top quarter", [
        row(f"EReg, gamma {g:g}", EREG, f"{p}%", **({} if g == 0.2 else {"gamma": g}))
        for g, p in ((0.2, 2.08), (0.0, "at most 0.7"), (0.05, "at most 0.7"), (0.1, "at most 0.7"), (0.15, 0.7), (0.25, 3.47), (0.3, 6.25))]),
    "ablation": ("Temperature and regularizer, each alone and together; one temperature per head for one per head and position", "PPL",
                 ablation(row("temperature alone, from 0.1", T, temperature_init=0.1))),
    "ablation_tuned": ("The same at the tuned settings, learning rate 0.004 and temperatures from 0.1", "PPL", ablation(**TUNED_EREG)),
    "norms": ("Weight and spectral norm by place, against the learnable scales (Tables 4 and 5)", "PPL", [
        row(*UNREGULARIZED[7]), row(*UNREGULARIZED[6]), *norms("ffn", "3.64", "3.63"), *norms("qk", "3.89", "4.25"),
        *norms("qk+ffn", "3.88", "4.23"), *norms("qkv+ffn", "3.93", "4.26"), *norms("qkvo+ffn", "3.98", "4.34")]),
    "lambda": ("Weight of the regularizer, its penalty by position or by head, and where the temperature starts", "PPL", [
        row("EReg: lambda 0.164, per position, t from 0.01", EREG, "3.21"), *(row(f"lambda {x:g}", EREG, lambda_entropy=x) for x in (0.0164, 0.05, 0.5)),
        *(row(f"per head (Algorithm 1 as printed), lambda {x:g}", EREG, reduction="head", lambda_entropy=x) for x in (0.164, 0.05)),
        *(row(f"t from {x:g}", EREG, temperature_init=x) for x in (0.003, 0.1, 1.0))]),
    "warmed": ("The architectures at a learning rate of 0.002 and a warmup of 20% of the steps for 5%", "PPL", [
        *(row(*architecture, **TUNED_LN) for architecture in UNREGULARIZED), row("EReg, t from 0.1", EREG, "3.21", **TUNED_LN, temperature_init=0.1)]),
    "depth": ("Does the order hold at 12 layers?", "PPL", [row(f"{name}, 12 layers", config, p, n_layer=12) for name, config, p in FIVE]),
    "tokens": ("Does it hold with three times the tokens?", "PPL", [row(f"{name}, 3 x the tokens", config, p, max_iters=3000) for name, config, p in FIVE]),
    "width": ("And at twice the width? Learning rate 0.002 and a warmup of 20%, to be compared with those above", "PPL", [
        row(f"{name}, width 384", config, p, n_embd=384, **TUNED_LN, **({"temperature_init": 0.1} if config == EREG else {})) for name, config, p in FIVE[:4]]),
    "divergence": ("Softmax alone at the paper's width and depth, 3 sequences a step: 12 layers, width 768", "PPL", [
        row("SM, 12 x 768", "sm", "NaN", n_layer=12, n_head=12, n_embd=768, batch_size=3, max_iters=80, eval_interval=1, eval_windows=3, log_interval=1)]),
}
PICTURES = {  # file: runs side by side, seed 1337
    "entropy_architectures.png": [("sm_ln_g", {}), ("sm_g", {}), ("sm_r", {}), ("sm", {})],             # Figure 2
    "entropy_stabilised.png": [("sm", {"weight_norm": "ffn"}), ("sm", {"spectral_norm": "ffn"}), (SC, {}), (EREG, {})],  # Figures 4 and 5
    "entropy_temperature.png": [(T, {}), (T, {"temperature_init": 0.1}), (SC, {"entropy_reg": True}), (EREG, {})],
    "entropy_tuned.png": [(SC, {"learning_rate": 4e-3}), (EREG, TUNED_EREG)],
    "entropy_gamma.png": [(EREG, {"gamma": g}) for g in (0.0, 0.1)] + [(EREG, {}), (EREG, {"gamma": 0.3})],       # Figures 6 and 7
}


def folder(config, flags, seed):
    return Path(out_dir) / "-".join([config, *(f"{k}={v}" for k, v in flags.items()), f"s{seed}"])


def train(config, flags, seed):
    """Run or resume one, unless its log says that it is over. A divergence, exit status 3, is a result like any other."""
    path = folder(config, flags, seed)
    log = read_log(path / "log.jsonl")
    if stopping or log and log[-1]["event"] in ("done", "diverged"):
        return
    path.mkdir(parents=True, exist_ok=True)
    settings = {**(GPU | {"max_iters": gpu_steps} if scale == "gpu" else {}), **flags, "seed": seed, "data_dir": data_dir, "out_dir": path}
    start = ["--init_from=resume", f"--out_dir={path}", f"--data_dir={data_dir}"] if (path / "ckpt.pt").exists() else \
        [f"config/{config}.py", *(f"--{k}={v}" for k, v in settings.items())]
    threads = {"OMP_NUM_THREADS": str(max(1, os.cpu_count() // jobs))} if scale == "cpu" else {}
    exact = ["--dtype=float32"] if scale == "cpu" else []  # whatever the processor does fastest: tables are to compare
    with open(path / "stdout.log", "a") as f:
        process = subprocess.Popen([sys.executable, "train.py", *start, *exact, *extra.split()], cwd=ROOT, env=os.environ | threads, stdout=f,
                                   stderr=subprocess.STDOUT, start_new_session=True)  # a Ctrl-C is ours to pass on, once
        running.append(process)
        if stopping:
            process.terminate()
        status = process.wait()
    if stopping:
        return
    if status not in (0, 3):
        raise RuntimeError(f"{path.name} ended with status {status}: {(path / 'stdout.log').read_text().strip().splitlines()[-1:]}")
    r = result(config, flags, seed)
    print(f"{path.name}: " + (f"validation perplexity {r['val_ppl']:.2f}" if status == 0 else f"diverged at step {r['step']}") + f", {r['tokens_per_s']:,} tokens/s", flush=True)


def result(config, flags, seed):
    """What one run came to, from its log; None if it isn't over."""
    log = read_log(folder(config, flags, seed) / "log.jsonl")
    if not log or log[-1]["event"] not in ("done", "diverged"):
        return None
    heads = [r for r in log if r["event"] == "eval"][-1]["head_entropy"]
    rates = [r["tokens_per_s"] for r in log if r["event"] == "step"]
    r = {k: log[-1].get(k) for k in ("event", "arch", "step", "tokens", "val_ppl", "entropy_by_layer", "parameters", "torch", "data_sha256", "machine", "unigram_ppl")}
    size = {k: log[-1]["settings"][k] for k in ("n_layer", "n_embd", "n_head", "block_size", "vocab_size")} if "settings" in log[-1] else None
    return r | {"seed": seed, "size": size, "quartiles": quartile_distribution(heads), "tokens_per_s": round(statistics.median(rates)) if rates else 0, "head_entropy": heads}


def mean(values):
    return sum(values) / len(values)


def markdown(name, rows):
    title, column, _ = TABLES[name]
    lines = [f"### {title} (`{name}`)", "", "| | seeds | tokens | val. perplexity | spread over seeds | over the first | heads by quarter of the largest, % | entropy by layer, nats "
             f"| tokens/s | published {column}, the paper's scale |", "|---|---|---|---|---|---|---|---|---|---|"]
    base = math.nan
    for r in rows:
        runs = [x for x in r["runs"] if x]
        done = [x for x in runs if x["event"] == "done"]
        if not runs:
            lines.append(f"| {r['label']} | not run | | | | | | | | {r['published']} |")
            continue
        ppl = mean([x["val_ppl"] for x in done]) if done else math.nan
        base = ppl if r is rows[0] else base
        spread = f"{min(x['val_ppl'] for x in done):.1f} to {max(x['val_ppl'] for x in done):.1f}" if len(done) > 1 else ""
        quarters = " ".join(f"{100 * mean([x['quartiles'][i] for x in runs]):.0f}" for i in range(4))
        layers = " ".join("nan" if None in es else f"{mean(es):.2f}" for es in zip(*(x["entropy_by_layer"] for x in runs)))
        cells = [f"{ppl:.1f}", spread, f"{100 * (ppl / base - 1):+.1f}%" if base > 0 else ""] if len(done) == len(runs) else \
            ["diverged at step " + ", ".join(str(x["step"]) for x in runs if x["event"] == "diverged"), "", ""]
        lines.append(f"| {r['label']} | {' '.join(str(x['seed']) for x in runs)} | {runs[0]['tokens'] or 0:,} | {' | '.join(cells)} | {quarters} | {layers} "
                     f"| {mean([x['tokens_per_s'] for x in runs]):,.0f} | {r['published']} |")
    return "\n".join(lines) + "\n"


def draw_divergence(log, path):
    """Loss and every layer's entropy, step by step, until softmax alone breaks."""
    import matplotlib.pyplot as plt
    evals = [r for r in log if r["event"] == "eval"]
    broken = log[-1] if log[-1]["event"] == "diverged" else None
    fig, (upper, lower) = plt.subplots(2, 1, figsize=(7, 5.5), sharex=True, layout="constrained", height_ratios=[1, 1.6])
    upper.plot([r["step"] for r in evals], [r["val_ce"] for r in evals], "o-", color="black", markersize=4, label="validation loss")
    steps = [r for r in log if r["event"] == "step"]
    upper.plot([r["step"] for r in steps], [r["ce"] for r in steps], "x--", color="0.5", markersize=4, label="training loss")
    upper.set(ylabel="cross-entropy, nats", yscale="log")
    draw_history(lower, [[r["step"], [mean(heads) for heads in r["head_entropy"]]] for r in evals])
    for ax in (upper, lower):
        if broken:
            ax.axvline(broken["step"], color="black", linestyle=":", label=broken["what"])
        ax.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    fig.savefig(path, dpi=130)
    plt.close(fig)


if __name__ == "__main__":
    given = configure(globals())
    small = ("warmed", "depth", "tokens", "width", "divergence")  # tables of the small scale alone
    wanted = [name for name in TABLES if scale == "cpu" or name not in small] if not only else [] if only == "none" else only.split(",")
    if scale not in ("cpu", "gpu") or jobs < 1 or set(wanted) - set(TABLES):
        die(f"scale is cpu or gpu, jobs at least 1, only some of {', '.join(TABLES)}", 2)
    suffix = "_gpu" * (scale == "gpu")
    out_dir, data_dir, stopping, running = os.path.abspath(out_dir + suffix), os.path.abspath(data_dir), [], []
    into = Path(into or out_dir)
    try:
        into.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        die(f"can't write into {into}: {e}", 2)

    def stop(number, frame):
        stopping.append(number)
        for process in running:
            process.terminate()  # it saves, and the next call resumes it

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    todo = list({folder(r["config"], r["flags"], seed): (r["config"], r["flags"], seed)
                 for name in wanted for r in TABLES[name][2] for seed in r["seeds"]}.values())
    todo.sort(key=lambda run: SEEDS.index(run[2]) if run[2] in SEEDS else 0)  # every row once before any twice
    if todo and "--dataset=" not in extra and not os.path.exists(os.path.join(data_dir, "pycode", "meta.json")):  # two runs would both prepare it
        if subprocess.run([sys.executable, ROOT / "data" / "prepare.py", f"--data_dir={data_dir}"]).returncode:
            die("data/prepare.py failed, see above")
    with ThreadPoolExecutor(jobs) as pool:
        futures = [pool.submit(train, *run) for run in todo]
        try:
            for future in futures:
                future.result()
        except Exception as e:
            stop(1, None)
            die(e)
    if stopping:
        print("stopped, every run saved: the same command goes on", file=sys.stderr)
        sys.exit(128 + stopping[0])
    tables = {name: [r | {"runs": [result(r["config"], r["flags"], seed) for seed in r["seeds"]]} for r in rows] for name, (_, _, rows) in TABLES.items()}
    over = [x for rows in tables.values() for r in rows for x in r["runs"] if x]
    runs = [x for x in over if x["event"] == "done"]
    for key in ("data_sha256", "torch"):
        if len({x[key] for x in runs}) > 1:
            die(f"the runs in {out_dir} differ in {key} and can't be compared: delete the older ones and run again")
    if not over:
        die(f"no finished run in {out_dir}")
    one, s = (runs[0], runs[0]["size"]) if runs else ({}, {})
    head = "" if not runs else (f"{s['n_layer']} layers, width {s['n_embd']}, {s['n_head']} heads, T = {s['block_size']}, vocabulary {s['vocab_size']}, pycode (sha256 "
            f"{one['data_sha256'][:16]}), where the paper has 12 layers, width 768, 12 heads and 2.1B tokens of CodeParrot. {statistics.mode(x['machine'] for x in runs)}, torch "
            f"{one['torch']}; tokens/s as trained, {jobs} side by side. Validation perplexity of a unigram model: {one['unigram_ppl']:.1f}. "
            f"Made by `{' '.join(['python experiments/reproduce.py', *(f'--{k}={v!r}' for k, v in given.items() if k in ('scale', 'gpu_steps', 'extra'))])}`.\n\n")
    (into / f"reproduction{suffix}.json").write_text(json.dumps(tables, indent=0) + "\n")
    (into / f"reproduction{suffix}.md").write_text(head + "\n".join(markdown(name, rows) for name, rows in tables.items()))
    print(head + "\n".join(markdown(name, tables[name]) for name in wanted or tables))
    if readme:
        before, _, rest = (ROOT / "README.md").read_text().partition("<!-- reproduce.py -->\n")
        after, shown = rest.partition("<!-- end -->\n")[2], "\n".join(markdown(name, tables[name]) for name in ("architectures", "tuned"))
        (ROOT / "README.md").write_text(f"{before}<!-- reproduce.py -->\n{head}{shown}<!-- end -->\n{after}")
    for name, chosen in PICTURES.items():
        paths = [folder(config, flags, SEEDS[0]) / "ckpt.pt" for config, flags in chosen]
        if all(result(config, flags, SEEDS[0]) and path.exists() for path, (config, flags) in zip(paths, chosen)):
            seen = [look(str(path)) for path in paths]
            titles = [run["arch"] + ("\n" + ", ".join(f"{k} {v}" for k, v in flags.items()) if flags else "") for run, (_, flags) in zip(seen, chosen)]
            draw([run | {"arch": title} for run, title in zip(seen, titles)], into / name.replace(".png", f"{suffix}.png"))
    log = read_log(folder("sm", TABLES["divergence"][2][0]["flags"], SEEDS[0]) / "log.jsonl")
    if log:
        draw_divergence(log, into / f"divergence{suffix}.png")
