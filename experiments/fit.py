"""
Make the constants of nonlinear.secure_exp and nonlinear.secure_gelu, and say how far they are from the functions.

    python experiments/fit.py     # a minute
"""
import numpy as np
from scipy.optimize import least_squares  # scipy comes with jax
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


def fit_gelu():
    """
    (near, far, largest error): two parabolas, each (up to which t, c2, c1, c0); GELU(t) - t is taken for 0 beyond. By least squares where
    numbers lie, not minimax: errors of one sign add up in the next matrix. By a minimax fit, within 4e-3, a trained
    SM+LN+G of 12 layers told the clear's token at 125 of 128 positions, by this one at all.
    """
    t = np.linspace(0, 8, 4001)
    y, weight = -t * (1 - erf(t / np.sqrt(2))) / 2, np.exp(-t**2 / 2) + 0.15 * np.exp(-t**2 / 8)  # of |x| in trained models, most below 1

    def fits(b, c):
        near, far = (np.polyfit(t[i], y[i], 2, w=np.sqrt(weight[i])) for i in (t < b, (t >= b) & (t < c)))
        error = np.where(t < b, np.polyval(near, t), np.where(t < c, np.polyval(far, t), 0)) - y
        return (weight * error**2).sum(), (round(b, 2), *near.round(8).tolist()), (round(c, 2), *far.round(8).tolist()), np.abs(error).max()

    return min(fits(b, c) for b in np.arange(0.8, 1.5, 0.05).tolist() for c in np.arange(2.6, 3.8, 0.1).tolist())[1:]


if __name__ == "__main__":
    q, e, error = fit_exp()
    print("FIT_Q =", tuple(q.round(8).tolist()), "\nFIT_E =", tuple(e.round(8).tolist()), f"\nexp within {error:.1e}")
    near, far, error = fit_gelu()
    print(f"GELU_NEAR, GELU_FAR = {near}, {far}\nGELU within {error:.1e}")
