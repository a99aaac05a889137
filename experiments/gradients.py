"""
Gradient norms, activations and logits by layer: what LayerNorm, norms and scales hold in check.

    python experiments/reproduce.py --only=architectures,norms    # trains the models
    python experiments/gradients.py                               # half a minute each
    python experiments/gradients.py --into=results                # how results/ got its file

Of every model of the first seed, before its training and by its last checkpoint, on validation
windows, in float32:

- gradient: norm of the loss's gradient by a block's parameters
- stream: root mean square of what leaves a block
- logit: the largest of a block's attention logits, less its row's mean, nats
"""
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "experiments")]
from configurator import configure, die, end_on_signals, within  # noqa: E402

end_on_signals()

import json  # noqa: E402
import os  # noqa: E402

import torch  # noqa: E402

import reproduce  # noqa: E402
from draw import write_whole  # noqa: E402
from entropy import attention_with_entropy, causal_average  # noqa: E402
from model import GPT, GPTConfig  # noqa: E402
from tables import SEEDS, TABLES  # noqa: E402

out_dir = "out/reproduce"  # where reproduce.py's runs live
data_dir = "data"  # where datasets lie
into = ""  # folder for gradients.json; out_dir if empty
windows = 256  # validation windows


def largest_logit(q, k):
    """max over i and j <= i of s_ij less the mean of row i, s = q k^T / sqrt(d_k), nats."""
    T, d_k = q.shape[-2:]
    C = causal_average(T)                       # (T, T)
    s = q @ k.mT / d_k ** 0.5                   # (B, H, T, T)
    above = s - (C * s).sum(-1, keepdim=True)   # (B, H, T, T)
    return above.masked_fill(C == 0, 0.0).max().item()


def by_layer(model, x, y):
    """
    {"gradient": , "stream": , "logit": } of one batch x, y (B, T): L numbers each, of the logits
    one for each layer with softmax.
    """
    streams, logits = [], []

    def watched(q, k, v):
        logits.append(largest_logit(q.detach(), k.detach()))
        return attention_with_entropy(q, k, v)

    handles = [block.register_forward_hook(lambda block, _, out: streams.append(out[0].detach()))
               for block in model.blocks]
    for block in model.blocks:
        block.attn.with_entropy = watched
    model(x, y, return_entropy=True)[1].backward()
    for handle in handles:
        handle.remove()
    gradients = [torch.cat([p.grad.flatten() for p in block.parameters()]).norm().item()
                 for block in model.blocks]
    model.zero_grad()
    return {"gradient": gradients, "logit": logits,
            "stream": [z.square().mean().sqrt().item() for z in streams]}


def study(r):
    """A row of reproduce.py's tables, before and after training, or None if it isn't trained."""
    found = reproduce.trained(r, windows)
    if not found:
        return None
    checkpoint, x, y = found
    torch.manual_seed(SEEDS[0])  # as train.py does before it makes its model
    models = {"before": GPT(GPTConfig(**checkpoint["model_config"])),
              "after": GPT.from_checkpoint(checkpoint)}
    bare = "" if r["flags"].get("final_layernorm", True) else ", no ln_f"
    return {"label": r["label"] + bare, "config": r["config"], "flags": r["flags"],
            "seed": SEEDS[0], **{when: by_layer(model, x, y) for when, model in models.items()}}


def main():
    global out_dir, data_dir
    configure(globals())
    within(globals(), windows=(1, 10**6))
    out_dir, data_dir = os.path.abspath(out_dir), os.path.abspath(data_dir)
    reproduce.out_dir, reproduce.data_dir = out_dir, data_dir
    names = ("architectures", "no_final_layernorm", "norms", "rivals")
    chosen = {reproduce.folder(r["config"], r["flags"], 0): r
              for name in names for r in TABLES[name][2]}
    try:
        rows = [study(r) for r in chosen.values()]
    except (OSError, ValueError) as e:
        die(e)
    rows = [row for row in rows if row]
    if not rows:
        die(f"no trained model in {out_dir}: python experiments/reproduce.py --only=architectures")
    keys = ("gradient", "stream", "logit")
    print("| | " + " | ".join(f"{key} {when}" for when in ("before", "after") for key in keys)
          + " |\n|" + "---|" * (1 + 2 * len(keys)))
    for row in rows:
        cells = [" ".join(f"{v:.2g}" for v in row[when][key])
                 for when in ("before", "after") for key in keys]
        print(f"| {row['label']} | {' | '.join(cells)} |")
    path = Path(into or out_dir) / "gradients.json"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(str(path), (json.dumps(rows) + "\n").encode())
    except OSError as e:
        die(e)


if __name__ == "__main__":
    main()
