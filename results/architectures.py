"""
Train the twelve architectures with one seed and one data order, and tabulate them.

    python results/architectures.py                       # everything, 45 to 60 minutes on 2 cores
    python results/architectures.py --max_iters=50        # further arguments go to every train.py run

Each run lives in out/architectures/<config>; one that has finished is not run again, one that was interrupted is
resumed. Writes architectures.json (the runs' own last log records) and architectures.md beside this script.
"""
import json
import statistics
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
CONFIGS = ["sm_ln_g", "sm_ln_r", "sm_ln", "sm_g", "sm_r", "sm", "sm_wnorm_ffn", "sm_snorm_ffn", "sm_scffn", "sm_scfuffn",
           "sm_t_scfuffn", "ereg_sm_t_scfuffn"]
# Perplexity at the paper's scale: GPT-2 small, CodeParrot, T = 128, 2.1B tokens (Tables 2 to 5; SM+ScFFN from AERO)
PUBLISHED = dict(sm_ln_g="2.69", sm_ln_r="2.76", sm_ln="3.38", sm_g="3.20", sm_r="2.94", sm="NaN", sm_wnorm_ffn="3.64", sm_snorm_ffn="3.63",
                 sm_scffn="3.50", sm_scfuffn="3.48", sm_t_scfuffn="", ereg_sm_t_scfuffn="3.21")


def records(config):
    path = ROOT / "out" / "architectures" / config / "log.jsonl"
    return [json.loads(line) for line in open(path)] if path.exists() else []


def train(config, extra):
    """Run or resume one configuration, unless its log says that it is over. Dies with train.py's status on an error."""
    log = records(config)
    if log and log[-1]["event"] in ("done", "diverged"):
        return
    out = f"--out_dir=out/architectures/{config}"
    resume = (ROOT / "out" / "architectures" / config / "ckpt.pt").exists()
    status = subprocess.run([sys.executable, "train.py", *(["--init_from=resume"] if resume else [f"config/{config}.py"]), out, *extra],
                            cwd=ROOT).returncode
    if status not in (0, 3):  # 3 is a divergence, a result like any other
        sys.exit(status)


def row(config):
    log = records(config)
    last = log[-1]
    rates = [r["tokens_per_s"] for r in log if r["event"] == "step"]
    last |= {"config": config, "published_ppl": PUBLISHED[config], "median_tokens_per_s": round(statistics.median(rates)),
             "head_entropy": [r for r in log if r["event"] == "eval"][-1]["head_entropy"]}
    return last


def table(rows):
    done = next(r for r in rows if r["event"] == "done")
    s = done["settings"]
    lines = [f"{s['n_layer']} layers, width {s['n_embd']}, {s['n_head']} heads, T = {s['block_size']}, vocabulary {s['vocab_size']}, "
             f"{done['tokens']:,} tokens of pycode (sha256 {done['data_sha256'][:16]}; the paper: 12 layers, width 768, 2.1B tokens of "
             f"CodeParrot), one seed ({s['seed']}); {done['machine']}, torch {done['torch']}. Validation perplexity of a unigram model: "
             f"{done['unigram_ppl']:.1f}. Made by `python results/architectures.py`.", "",
             "| architecture | parameters | val. perplexity | over SM+LN+G | entropy by layer, nats | tokens/s | published PPL, the paper's scale |",
             "|---|---|---|---|---|---|---|"]
    base = rows[0]["val_ppl"]
    for r in rows:
        layers = " ".join(f"{e:.2f}" for e in r["entropy_by_layer"])
        result = [f"{r['parameters'] / 1e6:.2f}M", f"{r['val_ppl']:.1f}", f"{100 * (r['val_ppl'] / base - 1):+.1f}%"] if r["event"] == "done" \
            else ["", f"diverged at step {r['step']}", ""]
        lines.append(f"| {r['arch']} | {' | '.join(result)} | {layers} | {r['median_tokens_per_s']:,} | {r['published_ppl']} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    for config in CONFIGS:
        train(config, sys.argv[1:])
    rows = [row(config) for config in CONFIGS]
    (HERE / "architectures.json").write_text(json.dumps(rows, indent=1) + "\n")
    (HERE / "architectures.md").write_text(table(rows))
    print(table(rows))
