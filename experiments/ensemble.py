"""
Cells of cells.py that differ in seed and learning rate alone, trained at once.

Models of one architecture and size take the same operations, so that torch.vmap makes each of them
one for all: a GPU, which waits for small models, trains tens of them in the time of a few. Each has
its own gradient norm, clipping and rate, and what one does, also to be no number any more, changes
no other.
"""
import math
import time
from functools import partial

import torch
import torch.nn as nn
from torch.func import functional_call, vmap

import cells

LOOKS = 6  # times on the way, the start among them, that a model is looked at
HIDDEN = -1e9  # a future key's logit: finite, so that A log A is 0 and not NaN where A is 0
B1, B2, EPS = 0.9, 0.999, 1e-8  # AdamW's, as in cells.py


def attention(told, q, k, v):
    """
    attention_with_entropy() in operations that vmap knows: y, and of every query what is `told`:
    its entropy, its largest absolute logit, or nothing to speak of.
    q, k, v (B, H, T, d_k) -> (B, H, T, d_k), (B, H, T).
    """
    T, d_k = q.shape[-2:]
    future = torch.full((T, T), HIDDEN, device=q.device).triu(1)
    s = q / math.sqrt(d_k) @ k.mT                                    # (B, H, T, T)
    if told == "entropy":
        log_A = (s + future).log_softmax(-1)                         # (B, H, T, T)
        A = log_A.exp()                                              # (B, H, T, T)
        return A @ v, -(A * log_A).sum(-1)
    A = (s + future).softmax(-1)                                     # (B, H, T, T)
    return A @ v, s.tril().abs().amax(-1) if told == "logit" else q[..., 0].detach()


class Member(nn.Module):
    """A cell's model and regularizer, as one module whose parameters functional_call() replaces."""

    def __init__(self, cell):
        super().__init__()
        self.model, self.regularizer = cells.build(cell)
        self.softmax_layers = self.model.config.softmax_layers

    def forward(self, x, y, told):
        """Cross-entropy, what is minimised, and what is `told` of softmax layers (L, B, H, T)."""
        for block in self.model.blocks[-self.softmax_layers:]:
            block.attn.with_entropy = partial(attention, told)
        _, ce, seen = self.model(x, y, return_entropy=True)
        seen = seen[-self.softmax_layers:]                                  # (L, B, H, T)
        if self.regularizer and told == "entropy":
            return ce, ce + cells.LAMBDA * self.regularizer(seen), seen
        return ce, ce, seen


class Ensemble:
    """Models of one architecture and size, trained at once: parameters (M, N), a row a model."""

    def __init__(self, group, device):
        of_seed = {cell["seed"]: Member(cell) for cell in group}
        self.member = next(iter(of_seed.values()))
        rows = {seed: nn.utils.parameters_to_vector(member.parameters()).detach()
                for seed, member in of_seed.items()}                        # (N) each
        named = dict(self.member.named_parameters())
        self.names, self.shapes = list(named), [p.shape for p in named.values()]
        matrices = {id(p) for p in self.member.model.param_groups(0.0)[0]["params"]}
        decay = [torch.full((p.numel(),), cells.WEIGHT_DECAY if id(p) in matrices else 0.0)
                 for p in named.values()]
        self.decay = torch.cat(decay).to(device)                            # (N)
        self.P = torch.stack([rows[cell["seed"]] for cell in group]).to(device).requires_grad_()
        self.m, self.v = torch.zeros_like(self.P), torch.zeros_like(self.P)  # AdamW's moments
        rates_of = [cell["flags"]["learning_rate"] for cell in group]
        self.rates = torch.tensor(rates_of, device=device)[:, None]         # (M, 1)
        self.told = "entropy" if self.member.regularizer else "nothing"

    def __call__(self, x, y, told):
        """Member.forward() of all: x and y (M, B, T), or (B, T) for every model the same."""
        parts = self.P.split([shape.numel() for shape in self.shapes], 1)   # (M, n) each
        parameters = {name: part.view(-1, *shape)
                      for name, part, shape in zip(self.names, parts, self.shapes)}
        where = 0 if x.dim() == 3 else None

        def one(parameters, x, y):
            return functional_call(self.member, parameters, (x, y, told))

        return vmap(one, (0, where, where))(parameters, x, y)

    def step(self, x, y, t, share):
        """Step t of AdamW, counted from 1, at a share of each model's rate, gradients clipped."""
        # A model's gradient is that of its own loss, also where another's loss is NaN.
        _, loss, _ = self(x, y, self.told)                                  # (M)
        [G] = torch.autograd.grad(loss.sum(), self.P)                       # (M, N)
        with torch.no_grad():
            G *= (cells.CLIP / (G.norm(dim=1, keepdim=True) + 1e-6)).clamp(max=1)
            self.m.lerp_(G, 1 - B1)
            self.v.mul_(B2).addcmul_(G, G, value=1 - B2)
            rate = share * self.rates                                       # (M, 1)
            self.P *= 1 - rate * self.decay
            root = self.v.sqrt().div_(math.sqrt(1 - B2**t)).add_(EPS)       # (M, N)
            self.P -= rate / (1 - B1**t) * self.m / root

    @torch.no_grad()
    def look(self, x, y, batch):
        """
        Of held-out sequences (N, T), so many at a time: loss (M), largest logit of the first batch
        and mean entropy of softmax layers (M, L).
        """
        _, _, logit = self(x[:batch], y[:batch], "logit")                   # (M, L, B, H, T)
        losses, entropies = [], []
        for some, wanted in zip(x.split(batch), y.split(batch)):
            ce, _, entropy = self(some, wanted, "entropy")
            losses.append(ce * len(some) / len(x))                          # (M)
            entropies.append(entropy.mean((-2, -1)).sum(-1) / len(x))       # (M, L)
        return sum(losses), logit.amax((2, 3, 4)), sum(entropies)


def train(group, make, held_out, device, deadline=math.inf):
    """
    Train a group of cells at once, as cells.train() does one: the ensemble, and its looks at x, y
    of held_out (N, T) as [step, loss (M), logit (M, L), entropy (M, L)]; None as soon as it won't
    be done by the deadline.
    """
    first, began = group[0], time.time()
    whole, batch = first["steps"], first["batch"]
    ensemble, looks = Ensemble(group, device), []
    held_out = [z.to(device) for z in held_out]
    drawn = list(dict.fromkeys(cell["seed"] for cell in group))
    generators = [torch.Generator().manual_seed(seed) for seed in drawn]
    mine = torch.tensor([drawn.index(cell["seed"]) for cell in group], device=device)  # (M)
    looked_at = {round(whole * i / LOOKS) for i in range(LOOKS)}
    for step in range(whole):
        if step in looked_at:
            looks.append([step, *(z.cpu() for z in ensemble.look(*held_out, batch))])
        if step % cells.LOOK == 0:
            if step and began + (time.time() - began) * whole / step > deadline:
                return None
            made = [make(first, cells.LOOK * batch, g) for g in generators]
            both = [torch.stack(z).to(device).unflatten(1, (cells.LOOK, batch))
                    for z in zip(*made)]                                # (S, LOOK, B, T) each
        x, y = (z[mine, step % cells.LOOK] for z in both)               # (M, B, T)
        share = cells.schedule(step, whole, first.get("warmup", cells.WARMUP))
        ensemble.step(x, y, step + 1, share)
    looks.append([whole, *(z.cpu() for z in ensemble.look(*held_out, batch))])
    return ensemble, looks
