"""
Train the twelve architectures with one seed and one data order, and tabulate them.

    python results/architectures.py                       # everything, 45 to 60 minutes on 2 cores
    python results/architectures.py --seed=1              # further arguments go to every train.py run

Each run lives in out/architectures/<config>; one that has finished is not run again, one that was interrupted is
resumed. Tokens/s come from 60 more steps of each, one after the other at the end, when nothing else ran. Writes
architectures.json (the runs' own last log records) and architectures.md beside this script.
"""
import json
import statistics
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
OUT = ROOT / "out" / "architectures"
CONFIGS = ["sm_ln_g", "sm_ln_r", "sm_ln", "sm_g", "sm_r", "sm", "sm_wnorm_ffn", "sm_snorm_ffn", "sm_scffn", "sm_scfuffn",
           "sm_t_scfuffn", "ereg_sm_t_scfuffn"]
# Perplexity at the paper's scale: GPT-2 small, CodeParrot, T = 128, 2.1B tokens (Tables 2 to 5; SM+ScFFN from AERO)
PUBLISHED = dict(sm_ln_g="2.69", sm_ln_r="2.76", sm_ln="3.38", sm_g="3.20", sm_r="2.94", sm="NaN", sm_wnorm_ffn="3.64", sm_snorm_ffn="3.63",
                 sm_scffn="3.50", sm_scfuffn="3.48", sm_t_scfuffn="", ereg_sm_t_scfuffn="3.21")


def records(run):
    path = OUT / run / "log.jsonl"
    return [json.loads(line) for line in open(path) if line.endswith("\n")] if path.exists() else []


def train(config, run, extra):
    """Run or resume one configuration, unless its log says that it is over. Exits with train.py's status on an error."""
    log = records(run)
    if log and log[-1]["event"] in ("done", "diverged"):
        return
    resume = (OUT / run / "ckpt.pt").exists()
    status = subprocess.run([sys.executable, "train.py", *(["--init_from=resume"] if resume else [f"config/{config}.py"]),
                             f"--out_dir={OUT / run}", *extra], cwd=ROOT).returncode
    if status not in (0, 3):  # 3 is a divergence, a result like any other
        sys.exit(status)


def row(config):
    log = records(config)
    rates = [r["tokens_per_s"] for r in records(f"speed_{config}") if r["event"] == "step"]
    return log[-1] | {"config": config, "published_ppl": PUBLISHED[config],
                      "tokens_per_s": round(statistics.median(rates)) if rates else None,
                      "head_entropy": [r for r in log if r["event"] == "eval"][-1]["head_entropy"]}


def table(rows, extra):
    done = next(r for r in rows if r["event"] == "done")
    s = done["settings"]
    for r in rows:  # a row of an older run would be compared with what it can't be
        for key in ("data_sha256", "tokens", "torch"):
            if r["event"] == "done" and r[key] != done[key]:
                sys.exit(f"error: {r['config']} has {key} {r[key]}, {done['config']} {done[key]}: delete {OUT} and run again")
    lines = [f"{s['n_layer']} layers, width {s['n_embd']}, {s['n_head']} heads, T = {s['block_size']}, vocabulary {s['vocab_size']}, "
             f"{done['tokens']:,} tokens of pycode (sha256 {done['data_sha256'][:16]}; the paper: 12 layers, width 768, 2.1B tokens of "
             f"CodeParrot), one seed ({s['seed']}); {done['machine']}, torch {done['torch']}. Validation perplexity of a unigram model: "
             f"{done['unigram_ppl']:.1f}. Made by `{' '.join(['python results/architectures.py', *extra])}`.", "",
             "| architecture | parameters | val. perplexity | over SM+LN+G | entropy by layer, nats | tokens/s | published PPL, the paper's scale |",
             "|---|---|---|---|---|---|---|"]
    base = rows[0].get("val_ppl", float("nan"))
    for r in rows:
        layers = " ".join("nan" if e is None else f"{e:.2f}" for e in r["entropy_by_layer"])
        result = [f"{r['parameters'] / 1e6:.2f}M", f"{r['val_ppl']:.1f}", f"{100 * (r['val_ppl'] / base - 1):+.1f}%"] if r["event"] == "done" \
            else ["", f"diverged at step {r['step']}", ""]
        lines.append(f"| {r['arch']} | {' | '.join(result)} | {layers} | {r['tokens_per_s'] or 0:,} | {r['published_ppl']} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    extra = sys.argv[1:]
    for config in CONFIGS:
        train(config, config, extra)
    for config in CONFIGS:
        train(config, f"speed_{config}", [*extra, "--max_iters=60", "--eval_windows=8", "--log_interval=5", "--sample_tokens=0"])
    rows = [row(config) for config in CONFIGS]
    (HERE / "architectures.json").write_text(json.dumps(rows, indent=1) + "\n")
    (HERE / "architectures.md").write_text(table(rows, extra))
    print(table(rows, extra))
