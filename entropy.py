"""
Attention entropy, and the regularizer of "Entropy-Guided Attention for Private LLMs"
(arXiv 2501.03489).

Self-contained (torch only): copy this file into any project that can show its attention weights,
e.g. a Hugging Face model called with `output_attentions=True`. All entropies are in nats.

- attention_entropy: eq. 7 from attention weights, with finite gradients where a weight is 0
- attention_with_entropy: causal attention that returns its output and its entropy in one go, eq. 10
- EntropyRegularizer: Algorithm 1 with its learnable thresholds, in three readings
- quartile_distribution: which share of the heads is collapsed, well-behaved, overloaded
- distance_from_average: how far a head is from the plain average, which needs no softmax
"""
import math

import torch
import torch.nn as nn
import torch.nn.functional as F


# ---------------------------------------------------------------------------------- eq. 7
class _Entropy(torch.autograd.Function):
    """
    -sum_j A_j log(A_j + eps), saving nothing but A, which softmax's own backward keeps anyway.

    The gradient is written by hand for two reasons: torch.special.entr has an infinite derivative
    at A = 0, so that any causal mask would give NaN; and autograd on the plain formula would keep
    two more T x T tensors a layer.
    """

    @staticmethod
    def forward(ctx, A, eps):
        ctx.save_for_backward(A)
        ctx.eps = eps
        # The sum exceeds 0 by eps in a one-hot row, and -log T by rounding in a uniform one.
        return -(A + eps).log_().mul_(A).sum(-1).clamp_(-math.log(A.shape[-1]), 0)

    @staticmethod
    def backward(ctx, grad):
        (A,) = ctx.saved_tensors
        # d/dA = -log(A + eps) - A / (A + eps). The quotient is 1 where A is large against eps, and
        # elsewhere softmax's backward multiplies by A: writing 1 saves a division per entry.
        return (A + ctx.eps).log_().add_(1).mul_(-grad.unsqueeze(-1)), None


def attention_entropy(A, eps=1e-9):
    """
    Shannon entropy of each row of attention weights, eq. 7 before its mean over query positions.

    A: (..., T, T), non-negative, rows summing to 1, masked entries 0
    -> (..., T) nats, from 0 to log T, in float32 at least: bfloat16 would lose tenths of a nat.
    """
    return _Entropy.apply(A if A.dtype == torch.float64 else A.float(), eps)


# ---------------------------------------------------------------------------------- eq. 10
def causal_attention(q, k):
    """Attention weights by the textbook: q and k (B, H, T, d_k) -> A (B, H, T, T)."""
    T, d_k = q.shape[-2:]
    future = torch.ones(T, T, dtype=torch.bool, device=q.device).triu(1)
    s = (q @ k.mT) / math.sqrt(d_k)                                 # (B, H, T, T)
    return F.softmax(s.masked_fill(future, float("-inf")), dim=-1)  # (B, H, T, T)


def explicit_attention_with_entropy(q, k, v):
    """attention_with_entropy() by the textbook: scores, softmax, eq. 7. It is the reference."""
    A = causal_attention(q, k)          # (B, H, T, T)
    return A @ v, attention_entropy(A)  # (B, H, T, d_k), (B, H, T)


ROWS = 64  # queries that _AttentionWithEntropy handles at a time


class _AttentionWithEntropy(torch.autograd.Function):
    """
    attention_with_entropy() of q / sqrt(d_k), k and v, each (N, T, d_k). It takes R = ROWS queries
    at a time, with the S keys that the last of them sees: blocks above the diagonal are neither
    computed nor kept, and A is all that is kept of T x T.

    The gradient is written by hand because autograd passes twice as often over T x T tensors. With
    g = dL/dy and h = dL/dH, the entropy only makes one of its products twice as wide:

        dL/dA_ij = g_i . v_j - h_i s_ij = [g_i, -h_i q_i] . [v_j, k_j]

    Only the way through A counts: the gradient of the logsumexp, sum_j A_ij ds_ij, cancels against
    the gradient of the s that stands beside A. The products of the backward pass are in the type of
    v, which is bfloat16 where the model's products are; all else is in the type of q.
    """

    @staticmethod
    def forward(ctx, q, k, v):
        wide_k, wide_v = k.to(q.dtype), v.to(q.dtype)
        y, entropy, weights = torch.empty_like(v), q.new_empty(q.shape[:-1]), []
        # The mask is finite, so that A s is 0 and not NaN where A is 0.
        mask = torch.finfo(q.dtype).min / 2
        future = torch.full((ROWS, ROWS), mask, dtype=q.dtype, device=q.device).triu_(1)
        for i in range(0, q.shape[-2], ROWS):
            rows, seen = slice(i, i + ROWS), slice(i + ROWS)
            s = q[:, rows] @ wide_k[:, seen].mT  # (N, R, S)
            own = s[..., i:]                     # (N, R, R), where the diagonal is
            own.add_(future[:own.shape[-2], :own.shape[-1]])
            s.sub_(s.amax(-1, keepdim=True))
            A = F.softmax(s, dim=-1)             # (N, R, S)
            y[:, rows] = A @ wide_v[:, seen]
            # With logits of at most 0 both terms of eq. 10 are positive and cannot cancel. The
            # largest weight is exp(0 - logsumexp), so that the logsumexp is -log of it.
            entropy[:, rows] = -A.amax(-1).log() - s.mul_(A).sum(-1)
            weights.append(A)
        ctx.save_for_backward(q.to(v.dtype), k, v, *weights)
        return y, entropy

    @staticmethod
    def backward(ctx, g, h):
        # once_differentiable() would let create_graph pass where g and h are constants, and a
        # second derivative then lacks this function's part without a word.
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # as create_graph has it
            raise RuntimeError("attention_with_entropy() has first derivatives only: "
                               "take explicit_attention_with_entropy() for a second one")
        q, k, v, *weights = ctx.saved_tensors
        g_and_hq = torch.cat((g, (q * -h[..., None]).to(g.dtype)), -1)  # (N, T, 2 d_k)
        v_and_k = torch.cat((v, k), -1)                                 # (N, T, 2 d_k)
        dq, dk, dv = (torch.zeros_like(q, dtype=h.dtype) for _ in range(3))
        for i, A in zip(range(0, q.shape[-2], ROWS), weights):
            rows, seen = slice(i, i + ROWS), slice(i + ROWS)
            dA = g_and_hq[:, rows] @ v_and_k[:, seen].mT  # (N, R, S)
            # softmax's backward, A (dA - sum_j A dA), in one pass
            ds = torch._softmax_backward_data(dA.to(A.dtype), A, -1, A.dtype).to(v.dtype)
            dq[:, rows] = ds @ k[:, seen]
            dk[:, seen] += ds.mT @ q[:, rows]
            dv[:, seen] += A.to(v.dtype).mT @ g[:, rows]
        return dq, dk.to(k.dtype), dv.to(v.dtype)


def attention_with_entropy(q, k, v):
    """
    Causal softmax attention, y = A v with A = softmax(s) and s = q k^T / sqrt(d_k) over j <= i, and
    the entropy of its rows, eq. 10:

        H_i = -sum_j A_ij log A_ij = logsumexp_j s_ij - sum_j A_ij s_ij

    q, k, v: (B, H, T, d_k), k in the type of v -> y (B, H, T, d_k) in that type, and the entropy
    (B, H, T) in nats, in float32 (float64 if q is). For a temperature per query position, eq. 9,
    the caller divides q by it.

    First derivatives only, a second one raises RuntimeError; explicit_attention_with_entropy() has
    them all.
    """
    q = q.to(torch.promote_types(q.dtype, torch.float32)) / math.sqrt(q.shape[-1])
    with torch.autocast(q.device.type, enabled=False):
        flat = [t.contiguous().flatten(0, -3) for t in (q, k, v)]  # (B H, T, d_k)
        y, entropy = _AttentionWithEntropy.apply(*flat)
    return y.view(v.shape), entropy.view(v.shape[:-1])


# ---------------------------------------------------------------------------------- heads
def max_entropy(T):
    """E_max = log T nats, a uniform row over T keys. Thresholds and margin are fractions of it."""
    return math.log(T)


def max_causal_entropy(T):
    """
    log(T!)/T nats, the most that a causal head can reach. Row i sees only i keys and reaches at
    most log i; this is the mean over the rows, 3.88 at T = 128, where log T = 4.85.
    """
    return math.lgamma(T + 1) / T


def causal_average(T):
    """C (T, T), C_ij = 1/i for j <= i, else 0: the attention of the largest entropy there is."""
    return torch.ones(T, T).tril() / torch.arange(1, T + 1)[:, None]


def distance_from_average(A):
    """
    Total variation distance of each row of causal attention A (..., T, T) from C's, (..., T) from 0
    to 1 - 1/i: the share of the weight that lies elsewhere. By Pinsker's inequality it is at most
    sqrt((log i - H_i) / 2), so that a head near the causal maximum of entropy averages.
    """
    return (A - causal_average(A.shape[-1]).to(A)).abs().sum(-1) / 2


def quartile_distribution(head_entropy, maximum=None):
    """
    Share of the heads in [0, M/4), [M/4, M/2), [M/2, 3M/4), [3M/4, M] (Figure 2a).

    head_entropy: (L, H) or any shape, one mean entropy a head, nats. M = `maximum`, by default the
    largest head observed, as in the paper. Returns 4 shares that sum to 1. Many heads in the last
    quarter are entropic overload, heads of deep layers in the first quarter entropy collapse.
    ValueError if an entropy is not finite.
    """
    e = torch.as_tensor(head_entropy, dtype=torch.float32).detach().flatten()
    if not torch.isfinite(e).all():
        raise ValueError("head entropies must be finite; the model that gave these has diverged")
    M = float(e.max()) if maximum is None else maximum
    quarter = (4 * e / M).long().clamp(0, 3) if M > 0 else torch.zeros_like(e, dtype=torch.long)
    return (torch.bincount(quarter, minlength=4) / e.numel()).tolist()


# ---------------------------------------------------------------------------------- Algorithm 1
class EntropyRegularizer(nn.Module):
    """
    The regularizer(entropy) of Algorithm 1: L_total = L_CE + lambda_entropy * regularizer(entropy).

        E_max = log T,  margin = gamma * E_max
        deviation(l, h) = E(l, h) - threshold(l, h) * E_max
        penalty = deviation^2 where |deviation| > margin, else 0;  mean over heads, then over layers

    threshold: (L, H), learnable, a fraction of E_max, to be optimized without weight decay.

    The paper can be read in three ways, which differ by large factors; `reduction` chooses:
    - "mean" (default): the deviation of every query position, averaged over batch and positions. It
      does not depend on the batch size. The paper's lambda of 1e-5 belongs to a sum over 128 x 128
      positions, so that 0.164 here gives the same gradient.
    - "sum": the same deviations summed over batch and positions, as in Appendix B and the authors'
      code, to the letter. lambda = 1e-5 (CodeParrot) belongs to it; it grows with the batch.
    - "head": Algorithm 1 as printed: the entropy is first averaged over query positions (eq. 7),
      then penalised, and the penalty averaged over the batch.
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
        entropy: (L, B, H, T) nats, or a list of L tensors (B, H, T), as attention_entropy() gives
        for each layer. Returns a scalar, nats^2. ValueError if L or H are not the thresholds'.
        """
        if isinstance(entropy, (list, tuple)):
            entropy = torch.stack(tuple(entropy))
        L, B, H, T = entropy.shape
        if (L, H) != tuple(self.threshold.shape):
            raise ValueError(f"entropy has {L} layers of {H} heads, "
                             f"the thresholds {tuple(self.threshold.shape)}")
        E_max = max_entropy(T)
        if self.reduction == "head":
            entropy = entropy.mean(-1, keepdim=True)
        deviation = entropy - self.threshold[:, None, :, None] * E_max
        penalty = torch.where(deviation.abs() > self.gamma * E_max, deviation, 0.0).square()
        if self.reduction == "sum":
            return penalty.sum() / (L * H)
        return penalty.mean()  # every layer has as many heads: the mean of means is one mean


if __name__ == "__main__":
    raise SystemExit("entropy.py is a library; the pictures of a trained model are: "
                     "python plot.py --out_dir=out")
