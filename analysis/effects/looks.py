"""Looking more than once: what a verdict must pass at each look, so that all looks together err as seldom as one.

Whoever peeks after every seed and stops at the first p < 0.05 errs in 64 % of families of ten dead arms.  Lan and
DeMets (Biometrika 70:659, 1983) spend the error as O'Brien and Fleming would, little at first:

    spent(t) = 2 - 2 Phi(z(1 - alpha/2) / sqrt(t)),   t = seeds / seeds of the last look

and a look may spend what its t has more than that of the look before.  For looks at 3, 5 and 8 seeds the nominal alphas
are .0014, .0126 and .0449: an arm is decided at a look when its Holm-adjusted p is below that look's.
"""

from collections.abc import Sequence
from functools import cache

import numpy as np
from scipy.special import ndtr, ndtri

from ablab.analysis.effects.power import ALPHA, HALVINGS

LOOKS = (3, 5, 8)  # seeds
NODES = 200  # of the density between two looks
FARTHEST = 40.0  # sd: nothing lies beyond


def nominal_alphas(looks: Sequence[int] = LOOKS, alpha: float = ALPHA) -> tuple[float, ...]:
    """Two-sided, one for each look, in rising order of seeds."""
    return _nominal_alphas(tuple(looks), alpha)


def alpha_at(n: int, looks: Sequence[int] = LOOKS, alpha: float = ALPHA) -> float:
    """What a verdict from n seeds must pass: what the last look at n seeds or fewer may; 0 before the first look."""
    reached = [
        allowed
        for seeds, allowed in zip(looks, nominal_alphas(looks, alpha), strict=True)
        if seeds <= n
    ]
    return reached[-1] if reached else 0.0


def spent(information: np.ndarray, alpha: float = ALPHA) -> np.ndarray:
    """The error that may be spent by then.  information: the share of the last look's seeds, in (0, 1]."""
    return 2 * ndtr(ndtri(alpha / 2) / np.sqrt(information))


@cache
def _nominal_alphas(looks: tuple[int, ...], alpha: float) -> tuple[float, ...]:
    """The score S = Z sqrt(t) walks by independent normal steps; its density is carried between the boundaries.

    Armitage, McPherson and Rowe, J. R. Stat. Soc. A 132:235, 1969.
    """
    times = np.array(looks, float) / looks[-1]
    allowed = np.diff(spent(times, alpha), prepend=0.0)
    points = np.zeros(1)  # where the walk may be before the look, and how likely it is there
    chances = np.ones(1)
    before = 0.0
    found = []
    for time, now in zip(times, allowed, strict=True):
        step = np.sqrt(time - before)
        boundary = _boundary(points, chances, step, now)
        found.append(float(2 * ndtr(-boundary / np.sqrt(time))))
        points, chances = _carried(points, chances, step, boundary)
        before = time
    return tuple(found)


def _boundary(points: np.ndarray, chances: np.ndarray, step: float, allowed: float) -> float:
    """The |S| that is passed with probability `allowed`."""
    low = 0.0
    high = FARTHEST
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        passed = ndtr((points - middle) / step) + ndtr((-points - middle) / step)
        if chances @ passed > allowed:
            low = middle
        else:
            high = middle
    return high


def _carried(
    points: np.ndarray, chances: np.ndarray, step: float, boundary: float
) -> tuple[np.ndarray, np.ndarray]:
    """The walk that went on: nodes between the boundaries, and how likely each is."""
    nodes, weights = np.polynomial.legendre.leggauss(NODES)
    there = boundary * nodes
    away = (there[:, None] - points) / step
    density = np.exp(-(away**2) / 2) @ chances / (step * np.sqrt(2 * np.pi))
    return there, boundary * weights * density
