"""
What trained models make of their context: does taking nonlinearities away cost recall?

    python experiments/reproduce.py --only=architectures,frontier   # trains the models
    python experiments/in_context.py                                # a few minutes
    python experiments/in_context.py --into=results                 # how results/ got its files

Of every model, by its last checkpoint, the mean of the seeds that are trained:

- in-context score (arXiv 2209.11895): mean loss at the last eighth of the positions less that at
  the second eighth, on validation text, nats; the lower the more it makes of a longer context
- induction: T/2 random tokens, twice. The loss on their second half, nats; log V is chance
- the head that attends most to what followed the token's first occurrence, T/2 - 1 positions back:
  its mean weight there, and its entropy on that text, nats
"""
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "experiments")]
from configurator import configure, die, end_on_signals, within  # noqa: E402

end_on_signals()

import json  # noqa: E402
import math  # noqa: E402
import os  # noqa: E402

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

import reproduce  # noqa: E402
from draw import COLOURS, write_figure, write_whole  # noqa: E402
from entropy import attention_entropy  # noqa: E402
from machine import choose_device, machine_and_commit  # noqa: E402
from model import GPT  # noqa: E402
from plot import weights_of  # noqa: E402
from rows import mean  # noqa: E402
from tables import TABLES  # noqa: E402

out_dir = "out/reproduce"  # where reproduce.py's runs live
data_dir = "data"  # where datasets lie
into = ""  # folder for in_context.json and in_context.png; out_dir if empty
windows = 512  # validation windows
sequences = 64  # of random tokens
device = "auto"  # auto | cpu | cuda

BATCH = 32  # windows at a time


@torch.no_grad()
def loss_by_position(model, x, y):
    """Mean cross-entropy in nats at each position: x, y (N, T) -> (T,)."""
    total = torch.zeros(x.shape[1], device=x.device)
    for some, wanted in zip(x.split(BATCH), y.split(BATCH)):
        logits = model(some)[0]                                               # (B, T, V)
        total += F.cross_entropy(logits.mT, wanted, reduction="none").sum(0)  # (T,)
    return total / len(x)


def in_context_score(loss):
    eighth = len(loss) // 8
    return (loss[-eighth:].mean() - loss[eighth:2 * eighth].mean()).item()


def repeated(V, T):
    """(N, T + 1) random tokens, the same for every model: T/2, once more, and the first again."""
    generator = torch.Generator().manual_seed(0)
    half = torch.randint(0, V, (sequences, T // 2), generator=generator)
    return torch.cat((half, half, half[:, :1]), 1)


@torch.no_grad()
def heads_on(model, x):
    """(L, H) each: mean weight T/2 - 1 positions back in the second half of x, and mean entropy."""
    half = x.shape[1] // 2
    weight, entropy = [], []
    for A in weights_of(model)(x):                              # (N, H, T, T)
        back = A.diagonal(1 - half, dim1=-2, dim2=-1)[..., 1:]  # of rows half to T - 1
        weight.append(back.mean((0, 2)).cpu())
        entropy.append(attention_entropy(A).mean((0, 2)).cpu())
    return torch.stack(weight), torch.stack(entropy)


def study(r, seed):
    """What a row's model of one seed makes of its context, or None if it isn't trained."""
    found = reproduce.trained(r, windows, seed)
    if not found:
        return None
    checkpoint, *text = found
    model = GPT.from_checkpoint(checkpoint).to(device)
    T, V = model.config.block_size, model.config.vocab_size
    x, y = (tokens.to(device) for tokens in text)
    on_text = loss_by_position(model, x, y)
    random = repeated(V, T).to(device)
    on_random = loss_by_position(model, random[:, :-1], random[:, 1:])
    weight, entropy = heads_on(model, random[:, :-1])
    best = divmod(weight.argmax().item(), model.config.n_head)
    # From position T/2 on, where the first token is seen again, what follows is known.
    return {"seed": seed, "chance": math.log(V), "in_context_score": in_context_score(on_text),
            "induction_loss": on_random[T // 2:].mean().item(),
            "induction_head": best, "weight": weight[best].item(), "entropy": entropy[best].item(),
            "loss_on_text": on_text.tolist(), "loss_on_random": on_random.tolist()}


def summary(r):
    """A row of reproduce.py's tables as its seeds' numbers and their means, or None."""
    seeds = [told for told in (study(r, seed) for seed in r["seeds"]) if told]
    if not seeds:
        return None
    means = {key: mean([told[key] for told in seeds])
             for key in ("in_context_score", "induction_loss", "weight", "entropy")}
    curves = {key: torch.tensor([told.pop(key) for told in seeds]).mean(0).tolist()
              for key in ("loss_on_text", "loss_on_random")}
    chance = [told.pop("chance") for told in seeds][0]
    return {"label": r["label"], "config": r["config"], "flags": r["flags"],
            "chance": chance} | means | {"seeds": seeds} | curves


def draw(rows, path):
    """Loss by position, on text and on random tokens that are repeated."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    fig, axes = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for place, row in enumerate(rows):
        style = ("-", "--", ":", "-.")[place // len(COLOURS) % 4]
        for ax, key in zip(axes, ("loss_on_text", "loss_on_random")):
            smooth = torch.tensor(row[key]).view(-1, 4).mean(1)
            ax.plot(range(2, 4 * len(smooth), 4), smooth, style,
                    color=COLOURS[place % len(COLOURS)], label=row["label"], linewidth=1)
    axes[0].set(xlabel="position", ylabel="loss, nats", title="validation text")
    axes[1].set(xlabel="position", title="random tokens, repeated")
    axes[1].axhline(rows[0]["chance"], color="0.6", linestyle=":", linewidth=1)
    axes[1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    write_figure(fig, str(path))


def main():
    global out_dir, data_dir, device
    configure(globals())
    within(globals(), windows=(1, 10**6), sequences=(1, 10**4))
    out_dir, data_dir = os.path.abspath(out_dir), os.path.abspath(data_dir)
    reproduce.out_dir, reproduce.data_dir = out_dir, data_dir
    folder = Path(into or out_dir)
    chosen = {r["label"]: r for name in ("architectures", "frontier", "rivals")
              for r in TABLES[name][2]}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        device = choose_device(device)
        rows = [row for row in map(summary, chosen.values()) if row]
    except (OSError, ValueError) as e:
        die(e)
    if not rows:
        die(f"no trained model in {out_dir}: python experiments/reproduce.py --only=architectures")
    print(f"{'':<42}{'seeds':>6}{'in-context':>11}{'induction':>11}  best head: weight, entropy")
    for row in rows:
        print(f"{row['label']:<42}{len(row['seeds']):>6}{row['in_context_score']:>11.2f}"
              f"{row['induction_loss']:>11.2f}  {row['weight']:.2f}, {row['entropy']:.2f}")
    told = {"made": machine_and_commit() | {"device": device, "torch": torch.__version__},
            "rows": rows}
    try:
        write_whole(str(folder / "in_context.json"), (json.dumps(told) + "\n").encode())
        draw(rows, folder / "in_context.png")
    except OSError as e:
        die(e)


if __name__ == "__main__":
    main()
