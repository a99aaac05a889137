"""
Make the constants of nonlinear.py's secure_exp and secure_gelu, and say how far the fits are from
the functions.

    python experiments/fit.py     # a minute
"""
import numpy as np
from scipy.optimize import least_squares  # scipy comes with jax
from scipy.special import erf

INTERVAL = 10.0  # exp is fitted on [-INTERVAL, 0], twice nonlinear.py's LOGIT_UNIT


# --------------------------------------------------------------------------------------------- exp
def squares(u, q):
    """The columns (len(u), 5) whose linear combination secure_exp is: z3, z2, z1, u, 1."""
    z1 = u * u
    z2 = (z1 + q[0] * u) ** 2
    z3 = (z2 + q[1] * z1 + q[2] * u) ** 2
    return np.stack((z3, z2, z1, u, np.ones_like(u)), 1)


def random_starts(n=200):
    rng = np.random.default_rng(0)
    return [rng.normal(size=3) for _ in range(n)]


def fit_exp(starts):
    """(q, e, largest error): nonlinear least squares over q from each start, linear over e."""
    u = np.cos(np.linspace(0, np.pi, 601))  # on [-1, 1], dense at both ends
    y = np.exp(INTERVAL / 2 * (u - 1))
    weight = 1 / (y + 0.3)  # an error of a large number is divided by a large sum
    weight[-1] = 300        # at the clip, where most of a sharp row may lie

    def solve(q):
        """(e, errors): the best linear combination of the columns that q makes."""
        columns = squares(u, q)
        e = np.linalg.lstsq(columns * weight[:, None], y * weight, rcond=1e-12)[0]
        return e, columns @ e - y

    best = None
    for start in starts:
        try:
            found = least_squares(lambda q: solve(q)[1] * weight, start, max_nfev=300,
                                  xtol=1e-15, ftol=1e-15, gtol=1e-15)
        except np.linalg.LinAlgError:
            continue
        small = np.abs(found.x).max() < 4  # small numbers lose nothing in 18 bits
        if small and (best is None or found.cost < best.cost):
            best = found
    e, errors = solve(best.x)
    return tuple(best.x.round(8).tolist()), tuple(e.round(8).tolist()), np.abs(errors).max()


# -------------------------------------------------------------------------------------------- GELU
def fit_gelu():
    """
    (near, far, largest error): two parabolas for GELU(t) - t, each (up to which t, c2, c1, c0),
    and 0 beyond both. By least squares where numbers lie, not minimax: errors of one sign add up
    in the next matrix. By a minimax fit, within 4e-3, a trained SM+LN+G of 12 layers gave the
    clear's token at 125 of 128 positions, by this one at all.
    """
    t = np.linspace(0, 8, 4001)
    y = -t * (1 - erf(t / np.sqrt(2))) / 2
    weight = np.exp(-t**2 / 2) + 0.15 * np.exp(-t**2 / 8)  # of |x| in trained models, most below 1

    def parabola(part):
        return np.polyfit(t[part], y[part], 2, w=np.sqrt(weight[part]))

    best = None
    for b in np.arange(0.8, 1.5, 0.05).tolist():
        for c in np.arange(2.6, 3.8, 0.1).tolist():
            near = parabola(t < b)
            far = parabola((t >= b) & (t < c))
            beyond = np.where(t < c, np.polyval(far, t), 0.0)
            error = np.where(t < b, np.polyval(near, t), beyond) - y
            cost = (weight * error**2).sum()
            if best is None or cost < best[0]:
                best = cost, b, near, c, far, error
    _, b, near, c, far, error = best
    return (round(b, 2), *near.round(8)), (round(c, 2), *far.round(8)), np.abs(error).max()


if __name__ == "__main__":
    q, e, error = fit_exp(random_starts())
    print(f"FIT_Q = {q}\nFIT_E = {e}\nexp within {error:.1e}")
    near, far, error = fit_gelu()
    print(f"GELU_NEAR = {tuple(map(float, near))}\nGELU_FAR = {tuple(map(float, far))}")
    print(f"GELU within {error:.1e}")
