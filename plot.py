"""
Pictures of the attention entropies of models that train.py trained, and a diagnosis of them:

    python plot.py --out_dir=out                                 # out/entropy.png and .json
    python plot.py --out_dir=out/sm,out/ereg --png=compare.png   # side by side, on one colour scale
    python plot.py --ckpt=out/ckpt.pt,gpt2 --text=FILE           # on any text; GPT-2 as well
    python plot.py --ckpt=FOLDER --text=FILE                     # any Hugging Face model's folder

It also names the first layers whose heads average, which need no softmax (--uniform_layers).
"""
from configurator import configure, die, end_on_signals, within

if __name__ == "__main__":
    end_on_signals()  # before the heavy imports

import json
import math
import os
from importlib.util import find_spec

import numpy as np
import torch
from tqdm import tqdm

from data.dataset import open_dataset
from draw import draw, write_whole
from entropy import (attention_entropy, causal_attention, distance_from_average,
                     max_causal_entropy, quartile_distribution)
from foreign import is_foreign, open_foreign
from model import GPT
from pretrained import encoding_of, is_checkpoint, read_pretrained, read_tokens

out_dir = "out"  # a folder of train.py's, or several, comma-separated
ckpt = ""        # or checkpoint files, comma-separated; a log.jsonl beside one is its history
text = ""        # measure on this file; ckpt may then name GPT-2's hub id, or a model's folder
tokenizer = ""   # of such a model: a tokenizer.json; if empty the one beside its weights
block_size = 0   # tokens of context, 0: the model's, at most 512 of a folder that isn't GPT-2's
windows = 256    # windows of the validation set or the text that the entropies are means over
tolerance = 0.05  # share of the causal maximum that a head that averages may lack of entropy
png = ""         # the picture, a .json beside it; entropy.png beside the first ckpt if empty


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


# ---------------------------------------------------------------------------------- numbers
def learned(model, threshold):
    """
    What a model learns beside matrices, as lists: alpha, beta, temperature, and `threshold`, its
    fractions of log T, (layers with softmax, H), or None.
    """
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


def describe(arch, T, head_entropy, log=()):
    """
    What there is to see of one model, as plain lists and numbers: a dict for draw() and table().

    head_entropy: (L, H) nats, means over windows of T tokens; log: the records of its log.jsonl.
    The paper counts heads in the lowest and in the highest quarter of [0, M], M the largest head's
    entropy; a layer is called collapsed or overloaded here if half of its heads or more are.
    ValueError if an entropy is not finite.
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
        "arch": arch, "block_size": T, "max_causal_entropy": max_causal_entropy(T),
        "seed": next((r["settings"].get("seed") for r in log if "settings" in r), None),
        "val_ppl": evals[-1]["val_ppl"] if evals else None,
        "head_entropy": E.tolist(), "layer_entropy": E.mean(1).tolist(),
        "quartiles": shares, "largest": float(M),
        "collapsed_heads": int(low.sum()), "collapsed_layers": layers(low),
        "overloaded_heads": int(high.sum()), "overloaded_layers": layers(high),
        "history": history,
    }


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


# ---------------------------------------------------------------------------------- a model
def weights_of(model):
    """A function of x (B, T): the attention weights of a GPT's layers, L of (B, H, T, T)."""
    seen = []

    def watched(q, k, v):
        """attention_with_entropy(), which leaves the weights."""
        seen.append(causal_attention(q, k))  # (B, H, T, T)
        return seen[-1] @ v, attention_entropy(seen[-1])

    without = model.config.n_layer - model.config.softmax_layers
    for block in model.blocks[without:]:
        block.attn.with_entropy = watched

    def weights(x):
        seen.clear()
        model(x, return_entropy=True)
        public = [block.attn.pattern(x.shape[1]) for block in model.blocks[:without]]
        return [A.expand(len(x), *A.shape) for A in public] + seen

    return weights


@torch.no_grad()
def measure(weights, tokens, n, T):
    """
    Means over `windows` of the n windows of T tokens, (L, H) each: entropies in nats, attention
    weights of the first position to all later ones, distances from the average. weights: a function
    as weights_of() gives. ValueError if the tokens have no whole window.
    """
    if n < 1:
        raise ValueError(f"{len(tokens)} tokens hold no window of {T}: give a longer text, or a "
                         "smaller --block_size")
    chosen = np.linspace(0, n - 1, min(windows, n)).round().astype(int)
    total = 0.0
    parts = min(len(chosen), math.ceil(len(chosen) * T / 1024))  # of about 1024 tokens each
    for some in tqdm(np.array_split(chosen, parts), desc="measure", leave=False, delay=10):
        x = torch.from_numpy(np.stack([tokens[w * T:(w + 1) * T] for w in some]).astype(np.int64))
        total = total + torch.stack([seen_of(A) for A in weights(x)], 1)  # (3, L, H)
    return total / len(chosen)


def seen_of(A):
    """
    Of attention weights A (B, H, T, T), sums over the batch, (3, H): entropy, weight on the first
    position, distance from the average.
    """
    first = A[..., 1:, 0].sum(-1) / max(1, A.shape[-1] - 1)  # (B, H)
    return torch.stack([attention_entropy(A).mean(-1), first,
                        distance_from_average(A).mean(-1)]).sum(1)


def measured(arch, weights, tokens, n, T, log=()):
    """describe() of what measure() finds, with its other two numbers of each head."""
    entropy, first, distance = measure(weights, tokens, n, T)
    return describe(arch, T, entropy, log) | {"first_position": first.tolist(),
                                              "distance": distance.tolist()}


def look(path):
    """
    describe() of a model, measured: a checkpoint on `text`, or else on the validation set it was
    trained beside; GPT-2, or another Hugging Face model, on `text`. Raises OSError or ValueError if
    model, log or data can't be read or the data is another one now.
    """
    if not text and not is_checkpoint(path):
        raise ValueError(f"{path} is no checkpoint of train.py's: name a text to measure it on, "
                         "--text=FILE")
    if is_foreign(path):
        arch, weights, tokens, T = open_foreign(path, text, tokenizer, block_size)
        return measured(arch, weights, tokens, len(tokens) // T, T) | {"layers_without_softmax": 0}
    checkpoint = read_pretrained(path)
    model = GPT.from_checkpoint(checkpoint)
    c, settings = model.config, checkpoint.get("settings", {})
    T = block_size or c.block_size
    if T > c.block_size:
        raise ValueError(f"{path} has a context of {c.block_size}: --block_size can't be more")
    if text:
        tokens, _ = read_tokens(text, encoding_of(path, checkpoint, tokenizer), c.vocab_size)
        n = len(tokens) // T
    else:
        place = settings.get("data_dir", "data"), settings.get("dataset", "pycode")
        _, tokens, meta, *_ = open_dataset(*place, T)
        if meta["sha256"] != checkpoint.get("data_sha256"):
            raise ValueError(f"{path} was trained on other data than {'/'.join(place)} holds now: "
                             "run this where its data is, or with --text=FILE")
        n = (len(tokens) - (0 if meta["piece"] else 1)) // T  # as many windows as train.py has
    log = []
    if os.path.basename(path) == "ckpt.pt":  # the log beside another name is another run's
        log = read_log(os.path.join(os.path.dirname(path), "log.jsonl"))
    threshold = (checkpoint.get("regularizer") or {}).get("threshold")
    arch = c.name if threshold is None else f"EReg({c.name})"
    run = measured(arch, weights_of(model), tokens, n, T, log)
    return run | learned(model, threshold) | {
        "seed": settings.get("seed"), "layers_without_softmax": c.n_layer - c.softmax_layers}


def main():
    configure(globals())
    within(globals(), tolerance=(0, 1), block_size=(0, 2**20), windows=(1, 10**9))
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
