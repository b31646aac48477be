"""From runs to effects: how far each cell lies from its reference, and how sure the seeds make us.

    delta = mean over pairs of (cell - reference),   interval = delta -+ t(0.975, df) se

Which se and df.  Runs of one pair share seed, init and batches, so a paired test looks natural; yet the correlation of
final loss between two arms that share a seed averaged -0.03 over ten public comparisons (-0.57 to +0.47).  Pairing then
buys nothing and halves the degrees of freedom.  So:

    paired t   with >= 6 pairs and a positive estimated correlation:  se = sd(differences)/sqrt(n),  df = n-1
    Welch      otherwise:  se = sqrt((sd_cell^2 + sd_reference^2)/n),  df by Welch and Satterthwaite

Measured coverage of the 95 % interval, 200,000 simulated A/A experiments each (equal sd, true correlation 0 / 0.6):
n=3: 96.4 / 98.9 %, n=5: 95.5 / 99.2 %, n=6: 93.4 / 94.9 %, n=12: 93.8 / 95.0 %.  Letting the data choose the method
costs about 1.5 points when the correlation is zero.  A truly negative correlation of -0.5 costs more: 93.0 % at n=3,
89 % from n=6.

Inert: every pair ends in the same bits.  Two different recipes never do by chance, so the toggle did nothing.
"""

from collections import Counter
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import pandas as pd
from scipy.special import (
    stdtrit,  # quantile of Student's t; scipy.stats takes a second to import
)

from ablab.analysis.effects.service import differing_service
from ablab.core.errors import UserError
from ablab.core.store.result import DIVERGED, FAILED, FINISHED, OUT_OF_MEMORY, PRUNED, said

BETTER = "better"
WORSE = "worse"
INCONCLUSIVE = "inconclusive"
INERT = "inert"
NO_RUN = "failed"
TOO_FEW = "too few seeds"
REFERENCE = "reference"
ENDED_BADLY = (DIVERGED, OUT_OF_MEMORY, FAILED, PRUNED)
PAIRS_FOR_PAIRED_T = 6


@dataclass(frozen=True)
class Interval:
    """A 95 % confidence interval for the difference of two means, in the metric's unit."""

    low: float
    high: float
    method: str  # "paired t" or "Welch"
    standard_error: float
    degrees: float  # of freedom


@dataclass(frozen=True)
class Effect:
    """One cell against its reference, over the pairs that both finished.  Values in the metric's unit."""

    cell: str
    reference: str | None  # None: this cell is what others are measured against
    verdict: str  # about the cell: better, worse, inconclusive, inert, failed, too few seeds; or "reference"
    sentence: str  # what that says about the ingredient
    n: int  # pairs used
    pairs: tuple[int, ...]
    statuses: dict[str, int]  # planned runs of this cell by status
    mean: float | None
    sd: float | None
    reference_mean: float | None = None
    reference_sd: float | None = None
    delta: float | None = None  # cell minus reference
    interval: Interval | None = None  # None below two pairs, and for inert cells
    correlation: float | None = None  # of cell and reference over pairs, from 3 pairs on
    tokens_per_second: float | None = None
    tokens_per_second_ratio: float | None = None  # cell over reference
    # Place -> what served it in the cell and in the reference, where these differ: the ratio compares kernels too.
    service: dict[str, tuple[str, str]] = field(default_factory=dict)
    note: str = ""

    @property
    def low(self) -> float | None:
        return self.interval.low if self.interval else None

    @property
    def high(self) -> float | None:
        return self.interval.high if self.interval else None

    @property
    def counts(self) -> str:
        """How the planned runs ended, in words: 2 finished, 1 diverged."""
        return said(self.statuses)

    @property
    def method(self) -> str:
        return self.interval.method if self.interval else ""


def measure(runs: pd.DataFrame, metric: str, better: str = "lower") -> list[Effect]:
    """One Effect per cell of `frame.load`, in the plan's order.  `better`: "lower" or "higher".

    UserError: a finished run lacks the metric, or a cell's reference is not in the experiment.
    """
    if better not in ("lower", "higher"):
        raise UserError(f"metric.better must be lower or higher, not {better!r}")
    _check_metric(runs, metric)
    # A run that a cell lists twice is one observation.
    cells = {
        str(cell): rows.drop_duplicates("run").set_index("pair")
        for cell, rows in runs.groupby("cell", sort=False)
    }
    effects = []
    for cell, rows in cells.items():
        reference = rows.reference.iloc[0]
        if pd.isna(reference):
            effects.append(_reference(cell, rows, metric))
            continue
        if reference not in cells:
            raise UserError(
                f"cell {cell!r} is measured against {reference!r}, which the experiment lacks; "
                f"it has: {', '.join(cells)}"
            )
        effects.append(
            _effect(Comparison(cell, reference, rows, cells[reference], metric), better)
        )
    return effects


def interval(cell: np.ndarray, reference: np.ndarray) -> Interval:
    """The 95 % interval of mean(cell) - mean(reference) by this module's rule.  Both [n], n >= 2, entry i of pair i."""
    n = len(cell)
    delta = cell.mean() - reference.mean()
    rho = correlation(cell, reference)
    if n >= PAIRS_FOR_PAIRED_T and rho is not None and rho > 0:
        method = "paired t"
        degrees = n - 1.0
        se = (cell - reference).std(ddof=1) / np.sqrt(n)
    else:
        method = "Welch"
        a = cell.var(ddof=1) / n
        b = reference.var(ddof=1) / n
        se = np.sqrt(a + b)
        degrees = n - 1.0  # without any spread df has no value; any will do, because se is zero
        if a + b:
            degrees = (a + b) ** 2 * (n - 1) / (a**2 + b**2)
    half = stdtrit(degrees, 0.975) * se
    return Interval(
        low=float(delta - half),
        high=float(delta + half),
        method=method,
        standard_error=float(se),
        degrees=float(degrees),
    )


def correlation(cell: np.ndarray, reference: np.ndarray) -> float | None:
    """Pearson's, over pairs; None below three pairs or without spread."""
    if len(cell) < 3 or np.ptp(cell) == 0 or np.ptp(reference) == 0:
        return None
    return float(np.corrcoef(cell, reference)[0, 1])


def ingredient(cell: str) -> tuple[str, str]:
    """What a cell's name says it changed: "- qk_norm" -> ("without", "qk_norm"), "+ z_loss" -> ("with", "z_loss")."""
    sign, _, name = cell.partition(" ")
    if sign == "-":
        return "without", name
    if sign == "+":
        return "with", name
    return "", cell


def _check_metric(runs: pd.DataFrame, metric: str) -> None:
    done = finished(runs)
    lacking = done if metric not in runs else done[done[metric].isna()]
    if len(lacking):
        columns = [str(name) for name in runs]
        aside = ("runtime/", "kernels/")
        logged = sorted(name for name in columns if "/" in name and not name.startswith(aside))
        raise UserError(
            f"run {lacking.run.iloc[0]} finished without the metric {metric!r}; set metric.name to one of {logged}"
        )


class Comparison:
    """The runs of one cell beside those of its reference.

    `both` has a row per pair that both planned, `done` one per pair that both finished; columns of the reference end
    in /reference.  `x`, `y`: the metric over `done`, [n] each.
    """

    def __init__(
        self, cell: str, reference: str, rows: pd.DataFrame, others: pd.DataFrame, metric: str
    ):
        self.cell = cell
        self.reference = reference
        self.metric = metric
        self.rows = rows
        self.statuses = dict(Counter(rows.status))
        self.both = rows.join(others.add_suffix("/reference"), how="inner")
        self.done = self.both[
            (self.both.status == FINISHED) & (self.both["status/reference"] == FINISHED)
        ]
        self.x = _column(self.done, metric)
        self.y = _column(self.done, f"{metric}/reference")

    @property
    def own(self) -> pd.DataFrame:
        """What the cell's own mean is taken over: without a reference, a cell still has one."""
        return self.done if len(self.done) else finished(self.rows)

    @cached_property
    def inert(self) -> bool:
        """The liveness check saw no difference, or it lists the same runs, or the same bits came out."""
        never_trained = bool((self.rows.status == INERT).all())
        same_runs = len(self.both) > 0 and bool(
            (self.both.run == self.both["run/reference"]).all()
        )
        same_bits = len(self.x) > 0 and np.array_equal(self.x, self.y)
        return never_trained or same_runs or same_bits

    @property
    def delta(self) -> float | None:
        if len(self.x) == 0:
            return None
        return float(self.x.mean() - self.y.mean())

    @cached_property
    def interval(self) -> Interval | None:
        if len(self.x) < 2 or self.inert:
            return None
        return interval(self.x, self.y)

    @property
    def speed_ratio(self) -> float | None:
        ours = _mean(self.own.tokens_per_second.dropna())
        theirs = _mean(self.done["tokens_per_second/reference"].dropna())
        return ours / theirs if ours and theirs else None

    def verdict(self, better: str) -> str:
        """About the cell, not about its ingredient."""
        if self.inert:
            return INERT
        if FINISHED not in self.statuses and any(one in self.statuses for one in ENDED_BADLY):
            return NO_RUN
        if self.interval is None or self.delta is None:
            return TOO_FEW
        if self.interval.low <= 0 <= self.interval.high:
            return INCONCLUSIVE
        return BETTER if (self.delta < 0) == (better == "lower") else WORSE

    def sentence(self, verdict: str) -> str:
        """The verdict, turned into one about the ingredient: an arm that gets worse without x says that x helps."""
        how, name = ingredient(self.cell)
        number = self._number()
        compared = f"{how} it {number}" if how else f"{number} against {self.reference}"
        if verdict in (BETTER, WORSE):
            if not how:
                return f"{name} is {verdict}: {compared}"
            helps = (verdict == WORSE) == (how == "without")
            return f"{name} {'helps' if helps else 'hurts'}: {compared}"
        if verdict == INERT:
            return (
                f"{name} changes nothing: {self.cell!r} and {self.reference!r} {self._same()}"
            )
        if number:
            return f"{name}: {verdict}, {compared}"
        return f"{name}: no pair finished{f' {how} it' if how else ''} ({said(self.statuses)})"

    def _number(self) -> str:
        """The delta and its interval; empty without."""
        if self.delta is None:
            return ""
        if self.interval is None:
            return f"{self.delta:+.4f}"
        return f"{self.delta:+.4f} [{self.interval.low:+.4f}, {self.interval.high:+.4f}]"

    def _same(self) -> str:
        """How an inert cell and its reference are the same."""
        if INERT in self.statuses:
            return "showed no difference in the liveness check, so it was not trained"
        return "end in the same bits" if len(self.x) else "are the same runs"

    def note(self) -> str:
        """What the reader must know beside the number."""
        planned = len(self.rows)
        notes = [note for note in self.rows.note.unique() if note]
        lost = Counter(status for status in self.rows.status if status in ENDED_BADLY)
        if lost and FINISHED in self.statuses:
            notes.append(
                f"{lost.total()} of {planned} runs ended badly ({said(lost)}); "
                "the delta is over the survivors and may flatter"
            )
        lost = Counter(status for status in self.both["status/reference"] if status != FINISHED)
        if lost:
            notes.append(f"no reference for {lost.total()} of {planned} pairs ({said(lost)})")
        if len(self.both) < planned:
            alone = planned - len(self.both)
            notes.append(f"no reference planned for {alone} of {planned} pairs")
        if self.interval and self.interval.standard_error == 0:
            notes.append("no spread between seeds: check that the seed reaches the run")
        return "; ".join(notes)


def _effect(pairs: Comparison, better: str) -> Effect:
    verdict = pairs.verdict(better)
    own = _column(pairs.own, pairs.metric)
    return Effect(
        cell=pairs.cell,
        reference=pairs.reference,
        verdict=verdict,
        sentence=pairs.sentence(verdict),
        n=len(pairs.x),
        pairs=_numbers(pairs.done),
        statuses=pairs.statuses,
        mean=_mean(own),
        sd=_sd(own),
        reference_mean=_mean(pairs.y),
        reference_sd=_sd(pairs.y),
        delta=pairs.delta,
        interval=pairs.interval,
        correlation=correlation(pairs.x, pairs.y),
        tokens_per_second=_mean(pairs.own.tokens_per_second.dropna()),
        tokens_per_second_ratio=pairs.speed_ratio,
        service=differing_service(pairs.done),
        note=pairs.note(),
    )


def _reference(cell: str, rows: pd.DataFrame, metric: str) -> Effect:
    done = finished(rows)
    values = _column(done, metric)
    return Effect(
        cell=cell,
        reference=None,
        verdict=REFERENCE,
        sentence=f"{cell}: what the others are measured against",
        n=len(done),
        pairs=_numbers(done),
        statuses=dict(Counter(rows.status)),
        mean=_mean(values),
        sd=_sd(values),
        tokens_per_second=_mean(done.tokens_per_second.dropna()),
    )


def finished(runs: pd.DataFrame) -> pd.DataFrame:
    return runs[runs.status == FINISHED]


def _numbers(rows: pd.DataFrame) -> tuple[int, ...]:
    """The pairs of these rows."""
    return tuple(int(pair) for pair in rows.index)


def _column(rows: pd.DataFrame, metric: str) -> np.ndarray:
    return rows[metric].to_numpy(float) if metric in rows else np.empty(0)


def _mean(values: np.ndarray | pd.Series) -> float | None:
    return float(np.mean(values)) if len(values) else None


def _sd(values: np.ndarray | pd.Series) -> float | None:
    return float(np.std(values, ddof=1)) if len(values) > 1 else None
