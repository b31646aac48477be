"""How many seeds a question needs: the chance of a verdict before anything has run.

    power = P(|T| > t(1 - alpha / 2k, df)),   T ~ noncentral t(df, effect / (spread / sqrt(n)))

spread: the sd over seeds of the difference of an arm from its reference, sd sqrt(2 (1 - rho)) where both have the same
sd and correlate by rho.  k arms stand in one family: alpha / k is Holm's first step, what a single live arm among dead
ones must pass; more live arms make it easier.  df as in analysis/effects/intervals.py for arms of like noise.

scipy's noncentral t returns NaN for one in three of these, near power 1 but also at 0.28 (df 2, effect 8 se), so
T = (Z + effect) / U is integrated over U = sqrt(chi^2 / df), which cannot fail.
"""

from functools import cache

import numpy as np
from scipy.special import chdtri, ndtr, stdtrit

from ablab.analysis.effects.intervals import MODERATED_FROM, PLAIN_FROM

ALPHA = 0.05
POWER = 0.8
MOST_SEEDS = 1000
NODES = 256  # of the integral over U: within 1e-4 of scipy where that answers
HALVINGS = 60  # of a bracket: to the last bit


def spread_of(sd: float, correlation: float) -> float:
    """The sd of a difference of two arms of one sd whose losses correlate over shared seeds."""
    return float(sd * np.sqrt(2 * (1 - correlation)))


def degrees_of(n: int, arms: int) -> float:
    """Of freedom, with n seeds an arm and arms of like noise."""
    if n >= PLAIN_FROM or arms == 1:
        return n - 1.0
    return (n - 1) * arms / (1 + (arms - 1) / 4)


def power(effect: float, spread: float, n: int, arms: int = 1, alpha: float = ALPHA) -> float:
    """The chance that an arm with this effect gets a verdict from n seeds; 0 below three, which get none."""
    if n < MODERATED_FROM:
        return 0.0
    if spread == 0:
        return float(effect != 0)
    degrees = degrees_of(n, arms)
    critical = stdtrit(degrees, 1 - alpha / (2 * arms))
    distance = abs(effect) / (spread / np.sqrt(n))
    return beyond(critical, degrees, distance)


def beyond(critical: float, degrees: float, distance: float) -> float:
    """P(|T| > critical) for T noncentral t with these degrees of freedom around `distance`."""
    quantiles, weights = _nodes()
    u = np.sqrt(chdtri(degrees, 1 - quantiles) / degrees)
    above = ndtr(distance - critical * u)
    below = ndtr(-distance - critical * u)
    return float(weights @ (above + below))


def smallest_effect(
    spread: float, n: int, arms: int = 1, wanted: float = POWER, alpha: float = ALPHA
) -> float:
    """The effect that n seeds show with this power, in the spread's unit; infinite below three seeds."""
    if n < MODERATED_FROM:
        return float("inf")
    low = 0.0
    high = spread
    while high > 0 and power(high, spread, n, arms, alpha) < wanted:
        high *= 2
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        if power(middle, spread, n, arms, alpha) < wanted:
            low = middle
        else:
            high = middle
    return high


def seeds_needed(
    effect: float, spread: float, arms: int = 1, wanted: float = POWER, alpha: float = ALPHA
) -> int | None:
    """The fewest seeds an arm that show this effect with this power; None above a thousand."""
    for n in range(MODERATED_FROM, MOST_SEEDS + 1):
        if power(effect, spread, n, arms, alpha) >= wanted:
            return n
    return None


@cache
def _nodes() -> tuple[np.ndarray, np.ndarray]:
    """Gauss and Legendre's, on (0, 1)."""
    points, weights = np.polynomial.legendre.leggauss(NODES)
    return (points + 1) / 2, weights / 2
