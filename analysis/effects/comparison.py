"""One cell beside its reference: the runs of both, seed by seed, and what must be said of those that are lost."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pandas as pd

from ablab.analysis.effects.effect import ENDED_BADLY, INERT, ingredient
from ablab.analysis.effects.service import COLUMN as KERNELS
from ablab.core.store.metrics import MEASURED
from ablab.core.store.result import FINISHED, said

UNMEASURED = "without_the_metric"  # finished, and yet without a finite value of the metric


def finished(runs: pd.DataFrame) -> pd.DataFrame:
    return runs[runs.status == FINISHED]


def with_numbers(runs: pd.DataFrame, metric: str) -> pd.DataFrame:
    """Where a finished run lacks a finite value of the metric, its status says so."""
    unmeasured = runs.status == FINISHED
    if metric in runs:
        values = runs[metric].astype(float)
        absent = ~np.isfinite(values)
        if metric in MEASURED:  # zero: not measured
            absent |= values == 0
        unmeasured &= absent
    return runs.assign(status=runs.status.where(~unmeasured, UNMEASURED))


def pace(rows: pd.DataFrame) -> pd.Series:
    """Tokens a second; NaN of a run that shared its machine."""
    speed: pd.Series = rows.tokens_per_second
    return speed.where(rows.contended == "") if "contended" in rows else speed


def column(rows: pd.DataFrame, metric: str) -> np.ndarray:
    return rows[metric].to_numpy(float) if metric in rows else np.empty(0)


@dataclass(frozen=True)
class Runs:
    """Runs of one cell, [R] each.  A family of 2,000 arms asks each a hundred things: too much for data frames."""

    seeds: np.ndarray
    ids: np.ndarray
    statuses: np.ndarray
    notes: np.ndarray
    values: np.ndarray  # of the metric; NaN where there is none
    rates: np.ndarray  # tokens/s
    paces: np.ndarray  # the same; NaN of those that shared their machine
    kernels: Mapping[str, np.ndarray]  # place -> what served it

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def are_finished(self) -> np.ndarray:
        """bool [R]"""
        return self.statuses == FINISHED

    @property
    def finished(self) -> "Runs":
        return self.at(self.are_finished)

    @property
    def measured_rates(self) -> np.ndarray:
        return self.rates[~np.isnan(self.rates)]

    @property
    def log_paces(self) -> np.ndarray:
        """Of the measured ones."""
        return np.log(self.paces[~np.isnan(self.paces)])

    def at(self, which: np.ndarray) -> "Runs":
        """which: places, or bool [R]."""
        return Runs(
            seeds=self.seeds[which],
            ids=self.ids[which],
            statuses=self.statuses[which],
            notes=self.notes[which],
            values=self.values[which],
            rates=self.rates[which],
            paces=self.paces[which],
            kernels={place: served[which] for place, served in self.kernels.items()},
        )


def by_cell(runs: pd.DataFrame, metric: str) -> dict[str, Runs]:
    """The runs of each cell of `frame.load`.  One that a cell lists twice is one observation."""
    once = with_numbers(runs, metric).drop_duplicates(["cell", "run"])
    every = Runs(
        seeds=once.seed.to_numpy(),
        ids=once.run.to_numpy(object),
        statuses=once.status.to_numpy(object),
        notes=once.note.to_numpy(object),
        values=column(once, metric) if metric in once else np.full(len(once), np.nan),
        rates=once.tokens_per_second.to_numpy(float),
        paces=pace(once).to_numpy(float),
        kernels={
            str(name).removeprefix(KERNELS): once[name].to_numpy(object)
            for name in once
            if str(name).startswith(KERNELS)
        },
    )
    places: dict[str, list[int]] = {}
    for place, cell in enumerate(once.cell):
        places.setdefault(str(cell), []).append(place)
    return {cell: every.at(np.array(own)) for cell, own in places.items()}


class Comparison:
    """The runs of one cell beside those of its reference; a row per seed, each seed once.

    `both` has a row per seed that both planned, `done` one per seed that both finished: the runs of the cell and those
    of the reference.  `x`, `y`: the metric over `done`, [n] each; of cells without a common seed, over all finished
    runs.
    """

    def __init__(self, cell: str, reference: str, own: Runs, others: Runs, metric: str):
        self.cell = cell
        self.reference = reference
        self.metric = metric
        self.rows = own
        self.others = others
        self.statuses = dict(Counter(own.statuses))
        theirs = {seed: place for place, seed in enumerate(others.seeds)}
        shared = [place for place, seed in enumerate(own.seeds) if seed in theirs]
        here = np.array(shared, int)
        there = np.array([theirs[own.seeds[place]] for place in shared], int)
        self.both = own.at(here), others.at(there)
        alive = self.both[0].are_finished & self.both[1].are_finished
        self.done = self.both[0].at(alive), self.both[1].at(alive)
        compared = (own.finished, others.finished) if self.disjoint else self.done
        self.x = compared[0].values
        self.y = compared[1].values
        # Behind the difference, of the cell and of its reference.
        self.runs = (*compared[0].ids, *compared[1].ids)

    @property
    def disjoint(self) -> bool:
        """Whether the two share no seed, as A/A replicas: then there is nothing to pair."""
        return len(self.both[0]) == 0

    @property
    def n(self) -> int:
        return min(len(self.x), len(self.y)) if self.disjoint else len(self.x)

    @property
    def own(self) -> Runs:
        """What the cell's own mean is taken over: without a reference, a cell still has one."""
        return self.done[0] if len(self.done[0]) else self.rows.finished

    @property
    def broken(self) -> bool:
        """Whether one of the two lost a run that the other finished: pairs alone would waste what is left of it."""
        ours, theirs = self.both
        return bool((ours.are_finished != theirs.are_finished).any())

    @cached_property
    def inert(self) -> bool:
        """The liveness check saw no difference, or it lists the same runs, or the same bits came out."""
        ours, theirs = self.both
        never_trained = bool((self.rows.statuses == INERT).all())
        same_runs = not self.disjoint and bool((ours.ids == theirs.ids).all())
        same_bits = len(self.done[0]) > 0 and np.array_equal(self.x, self.y)
        return never_trained or same_runs or same_bits

    @property
    def failed(self) -> bool:
        """Whether no run has a number, and some never will."""
        lost = (*ENDED_BADLY, UNMEASURED)
        return FINISHED not in self.statuses and any(one in self.statuses for one in lost)

    @property
    def delta(self) -> float | None:
        """The plain difference of the means."""
        if len(self.x) == 0 or len(self.y) == 0:
            return None
        return float(self.x.mean() - self.y.mean())

    @property
    def spread(self) -> float | None:
        if self.disjoint or len(self.x) < 2:
            return None
        return float((self.x - self.y).std(ddof=1))

    @property
    def correlation(self) -> float | None:
        """Pearson's, over shared seeds; None below three, or without spread."""
        if self.disjoint or len(self.x) < 3 or np.ptp(self.x) == 0 or np.ptp(self.y) == 0:
            return None
        return float(np.corrcoef(self.x, self.y)[0, 1])

    @property
    def speeds(self) -> tuple[np.ndarray, np.ndarray]:
        """log(tokens/s) of cell and reference: of the seeds where both were measured; of disjoint cells, of each.

        Runs that shared their machine are left out: what they say of speed is how many others ran.
        """
        if self.disjoint:
            return self.rows.finished.log_paces, self.others.finished.log_paces
        ours, theirs = self.done
        measured = ~np.isnan(ours.paces) & ~np.isnan(theirs.paces)
        return np.log(ours.paces[measured]), np.log(theirs.paces[measured])

    def same(self) -> str:
        """How an inert cell and its reference are the same."""
        if INERT in self.statuses:
            return "showed no difference in the liveness check, so it was not trained"
        return "end in the same bits" if len(self.x) else "are the same runs"

    def lack(self) -> str:
        """Why there is no number at all."""
        how, _ = ingredient(self.cell)
        return f"no pair finished{f' {how} it' if how else ''} ({said(self.statuses)})"

    def notes(self) -> list[str]:
        """What the reader must know beside the number."""
        planned = len(self.rows)
        notes = [note for note in dict.fromkeys(self.rows.notes) if note]
        lost = Counter(status for status in self.rows.statuses if status in ENDED_BADLY)
        if lost and FINISHED in self.statuses:
            notes.append(
                f"{lost.total()} of {planned} runs ended badly ({said(lost)}); "
                "the delta is over the survivors and may flatter"
            )
        if unmeasured := self.statuses.get(UNMEASURED):
            notes.append(f"{unmeasured} of {planned} runs finished without {self.metric}")
        if self.disjoint:
            return notes
        ours, theirs = self.both
        lost = Counter(status for status in theirs.statuses if status != FINISHED)
        if lost:
            notes.append(f"no reference for {lost.total()} of {planned} pairs ({said(lost)})")
        if len(ours) < planned:
            alone = planned - len(ours)
            notes.append(f"no reference planned for {alone} of {planned} pairs")
        return notes
