"""
train.py with another regularizer in the place of Algorithm 1's, for comparison.

    python experiments/regularizers.py logit_variance config/sm_scfuffn.py
    python experiments/regularizers.py layer=3 config/ereg_sm_t_scfuffn.py

logit_variance: lambda_entropy times the mean variance of a row's logits, which no threshold guides.
layer=3: Algorithm 1 on the heads of that layer alone, where it weighs as much as it does beside the
others, counted from the first layer with softmax. What comes after the name is train.py's.
"""
import math
import runpy
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "experiments")]

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

import entropy  # noqa: E402
from configurator import die  # noqa: E402
from model import Attention  # noqa: E402


def row_variance(q, k):
    """Variance of s = q k^T / sqrt(d_k) over the keys j <= i: q, k (B, H, T, d_k) -> (B, H, T)."""
    T, d_k = q.shape[-2:]
    C = entropy.causal_average(T).to(q)            # (T, T)
    s = q @ k.to(q.dtype).mT / math.sqrt(d_k)      # (B, H, T, T)
    mean = (C * s).sum(-1, keepdim=True)           # (B, H, T, 1)
    return (C * (s - mean).square()).sum(-1)       # (B, H, T)


def attention_with_variance(q, k, v):
    """Attention.with_entropy() that gives a row's variance for its entropy, but in evaluations."""
    if not torch.is_grad_enabled():
        return entropy.attention_with_entropy(q, k, v)
    q, k, v = q.float(), k.float(), v.float()
    return F.scaled_dot_product_attention(q, k, v, is_causal=True), row_variance(q, k)


class LogitVariance(torch.nn.Module):
    """The mean of what attention_with_variance() gives, (L, B, H, T); it learns nothing."""

    threshold = None

    def __init__(self, *settings_of_algorithm_1):
        super().__init__()

    def forward(self, variance):
        return variance.mean()


class OneLayer(entropy.EntropyRegularizer):
    """Algorithm 1 where every layer but `layer` has its deviation set to 0."""

    layer = 0

    def __init__(self, n_layer, *settings):
        super().__init__(n_layer, *settings)
        if self.layer >= n_layer:
            die(f"there is no layer={self.layer} among {n_layer} with softmax", 2)

    def forward(self, entropies):
        """entropies (L, B, H, T) nats -> a scalar, nats^2."""
        L, T = len(entropies), entropies.shape[-1]
        chosen = torch.arange(L, device=entropies.device) == self.layer
        wanted = self.threshold[:, None, :, None] * entropy.max_entropy(T)      # (L, 1, H, 1)
        return super().forward(torch.where(chosen[:, None, None, None], entropies, wanted))


def main():
    name, _, layer = sys.argv[1].partition("=") if len(sys.argv) > 1 else ("", "", "")
    if name == "logit_variance" and not layer:
        Attention.with_entropy = staticmethod(attention_with_variance)
        entropy.EntropyRegularizer = LogitVariance
    elif name == "layer" and layer.isdigit():
        OneLayer.layer = int(layer)
        entropy.EntropyRegularizer = OneLayer
    else:
        die("name the regularizer first: logit_variance, or layer=3 for one layer", 2)
    sys.argv[:] = ["train.py", *sys.argv[2:], "--entropy_reg=True"]
    runpy.run_path(str(ROOT / "train.py"), run_name="__main__")


if __name__ == "__main__":
    main()
