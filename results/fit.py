"""
Make the constants of nonlinear.secure_exp and nonlinear.secure_gelu, and say how far they are from the functions.

    python results/fit.py     # a minute
"""
import numpy as np
from scipy.optimize import least_squares, linprog  # scipy comes with jax
from scipy.special import erf

REACH = 10.0  # exp is fitted on [-REACH, 0]


def squares(u, q):
    """The columns whose linear combination secure_exp is: z3, z2, z1, u, 1."""
    z1 = u * u
    z2 = (z1 + q[0] * u) ** 2
    return np.stack(((z2 + q[1] * z1 + q[2] * u + q[3]) ** 2, z2, z1, u, np.ones_like(u)), 1)


def fit_exp(starts=200):
    """(q, e, largest error): nonlinear least squares over q, linear over e, from random starts."""
    u = np.cos(np.linspace(0, np.pi, 601))
    y = np.exp(REACH / 2 * (u - 1))
    weight = 1 / (y + 0.3)  # what is large is divided by a large sum
    weight[-1] = 300        # at the clip, where most of a sharp row may lie
    rng, best = np.random.default_rng(0), None

    def solve(q):
        columns = squares(u, q)
        e = np.linalg.lstsq(columns * weight[:, None], y * weight, rcond=1e-12)[0]
        return e, columns @ e - y

    for _ in range(starts):
        try:
            r = least_squares(lambda q: solve(q)[1] * weight, rng.normal(size=4), max_nfev=300)
        except np.linalg.LinAlgError:
            continue
        if np.abs(r.x).max() < 4 and (best is None or r.cost < best.cost):  # small numbers lose nothing in 18 bits
            best = r
    e, error = solve(best.x)
    return best.x, e, np.abs(error).max()


def parabola(a, b):
    """((c2, c1, c0), largest error) of the minimax parabola to GELU(t) - t on [a, b]."""
    t = np.linspace(a, b, 300)
    y, A = -t * (1 - erf(t / np.sqrt(2))) / 2, np.vander(t, 3)
    rows = np.block([[A, -np.ones((300, 1))], [-A, -np.ones((300, 1))]])
    x = linprog([0, 0, 0, 1], rows, np.hstack((y, -y)), bounds=[(None, None)] * 4).x
    return x[:3], x[3]


def fit_gelu():
    """(near, far, largest error): two parabolas, each (up to which t, c2, c1, c0); GELU(t) - t is taken for 0 beyond."""
    def worst(b, c):
        return max(parabola(0, b)[1], parabola(b, c)[1], c * (1 - erf(c / np.sqrt(2))) / 2)

    error, b, c = min((worst(b, c), b, c) for b in np.arange(0.8, 1.5, 0.05) for c in np.arange(2.6, 3.5, 0.1))
    return (round(b, 2), *parabola(0, b)[0].round(8).tolist()), (round(c, 2), *parabola(b, c)[0].round(8).tolist()), error


if __name__ == "__main__":
    q, e, error = fit_exp()
    print("FIT_Q =", tuple(q.round(8).tolist()), "\nFIT_E =", tuple(e.round(8).tolist()), f"\nexp within {error:.1e}")
    near, far, error = fit_gelu()
    print(f"GELU_NEAR, GELU_FAR = {near}, {far}\nGELU within {error:.1e}")
