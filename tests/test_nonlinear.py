"""
nonlinear.py: each form that MPC affords is near the function it stands for.

In the clear; test_ranges.py holds the same under the engine. Beside a copy of nonlinear.py this
file runs alone.
"""
import numpy as np
import pytest

jax = pytest.importorskip("jax", reason="jax comes with spu, which needs Python 3.10 or 3.11")

try:
    from private import nonlinear
except ImportError:
    import nonlinear


@pytest.fixture
def in_the_clear(monkeypatch):
    """engine_square() as it is under the engine, where exp(x) is (1 + x/2)^2."""
    monkeypatch.setattr(nonlinear, "engine_square", lambda w: w * w)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("n", [1, 4095, 4096, 16384, 16385, 20480, 40000])
def test_a_square_in_blocks_and_a_rest(in_the_clear, n):
    w = normal(n)
    assert np.array_equal(nonlinear.square(w), w * w)


def test_hidden_places_count_nothing(in_the_clear):
    """Beside the same row without them, wherever their logits are: 9 of 300 places are seen."""
    s = 3 * normal(2, 1, 300)
    s[..., 9:] += 1000
    hidden = np.where(np.arange(300) < 9, 0, nonlinear.HIDDEN)[None]
    left = np.where(hidden, nonlinear.CLIPPED, 0)
    e = np.asarray(nonlinear.secure_row_exponentials(s, hidden, left))
    assert np.abs(e - nonlinear.row_exponentials(s, hidden, left)).max() < 4e-3
    assert np.abs(e[..., 9:]).max() < 1e-6


def test_the_exponential_fit(in_the_clear):
    z = np.linspace(-10, 0, 100_001)
    e = nonlinear.secure_exp(z / nonlinear.LOGIT_UNIT + 1)
    assert np.abs(e - np.exp(z)).max() < 4e-3
    assert abs(e[0]) < 5e-5  # at the clip, where most of a sharp row may lie


def test_the_fits_are_those_of_fit_py():
    """Least squares from the exponential's constants stays at them."""
    fit = pytest.importorskip("experiments.fit", reason="this file was copied without fit.py")
    q, e, _ = fit.fit_exp([nonlinear.FIT_Q])
    assert np.abs(np.subtract(q, nonlinear.FIT_Q)).max() < 1e-6
    assert np.abs(np.subtract(e, nonlinear.FIT_E)).max() < 1e-6
    assert fit.fit_gelu()[:2] == (nonlinear.GELU_NEAR, nonlinear.GELU_FAR)


@pytest.mark.parametrize("most, error", [(2, 1e-6), (16, 1e-6), (128, 1e-4), (512, 1e-5)])
def test_reciprocal_by_newton(most, error):
    s = np.geomspace(0.98, 1.01 * most, 9_999).reshape(3, -1, 1)
    r = np.asarray(nonlinear.secure_reciprocal(s, most))
    assert np.abs(r * s - 1).max() < error


@pytest.mark.parametrize("rows", [1, 5, 129, 300])
@pytest.mark.parametrize("unit", [1.0, 8.0])
def test_layernorm_by_matrix_products(rows, unit):
    x = 9 * normal(rows, 32) + 3
    y = np.asarray(nonlinear.SECURE.normalise(x, unit=unit))
    assert np.abs(y - np.asarray(nonlinear.EXACT.normalise(x, unit=unit))).max() < 2e-5


def test_the_price_of_layernorm_stops_growing_with_the_square_of_the_rows():
    def makes_rows_by_rows(step, rows):
        return f"[{rows},{rows}]" in str(jax.make_jaxpr(step)(normal(rows, 32)))

    assert makes_rows_by_rows(nonlinear.secure_normalise, 300)
    assert makes_rows_by_rows(nonlinear.SECURE.normalise, 128)
    assert not makes_rows_by_rows(nonlinear.SECURE.normalise, 129)


def test_the_gelu_fit(in_the_clear):
    x = np.linspace(-20, 20, 100_001, dtype=np.float32)
    for exact in (nonlinear.EXACT.activation["gelu"], nonlinear.EXACT.activation["gelu_tanh"]):
        error = np.asarray(nonlinear.secure_gelu(x) - exact(x))
        assert np.abs(error).max() < 7e-3
        for spread in (0.65, 1, 2):  # of a trained model's numbers
            weight = np.exp(-x**2 / (2 * spread**2))
            bias = np.average(error, weights=weight)  # what all have in common adds up later
            assert abs(bias) < 1e-4
            assert np.average(error**2, weights=weight) < 2.2e-3**2


@pytest.mark.parametrize("name", nonlinear.EXACT.activation)
def test_every_activation_has_a_secure_form(in_the_clear, name):
    x = 3 * normal(7, 5)
    error = nonlinear.SECURE.activation[name](x) - nonlinear.EXACT.activation[name](x)
    assert np.abs(np.asarray(error)).max() < 7e-3
    assert name in nonlinear.ACTIVATION_KIND


@pytest.mark.parametrize("T", [1, 2, 3, 7, 16, 33])
@pytest.mark.parametrize("scale", [0.1, 2.0, 30.0])  # 30: far beyond the fit
def test_causal_softmax_by_packing(in_the_clear, T, scale):
    s = scale * normal(3, T, T) / nonlinear.LOGIT_UNIT
    causal = np.tri(T, dtype=bool)
    largest = np.where(causal, s, -np.inf).max(-1)
    assert np.array_equal(np.asarray(nonlinear.causal_row_max(s))[..., 0], largest)
    e = np.asarray(nonlinear.secure_exponentials(s))
    assert np.abs(e - np.asarray(nonlinear.exponentials(s))).max() < 4e-3
    assert not e[:, ~causal].any()


@pytest.mark.parametrize("row", [0, 7, 15])
@pytest.mark.parametrize("scale", [0.1, 2.0, 30.0])
@pytest.mark.parametrize("lead", [0, 1e3, 1e7])  # of the logits at padding positions
def test_softmax_of_one_row(in_the_clear, row, scale, lead):
    s = scale * normal(3, 1, 16) / nonlinear.LOGIT_UNIT
    s[..., row + 1:] += lead
    hidden = np.where(np.arange(16) > row, nonlinear.HIDDEN, 0)[None]
    left = np.where(hidden, nonlinear.CLIPPED, 0)
    exact = np.asarray(nonlinear.row_exponentials(s, hidden, left))
    assert exact.max() == 1
    e = np.asarray(nonlinear.secure_row_exponentials(s, hidden, left))
    assert np.abs(e - exact).max() < 4e-3
    assert np.abs(e[..., row + 1:]).max(initial=0) < 1e-6


@pytest.mark.parametrize("V", [1, 2, 3, 8, 101])
def test_argmax_by_a_tree(V):
    x = normal(5, V, seed=V)
    x[0] = 1.0  # among equals any will do
    found = np.asarray(nonlinear.secure_argmax(x))
    assert np.array_equal(x[np.arange(5), found], x.max(-1))
    assert np.array_equal(found[1:], x.argmax(-1)[1:])
