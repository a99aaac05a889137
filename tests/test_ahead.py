"""ahead.py between two real parties: products by a matrix, of rows that come after them."""
import numpy as np
import pytest

pytest.importorskip("spu", reason="spu needs Python 3.10 or 3.11")

from private.nonlinear import CIPHERTEXT  # noqa: E402

n, m = 5, 3
rng = np.random.default_rng(0)
W = rng.normal(size=(n, m))
b = rng.normal(size=m)
X = 100 * rng.normal(size=(4, n))
WIDE = rng.integers(-99, 99, (2, CIPHERTEXT + 3)).astype(np.float64)  # of more than one piece


def party(engine):
    """What either party runs: what it saw."""
    from private.ahead import Matrix, fixed
    from private.block import add_linear, linear, scale_add_linear
    from private.engine import CLIENT, SERVER
    seen, rank = {}, engine.rank

    def matrix(values, rows):
        made = Matrix(values.shape, fixed(values) if rank == SERVER else None)
        for some in rows:
            made.make(lambda *values: engine.op("ahead", *values), engine, some)
        return made

    def told(name, kind, function, *values):
        before = len(engine.costs)
        y = engine.reveal(engine.op(kind, function, *values))
        seen[name] = None if y is None else np.asarray(y, float).tolist()
        cost = sum(cost for _, _, cost in engine.costs[before:])
        seen[name + ", cost"] = cost.tolist()

    x = engine.put(X.shape, CLIENT, X)
    bias = engine.put(b.shape, SERVER, b)
    beta = engine.put((), SERVER, np.array(2.0))
    A = matrix(W, (4, 13))
    first = A.masks[:4].tolist()
    told("linear", "matmul", linear, x, A, bias)
    told("sum", "matmul", add_linear, engine.put((4, m), CLIENT, X[:, :m]), x, A)
    told("scaled", "matmul", scale_add_linear, engine.put((4, m), CLIENT, X[:, :m]), x, beta, A)
    finer = engine.hold(fixed(X if rank == CLIENT else 0 * X, 25), dtype=np.float32, fraction=25)
    told("of more bits", "matmul", linear, finer, A)
    told("the engine's", "matmul", linear, x, engine.put(W.shape, SERVER, W), bias)
    seen["left"] = A.left()
    seen["masks differ"] = not set(map(tuple, first)) & set(map(tuple, A.masks.tolist()))
    try:
        engine.op("matmul", linear, x, A)
    except RuntimeError as e:
        seen["refused"] = str(e)
    told("wide", "matmul", linear, engine.put((1, 2), CLIENT, X[:1, :2]), matrix(WIDE, (1,)))
    told("tall", "matmul", linear, engine.put((1, CIPHERTEXT + 3), CLIENT, WIDE[:1] / 64),
         matrix(WIDE.T, (1,)))
    return seen


@pytest.fixture
def seen(saw):
    """What the client and the server saw."""
    return saw[__name__]


def test_products_are_those_of_the_matrix(seen):
    client, server = seen
    assert np.abs(np.array(client["linear"]) - (X @ W + b)).max() < 2e-3
    assert np.abs(np.array(client["sum"]) - (X[:, :m] + X @ W)).max() < 2e-3
    assert np.abs(np.array(client["scaled"]) - (2 * X[:, :m] + X @ W)).max() < 2e-3
    assert np.abs(np.array(client["of more bits"]) - X @ W).max() < 2e-3
    assert server["linear"] is None


def test_a_matrix_of_many_pieces(seen):
    client, _ = seen
    assert np.abs(np.array(client["wide"]) - X[:1, :2] @ WIDE).max() < 2e-3
    exact = WIDE[:1] / 64 @ WIDE.T
    assert np.abs(np.array(client["tall"]) - exact).max() < 2e-3


def test_each_row_serves_once(seen):
    for party_saw in seen:
        assert party_saw["left"] == 1  # of 17, 4 in each of four products
        assert "4 rows" in party_saw["refused"]
    assert seen[0]["masks differ"]


def test_what_goes_over_is_eight_bytes_a_number_and_a_truncation(seen):
    for party_saw in seen:
        sent, messages, seconds, truncation = party_saw["sum, cost"]  # the first sets up
        assert X.size * 8 < sent <= X.size * 8 + truncation
        assert sent < party_saw["the engine's, cost"][0] / 10
        assert messages and seconds > 0
