"""From runs to effects: how far each cell lies from its reference, and how sure the seeds make us.

    delta = mean over pairs of (cell - reference),   interval = delta -+ t(0.975, df) se

Which se and df.  Runs of one pair share seed, init and batches, so a paired test looks natural; yet the correlation of
final loss between two arms that share a seed averaged -0.03 over ten public comparisons (-0.57 to +0.47).  Pairing then
buys nothing and halves the degrees of freedom.  So:

    paired t   with >= 6 pairs and a positive estimated correlation:  se = sd(differences)/sqrt(n),  df = n-1
    Welch      otherwise:  se = sqrt((sd_cell^2 + sd_reference^2)/n),  df by Welch and Satterthwaite

Measured coverage of the 95 % interval, 200,000 simulated A/A experiments each (equal sd, true correlation 0 / 0.6):
n=3: 96.4 / 98.9 %, n=5: 95.5 / 99.2 %, n=6: 93.4 / 94.9 %, n=12: 93.8 / 95.0 %.  Letting the data choose the method costs
about 1.5 points when the correlation is zero.  A truly negative correlation of -0.5 costs more: 93.0 % at n=3, 89 % from n=6.

Inert: every pair ends in the same bits.  Two different recipes never do by chance, so the toggle did nothing.
"""

from collections import Counter
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.special import (
    stdtrit,  # quantile of Student's t; scipy.stats takes a second to import
)

from ablab.core.errors import UserError
from ablab.core.store.record import DIVERGED, FAILED, FINISHED, OUT_OF_MEMORY, PRUNED

BETTER, WORSE, INCONCLUSIVE, INERT = "better", "worse", "inconclusive", "inert"
NO_RUN, TOO_FEW, REFERENCE = "failed", "too few seeds", "reference"
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
    note: str = ""

    @property
    def low(self) -> float | None:
        return self.interval and self.interval.low

    @property
    def high(self) -> float | None:
        return self.interval and self.interval.high

    @property
    def counts(self) -> str:
        """How the planned runs ended, in words: 2 finished, 1 diverged."""
        return _counts(self.statuses)

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
        cell: rows.drop_duplicates("run").set_index("pair")
        for cell, rows in runs.groupby("cell", sort=False)
    }
    return [_effect(cell, cells, metric, better) for cell in cells]


def interval(cell: np.ndarray, reference: np.ndarray) -> Interval:
    """The 95 % interval of mean(cell) - mean(reference) by this module's rule.  Both [n], n >= 2, entry i of pair i."""
    n, delta = len(cell), cell.mean() - reference.mean()
    rho = correlation(cell, reference)
    if n >= PAIRS_FOR_PAIRED_T and rho is not None and rho > 0:
        method, degrees, se = "paired t", n - 1.0, (cell - reference).std(ddof=1) / np.sqrt(n)
    else:
        a, b = cell.var(ddof=1) / n, reference.var(ddof=1) / n
        # No spread at all: df has no value; any will do, because se is zero.
        method, degrees, se = (
            "Welch",
            (a + b) ** 2 * (n - 1) / (a**2 + b**2) if a + b else n - 1.0,
            np.sqrt(a + b),
        )
    half = stdtrit(degrees, 0.975) * se
    return Interval(float(delta - half), float(delta + half), method, float(se), float(degrees))


def correlation(cell: np.ndarray, reference: np.ndarray) -> float | None:
    """Pearson's, over pairs; None below three pairs or without spread."""
    if len(cell) < 3 or np.ptp(cell) == 0 or np.ptp(reference) == 0:
        return None
    return float(np.corrcoef(cell, reference)[0, 1])


def ingredient(cell: str) -> tuple[str, str]:
    """What a cell's name says it changed: "- qk_norm" -> ("without", "qk_norm"), "+ z_loss" -> ("with", "z_loss")."""
    sign, _, name = cell.partition(" ")
    return {"-": ("without", name), "+": ("with", name)}.get(sign, ("", cell))


def _check_metric(runs: pd.DataFrame, metric: str) -> None:
    finished = runs[runs.status == FINISHED]
    lacking = finished if metric not in runs else finished[finished[metric].isna()]
    if len(lacking):
        logged = sorted(
            name for name in runs if "/" in name and not name.startswith("runtime/")
        )
        raise UserError(
            f"run {lacking.run.iloc[0]} finished without the metric {metric!r}; set metric.name to one of {logged}"
        )


def _effect(cell: str, cells: dict[str, pd.DataFrame], metric: str, better: str) -> Effect:
    rows, name = cells[cell], cells[cell].reference.iloc[0]
    statuses = dict(Counter(rows.status))
    if pd.isna(name):
        return _reference(cell, rows[rows.status == FINISHED], statuses, metric)
    if name not in cells:
        raise UserError(
            f"cell {cell!r} is measured against {name!r}, which the experiment lacks; it has: {', '.join(cells)}"
        )
    both = rows.join(cells[name].add_suffix("/reference"), how="inner")
    done = both[(both.status == FINISHED) & (both["status/reference"] == FINISHED)]
    x, y = _column(done, metric), _column(done, f"{metric}/reference")
    inert = (
        bool((rows.status == INERT).all())
        or bool((both.run == both["run/reference"]).all() if len(both) else False)
        or bool(len(x) and (x == y).all())
    )
    delta = float(x.mean() - y.mean()) if len(x) else None
    ci = interval(x, y) if len(x) > 1 and not inert else None
    verdict = INERT if inert else _verdict(delta, ci, statuses, better)
    own = (
        done if len(done) else rows[rows.status == FINISHED]
    )  # without a reference, a cell still has its own mean
    speed, speed_reference = (
        _mean_sd(of[column].dropna())[0]
        for of, column in ((own, "tokens_per_second"), (done, "tokens_per_second/reference"))
    )
    mean, sd = _mean_sd(_column(own, metric))
    reference_mean, reference_sd = _mean_sd(y)
    return Effect(
        cell=cell,
        reference=name,
        verdict=verdict,
        sentence=_sentence(cell, name, verdict, delta, ci, statuses),
        n=len(x),
        pairs=tuple(map(int, done.index)),
        statuses=statuses,
        mean=mean,
        sd=sd,
        reference_mean=reference_mean,
        reference_sd=reference_sd,
        delta=delta,
        interval=ci,
        correlation=correlation(x, y),
        tokens_per_second=speed,
        tokens_per_second_ratio=speed / speed_reference if speed and speed_reference else None,
        note=_note(rows, both, ci),
    )


def _reference(cell: str, done: pd.DataFrame, statuses: dict[str, int], metric: str) -> Effect:
    mean, sd = _mean_sd(_column(done, metric))
    speed, _ = _mean_sd(done.tokens_per_second.dropna())
    sentence = f"{cell}: what the others are measured against"
    return Effect(
        cell,
        None,
        REFERENCE,
        sentence,
        len(done),
        tuple(map(int, done.index)),
        statuses,
        mean,
        sd,
        tokens_per_second=speed,
    )


def _column(rows: pd.DataFrame, metric: str) -> np.ndarray:
    return rows[metric].to_numpy(float) if metric in rows else np.empty(0)


def _mean_sd(values) -> tuple[float | None, float | None]:
    return (
        float(np.mean(values)) if len(values) else None,
        float(np.std(values, ddof=1)) if len(values) > 1 else None,
    )


def _verdict(
    delta: float | None, ci: Interval | None, statuses: dict[str, int], better: str
) -> str:
    if FINISHED not in statuses and any(status in statuses for status in ENDED_BADLY):
        return NO_RUN
    if ci is None:
        return TOO_FEW
    if ci.low <= 0 <= ci.high:
        return INCONCLUSIVE
    return BETTER if (delta < 0) == (better == "lower") else WORSE


def _sentence(
    cell: str,
    reference: str,
    verdict: str,
    delta: float | None,
    ci: Interval | None,
    statuses: dict[str, int],
) -> str:
    """The verdict about the cell, turned into one about its ingredient: an arm that gets worse without x says that x helps."""
    how, name = ingredient(cell)
    number = (
        ""
        if delta is None
        else f"{delta:+.4f}" + (f" [{ci.low:+.4f}, {ci.high:+.4f}]" if ci else "")
    )
    compared = f"{how} it {number}" if how else f"{number} against {reference}"
    if verdict in (BETTER, WORSE):
        helps = (verdict == WORSE) == (how == "without")
        return (
            f"{name} {('helps' if helps else 'hurts') if how else 'is ' + verdict}: {compared}"
        )
    if verdict == INERT:
        same = (
            "compute the same bits, so it was not trained"
            if INERT in statuses
            else "end in the same bits"
            if number
            else "are the same runs"
        )
        return f"{name} changes nothing: {cell!r} and {reference!r} {same}"
    if number:
        return f"{name}: {verdict}, {compared}"
    return f"{name}: no pair finished{f' {how} it' if how else ''} ({_counts(statuses)})"


def _counts(statuses: dict[str, int]) -> str:
    return ", ".join(
        f"{count} {status.replace('_', ' ')}" for status, count in statuses.items()
    )


def _note(rows: pd.DataFrame, both: pd.DataFrame, ci: Interval | None) -> str:
    """What the reader must know beside the number."""
    notes = [note for note in rows.note.unique() if note]
    lost = Counter(status for status in rows.status if status in ENDED_BADLY)
    if lost and (rows.status == FINISHED).any():
        notes.append(
            f"{lost.total()} of {len(rows)} runs ended badly ({_counts(lost)}); the delta is over the survivors and may flatter"
        )
    lost = Counter(status for status in both["status/reference"] if status != FINISHED)
    if lost:
        notes.append(f"no reference for {lost.total()} of {len(rows)} pairs ({_counts(lost)})")
    if len(both) < len(rows):
        notes.append(f"no reference planned for {len(rows) - len(both)} of {len(rows)} pairs")
    if ci and ci.standard_error == 0:
        notes.append("no spread between seeds: check that the seed reaches the run")
    return "; ".join(notes)
