"""Pictures and a diagnosis of models trained here (a stub: entropy.py's second half, moved)."""
import json
import os

import torch

from entropy import max_causal_entropy, quartile_distribution

# ------------------------------------------------------------------------------------------------ python entropy.py
# Pictures of models trained here. This half needs model.py, numpy and matplotlib; nothing above needs this half.
out_dir = "out"  # a folder of train.py's, or several, comma-separated
ckpt = ""        # or checkpoint files, comma-separated; a log.jsonl beside one gives the course of its training
windows = 256    # validation windows that the entropies are means over
png = ""         # the picture; entropy.png in the first folder if empty. The same as .json beside it


def read_log(path):
    """The records of a log.jsonl of train.py's, without a half-written last line; none if there is no such file."""
    if not os.path.isfile(path):
        return []
    with open(path) as f:
        return [json.loads(line) for line in f if line.endswith("\n")]


def describe(arch, model, head_entropy, threshold=None, log=()):
    """
    What there is to see of one model, as plain lists and numbers: a dict for draw() and table().

    head_entropy: (L, H) nats, means over the validation windows; threshold: (L, H) learned fractions of log T, or None;
    log: the records of its log.jsonl. Heads in the lowest and the highest quarter of [0, M], M the largest head's entropy,
    are what the paper counts; a layer is called collapsed or overloaded here if that is half of its heads or more.
    ValueError if an entropy is not finite.
    """
    E, c = torch.as_tensor(head_entropy).float().cpu(), model.config
    shares = quartile_distribution(E)
    low, high = (E < E.max() / 4) | (E == 0), (E >= 3 * E.max() / 4) & (E > 0)
    run = {"arch": arch, "block_size": c.block_size, "max_causal_entropy": max_causal_entropy(c.block_size),
           "val_ppl": ([r["val_ppl"] for r in log if r["event"] == "eval"] or [None])[-1],
           "head_entropy": E.tolist(), "layer_entropy": E.mean(1).tolist(), "quartiles": shares, "largest": float(E.max()),
           "collapsed_heads": int(low.sum()), "collapsed_layers": [l for l in range(c.n_layer) if 2 * low[l].sum() >= c.n_head],
           "overloaded_heads": int(high.sum()), "overloaded_layers": [l for l in range(c.n_layer) if 2 * high[l].sum() >= c.n_head],
           "history": [[r["step"], [sum(heads) / len(heads) for heads in r["head_entropy"]]] for r in log if r["event"] == "eval"]}
    run["history"] += [[r["step"], r["entropy_by_layer"]] for r in log if r["event"] == "diverged" and None not in r["entropy_by_layer"]]
    with torch.no_grad():
        if c.learnable_ffn_scale:
            run |= {name: [getattr(b, name).item() for b in model.blocks] for name in ("alpha", "beta")}
        if c.learnable_temperature:
            t = torch.stack([b.attn.temperature for b in model.blocks]).float().cpu()
            run |= {"temperature": t.mean(-1).tolist(), "temperature_range": [t.amin((1, 2)).tolist(), t.amax((1, 2)).tolist()]}
        if threshold is not None:
            run["threshold"] = threshold.detach().float().cpu().tolist()
    return run


def diagnosis(run):
    """One line for each of the paper's two failure modes."""
    n, M = sum(map(len, run["head_entropy"])), run["largest"]
    lines = []
    for name, side, where in (("overload", "overloaded", f"top quarter, {0.75 * M:.2f} to {M:.2f} nats"),
                              ("collapse", "collapsed", f"bottom quarter, 0 to {0.25 * M:.2f} nats")):
        heads, layers = run[f"{side}_heads"], run[f"{side}_layers"]
        lines.append(f"entropy {name}: {heads} of {n} heads ({heads / n:.0%}) in the {where}; "
                     + (f"half or more of layer{'s' * (len(layers) > 1)} {', '.join(map(str, layers))}" if layers else "no layer by half"))
    full = sum(e > 0.95 * run["max_causal_entropy"] for heads in run["head_entropy"] for e in heads)
    lines[0] += f"; {full} within 5% of a causal head's maximum, {run['max_causal_entropy']:.2f}"
    return lines


def table(runs):
    """The runs side by side, a line each."""
    rows = [["", "val. perplexity", "lowest quarter", "second", "third", "highest", "largest head", "mean entropy by layer, nats"]]
    rows += [[r["arch"], f"{r['val_ppl']:.2f}" if r["val_ppl"] else "", *(f"{q:.0%}" for q in r["quartiles"]), f"{r['largest']:.2f}",
              " ".join(f"{e:.2f}" for e in r["layer_entropy"])] for r in runs]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(w) if i in (0, 7) else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))).rstrip() for row in rows)


def draw_history(ax, history):
    """Each layer's mean entropy over training into a matplotlib axes. history: [[step, L nats]], as describe() has it."""
    from matplotlib.pyplot import cm
    L = len(history[0][1])
    for l in range(L):
        ax.plot([step for step, _ in history], [e[l] for _, e in history], color=cm.viridis(0.92 * l / max(1, L - 1)), marker="osv^Dx*"[l % 7],
                markersize=3, linewidth=1.3, label=f"layer {l}")
    ax.set(xlabel="training step", ylabel="mean entropy, nats")


def draw(runs, path):
    """
    A column for each run, as a PNG: heatmap of the heads (Figure 2d-f), quartile distribution (2a), each layer's mean over
    training (4, 7), learned thresholds, alpha, beta and temperature (5). One colour scale, from 0 to log(T!)/T nats, for all.
    """
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    most = max(r["max_causal_entropy"] for r in runs)
    panels = [("heads", 3.0), ("quartiles", 1.9)]
    panels += [("history", 2.3)] * any(len(r["history"]) > 1 for r in runs) + [("threshold", 3.0)] * any("threshold" in r for r in runs)
    panels += [(name, 1.9) for name, key in (("scales", "alpha"), ("temperature", "temperature")) if any(key in r for r in runs)]
    fig, axes = plt.subplots(len(panels), len(runs), squeeze=False, layout="constrained", height_ratios=[h for _, h in panels],
                             figsize=(1.2 + 3.6 * len(runs), 0.3 + sum(h for _, h in panels)))

    def heatmap(ax, values, top, form):
        image = ax.imshow(values, cmap="viridis", vmin=0, vmax=top, aspect="auto")
        L, H = len(values), len(values[0])
        ax.set(xlabel="head", ylabel="layer", xticks=range(0, H, 1 + H // 13), yticks=range(0, L, 1 + L // 13))
        for l in range(L if L * H <= 144 else 0):
            for h in range(H):
                ax.text(h, l, form.format(values[l][h]), ha="center", va="center", fontsize=7, color="white" if values[l][h] < 0.6 * top else "black")
        return image

    for row, (panel, _) in zip(axes, panels):
        image = None
        for ax, r in zip(row, runs):
            if panel == "heads":
                image = heatmap(ax, r["head_entropy"], most, "{:.1f}")
                ax.set_title(r["arch"] + (f"\nval. perplexity {r['val_ppl']:.1f}" if r["val_ppl"] else ""), fontsize=10)
            elif panel == "quartiles":
                ax.bar(range(4), [100 * q for q in r["quartiles"]], color=plt.cm.viridis([0.1, 0.37, 0.63, 0.9]), edgecolor="black", linewidth=0.5)
                for i, q in enumerate(r["quartiles"]):
                    ax.text(i, 100 * q, f"{q:.0%}", ha="center", va="bottom", fontsize=8)
                ax.set(ylim=(0, 115), yticks=(0, 50, 100), ylabel="% of heads", xticks=range(4), xlabel=f"entropy, M = {r['largest']:.2f} nats")
                ax.set_xticklabels(["0 to M/4", "to M/2", "to 3M/4", "to M"], fontsize=8)
            elif panel == "history" and len(r["history"]) > 1:
                draw_history(ax, r["history"])
                ax.set_ylim(-0.05 * most, 1.08 * most)
                ax.axhline(r["max_causal_entropy"], color="grey", linewidth=0.8, linestyle=":")
                if r is runs[-1]:
                    ax.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
            elif panel == "threshold" and "threshold" in r:
                image = heatmap(ax, r["threshold"], 1.0, "{:.2f}")
            elif panel == "scales" and "alpha" in r:
                for name, mark in (("alpha", "o-"), ("beta", "s--")):
                    ax.plot(r[name], mark, color="black", markersize=4, linewidth=1, label=name)
                ax.set(xlabel="layer", ylabel="alpha, beta")
                ax.legend(fontsize=7)
            elif panel == "temperature" and "temperature" in r:
                mean = [sum(heads) / len(heads) for heads in r["temperature"]]
                low, high = r["temperature_range"]
                ax.errorbar(range(len(mean)), mean, [[m - a for m, a in zip(mean, low)], [b - m for m, b in zip(mean, high)]], fmt="o-", color="black",
                            capsize=3, markersize=4, linewidth=1)
                ax.set(xlabel="layer", ylabel="temperature\n(mean and range)")
            else:
                ax.set_axis_off()
        if image:
            fig.colorbar(image, ax=list(row), label="mean entropy, nats" if panel == "heads" else "threshold, of log T", shrink=0.9)
    fig.savefig(path, dpi=130)
    plt.close(fig)


@torch.no_grad()
def look(path):
    """describe() of a checkpoint, its entropies measured on the validation set it was trained beside. Exits with a line if that fails."""
    import numpy as np
    from configurator import die
    from model import GPT, load_checkpoint
    try:
        checkpoint = load_checkpoint(path)
    except (OSError, ValueError) as e:
        die(e)
    s = checkpoint.get("settings", {})
    data = os.path.join(s.get("data_dir", "data"), s.get("dataset", "pycode"))
    log_path = os.path.join(os.path.dirname(path), "log.jsonl" if os.path.basename(path) == "ckpt.pt" else "none")  # another one's log isn't its own
    try:
        tokens, log = np.fromfile(os.path.join(data, "val.bin"), np.uint16), read_log(log_path)
        with open(os.path.join(data, "meta.json")) as f:
            meta = json.load(f)
        sha256, pieces = meta["sha256"], meta["piece"] > 0
    except (OSError, ValueError, KeyError, TypeError) as e:
        die(f"can't read the validation set {path} was trained beside, or its log: {e}; run this where its data is")
    if sha256 != checkpoint.get("data_sha256"):
        die(f"{path} was trained on other data than {data} holds now: run this where its data is")
    model = GPT.from_checkpoint(checkpoint)
    T, V = model.config.block_size, model.config.vocab_size
    n = (len(tokens) - (not pieces)) // T  # train.py's windows
    if n < 1 or tokens.max() >= V:
        die(f"{data} has {len(tokens)} validation tokens up to {tokens.max(initial=0)}, and the model takes {T + (not pieces)} or more below {V}: prepare it again")
    chosen = np.linspace(0, n - 1, min(windows, n)).round().astype(int)
    total = 0
    for some in np.array_split(chosen, -(-len(chosen) // 8)):
        x = torch.from_numpy(np.stack([tokens[w * T:(w + 1) * T] for w in some]).astype(np.int64))
        total = total + model(x, return_entropy=True)[2].mean(-1).sum(1)
    regularizer = checkpoint.get("regularizer") or {}
    try:
        return describe(f"EReg({model.config.name})" if regularizer else model.config.name, model, total / len(chosen), regularizer.get("threshold"), log)
    except ValueError as e:
        die(f"{path}: {e}")


def main():
    from importlib.util import find_spec
    from configurator import configure, die
    configure(globals())
    if windows < 1:
        die(f"windows must be at least 1, and is {windows}", 2)
    if not find_spec("matplotlib"):
        die("drawing needs matplotlib: pip install matplotlib")
    paths = ckpt.split(",") if ckpt else [os.path.join(folder, "ckpt.pt") for folder in out_dir.split(",")]
    paths = [os.path.expanduser(path) for path in paths]
    picture = os.path.expanduser(png) or os.path.join(os.path.dirname(paths[0]), "entropy.png")
    if not picture.endswith(".png") or png and not os.path.isdir(os.path.dirname(picture) or "."):
        die(f"png must be a .png in a folder that exists, and is {picture!r}", 2)
    runs = [look(path) for path in paths]
    for run in runs:
        print(f"{run['arch']}: " + "\n".join(diagnosis(run)))
    print(table(runs))
    try:
        draw(runs, picture)
        with open(picture.removesuffix(".png") + ".json", "w") as f:
            json.dump(runs, f, indent=1)
    except OSError as e:
        die(f"can't write {picture}: {e}")
    print(f"{picture}, {picture.removesuffix('.png')}.json")


if __name__ == "__main__":
    main()
