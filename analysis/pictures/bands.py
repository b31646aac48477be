"""Curves as a page shows them: the mean and the standard deviation over the runs of a cell, on one axis of tokens.

    mean[p] = mean over runs of metric(tokens[p]),   sd[p] over the same runs,   `runs` of them have come that far

A run is linear between its logged lines and says nothing outside them.  Differences are taken run by run, over runs of
one seed: their sd is that of the differences.
"""

from collections.abc import Sequence
from dataclasses import dataclass

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
            axis = _axis(runs, points)
            values = np.stack([run.at(axis) for run in runs])
            tables.append(_table(metric, cell, axis, runs, values))
    return _joined(tables)


def differences(
    logged: pd.DataFrame, metric: str, statuses: Sequence[str] = (FINISHED,)
) -> pd.DataFrame:
    """As `bands`, of each cell's runs minus those of its reference on the same seeds, where both have been."""
    alive = logged[logged.status.isin(statuses)]
    references = dict(zip(alive.cell, alive.reference, strict=True))
    found = _runs_of(alive, _clocks(alive), metric)
    cells = {cell: {run.clock.pair: run for run in runs} for cell, runs in found.items()}
    points = points_for(len(cells))
    tables = []
    for cell, own in cells.items():
        theirs = cells.get(references[cell], {})
        pairs = sorted(own.keys() & theirs.keys())
        if not pairs:
            continue
        runs = [own[pair] for pair in pairs]
        axis = _axis(runs, points)
        values = np.stack([own[pair].at(axis) - theirs[pair].at(axis) for pair in pairs])
        seen = np.isfinite(values).any(axis=0)
        if seen.any():
            tables.append(_table(metric, cell, axis[seen], runs, values[:, seen]))
    return _joined(tables)


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
        return np.interp(axis, self.tokens, self.seconds, left=np.nan, right=np.nan)


@dataclass(frozen=True)
class _Run:
    """A metric of one run over tokens, [P] each: where the run has logged it."""

    clock: _Clock
    tokens: np.ndarray
    values: np.ndarray

    def at(self, axis: np.ndarray) -> np.ndarray:
        """The metric there; NaN where the run has not been."""
        return np.interp(axis, self.tokens, self.values, left=np.nan, right=np.nan)


def _clocks(logged: pd.DataFrame) -> list[_Clock]:
    """A clock a run.  The lines of a run stand together: a slice finds them a hundred times faster than a groupby."""
    if logged.empty:
        return []
    cells, names = pd.factorize(logged.cell)
    pairs = logged.pair.to_numpy()
    changes = np.flatnonzero((np.diff(cells) != 0) | (np.diff(pairs) != 0)) + 1
    starts = [0, *changes.tolist()]
    ends = [*changes.tolist(), len(logged)]
    tokens = logged.tokens.to_numpy(float)
    seconds = logged.seconds.to_numpy(float)
    flops = logged.flops.to_numpy(float)
    return [
        _Clock(
            cell=str(names[cells[start]]),
            pair=int(pairs[start]),
            lines=slice(start, end),
            tokens=tokens[start:end],
            seconds=seconds[start:end],
            token_flops=flops[end - 1] / tokens[end - 1] if tokens[end - 1] else np.nan,
        )
        for start, end in zip(starts, ends, strict=True)
    ]


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
            cells.setdefault(clock.cell, []).append(
                _Run(clock, clock.tokens[known], own[known])
            )
    return cells


def _axis(runs: Sequence[_Run], points: int) -> np.ndarray:
    """Tokens, [P]: those at which the run that has come farthest logged, thinned to `points`."""
    longest = max(runs, key=lambda run: run.tokens[-1])
    places = np.linspace(0, len(longest.tokens) - 1, min(points, len(longest.tokens)))
    return longest.tokens[np.unique(places.round().astype(int))]


def _table(
    metric: str, cell: str, axis: np.ndarray, runs: Sequence[_Run], values: np.ndarray
) -> pd.DataFrame:
    """values: [S, P]."""
    there = np.isfinite(values)
    count = there.sum(axis=0)
    mean = _mean(values, there)
    squares = np.where(there, (values - mean) ** 2, 0).sum(axis=0)
    seconds = np.stack([run.clock.at(axis) for run in runs])
    return pd.DataFrame(
        {
            "metric": metric,
            "cell": cell,
            "tokens": axis,
            "flops": axis * runs[0].clock.token_flops,
            "seconds": _mean(seconds, np.isfinite(seconds)),
            "mean": mean,
            "sd": np.sqrt(np.where(count > 1, squares, np.nan) / np.maximum(count - 1, 1)),
            "runs": count,
        }
    )


def _mean(values: np.ndarray, there: np.ndarray) -> np.ndarray:
    """Over the runs that are there; NaN where none is."""
    count = there.sum(axis=0)
    total = np.where(there, values, 0).sum(axis=0)
    return np.where(count > 0, total, np.nan) / np.maximum(count, 1)


def _joined(tables: list[pd.DataFrame]) -> pd.DataFrame:
    if not tables:
        return pd.DataFrame(columns=COLUMNS)
    return pd.concat(tables, ignore_index=True)
