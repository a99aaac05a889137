"""
Pictures of the attention entropies of models that train.py trained, and a diagnosis of them:

    python plot.py --out_dir=out                                 # out/entropy.png and .json
    python plot.py --out_dir=out/sm,out/ereg --png=compare.png   # side by side, on one colour scale
    python plot.py --ckpt=out/ckpt.pt,gpt2 --text=FILE           # on any text; GPT-2 as well

It also names the first layers whose heads average, which need no softmax (--uniform_layers).
"""
from configurator import configure, die, end_on_signals, within

if __name__ == "__main__":
    end_on_signals()  # before the heavy imports

import io
import json
import math
import os
from functools import partial
from importlib.util import find_spec

import numpy as np
import torch

from data.dataset import open_dataset
from entropy import (attention_entropy, causal_attention, distance_from_average,
                     max_causal_entropy, quartile_distribution)
from model import GPT
from pretrained import encoding_of, is_checkpoint, read_pretrained, read_tokens

out_dir = "out"  # a folder of train.py's, or several, comma-separated
ckpt = ""        # or checkpoint files, comma-separated; a log.jsonl beside one is its history
text = ""        # measure on this file, and ckpt may also name GPT-2: a hub id or a folder
tokenizer = ""   # of GPT-2: a tokenizer.json; if empty the one beside its weights, else tiktoken's
windows = 256    # windows of the validation set or the text that the entropies are means over
tolerance = 0.05  # share of the causal maximum that a head that averages may lack of entropy
png = ""         # the picture, a .json beside it; entropy.png beside the first ckpt if empty

COLOURS = ("black", "#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
MARKERS = "osv^Dx*"


# ---------------------------------------------------------------------------------- files
def read_log(path):
    """
    The records of a log.jsonl of train.py's, without a half-written last line; none if there is no
    such file. ValueError, naming file and line, if a whole line is no record.
    """
    records = []
    if not os.path.isfile(path):
        return records
    with open(path, "rb") as f:
        for number, line in enumerate(f, 1):
            if not line.endswith(b"\n"):
                break
            try:
                record = json.loads(line)
                record["event"], record["step"]
            except (ValueError, KeyError, TypeError) as e:
                raise ValueError(f"line {number} of {path} is no record of train.py's ({e}): "
                                 "delete that line, or move the file away") from e
            records.append(record)
    return records


def write_whole(path, data):
    """Write bytes to path, all of them or none. OSError if it fails; path is then as it was."""
    try:
        with open(f"{path}.tmp", "wb") as f:
            f.write(data)
        os.replace(f"{path}.tmp", path)
    except OSError as e:
        raise OSError(f"can't write {path}: {e.strerror}") from e
    finally:
        if os.path.exists(f"{path}.tmp"):
            os.remove(f"{path}.tmp")


def write_figure(fig, path):
    """A matplotlib figure as a PNG, whole or not at all. OSError if it can't be written."""
    import matplotlib.pyplot as plt
    image = io.BytesIO()
    fig.savefig(image, dpi=130, format="png")
    plt.close(fig)
    write_whole(path, image.getvalue())


# ---------------------------------------------------------------------------------- numbers
def learned(model, threshold):
    """What a model learns beside matrices, as lists: alpha, beta, temperature, threshold."""
    found = {}
    if model.config.learnable_ffn_scale:
        for name in ("alpha", "beta"):
            found[name] = [getattr(block, name).item() for block in model.blocks]
    if model.config.learnable_temperature and model.config.softmax_layers:
        softmax = model.blocks[-model.config.softmax_layers:]
        t = torch.stack([block.attn.temperature.detach().float().cpu() for block in softmax])
        found["temperature"] = t.mean(-1).tolist()  # (layers with softmax, H)
        found["temperature_range"] = [t.amin((1, 2)).tolist(), t.amax((1, 2)).tolist()]
    if threshold is not None:
        found["threshold"] = threshold.detach().float().cpu().tolist()
    return found


def describe(arch, model, head_entropy, threshold=None, log=()):
    """
    What there is to see of one model, as plain lists and numbers: a dict for draw() and table().

    head_entropy: (L, H) nats, means over the validation windows; threshold: learned fractions of
    log T, (layers with softmax, H), or None; log: the records of its log.jsonl. The paper counts
    heads in the lowest and in the highest quarter of [0, M], M the largest head's entropy; a layer
    is called collapsed or overloaded here if half of its heads or more are. ValueError if an
    entropy is not finite.
    """
    E = torch.as_tensor(head_entropy).float().cpu()
    shares = quartile_distribution(E)
    M = E.max()
    low = (E < M / 4) | (E == 0)
    high = (E >= 3 * M / 4) & (E > 0)
    evals = [r for r in log if r["event"] == "eval"]
    history = [[r["step"], torch.tensor(r["head_entropy"]).mean(1).tolist()] for r in evals]
    for r in log:
        if r["event"] == "diverged" and None not in r["entropy_by_layer"]:
            history.append([r["step"], r["entropy_by_layer"]])

    def layers(heads):
        return [l for l, some in enumerate(heads) if 2 * some.sum() >= len(some)]

    return {
        "arch": arch, "block_size": model.config.block_size,
        "max_causal_entropy": max_causal_entropy(model.config.block_size),
        "seed": next((r["settings"].get("seed") for r in log if "settings" in r), None),
        "val_ppl": evals[-1]["val_ppl"] if evals else None,
        "head_entropy": E.tolist(), "layer_entropy": E.mean(1).tolist(),
        "quartiles": shares, "largest": float(M),
        "collapsed_heads": int(low.sum()), "collapsed_layers": layers(low),
        "overloaded_heads": int(high.sum()), "overloaded_layers": layers(high),
        "history": history,
    } | learned(model, threshold)


def diagnosis(run):
    """One line for each of the paper's two failure modes."""
    heads, M = sum(run["head_entropy"], []), run["largest"]

    def line(name, side, quarter):
        n, layers = run[f"{side}_heads"], run[f"{side}_layers"]
        where = "no layer by half"
        if layers:
            plural = "s" if len(layers) > 1 else ""
            where = f"half or more of layer{plural} {', '.join(map(str, layers))}"
        share = f"{n} of {len(heads)} heads ({n / len(heads):.0%})"
        return f"entropy {name}: {share} in the {quarter} nats; {where}"

    most = run["max_causal_entropy"]
    full = sum(e > 0.95 * most for e in heads)
    overload = line("overload", "overloaded", f"top quarter, {0.75 * M:.2f} to {M:.2f}")
    collapse = line("collapse", "collapsed", f"bottom quarter, 0 to {0.25 * M:.2f}")
    return [f"{overload}; {full} within 5% of a causal head's maximum, {most:.2f}", collapse]


def averaging(run, tolerance):
    """
    A sentence on the heads whose mean entropy lacks at most `tolerance`, a share, of the causal
    maximum: which they are, how far the layers are from the average (mean total variation distance
    of their attention), and the flag for those first layers that have no other heads, with what it
    saves.
    """
    most, already = run["max_causal_entropy"], run["layers_without_softmax"]
    near = np.array(run["head_entropy"]) >= (1 - tolerance) * most - 1e-5  # (L, H)
    L, H = near.shape
    layers = []
    for l in np.flatnonzero(near.any(1)):
        heads = "all" if near[l].all() else " ".join(map(str, np.flatnonzero(near[l])))
        layers.append(f"layer {l}: {heads}")
    where = f" ({', '.join(layers)})" if layers else ""
    distances = " ".join(f"{distance:.2f}" for distance in np.mean(run["distance"], 1))
    k = int(np.argmin([*near.all(1), False]))  # how many first layers have no other heads
    saved = max(0, k - already) * H
    advice = f"--uniform_layers={k} would save {saved} of {(L - already) * H} softmaxes"
    if saved == 0:
        advice = "no further first layer could do without softmax"
    return (f"averaging: {near.sum()} of {L * H} heads within {tolerance:.0%} of {most:.2f} nats"
            f"{where}, distance from the average by layer {distances}; {advice}")


def aligned(rows, left=(0,)):
    """Rows of str as a text table; the columns whose numbers are in `left` are flush left."""
    widths = [max(map(len, column)) for column in zip(*rows)]

    def line(row):
        cells = [cell.ljust(w) if i in left else cell.rjust(w)
                 for i, (cell, w) in enumerate(zip(row, widths))]
        return "  ".join(cells).rstrip()

    return "\n".join(map(line, rows))


def table(runs):
    """The runs below each other, a line each."""
    rows = [["", "val. perplexity", "lowest quarter", "second", "third", "highest", "largest head",
             "to the first position", "mean entropy by layer, nats"]]
    for r in runs:
        perplexity = f"{r['val_ppl']:.2f}" if r["val_ppl"] else ""
        layers = " ".join(f"{e:.2f}" for e in r["layer_entropy"])
        quarters = [f"{q:.0%}" for q in r["quartiles"]]
        first = f"{np.mean(r['first_position']):.0%}" if "first_position" in r else ""
        rows.append([r["arch"], perplexity, *quarters, f"{r['largest']:.2f}", first, layers])
    return aligned(rows, left=(0, len(rows[0]) - 1))


# ---------------------------------------------------------------------------------- panels
def draw_history(ax, history):
    """
    Each layer's mean entropy over training into a matplotlib axes.

    history: [[step, L nats]], as describe() has it.
    """
    from matplotlib.pyplot import cm
    steps = [step for step, _ in history]
    L = len(history[0][1])
    for l in range(L):
        ax.plot(steps, [e[l] for _, e in history], color=cm.viridis(0.92 * l / max(1, L - 1)),
                marker=MARKERS[l % len(MARKERS)], markersize=3, linewidth=1.3, label=f"layer {l}")
    ax.set(xlabel="training step", ylabel="mean entropy, nats")


def draw_heatmap(ax, values, top, form, start=0):
    """
    (layers, H) values from 0 to top as colours, with their numbers where these are not too many.
    start: the first one's layer.
    """
    image = ax.imshow(values, cmap="viridis", vmin=0, vmax=top, aspect="auto")
    L, H = len(values), len(values[0])
    rows = range(0, L, 1 + L // 13)
    ax.set(xlabel="head", xticks=range(0, H, 1 + H // 13), yticks=rows,
           yticklabels=[start + row for row in rows])
    if L * H <= 18 * 12:
        for l, row in enumerate(values):
            for h, value in enumerate(row):
                ax.text(h, l, form.format(value), ha="center", va="center", fontsize=7,
                        color="white" if value < 0.6 * top else "black")
    return image


def draw_quartiles(ax, run):
    from matplotlib.pyplot import cm
    ax.bar(range(4), [100 * q for q in run["quartiles"]], color=cm.viridis([0.1, 0.37, 0.63, 0.9]),
           edgecolor="black", linewidth=0.5)
    for i, q in enumerate(run["quartiles"]):
        ax.text(i, 100 * q, f"{q:.0%}", ha="center", va="bottom", fontsize=8)
    ax.set(ylim=(0, 115), yticks=(0, 50, 100), xticks=range(4))
    ax.set_xlabel(f"entropy, M = {run['largest']:.2f} nats")
    ax.set_xticklabels(["0 to M/4", "to M/2", "to 3M/4", "to M"], fontsize=8)


def draw_scales(ax, named):
    """alpha and beta of every model, named {tag: run}, in one axes."""
    for (tag, run), colour in zip(named.items(), COLOURS * len(named)):
        if "alpha" in run:
            style = dict(color=colour, markersize=4, linewidth=1)
            ax.plot(run["alpha"], "o-", label=f"{tag}alpha", **style)
            ax.plot(run["beta"], "s--", label=f"{tag}beta", **style)
    ax.set(xlabel="layer", title="alpha and beta of the FFN", ymargin=0.2)
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.legend(fontsize=7, ncols=2)


def draw_temperatures(ax, named):
    """Each layer's temperatures, mean and range, of every model, named {tag: run}, in one axes."""
    for (tag, run), colour in zip(named.items(), COLOURS * len(named)):
        if "temperature" in run:
            mean = np.mean(run["temperature"], 1)
            low, high = run["temperature_range"]
            reach = np.maximum(0, [mean - low, high - mean])  # a mean of equals is off by rounding
            L = len(run["head_entropy"])  # the first ones may have no softmax, so no temperature
            ax.errorbar(range(L - len(mean), L), mean, reach, fmt="o-", color=colour, capsize=3,
                        markersize=4, linewidth=1, label=tag)
    ax.set(xlabel="layer", title="temperature, mean and range", ymargin=0.2)
    ax.xaxis.get_major_locator().set_params(integer=True)
    low, high = ax.dataLim.intervaly
    if high > 3 * low:
        ax.set_yscale("log")
    if len(named) > 1:
        ax.legend(fontsize=7, ncols=len(named))


def draw_columns(fig, named, panels, most):
    """A column for each run, named {tag: run}, and a narrow one for colour bar and legend."""
    n = len(named)
    labels = {"heads": "layer", "quartiles": "% of heads", "history": "mean entropy, nats"}
    axes = fig.subplots(len(panels), n + 1, squeeze=False, height_ratios=list(panels.values()),
                        width_ratios=[1] * n + [0.05])
    for row, panel in zip(axes, panels):
        for ax, (tag, run) in zip(row, named.items()):
            if panel == "heads":
                image = draw_heatmap(ax, run["head_entropy"], most, "{:.1f}")
                perplexity = f"val. perplexity {run['val_ppl']:.1f}" if run["val_ppl"] else ""
                seed = f"seed {run['seed']}" if run["seed"] is not None else ""
                below = ", ".join(filter(None, (perplexity, seed)))
                ax.set_title(f"{tag}{run['arch']}\n{below}".rstrip(), fontsize=10)
            elif panel == "quartiles":
                draw_quartiles(ax, run)
            elif run["history"]:
                draw_history(ax, run["history"])
                ax.axhline(run["max_causal_entropy"], color="grey", linewidth=0.9, linestyle=":",
                           label="log(T!)/T, a causal\nhead's maximum")
                ax.set_ylim(-0.05 * most, 1.08 * most)
                lines = ax.get_legend_handles_labels()
            else:
                ax.set_axis_off()
            ax.set_ylabel("")
        row[0].set_ylabel(labels[panel])
        if panel == "heads":
            ticks = [t for t in range(int(most) + 1) if t < most - 0.2]
            fig.colorbar(image, cax=row[n], ticks=[*ticks, most], label="mean entropy, nats")
            row[n].set_yticklabels([*map(str, ticks), f"{most:.2f}"])
        else:
            row[n].set_axis_off()
        if panel == "history":
            row[n].legend(*lines, fontsize=7, loc="center left", bbox_to_anchor=(0, 0.5),
                          frameon=False)


def draw_learned(fig, named, columns):
    """What the models, named {tag: run}, have learned beside matrices, in so many columns."""
    panels = learned_panels(named)
    axes = fig.subplots(-(-len(panels) // columns), columns, squeeze=False).flatten()
    for ax, (panel, tag) in zip(axes, panels):
        if panel == "threshold":
            percent = [[100 * share for share in heads] for heads in named[tag]["threshold"]]
            start = len(named[tag]["head_entropy"]) - len(percent)
            draw_heatmap(ax, percent, 100, "{:.0f}", start)
            ax.set(ylabel="layer", title=f"{tag}thresholds, % of log T")
        elif panel == "alpha":
            draw_scales(ax, named)
        else:
            draw_temperatures(ax, named)
        ax.title.set_fontsize(10)
    for ax in axes[len(panels):]:
        ax.set_axis_off()


def learned_panels(named):
    """[(panel, tag)]: thresholds of each model, alpha and beta of all, temperatures of all."""
    panels = [("threshold", tag) for tag, run in named.items() if "threshold" in run]
    for key in ("alpha", "temperature"):
        if any(key in run for run in named.values()):
            panels.append((key, ""))
    return panels


def draw(runs, path):
    """
    The runs side by side, as a PNG: heatmap of the heads (Figure 2d-f), quartile distribution (2a),
    each layer's mean over training (4, 7); then, as far as there are any, learned thresholds, and
    alpha, beta and temperature (5), all models in one panel. One colour scale, from 0 to log(T!)/T
    nats, for all. OSError if path can't be written, which is then as it was.
    """
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    named = {f"({number}) ": run for number, run in enumerate(runs, 1)}
    if len(runs) == 1:
        named = {"": runs[0]}
    panels = {"heads": 3.0, "quartiles": 1.9}  # heights in inches
    if any(len(run["history"]) > 1 for run in runs):
        panels["history"] = 2.3
    width, height = 1.2 + 3.2 * len(runs), 0.3 + sum(panels.values())
    more = len(learned_panels(named))

    fig = plt.figure(layout="constrained")
    if not more:
        fig.set_size_inches(width, height)
        upper = fig
    elif len(runs) == 1:  # beside
        fig.set_size_inches(width + 3.6, height)
        upper, right = fig.subfigures(1, 2, width_ratios=[width, 3.6])
        draw_learned(right, named, 1)
    else:  # below, as many in each row as the width has place for
        rows = math.ceil(more / (width // 2.4))
        fig.set_size_inches(width, height + 2.6 * rows)
        upper, lower = fig.subfigures(2, 1, height_ratios=[height, 2.6 * rows])
        draw_learned(lower, named, math.ceil(more / rows))
    draw_columns(upper, named, panels, max(run["max_causal_entropy"] for run in runs))
    write_figure(fig, path)


# ---------------------------------------------------------------------------------- a checkpoint
@torch.no_grad()
def measure(model, tokens, n):
    """
    Means over `windows` of the n windows of block_size tokens, (L, H) each: entropies in nats,
    attention weights of the first position to all later ones, distances from the average.
    """
    c, T = model.config, model.config.block_size
    chosen = np.linspace(0, n - 1, min(windows, n)).round().astype(int)
    entropy, first, distance = torch.zeros(3, c.n_layer, c.n_head)

    def watched(q, k, v, block_mask, layer):
        """attention_with_entropy(), with a look at the weights."""
        A = causal_attention(q, k)  # (B, H, T, T)
        first[layer] += A[..., 1:, 0].sum((0, 2)) / max(1, T - 1)
        distance[layer] += distance_from_average(A).mean(-1).sum(0)
        return A @ v, attention_entropy(A)

    without = c.n_layer - c.softmax_layers
    for layer in range(without, c.n_layer):
        model.blocks[layer].attn.with_entropy = partial(watched, layer=layer)
    for some in np.array_split(chosen, -(-len(chosen) // 8)):
        x = torch.from_numpy(np.stack([tokens[w * T:(w + 1) * T] for w in some]).astype(np.int64))
        entropy += model(x, return_entropy=True)[2].mean(-1).sum(1)
    entropy, first, distance = (total / len(chosen) for total in (entropy, first, distance))
    for layer in range(without):
        A = model.blocks[layer].attn.pattern(T)  # (H, T, T)
        first[layer] = A[:, 1:, 0].sum(-1) / max(1, T - 1)
        distance[layer] = distance_from_average(A).mean(-1)
    return entropy, first, distance


def look(path):
    """
    describe() of a checkpoint, measured on `text`, or else on the validation set it was trained
    beside; of GPT-2 on `text`. Raises OSError or ValueError if model, log or data can't be read or
    the data is another one now.
    """
    if not text and not is_checkpoint(path):
        raise ValueError(f"{path} is no checkpoint of train.py's: name a text to measure it on, "
                         "--text=FILE")
    checkpoint = read_pretrained(path)
    settings = {"data_dir": "data", "dataset": "pycode", "seed": None}
    settings |= checkpoint.get("settings", {})
    model = GPT.from_checkpoint(checkpoint)
    T = model.config.block_size
    if text:
        encoding = encoding_of(path, checkpoint, tokenizer)
        tokens, _ = read_tokens(text, encoding, model.config.vocab_size)
        n = len(tokens) // T
        if n == 0:
            raise ValueError(f"{text} has {len(tokens)} tokens, and one window of {path} takes {T}")
    else:
        _, tokens, meta, *_ = open_dataset(settings["data_dir"], settings["dataset"], T)
        if meta["sha256"] != checkpoint.get("data_sha256"):
            raise ValueError(f"{path} was trained on other data than {settings['data_dir']}/"
                             f"{settings['dataset']} holds now: run this where its data is, or "
                             "with --text=FILE")
        n = (len(tokens) - (0 if meta["piece"] else 1)) // T  # as many windows as train.py has
    log = []
    if os.path.basename(path) == "ckpt.pt":  # the log beside another name is another run's
        log = read_log(os.path.join(os.path.dirname(path), "log.jsonl"))
    head_entropy, first, distance = measure(model, tokens, n)
    threshold = (checkpoint.get("regularizer") or {}).get("threshold")
    c = model.config
    arch = c.name if threshold is None else f"EReg({c.name})"
    run = describe(arch, model, head_entropy, threshold, log)
    return run | {"seed": settings["seed"], "first_position": first.tolist(),
                  "distance": distance.tolist(),
                  "layers_without_softmax": c.n_layer - c.softmax_layers}


def main():
    configure(globals())
    within(globals(), tolerance=(0, 1))
    if windows < 1:
        die(f"windows must be at least 1, and is {windows}", 2)
    if not find_spec("matplotlib"):
        die("drawing needs matplotlib: pip install matplotlib")
    paths = ckpt.split(",") if ckpt else [os.path.join(f, "ckpt.pt") for f in out_dir.split(",")]
    paths = [os.path.expanduser(path) for path in paths]
    folder = os.path.dirname(paths[0]) if is_checkpoint(paths[0]) else ""
    picture = os.path.expanduser(png) or os.path.join(folder, "entropy.png")
    if not picture.endswith(".png") or png and not os.path.isdir(os.path.dirname(picture) or "."):
        die(f"png must be a .png in a folder that exists, and is {picture!r}", 2)
    numbers = picture.removesuffix(".png") + ".json"
    try:
        runs = [look(path) for path in paths]
        for run in runs:
            print(f"{run['arch']}: " + "\n".join([*diagnosis(run), averaging(run, tolerance)]))
        print(table(runs))
        draw(runs, picture)
        write_whole(numbers, json.dumps(runs, indent=1).encode())
    except (OSError, ValueError) as e:
        die(e)
    print(f"{picture}, {numbers}")


if __name__ == "__main__":
    main()
