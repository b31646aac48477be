"""One cell beside its reference: the runs of both, seed by seed, and what must be said of those that are lost."""

from collections import Counter
from functools import cached_property

import numpy as np
import pandas as pd

from ablab.analysis.effects.effect import ENDED_BADLY, INERT, ingredient
from ablab.core.store.result import FINISHED, said

UNMEASURED = "without_the_metric"  # finished, and yet without a finite value of the metric


def finished(runs: pd.DataFrame) -> pd.DataFrame:
    return runs[runs.status == FINISHED]


def pace(rows: pd.DataFrame, whose: str = "") -> pd.Series:
    """Tokens a second; NaN of a run that shared its machine.  whose: "/reference" for that of the reference."""
    speed: pd.Series = rows[f"tokens_per_second{whose}"]
    contended = f"contended{whose}"
    return speed.where(rows[contended] == "") if contended in rows else speed


def column(rows: pd.DataFrame, metric: str) -> np.ndarray:
    return rows[metric].to_numpy(float) if metric in rows else np.empty(0)


class Comparison:
    """The runs of one cell beside those of its reference; a row per seed, each seed once.

    `both` has a row per seed that both planned, `done` one per seed that both finished; columns of the reference end
    in /reference.  `x`, `y`: the metric over `done`, [n] each; of cells without a common seed, over all finished runs.
    """

    def __init__(
        self, cell: str, reference: str, rows: pd.DataFrame, others: pd.DataFrame, metric: str
    ):
        self.cell = cell
        self.reference = reference
        self.metric = metric
        self.rows = rows
        self.others = others
        self.statuses = dict(Counter(rows.status))
        self.both = rows.join(others.add_suffix("/reference"), how="inner")
        self.done = self.both[
            (self.both.status == FINISHED) & (self.both["status/reference"] == FINISHED)
        ]
        self.x = column(finished(rows) if self.disjoint else self.done, metric)
        theirs = finished(others).add_suffix("/reference") if self.disjoint else self.done
        self.y = column(theirs, f"{metric}/reference")

    @property
    def disjoint(self) -> bool:
        """Whether the two share no seed, as A/A replicas: then there is nothing to pair."""
        return len(self.both) == 0

    @property
    def n(self) -> int:
        return min(len(self.x), len(self.y)) if self.disjoint else len(self.x)

    @property
    def own(self) -> pd.DataFrame:
        """What the cell's own mean is taken over: without a reference, a cell still has one."""
        return self.done if len(self.done) else finished(self.rows)

    @property
    def runs(self) -> tuple[str, ...]:
        """Behind the difference, of the cell and of its reference."""
        if self.disjoint:
            return (*finished(self.rows).run, *finished(self.others).run)
        return (*self.done.run, *self.done["run/reference"])

    @property
    def broken(self) -> bool:
        """Whether one of the two lost a run that the other finished: pairs alone would waste what is left of it."""
        one = self.both.status == FINISHED
        other = self.both["status/reference"] == FINISHED
        return bool((one != other).any())

    @cached_property
    def inert(self) -> bool:
        """The liveness check saw no difference, or it lists the same runs, or the same bits came out."""
        never_trained = bool((self.rows.status == INERT).all())
        same_runs = len(self.both) > 0 and bool(
            (self.both.run == self.both["run/reference"]).all()
        )
        same_bits = len(self.done) > 0 and np.array_equal(self.x, self.y)
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
            ours = pace(finished(self.rows)).dropna()
            theirs = pace(finished(self.others)).dropna()
            return np.log(ours.to_numpy(float)), np.log(theirs.to_numpy(float))
        both = pd.concat([pace(self.done), pace(self.done, "/reference")], axis=1)
        measured = both.dropna().to_numpy(float)
        ours, theirs = np.log(measured).T
        return ours, theirs

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
        notes = [note for note in self.rows.note.unique() if note]
        lost = Counter(status for status in self.rows.status if status in ENDED_BADLY)
        if lost and FINISHED in self.statuses:
            notes.append(
                f"{lost.total()} of {planned} runs ended badly ({said(lost)}); "
                "the delta is over the survivors and may flatter"
            )
        if unmeasured := self.statuses.get(UNMEASURED):
            notes.append(f"{unmeasured} of {planned} runs finished without {self.metric}")
        if self.disjoint:
            return notes
        lost = Counter(status for status in self.both["status/reference"] if status != FINISHED)
        if lost:
            notes.append(f"no reference for {lost.total()} of {planned} pairs ({said(lost)})")
        if len(self.both) < planned:
            alone = planned - len(self.both)
            notes.append(f"no reference planned for {alone} of {planned} pairs")
        return notes
