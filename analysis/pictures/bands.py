"""Curves as a page shows them: the mean and the standard deviation over the runs of a cell, on one axis of tokens.

    mean[p] = mean over runs of metric(tokens[p]),   sd[p] over the same runs,   `runs` of them have come that far

A run is linear between its logged lines and says nothing outside them.  Differences are taken run by run, over runs of
one seed: their sd is that of the differences.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd

from ablab.core.store.result import FINISHED

POINTS = 200  # of one curve at most: as many as a screen can tell apart
FEWEST_POINTS = 30
ALL_POINTS = 60_000  # points of all curves of a page together
COLUMNS = ["metric", "cell", "tokens", "flops", "seconds", "mean", "sd", "runs"]
KNOWN = ("cell", "reference", "pair", "run", "status", "step", "tokens", "flops", "seconds")
PER_LAYER = "layer/"  # metrics by the hundred: for a notebook, not for a page


def metrics_of(logged: pd.DataFrame, first: str) -> list[str]:
    """The metrics that have a curve: `first`, what is measured on held-out text, then the others as they are logged."""
    found = [name for name in map(str, logged) if name not in KNOWN]
    found = [name for name in found if not name.startswith(PER_LAYER)]
    return sorted(found, key=lambda name: (name != first, not name.startswith("val/")))


def points_for(curves: int) -> int:
    """Points of each of so many curves."""
    return int(np.clip(ALL_POINTS // max(curves, 1), FEWEST_POINTS, POINTS))


def bands(
    logged: pd.DataFrame, metrics: Sequence[str], statuses: Sequence[str] = (FINISHED,)
) -> pd.DataFrame:
    """One row per metric, cell and point, in the columns COLUMNS.

    logged: of `frame.curves`.  statuses: of the runs that count.  sd: NaN where one run alone has come that far.
    """
    alive = logged[logged.status.isin(statuses)]
    clocks = _clocks(alive)
    points = points_for(len(metrics) * alive.cell.nunique())
    tables = []
    for metric in metrics:
        for cell, runs in _runs_of(alive, clocks, metric).items():
            tables.append(_sheaf(runs, points).band(metric, cell))
    return _joined(tables)


def differences(
    logged: pd.DataFrame, metric: str, statuses: Sequence[str] = (FINISHED,)
) -> pd.DataFrame:
    """As `bands`, of each cell's runs minus those of its reference on the same seeds, where both have been."""
    alive = logged[logged.status.isin(statuses)]
    references = dict(zip(alive.cell, alive.reference, strict=True))
    cells = _runs_of(alive, _clocks(alive), metric)
    points = points_for(len(cells))
    tables = []
    for cell, runs in cells.items():
        theirs = {run.clock.pair: run for run in cells.get(references[cell], [])}
        shared = [run for run in runs if run.clock.pair in theirs]
        if not shared:
            continue
        both = _sheaf(shared, points).minus([theirs[run.clock.pair] for run in shared])
        if len(both.axis):
            tables.append(both.band(metric, cell))
    return _joined(tables)


Band = dict[str, Any]  # COLUMNS of one cell: metric and cell a word each, the others [P]


def _joined(bands: list[Band]) -> pd.DataFrame:
    if not bands:
        return pd.DataFrame(columns=COLUMNS)
    points = [len(band["tokens"]) for band in bands]
    table = {}
    for name in COLUMNS:
        told = [band[name] for band in bands]
        words = name in ("metric", "cell")
        table[name] = pd.Series(told).repeat(points).array if words else np.concatenate(told)
    return pd.DataFrame(table)


# -- runs --------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class _Clock:
    """Where a run stands in the frame, and when it had read how many tokens: [P] each."""

    cell: str
    pair: int
    lines: slice
    tokens: np.ndarray
    seconds: np.ndarray
    token_flops: float

    def at(self, axis: np.ndarray) -> np.ndarray:
        return _linear(axis, self.tokens, self.seconds)


@dataclass(frozen=True)
class _Run:
    """A metric of one run over tokens, [P] each: where the run has logged it."""

    clock: _Clock
    tokens: np.ndarray
    values: np.ndarray

    @property
    def last(self) -> float:
        return float(self.tokens[-1])

    def at(self, axis: np.ndarray) -> np.ndarray:
        return _linear(axis, self.tokens, self.values)


def _linear(axis: np.ndarray, tokens: np.ndarray, values: np.ndarray) -> np.ndarray:
    """The values there; NaN where the run has not been."""
    return np.interp(axis, tokens, values, left=np.nan, right=np.nan)


def _clocks(logged: pd.DataFrame) -> list[_Clock]:
    """A clock a run.  The lines of a run stand together: a slice finds them a hundred times faster than a groupby."""
    if logged.empty:
        return []
    codes, names = pd.factorize(logged.cell)
    pairs = logged.pair.to_numpy()
    changes = (np.diff(codes) != 0) | (np.diff(pairs) != 0)
    bounds = [0, *(np.flatnonzero(changes) + 1), len(logged)]
    tokens = logged.tokens.to_numpy(float)
    seconds = logged.seconds.to_numpy(float)
    with np.errstate(
        invalid="ignore", divide="ignore"
    ):  # before its first token a run has cost nothing
        token_flops = logged.flops.to_numpy(float) / tokens
    clocks = []
    for start, end in pairwise(bounds):
        lines = slice(start, end)
        clocks.append(
            _Clock(
                cell=str(names[codes[start]]),
                pair=int(pairs[start]),
                lines=lines,
                tokens=tokens[lines],
                seconds=seconds[lines],
                token_flops=token_flops[end - 1],
            )
        )
    return clocks


def _runs_of(
    logged: pd.DataFrame, clocks: Sequence[_Clock], metric: str
) -> dict[str, list[_Run]]:
    """The cells that have logged the metric, each with its runs."""
    values = logged[metric].to_numpy(float)
    cells: dict[str, list[_Run]] = {}
    for clock in clocks:
        own = values[clock.lines]
        known = np.isfinite(own)
        if known.any():
            run = _Run(clock, clock.tokens[known], own[known])
            cells.setdefault(clock.cell, []).append(run)
    return cells


# -- runs on one axis --------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class _Sheaf:
    """Several runs on one axis of tokens [P]: values [S, P], NaN where a run has not been."""

    axis: np.ndarray
    values: np.ndarray
    clocks: list[_Clock]

    def minus(self, others: Sequence[_Run]) -> "_Sheaf":
        """Each run minus another, on the part of the axis where any pair has been."""
        theirs = np.stack([run.at(self.axis) for run in others])
        values = self.values - theirs
        seen = np.isfinite(values).any(axis=0)
        return _Sheaf(self.axis[seen], values[:, seen], self.clocks)

    def band(self, metric: str, cell: str) -> Band:
        seconds = np.stack([clock.at(self.axis) for clock in self.clocks])
        return {
            "metric": metric,
            "cell": cell,
            "tokens": self.axis,
            "flops": self.axis * self.clocks[0].token_flops,
            "seconds": _mean(seconds),
            "mean": _mean(self.values),
            "sd": _sd(self.values),
            "runs": _count(self.values),
        }


def _sheaf(runs: Sequence[_Run], points: int) -> _Sheaf:
    """On the tokens at which the run that has come farthest logged, thinned to `points`."""
    tokens = max(runs, key=lambda run: run.last).tokens
    places = np.linspace(0, len(tokens) - 1, min(points, len(tokens)))
    axis = tokens[np.unique(places.round().astype(int))]
    values = np.stack([run.at(axis) for run in runs])
    return _Sheaf(axis, values, [run.clock for run in runs])


def _count(values: np.ndarray) -> np.ndarray:
    """[S, P] -> [P]: how many runs have come that far."""
    return np.isfinite(values).sum(axis=0)


def _mean(values: np.ndarray) -> np.ndarray:
    """[S, P] -> [P], over the runs that are there; NaN where none is."""
    total = np.nansum(values, axis=0)
    count = _count(values)
    return np.where(count > 0, total, np.nan) / np.maximum(count, 1)


def _sd(values: np.ndarray) -> np.ndarray:
    """The same, with one degree of freedom taken; NaN where one run alone is there."""
    away = values - _mean(values)
    squares = np.nansum(away**2, axis=0)
    degrees = _count(values) - 1
    return np.sqrt(np.where(degrees > 0, squares, np.nan) / np.maximum(degrees, 1))
