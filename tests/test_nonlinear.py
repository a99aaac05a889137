"""nonlinear.py: each form that MPC affords near the function it stands for."""
import numpy as np
import pytest

jax = pytest.importorskip("jax", reason="jax comes with spu, which needs Python 3.10 or 3.11")

from private import nonlinear  # noqa: E402


def test_the_exponential_fit(in_the_clear):
    z = np.linspace(-10, 0, 100_001)
    e = nonlinear.secure_exp(z / nonlinear.LOGIT_UNIT + 1)
    assert np.abs(e - np.exp(z)).max() < 4e-3 and abs(e[0]) < 5e-5  # at the clip, where most of a sharp row may lie


@pytest.mark.parametrize("most", [2, 16, 128, 512])
def test_reciprocal_by_newton(most):
    s = np.geomspace(0.98, 1.01 * most, 9_999).reshape(3, -1, 1)
    assert np.abs(np.asarray(nonlinear.secure_reciprocal(s, most)) * s - 1).max() < {2: 1e-6, 16: 1e-6, 128: 1e-4, 512: 1e-5}[most]


@pytest.mark.parametrize("rows", [1, 5, 129, 300])
def test_layernorm_by_matrix_products(rows):
    x = (np.random.default_rng(0).standard_normal((rows, 32)) * 9 + 3).astype(np.float32)
    step = nonlinear.SECURE.normalise
    assert np.abs(np.asarray(step(x)) - np.asarray(nonlinear.normalise(x))).max() < 1e-5
    assert f"[{rows},{rows}]" in str(jax.make_jaxpr(nonlinear.secure_normalise)(x))
    assert (f"[{rows},{rows}]" in str(jax.make_jaxpr(step)(x))) == (rows <= 128)  # its price stops growing with their square


def test_the_gelu_fit(in_the_clear):
    x = np.linspace(-20, 20, 100_001, dtype=np.float32)
    for exact in (nonlinear.EXACT.activation["gelu"], nonlinear.EXACT.activation["gelu_tanh"]):
        error = np.asarray(nonlinear.secure_gelu(x) - exact(x))
        assert np.abs(error).max() < 7e-3
        for spread in (0.65, 1, 2):  # of a trained model's numbers: what all have in common adds up in the next matrix
            weight = np.exp(-x**2 / (2 * spread**2))
            assert abs(np.average(error, weights=weight)) < 1e-4 and np.average(error**2, weights=weight) < 2.2e-3**2


@pytest.mark.parametrize("T", [1, 2, 3, 7, 16, 33])
@pytest.mark.parametrize("scale", [0.1, 2.0, 30.0])  # 30: logits hundreds below their row's largest, beyond the fit
def test_causal_softmax_by_packing(in_the_clear, T, scale):
    s = (scale * np.random.default_rng(0).standard_normal((3, T, T)) / nonlinear.LOGIT_UNIT).astype(np.float32)
    seen = np.where(np.tri(T, dtype=bool), s, -np.inf)
    assert np.array_equal(np.asarray(nonlinear.causal_row_max(s))[..., 0], seen.max(-1))
    e, exact = np.asarray(nonlinear.secure_exponentials(s)), np.asarray(nonlinear.exponentials(s))
    assert np.abs(e - exact).max() < 4e-3 and not e[:, ~np.tri(T, dtype=bool)].any()


@pytest.mark.parametrize("scale", [0.1, 2.0, 30.0])
def test_softmax_of_one_row(in_the_clear, scale):
    s = (scale * np.random.default_rng(0).standard_normal((3, 1, 16)) / nonlinear.LOGIT_UNIT).astype(np.float32)
    for row in (0, 7, 15):
        seen = np.tri(16, dtype=np.float32)[row:row + 1]
        e, exact = np.asarray(nonlinear.secure_row_exponentials(s, seen)), np.asarray(nonlinear.exponentials(s, seen))
        assert np.abs(e - exact).max() < 4e-3 and not e[..., row + 1:].any() and not exact[..., row + 1:].any() and exact.max() == 1


@pytest.mark.parametrize("V", [1, 2, 3, 8, 101])
def test_argmax_by_a_tree(V):
    x = np.random.default_rng(V).standard_normal((5, V)).astype(np.float32)
    x[0] = 1.0  # among equals any will do
    found = np.asarray(nonlinear.secure_argmax(x))
    assert np.array_equal(x[np.arange(5), found], x.max(-1)) and np.array_equal(found[1:], x.argmax(-1)[1:])
