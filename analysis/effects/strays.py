"""Runs far from the other seeds of their arm: a run that recovered from a spike is finished, and its number is not.

    spread = 1.4826 median |x - median of its arm|     over all arms; a run that is its arm's median left out
    stray:   |x - median of its arm| > 10 spread

A modified z-score (Iglewicz and Hoaglin, 1993, who name points from 3.5 on).  Of 40,000 simulated experiments whose
noise is normal, from 2 arms to 12 of 3 or 5 seeds, three in a thousand or fewer name a run; of 4 seeds, whose middle is
a mean, 21 with 2 arms, 14 with 3, 8 with 4.  Three seeds of one arm and no other never do: the stray widens the spread.
A stray stays in every number: to leave out what looks bad is to choose.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pandas as pd

FAR = 10.0  # spreads
FEWEST = 3  # seeds of an arm that has a middle
NORMAL = 1.4826  # sd of normal noise over its median distance from the middle


class Stray(NamedTuple):
    """cell, seed: whose it is.  value: its final.  others: lowest and highest of its arm's other seeds."""

    cell: str
    seed: int
    value: float
    others: tuple[float, float]


def strays(runs: pd.DataFrame, metric: str) -> Iterator[Stray]:
    """runs: finished, a row each with `cell`, `seed` and the metric; without a finite number one is passed over."""
    measured = runs[np.isfinite(runs[metric].astype(float))]
    arms = [arm for _, arm in measured.groupby("cell", sort=False) if len(arm) >= FEWEST]
    if not arms:
        return
    distances = [_distances(arm[metric].to_numpy(float)) for arm in arms]
    spread = NORMAL * np.median(np.concatenate([_informative(one) for one in distances]))
    if not spread > 0:
        return
    for arm, distance in zip(arms, distances, strict=True):
        for place in np.flatnonzero(distance > FAR * spread):
            yield _stray(arm, int(place), metric)


def _distances(finals: np.ndarray) -> np.ndarray:
    return np.abs(finals - np.median(finals))


def _informative(distances: np.ndarray) -> np.ndarray:
    """Without the middle run of an odd count, whose distance is 0 by definition."""
    return np.sort(distances)[len(distances) % 2 :]


def _stray(arm: pd.DataFrame, place: int, metric: str) -> Stray:
    finals = arm[metric].to_numpy(float)
    others = np.delete(finals, place)
    row = arm.iloc[place]
    bounds = (float(others.min()), float(others.max()))
    return Stray(str(row.cell), int(row.seed), float(finals[place]), bounds)
