"""
Attention entropy, and the regularizer of "Entropy-Guided Attention for Private LLMs" (arXiv 2501.03489).

Self-contained (torch only): copy this file into any project that can show its attention weights, e.g. a
Hugging Face model called with `output_attentions=True`. All entropies are in nats. Pictures of models that train.py
trained are plot.py's.

- attention_entropy: eq. 7, from attention weights, finite gradients at A = 0, no extra T x T tensor kept
- attention_with_entropy: causal attention that returns its output and its entropy in one go (eq. 10), at contexts of some hundreds hardly dearer than the output alone
- EntropyRegularizer: Algorithm 1 with its learnable per-head thresholds, in three readings
- quartile_distribution: which share of the heads is collapsed, well-behaved, overloaded
"""
import math

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


if __name__ == "__main__":
    raise SystemExit("entropy.py is a library; the pictures of a trained model are: python plot.py --out_dir=out")
