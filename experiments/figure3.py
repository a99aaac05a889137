"""
The block before and after, as in the paper's Figure 3, with what each part costs privately.

    python experiments/figure3.py        # writes results/figure3.png

The costs are of results/private_table2.json (bytes of 12 layers) and private_ledger.json.
"""
import json
from pathlib import Path

import matplotlib.pyplot as plt

RESULTS = Path(__file__).resolve().parents[1] / "results"
COLOUR = {"nonlinear": "#f4a259", "linear": "#dbe7f3", "learned": "#8cc084"}
BELOW = 0.27  # where the cost of a box begins below it
RISE = 0.62   # how far above its row a residual connection runs


def box(ax, x, y, text, kind, cost=""):
    """One operation centred on (x, y), and below it what it costs."""
    style = {"boxstyle": "round,pad=0.35", "facecolor": COLOUR[kind], "edgecolor": "0.3"}
    ax.text(x, y, text, ha="center", va="center", fontsize=11, bbox=style, zorder=3)
    ax.text(x, y - BELOW, cost, ha="center", va="top", fontsize=10, fontweight="bold")


def residual(ax, start, end, y, label=""):
    """The connection that passes a sub-block by, from x = start to the sum at x = end."""
    ax.plot([start, start, end, end], [y, y + RISE, y + RISE, y], color="0.45", zorder=1)
    ax.plot(end, y, "o", markersize=15, markerfacecolor="white", markeredgecolor="0.3", zorder=3)
    ax.text(end, y - 0.01, "+", ha="center", va="center", fontsize=13, zorder=4)
    if label:
        box(ax, (start + end) / 2, y + RISE, label, "learned")


def block(ax, y, title):
    """What both blocks have: the line that a row runs along, attention, residual connections."""
    ax.text(-0.4, y + 1.0, title, fontsize=12)
    ax.annotate("", xy=(13.3, y), xytext=(-0.3, y), arrowprops={"arrowstyle": "->"}, zorder=1)
    ax.text(-0.4, y, "$X$", ha="right", va="center", fontsize=13)
    ax.text(13.4, y, "$X_{out}$", ha="left", va="center", fontsize=13)
    for x, text in ((2.4, "$QK^T$"), (5.2, "$AV$"), (6.1, "$W_O$")):
        box(ax, x, y, text, "linear")
    residual(ax, 0.1, 6.9, y)


def mb(cost):
    return f"{cost / 1e6:,.0f} MB"


def total(costs):
    return f"{mb(sum(costs.values()))} a token, {mb(costs['matmul'])} of it matrix products"


table = json.loads((RESULTS / "private_table2.json").read_text())
ledger = json.loads((RESULTS / "private_ledger.json").read_text())["rows"]
gpt2, softmax_only = (run["bytes_by_kind"] for run in table if run["arch"] != "SM+LN+R")
temperature = next(row["MB"] for row in ledger if row["what"] == "temperature")
fig, ax = plt.subplots(figsize=(11, 4.2), layout="constrained")
block(ax, 2.5, f"GPT-2's block, SM+LN+G: {total(gpt2)}")
box(ax, 1.1, 2.5, "LayerNorm", "nonlinear", mb(gpt2["LayerNorm"]))
box(ax, 4.0, 2.5, "softmax", "nonlinear", mb(gpt2["softmax"]))
box(ax, 8.3, 2.5, "LayerNorm", "nonlinear", "(with the other)")
box(ax, 9.6, 2.5, "$W_{in}$", "linear")
box(ax, 10.7, 2.5, "GELU", "nonlinear", mb(gpt2["GELU"]))
box(ax, 11.8, 2.5, "$W_{out}$", "linear")
residual(ax, 7.3, 12.6, 2.5)

block(ax, 0, f"Softmax only, SM(t)+ScFuFFN: {total(softmax_only)}, without $t$")
box(ax, 3.15, 0, "$1/t$", "learned")
ax.text(3.15, 0.27, f"{temperature:.0f} MB a layer", ha="center", fontsize=10, weight="bold")
box(ax, 4.0, 0, "softmax", "nonlinear", mb(softmax_only["softmax"]))
box(ax, 10.2, 0, "$W_{ffn}$", "linear", "0 MB, folded into the next block")
box(ax, 11.8, 0, r"$1/\alpha$", "learned")
residual(ax, 7.3, 12.6, 0, r"$\beta$")

ax.set(xlim=(-0.9, 14.2), ylim=(-0.7, 3.9))
ax.axis("off")
fig.savefig(RESULTS / "figure3.png", dpi=130)
