"""
entropy.py against plain loops written from the paper's text.

This file needs entropy.py alone, in the folder above or beside it: both can be copied anywhere.
"""
import math
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]
from entropy import (  # noqa: E402
    ROWS, EntropyRegularizer, attention_entropy, attention_with_entropy, causal_average,
    distance_from_average, explicit_attention_with_entropy, max_causal_entropy, max_entropy,
    quartile_distribution)

L, B, H, T, D = 3, 2, 4, 16, 8


def causal(scores):
    return scores.masked_fill(torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1), -math.inf)


def attention(seed=0, scale=2.0, shape=(B, H, T, T)):
    torch.manual_seed(seed)
    return F.softmax(causal(scale * torch.randn(shape, dtype=torch.float64)), -1)


def test_uniform_rows_reach_log_T():
    assert torch.allclose(attention_entropy(torch.full((T, T), 1 / T)),
                          torch.tensor(max_entropy(T)), atol=1e-5)


@pytest.mark.parametrize("T", [2, 3, 100, 499, 4096])
def test_no_row_exceeds_log_T(T):
    A = F.softmax(torch.randn(50, T) * torch.linspace(0, 0.01, 50)[:, None], -1)
    assert attention_entropy(A).max() <= max_entropy(T)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_hot_rows_have_entropy_0_and_not_less(dtype):
    assert torch.equal(attention_entropy(torch.eye(T, dtype=dtype)), torch.zeros(T, dtype=dtype))


def test_uniform_causal_rows_reach_the_papers_observed_maximum():
    uniform = F.softmax(causal(torch.zeros(128, 128)), -1)
    assert attention_entropy(uniform).mean() == pytest.approx(max_causal_entropy(128), abs=1e-5)
    assert max_causal_entropy(128) == pytest.approx(3.87, abs=0.01)
    assert max_entropy(128) == pytest.approx(4.85, abs=0.01)


def test_distance_from_the_average():
    """By a loop; none from itself; all but 1/i from a row that sees one key; Pinsker's bound."""
    C, i = causal_average(T), torch.arange(1, T + 1)
    assert torch.allclose(distance_from_average(C), torch.zeros(T))
    assert torch.allclose(distance_from_average(torch.eye(T)), 1 - 1 / i)
    A = attention()
    distance = distance_from_average(A)
    row = A[1, 2, 8]
    assert distance[1, 2, 8].item() == pytest.approx(sum(max(0, 1 / 9 - a) for a in row[:9]))
    assert (distance <= ((i.log() - attention_entropy(A)) / 2).clamp(min=0).sqrt() + 1e-4).all()


def test_equation_7_is_equation_10():
    s = causal(3 * torch.randn(B, H, T, T, dtype=torch.float64))
    A = F.softmax(s, -1)
    eq10 = s.logsumexp(-1) - (A * s.masked_fill(s.isinf(), 0)).sum(-1)
    assert torch.allclose(attention_entropy(A), eq10, atol=1e-7)


@pytest.mark.parametrize("scale", [0.1, 2.0, 60.0])  # 60: heads collapsed to one-hot rows
def test_gradient_is_the_plain_formulas_and_finite(scale):
    torch.manual_seed(0)
    s = (scale * torch.randn(B, H, T, T, dtype=torch.float64)).requires_grad_()
    weight = torch.randn(B, H, T, dtype=torch.float64)
    A = F.softmax(causal(s), -1)
    (ours,) = torch.autograd.grad((attention_entropy(A) * weight).sum(), s, retain_graph=True)
    plain = -(A * (A + 1e-9).log()).sum(-1)
    (theirs,) = torch.autograd.grad((plain * weight).sum(), s)
    assert ours.isfinite().all()
    assert torch.allclose(ours, theirs, atol=1e-7)


def test_gradient_is_finite_where_a_weight_is_0():
    """torch.special.entr gives infinities here."""
    A = torch.eye(T, requires_grad=True)
    (gradient,) = torch.autograd.grad(attention_entropy(A).sum(), A)
    assert gradient.isfinite().all()


def test_entropy_keeps_no_further_T_by_T_tensor():
    A, kept = attention().requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        attention_entropy(A)
    assert [t.data_ptr() for t in kept if t.numel() >= A.numel()] == [A.data_ptr()]


def test_bfloat16_weights_are_summed_in_float32():
    A = attention().float()
    assert attention_entropy(A.bfloat16()).dtype == torch.float32
    assert torch.allclose(attention_entropy(A.bfloat16()), attention_entropy(A), atol=0.02)


def values_and_gradients(form, q, k, v, dy, dH):
    q, k, v = (t.clone().requires_grad_() for t in (q, k, v))
    y, entropy = form(q, k, v)
    ((y * dy).sum() + (entropy * dH).sum()).backward()
    return y.detach(), entropy.detach(), q.grad, k.grad, v.grad


@pytest.mark.parametrize("T", [16, 200])  # 200: no multiple of the blocks of 64 and 128
@pytest.mark.parametrize("scale, most", [(1.0, 4.0), (10.0, 0.8), (100.0, 0.1)])  # to collapse
def test_attention_with_entropy_is_the_textbooks(T, scale, most):
    """
    Output, entropy and all gradients in float32, per-position temperatures in q, against the
    explicit form in float64: the difference that eq. 10 takes is rounded by the size of the logits.
    """
    torch.manual_seed(0)
    q, k, v, dy = torch.randn(4, B, H, T, D).unbind()
    q, dH = scale * q / torch.linspace(0.5, 2, T)[:, None], torch.randn(B, H, T)
    double = (t.double() for t in (q, k, v, dy, dH))
    wanted = values_and_gradients(explicit_attention_with_entropy, *double)
    assert wanted[1].mean() < most
    torchs = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=True)
    assert torch.allclose(wanted[0], torchs)
    rounding = 2e-6 * (1 + (q @ k.mT).abs().max() / math.sqrt(D))
    sizes = 1, 1, k.abs().max(), q.abs().max(), 1  # of what ds is multiplied with
    for got, want, size in zip(values_and_gradients(attention_with_entropy, q, k, v, dy, dH),
                               wanted, sizes):
        assert (got - want).abs().max() < rounding * size


def test_a_diverging_models_entropy_is_still_a_number_of_nats():
    """Logits of 1e9, as SM shows before it breaks: eq. 10's difference is hundreds of nats off."""
    torch.manual_seed(0)
    q, k, v = 3e4 * torch.randn(3, B, H, 200, D)
    entropy = attention_with_entropy(q, k, v)[1]
    assert torch.allclose(entropy, explicit_attention_with_entropy(q, k, v)[1], atol=1e-3)
    assert 0 <= entropy.min() and entropy.max() < max_entropy(T)


def test_a_second_derivative_is_refused():
    """
    The saved weights are constants of the backward pass: its own gradient would be wrong. That is
    refused though the incoming gradient, 1, is a constant; autograd's once_differentiable wouldn't.
    """
    q, k, v = (torch.randn(B, H, T, D, requires_grad=True) for _ in range(3))
    _, entropy = attention_with_entropy(q, k, v)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.autograd.grad(entropy.sum(), q, create_graph=True)


@pytest.mark.parametrize("scale", [1.0, 10.0])
def test_the_entropy_of_bfloat16_is_computed_in_float32(scale):
    torch.manual_seed(0)
    q, k, v = (t.bfloat16() for t in torch.randn(3, B, H, 200, D).unbind())
    _, wanted = explicit_attention_with_entropy((scale * q).float(), k.float(), v.float())
    y, entropy = attention_with_entropy(scale * q, k, v)
    assert y.dtype == torch.bfloat16 and entropy.dtype == torch.float32
    assert (entropy - wanted).abs().max() < 1e-4


@pytest.mark.parametrize("scale, most, tolerance",
                         [(1.0, 4.0, 0.01), (10.0, 0.8, 0.02), (100.0, 0.1, 0.2)])
def test_bfloat16_gradients(scale, most, tolerance):
    """
    The backward's products are in bfloat16, its softmax in float32: within 2% of the float32
    gradients, as norms, for logits of up to 100. What is rounded grows with the logits: at 1000 it
    is within 20%.
    """
    torch.manual_seed(0)
    q, k, v, dy = (t.bfloat16() for t in torch.randn(4, B, H, 200, D).unbind())
    q = scale * q / torch.linspace(0.5, 2, 200)[:, None]  # float32, as after a temperature
    dH = torch.randn(B, H, 200)
    single = (t.float() for t in (q, k, v, dy, dH))
    wanted = values_and_gradients(explicit_attention_with_entropy, *single)
    assert wanted[1].mean() < most
    for got, want in zip(values_and_gradients(attention_with_entropy, q, k, v, dy, dH), wanted):
        assert (got - want).norm() < tolerance * want.norm()


def test_attention_with_entropy_is_float32_under_autocast():
    """float32 inputs stay float32 under the caller's autocast, the backward pass outside of it."""
    q, k, v, dy = torch.randn(4, B, H, T, D).unbind()
    dH = torch.randn(B, H, T)
    wanted = values_and_gradients(attention_with_entropy, q, k, v, dy, dH)
    under = torch.autocast("cpu", torch.bfloat16)(attention_with_entropy)
    got = values_and_gradients(under, q, k, v, dy, dH)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted))


def test_attention_with_entropy_keeps_the_causal_half_of_one_T_by_T_tensor():
    T = 4 * ROWS
    q, k, v = (torch.randn(B, H, T, D, requires_grad=True) for _ in range(3))
    kept = {}
    hooks = torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t)
    with hooks:
        attention_with_entropy(q, k, v)
    small = 4 * q.numel()  # q twice, k and v
    assert sum(t.numel() for t in kept.values()) <= small + B * H * T * (T + ROWS) / 2


def test_the_plain_call_compiles():
    """Its hand-written backward can be traced: train.py --compile=yes on a CPU."""
    compiled = torch.compile(attention_with_entropy, fullgraph=True, backend="aot_eager")
    q, k, v, dy = torch.randn(4, B, H, T, D)
    dH = torch.randn(B, H, T)
    wanted = values_and_gradients(attention_with_entropy, q, k, v, dy, dH)
    got = values_and_gradients(compiled, q, k, v, dy, dH)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(got, wanted))


def by_loops(A, threshold, gamma, reading):
    """Algorithm 1 and Appendix B, a number at a time. A: L tensors (B, H, T, T)."""
    E_max = math.log(T)
    total = 0.0
    for l in range(L):
        layer = 0.0
        for h in range(H):
            head = 0.0
            for b in range(B):
                rows = [-sum(p * math.log(p + 1e-9) for p in row) for row in A[l][b, h].tolist()]
                if reading == "head":
                    rows = [sum(rows) / T]
                for E in rows:
                    deviation = E - threshold[l][h] * E_max
                    head += deviation**2 if abs(deviation) > gamma * E_max else 0.0
            layer += {"sum": head, "mean": head / (B * T), "head": head / B}[reading]
        total += layer / H
    return total / L


@pytest.mark.parametrize("reading", ["mean", "sum", "head"])
@pytest.mark.parametrize("gamma", [0.0, 0.2])
def test_regularizer_is_the_double_loop(reading, gamma):
    A = [attention(seed) for seed in range(L)]
    regularizer = EntropyRegularizer(L, H, gamma, reduction=reading).double()
    with torch.no_grad():
        regularizer.threshold.uniform_(0.1, 0.9)
    entropies = [attention_entropy(a) for a in A]
    wanted = by_loops(A, regularizer.threshold.tolist(), gamma, reading)
    assert regularizer(entropies).item() == pytest.approx(wanted, rel=1e-9) and wanted > 0
    assert torch.equal(regularizer(entropies), regularizer(torch.stack(entropies)))


def test_readings_agree_where_the_paper_used_them():
    """lambda = 1e-5 on the authors' sum over 128 x 128 positions is 0.164 on the mean."""
    entropy = torch.rand(L, 128, H, 128, dtype=torch.float64) * 4
    of_sum = EntropyRegularizer(L, H, reduction="sum").double()(entropy)
    of_mean = EntropyRegularizer(L, H, reduction="mean").double()(entropy)
    assert (1e-5 * of_sum).item() == pytest.approx(0.164 * of_mean.item(), rel=2e-3)
    twice = EntropyRegularizer(L, H).double()(torch.cat((entropy, entropy), 1))
    assert twice.item() == pytest.approx(of_mean.item())


def test_margin_and_thresholds():
    regularizer = EntropyRegularizer(L, H, gamma=0.2, threshold_init=0.5)
    assert regularizer.threshold.shape == (L, H) and (regularizer.threshold == 0.5).all()
    inside = torch.full((L, B, H, T), 0.65 * math.log(T))
    assert regularizer(inside) == 0
    outside = torch.full((L, B, H, T), 0.8 * math.log(T), requires_grad=True)
    regularizer(outside).backward()
    assert (outside.grad > 0).all()  # the entropy is pushed down
    assert (regularizer.threshold.grad < 0).all()  # and the thresholds up


def test_regularizer_refuses():
    with pytest.raises(ValueError, match="reduction must be"):
        EntropyRegularizer(L, H, reduction="max")
    with pytest.raises(ValueError, match="3 layers of 5 heads"):
        EntropyRegularizer(L, H)(torch.rand(3, B, 5, T))


def test_quartiles():
    heads = [0.0, 0.9, 1.0, 2.0, 3.0, 4.0, 3.9, 2.9]
    assert quartile_distribution(heads) == [2 / 8, 1 / 8, 2 / 8, 3 / 8]
    assert quartile_distribution(torch.tensor([[1.0, 2.0]]), maximum=8) == [0.5, 0.5, 0, 0]
    assert quartile_distribution([0.0, 0.0]) == [1, 0, 0, 0]
    with pytest.raises(ValueError, match="finite"):
        quartile_distribution([1.0, math.nan])
