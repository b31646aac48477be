"""From runs to effects: how far each cell lies from its reference, how sure the seeds make us, and the verdict.

    1  differences on shared seeds, by the method that their number asks for      analysis/effects/family.py
    2  the 95 % interval of each arm alone
    3  p-values of the family of arms, adjusted by Holm                            analysis/effects/multiplicity.py
    4  the verdict, from the adjusted p; "equivalent" where the experiment declares a smallest effect of interest m and
       the 90 % interval lies within +-m (Schuirmann's two one-sided tests, J. Pharmacokinet. Biopharm. 15:657, 1987)

Fewer than three seeds give numbers and no verdict, one seed no interval.  Inert: every seed ends in the same bits; two
different recipes never do by chance, so the toggle did nothing.
"""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from ablab.analysis.effects.comparison import (
    Comparison,
    Runs,
    by_cell,
    finished,
    with_numbers,
)
from ablab.analysis.effects.effect import (
    EQUIVALENT,
    HELPS,
    HURTS,
    INADMISSIBLE,
    INCONCLUSIVE,
    INERT,
    REFERENCE,
    TOO_FEW,
    Effect,
    Interval,
    ingredient,
)
from ablab.analysis.effects.family import estimates_of
from ablab.analysis.effects.intervals import (
    MODERATED_FROM,
    PLAIN_FROM,
    Estimates,
    paired,
    welch,
)
from ablab.analysis.effects.looks import alpha_at
from ablab.analysis.effects.multiplicity import holm
from ablab.analysis.effects.power import ALPHA
from ablab.analysis.effects.service import differing_service
from ablab.core.errors import UserError
from ablab.core.store.metrics import MEASURED

NOISE_DIFFERS = 10  # fold, between the spreads of two arms


def measure(
    runs: pd.DataFrame,
    metric: str,
    better: str = "lower",
    equivalence: float | None = None,
    looks: Sequence[int] | None = None,
) -> list[Effect]:
    """One Effect per cell of `frame.load`, in the plan's order.

    better: "lower" or "higher".  equivalence: the smallest effect of interest, in the metric's unit.  looks: the seeds
    at which a sequential design looks; a verdict then passes what such a look may spend instead of 0.05.
    UserError: no finished run has the metric, or a cell's reference is not in the experiment.
    """
    if better not in ("lower", "higher"):
        raise UserError(f"metric.better must be lower or higher, not {better!r}")
    _check_metric(runs, metric)
    cells = by_cell(runs, metric)
    first = runs.drop_duplicates("cell")
    references = dict(zip(first.cell, first.reference, strict=True))
    comparisons = _compared(cells, references, metric)
    live = [one for one in comparisons.values() if not one.inert]
    estimates = estimates_of(live)
    judge = Judge(comparisons, estimates, better, equivalence, looks)
    return [
        judge.effect(cell) if cell in comparisons else _reference(cell, own)
        for cell, own in cells.items()
    ]


def noisy_arms(effects: Sequence[Effect]) -> tuple[Effect, Effect] | None:
    """The noisiest and the quietest arm where their spreads differ ten-fold and seeds are few; None where not.

    Moderation then trusts the noisy arm too much: ten-fold at three seeds, 10 % of families hold a false verdict.  By
    chance alone the spreads of ten equally noisy arms differ so in one experiment of five at three seeds, and in one of
    500 at five.
    """
    few = [
        (effect.spread, effect)
        for effect in effects
        if effect.spread and MODERATED_FROM <= effect.n < PLAIN_FROM
    ]
    if len(few) < 2:
        return None
    least, quietest = min(few, key=_spread)
    most, noisiest = max(few, key=_spread)
    return (noisiest, quietest) if most >= NOISE_DIFFERS * least else None


def _spread(arm: tuple[float, Effect]) -> float:
    return arm[0]


def _compared(
    cells: dict[str, Runs], references: dict[str, str | None], metric: str
) -> dict[str, Comparison]:
    """Cell -> its comparison, for each that has a reference."""
    found = {}
    for cell, own in cells.items():
        reference = references[cell]
        if pd.isna(reference):
            continue
        if reference not in cells:
            raise UserError(
                f"cell {cell!r} is measured against {reference!r}, which the experiment lacks; "
                f"it has: {', '.join(cells)}"
            )
        found[cell] = Comparison(cell, reference, own, cells[reference], metric)
    return found


def _check_metric(runs: pd.DataFrame, metric: str) -> None:
    done = finished(runs)
    measured = finished(with_numbers(runs, metric))
    if len(done) and (metric not in runs or not len(measured)):
        columns = [str(name) for name in runs]
        aside = ("runtime/", "kernels/")
        logged = sorted(name for name in columns if "/" in name and not name.startswith(aside))
        names = [*logged, *MEASURED]
        raise UserError(
            f"run {done.run.iloc[0]} finished without the metric {metric!r}; set metric.name to one of {names}"
        )


class Judge:
    """The verdicts over one family."""

    def __init__(
        self,
        comparisons: dict[str, Comparison],
        estimates: dict[str, Estimates],
        better: str,
        equivalence: float | None,
        looks: Sequence[int] | None,
    ):
        self.comparisons = comparisons
        self.estimates = estimates
        self.better = better
        self.equivalence = equivalence
        self.looks = looks
        # Arms with too few seeds have no verdict, so they are in no family.
        judged = [cell for cell in estimates if comparisons[cell].n >= MODERATED_FROM]
        p = np.array([estimates[cell].p[0] for cell in judged])
        self.adjusted = dict(zip(judged, map(float, holm(p)), strict=True))

    def effect(self, cell: str) -> Effect:
        pair = self.comparisons[cell]
        estimate = self.estimates.get(cell)
        interval = interval_of(estimate) if estimate else None
        delta = float(estimate.delta[0]) if estimate else pair.delta
        verdict = self._verdict(pair, delta)
        own = pair.own
        return Effect(
            cell=cell,
            reference=pair.reference,
            verdict=verdict,
            sentence=_sentence(pair, verdict, delta, interval),
            n=pair.n,
            seeds=tuple(int(seed) for seed in pair.done[0].seeds),
            statuses=pair.statuses,
            mean=_mean(own.values),
            sd=_sd(own.values),
            runs=pair.runs,
            reference_mean=_mean(pair.y),
            reference_sd=_sd(pair.y),
            delta=delta,
            interval=interval,
            spread=pair.spread,
            correlation=pair.correlation,
            p_adjusted=self.adjusted.get(cell),
            p_equivalent=self._p_equivalent(cell),
            more_seeds=max(MODERATED_FROM - pair.n, 0) if verdict == TOO_FEW else 0,
            tokens_per_second=_mean(own.measured_rates),
            service=differing_service(*(runs.kernels for runs in pair.done)),
            note=_note(pair, interval),
            **_speed(pair),
        )

    def _verdict(self, pair: Comparison, delta: float | None) -> str:
        if pair.inert:
            return INERT
        if pair.failed:
            return INADMISSIBLE
        if pair.cell not in self.adjusted or delta is None:
            return TOO_FEW
        alpha = alpha_at(pair.n, self.looks) if self.looks else ALPHA
        beyond = self._p_equivalent(pair.cell)
        if beyond is not None and beyond < alpha:
            return EQUIVALENT
        if self.adjusted[pair.cell] >= alpha:
            return INCONCLUSIVE
        improves = (delta < 0) == (self.better == "lower")
        without = ingredient(pair.cell)[0] == "without"
        return HELPS if improves != without else HURTS

    def _p_equivalent(self, cell: str) -> float | None:
        if self.equivalence is None or cell not in self.adjusted:
            return None
        return float(self.estimates[cell].p_beyond(self.equivalence)[0])


def interval_of(estimate: Estimates) -> Interval:
    """Of the first arm."""
    delta = float(estimate.delta[0])
    half = float(estimate.half_width()[0])
    return Interval(
        low=delta - half,
        high=delta + half,
        method=estimate.method,
        standard_error=float(estimate.standard_error[0]),
        degrees=float(estimate.degrees[0]),
        p=float(estimate.p[0]),
    )


def _sentence(
    pair: Comparison, verdict: str, delta: float | None, interval: Interval | None
) -> str:
    """The verdict on the ingredient, with its number."""
    how, name = ingredient(pair.cell)
    if verdict == INERT:
        return f"{name} changes nothing: {pair.cell!r} and {pair.reference!r} {pair.same()}"
    if delta is None:
        return f"{name}: {pair.lack()}"
    number = f"{delta:+.4f}"
    if interval:
        number += f" [{interval.low:+.4f}, {interval.high:+.4f}]"
    compared = f"{how} it {number}" if how else f"{number} against {pair.reference}"
    if verdict in (HELPS, HURTS):
        # An arm whose name has no sign is no ingredient.
        word = verdict if how else {HELPS: "is better", HURTS: "is worse"}[verdict]
        return f"{name} {word}: {compared}"
    if verdict == TOO_FEW:
        more = MODERATED_FROM - pair.n
        return f"{name}: too few seeds (+{more} more), {compared}"
    return f"{name}: {verdict}, {compared}"


def _note(pair: Comparison, interval: Interval | None) -> str:
    notes = pair.notes()
    if interval and interval.standard_error == 0:
        notes.append("no spread between seeds: check that the seed reaches the run")
    return "; ".join(notes)


def _speed(pair: Comparison) -> dict[str, Any]:
    """The ratio of throughputs, from logarithms: its interval cannot reach below zero."""
    ours, theirs = pair.speeds
    if len(ours) == 0 or len(theirs) == 0:
        return {}
    ratio = float(np.exp(ours.mean() - theirs.mean()))
    if min(len(ours), len(theirs)) < 2:
        return {"tokens_per_second_ratio": ratio}
    if pair.disjoint:
        logs = interval_of(welch(ours[None], theirs[None]))
    else:
        logs = interval_of(paired((ours - theirs)[None]))
    of_ratio = Interval(
        low=float(np.exp(logs.low)),
        high=float(np.exp(logs.high)),
        method=logs.method,
        standard_error=ratio * logs.standard_error,
        degrees=logs.degrees,
        p=logs.p,
    )
    return {"tokens_per_second_ratio": ratio, "speed": of_ratio}


def _reference(cell: str, runs: Runs) -> Effect:
    done = runs.finished
    return Effect(
        cell=cell,
        reference=None,
        verdict=REFERENCE,
        sentence=f"{cell}: what the others are measured against",
        n=len(done),
        seeds=tuple(int(seed) for seed in done.seeds),
        statuses=dict(Counter(runs.statuses)),
        mean=_mean(done.values),
        sd=_sd(done.values),
        runs=tuple(done.ids),
        tokens_per_second=_mean(done.measured_rates),
    )


def _mean(values: np.ndarray) -> float | None:
    return float(np.mean(values)) if len(values) else None


def _sd(values: np.ndarray) -> float | None:
    return float(np.std(values, ddof=1)) if len(values) > 1 else None
