"""
Attention entropy, and the regularizer of "Entropy-Guided Attention for Private LLMs" (arXiv 2501.03489).

Self-contained (torch only): copy this file into any project that can show its attention weights, e.g. a
Hugging Face model called with `output_attentions=True`. All entropies are in nats. As a script it draws those of models
that train.py trained, and says what is wrong with them:

    python entropy.py --out_dir=out                                 # out/entropy.png and .json
    python entropy.py --out_dir=out/sm,out/ereg --png=compare.png   # side by side, on one colour scale

- attention_entropy: eq. 7, from attention weights, finite gradients at A = 0, no extra T x T tensor kept
- attention_with_entropy: causal attention that returns its output and its entropy in one go (eq. 10), at contexts of some hundreds hardly dearer than the output alone
- EntropyRegularizer: Algorithm 1 with its learnable per-head thresholds, in three readings
- quartile_distribution: which share of the heads is collapsed, well-behaved, overloaded
"""
import json
import math
import os

import torch
import torch.nn as nn
import torch.nn.functional as F


class _Entropy(torch.autograd.Function):
    """
    -sum_j A_j log(A_j + eps), saving nothing but A (which softmax's own backward keeps anyway).

    Written by hand for two reasons: torch.special.entr has an infinite derivative at A = 0, so NaN under any
    causal mask; and autograd on the plain formula would keep two more T x T tensors per layer.
    """

    @staticmethod
    def forward(ctx, A, eps):
        ctx.save_for_backward(A)
        ctx.eps = eps
        return -(A + eps).log_().mul_(A).sum(-1)

    @staticmethod
    def backward(ctx, grad):
        (A,) = ctx.saved_tensors
        # d/dA = -log(A + eps) - A / (A + eps). The second term is 1 wherever A matters, and where A is not
        # large against eps softmax's backward multiplies it by A: leaving the 1 saves a division per entry.
        return (A + ctx.eps).log_().add_(1).mul_(-grad.unsqueeze(-1)), None


def attention_entropy(A, eps=1e-9):
    """
    Shannon entropy of each row of attention weights, eq. 7 before its mean over query positions.

    A: (..., T, T) non-negative, rows summing to 1 (masked entries 0) -> (..., T) nats, in [0, log T].
    Computed in float32 at least: in bfloat16 the sum loses whole tenths of a nat.
    """
    return _Entropy.apply(A if A.dtype == torch.float64 else A.float(), eps)


def explicit_attention_with_entropy(q, k, v):
    """attention_with_entropy() as the textbook has it: scores, softmax, eq. 7. The reference."""
    T, d_k = q.shape[-2:]
    future = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1)
    s = (q @ k.mT) / math.sqrt(d_k)
    A = F.softmax(s.masked_fill(future, float("-inf")), dim=-1)
    return A @ v, attention_entropy(A)


class _AttentionWithEntropy(torch.autograd.Function):
    """
    attention_with_entropy() of q / sqrt(d_k), k, v, each (N, T, d_k), keeping one T x T tensor: A. Its gradient by hand, as autograd
    makes twice as many passes over T x T tensors. With g = dL/dy, h = dL/dH, the entropy makes one of its products twice as wide:

        dL/dA_ij = g_i . v_j - h_i s_ij = [g_i, -h_i q_i] . [v_j, k_j]

    through A alone: the logsumexp's gradient, sum_j A_ij ds_ij, cancels against that of s where it stands beside A. The backward's
    products are in v's type, bfloat16 where the model's are, and all else in q's.
    """

    @staticmethod
    def forward(ctx, q, k, v):
        T = q.shape[-2]
        future = torch.full((T, T), torch.finfo(q.dtype).min / 2, dtype=q.dtype, device=q.device).triu_(1)  # finite: A s is 0 there
        s = (q @ k.to(q.dtype).mT).add_(future)
        s.sub_(s.amax(-1, keepdim=True))
        A = F.softmax(s, dim=-1)
        ctx.save_for_backward(q.to(v.dtype), k, v, A)
        # of logits at most 0, so that both terms are sums of what is positive: logsumexp is -log of the largest weight, at least 1/T
        return (A @ v.to(q.dtype)).to(v.dtype), -A.amax(-1).log() - s.mul_(A).sum(-1)

    @staticmethod
    def backward(ctx, g, h):
        q, k, v, A = ctx.saved_tensors
        dA = torch.cat((g, (q * -h[..., None]).to(g.dtype)), -1) @ torch.cat((v, k), -1).mT
        ds = torch._softmax_backward_data(dA.to(A.dtype), A, -1, A.dtype).to(v.dtype)  # A (dA - sum_j A dA), in one pass
        return (ds @ k).to(A.dtype), ds.mT @ q, A.to(v.dtype).mT @ g


def attention_with_entropy(q, k, v, block_mask=None):
    """
    Causal softmax attention and its entropy: y = A v, A = softmax(s), s = q k^T / sqrt(d_k) over j <= i, and eq. 10,

        H_i = -sum_j A_ij log A_ij = logsumexp_j s_ij - sum_j A_ij s_ij = logsumexp_j s_ij - q_i . (A k)_i / sqrt(d_k).

    q, k, v: (B, H, T, d_k), k in v's dtype -> y (B, H, T, d_k) in that dtype, entropy (B, H, T) nats in float32 (float64 if q is). A
    temperature per query position (eq. 9) is a division of q by it, done by the caller. With a block_mask, causal_block_mask()'s, one
    call of flex_attention stores no T x T tensor: for compiled models on CUDA.
    """
    if block_mask is not None:
        return fused_attention_with_entropy(q, k, v, block_mask)
    q = q.to(torch.promote_types(q.dtype, torch.float32)) / math.sqrt(q.shape[-1])
    with torch.autocast(q.device.type, enabled=False):
        y, entropy = _AttentionWithEntropy.apply(*(t.contiguous().flatten(0, -3) for t in (q, k, v)))
    return y.view(v.shape), entropy.view(v.shape[:-1])


def fused_attention_with_entropy(q, k, v, block_mask):
    """attention_with_entropy() as one call of flex_attention with values [v, k]; detach() leaves the gradient that _AttentionWithEntropy derives."""
    from torch.nn.attention.flex_attention import AuxRequest, flex_attention
    q = q.to(k.dtype)  # a temperature in float32 has widened it
    y, aux = flex_attention(q, k, torch.cat((v, k.detach()), -1), block_mask=block_mask, return_aux=AuxRequest(lse=True))
    y, Ak = y.split((v.shape[-1], k.shape[-1]), -1)
    # the difference cancels where a head collapses: in float32, though Ak comes rounded to the type of the values
    return y, aux.lse.detach() - (q.detach().float() * Ak.float()).sum(-1) / math.sqrt(q.shape[-1])


def causal_block_mask(T, device):
    """flex_attention's mask of j <= i."""
    from torch.nn.attention.flex_attention import create_block_mask
    return create_block_mask(lambda b, h, i, j: i >= j, None, None, T, T, device=device)


def max_entropy(T):
    """E_max = log T nats: a uniform row over all T keys. The reference of thresholds and margin (Algorithm 1)."""
    return math.log(T)


def max_causal_entropy(T):
    """
    log(T!)/T nats, the most a causal head can reach: row i sees only i keys, so at most log i, and this is the
    mean over rows (3.88 at T = 128, where log T = 4.85).
    """
    return math.lgamma(T + 1) / T


def quartile_distribution(head_entropy, maximum=None):
    """
    Share of the heads in [0, M/4), [M/4, M/2), [M/2, 3M/4), [3M/4, M] (Figure 2a).

    head_entropy: (L, H) or any shape, one mean entropy per head, nats. M = `maximum`, by default the largest
    head observed, as in the paper. Returns 4 shares that sum to 1. Many heads in the last quarter is entropic
    overload; heads near 0 in deep layers, in the first, entropy collapse. ValueError if an entropy is not finite.
    """
    e = torch.as_tensor(head_entropy, dtype=torch.float32).detach().flatten()
    if not torch.isfinite(e).all():
        raise ValueError("head entropies must be finite; the model that gave these has diverged")
    M = float(e.max()) if maximum is None else maximum
    quarter = (4 * e / M).long().clamp(0, 3) if M > 0 else torch.zeros_like(e, dtype=torch.long)
    return (torch.bincount(quarter, minlength=4) / e.numel()).tolist()


class EntropyRegularizer(nn.Module):
    """
    Algorithm 1: L_total = L_CE + lambda_entropy * regularizer(entropy). This module is the second factor.

        E_max = log T,  margin = gamma * E_max
        deviation(l, h) = E(l, h) - threshold(l, h) * E_max
        penalty = deviation^2 where |deviation| > margin, else 0;  mean over heads, then over layers

    threshold: (L, H), learnable, a fraction of E_max; give it to the optimizer without weight decay.

    The paper can be read in three ways, which differ by large factors; `reduction` chooses:
    - "mean" (default): the deviation of every query position, averaged over batch and positions. Does not depend
      on the batch size. The paper's lambda of 1e-5 is for the sum below over 128 x 128 positions, so 0.164 here
      gives the same gradient.
    - "sum": the same deviations summed over batch and positions: Appendix B and the authors' code, to the letter.
      lambda = 1e-5 (CodeParrot) belongs to it, and it grows with the batch.
    - "head": Algorithm 1 as printed: the entropy is first averaged over query positions (eq. 7), then penalised;
      averaged over the batch.
    """

    def __init__(self, n_layer, n_head, gamma=0.2, threshold_init=0.5, reduction="mean"):
        super().__init__()
        if reduction not in ("mean", "sum", "head"):
            raise ValueError(f"reduction must be 'mean', 'sum' or 'head', and is {reduction!r}")
        self.threshold = nn.Parameter(torch.full((n_layer, n_head), float(threshold_init)))
        self.gamma = gamma
        self.reduction = reduction

    def forward(self, entropy):
        """
        entropy: (L, B, H, T) nats, or a list of L tensors (B, H, T): what attention_entropy gives per layer.
        Returns a scalar, nats^2. ValueError if L or H are not the thresholds'.
        """
        entropy = torch.stack(tuple(entropy)) if isinstance(entropy, (list, tuple)) else entropy
        L, B, H, T = entropy.shape
        if (L, H) != tuple(self.threshold.shape):
            raise ValueError(f"entropy has {L} layers of {H} heads, the thresholds {tuple(self.threshold.shape)}")
        E_max = max_entropy(T)
        if self.reduction == "head":
            entropy = entropy.mean(-1, keepdim=True)
        deviation = entropy - self.threshold[:, None, :, None] * E_max
        penalty = torch.where(deviation.abs() > self.gamma * E_max, deviation, 0.0).square()
        # every layer has the same number of heads: the mean of means is one mean
        return penalty.sum() / (L * H) if self.reduction == "sum" else penalty.mean()


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
