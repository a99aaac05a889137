"""
The picture of attention entropies that train.py and plot.py draw, and files written whole.

Panels take a matplotlib axes and what plot.py's describe() tells of a run.
"""
import io
import math
import os

import numpy as np

COLOURS = ("black", "#d55e00", "#0072b2", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
MARKERS = "osv^Dx*"


# ---------------------------------------------------------------------------------- files
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
    least, most = ax.get_ylim()
    ax.set(xlabel="layer", title="alpha and beta of the FFN",
           ylim=(least, most + 0.5 * (most - least)))  # room for the legend
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.legend(fontsize=7, ncols=2, loc="upper center")


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
