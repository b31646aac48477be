"""Main effects and interactions of a design that crosses factors: every run speaks about every factor.

    y = seed + sum_f b_f x_f + sum_fg b_fg x_f x_g + noise,   x = -1 at a factor's first level, +1 at its second

by ordinary least squares over all finished runs, with one variance and a block for each seed.  A main effect is 2 b_f:
the mean at the second level minus the mean at the first.  An interaction is 2 b_fg: half of what g changes about the
effect of f.  Five factors in half of their 32 combinations and two seeds, 32 runs: 95 % intervals of +-0.74 sd, of
interactions too; leaving each out in turn takes 30 runs for +-1.29 sd and tells no interaction.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import pandas as pd

from ablab.analysis.effects.comparison import column, finished, with_numbers
from ablab.analysis.effects.effect import (
    EQUIVALENT,
    HELPS,
    HURTS,
    INCONCLUSIVE,
    TOO_FEW,
    Interval,
)
from ablab.analysis.effects.effects import interval_of
from ablab.analysis.effects.intervals import Estimates
from ablab.analysis.effects.linear import Linear
from ablab.analysis.effects.multiplicity import holm
from ablab.analysis.effects.power import ALPHA
from ablab.core.store.planned import Factors

METHOD = "y ~ factors + seed"
FEWEST_DEGREES = 2  # of freedom, as three pairs have


@dataclass(frozen=True)
class FactorEffect:
    """A factor, or two together, over all cells.  Values in the metric's unit."""

    term: str  # muon, or gating x muon
    factors: tuple[str, ...]
    # helps, hurts, equivalent, inconclusive, too few seeds; of two: helps where they do more together than apart.
    verdict: str
    sentence: str
    delta: float | None  # None: the finished runs cannot tell it
    interval: Interval | None
    p_adjusted: float | None
    p_equivalent: float | None
    aliases: tuple[str, ...]  # what cannot be told from it
    n: int  # seeds of the finished runs

    @property
    def subject(self) -> str:
        return self.term

    @property
    def word(self) -> str:
        return self.verdict

    @property
    def low(self) -> float | None:
        return self.interval.low if self.interval else None

    @property
    def high(self) -> float | None:
        return self.interval.high if self.interval else None


def factorial_effects(
    runs: pd.DataFrame,
    metric: str,
    factors: Factors,
    better: str = "lower",
    equivalence: float | None = None,
) -> list[FactorEffect]:
    """The main effects in the factors' order, then the interactions that the cells can tell.

    runs: of `frame.load`.  A run that several cells list is one observation.
    """
    done = finished(with_numbers(runs, metric)).drop_duplicates("run")
    crossed = done[done.cell.isin(factors.levels)]
    terms: list[tuple[str, ...]] = [(name,) for name in factors.names]
    terms += [(one, other) for one, other in factors.interactions]
    estimates = _estimates(crossed, metric, factors, terms)
    judged = [term for term, one in estimates.items() if one.degrees[0] >= FEWEST_DEGREES]
    p = np.array([estimates[term].p[0] for term in judged])
    adjusted = dict(zip(judged, map(float, holm(p)), strict=True))
    found = []
    for term in terms:
        estimate = estimates.get(term)
        beyond = None
        if estimate and term in adjusted and equivalence is not None:
            beyond = float(estimate.p_beyond(equivalence)[0])
        verdict = _verdict(estimate, adjusted.get(term), beyond, better)
        name = " x ".join(term)
        effect = FactorEffect(
            term=name,
            factors=term,
            verdict=verdict,
            sentence=_sentence(term, verdict, estimate, factors),
            delta=float(estimate.delta[0]) if estimate else None,
            interval=interval_of(estimate) if estimate else None,
            p_adjusted=adjusted.get(term),
            p_equivalent=beyond,
            aliases=_aliases(name, factors.aliases),
            n=crossed.seed.nunique(),
        )
        found.append(effect)
    return found


def _estimates(
    runs: pd.DataFrame, metric: str, factors: Factors, terms: Sequence[tuple[str, ...]]
) -> dict[tuple[str, ...], Estimates]:
    """Of the terms that the finished runs can tell."""
    if len(runs) == 0:
        return {}
    seeds, named = pd.factorize(runs.seed)
    levels = [factors.levels[cell] for cell in runs.cell]
    coded = [[prod(level[name] for name in term) for term in terms] for level in levels]
    design = np.hstack([np.eye(len(named))[seeds], np.array(coded, float)])
    model = Linear(design, column(runs, metric), METHOD)
    found = {}
    for i, term in enumerate(terms):
        contrast = np.zeros(design.shape[1])
        contrast[len(named) + i] = 2
        if model.tells(contrast):
            found[term] = model.estimate(contrast[None])
    return found


def _verdict(
    estimate: Estimates | None, p: float | None, beyond: float | None, better: str
) -> str:
    if estimate is None or p is None:
        return TOO_FEW
    if beyond is not None and beyond < ALPHA:
        return EQUIVALENT
    if p >= ALPHA:
        return INCONCLUSIVE
    improves = bool(estimate.delta[0] < 0) == (better == "lower")
    return HELPS if improves else HURTS


def _sentence(
    term: tuple[str, ...], verdict: str, estimate: Estimates | None, factors: Factors
) -> str:
    name = " x ".join(term)
    if estimate is None:
        return f"{name}: the finished runs cannot tell it"
    interval = interval_of(estimate)
    number = f"{estimate.delta[0]:+.4f} [{interval.low:+.4f}, {interval.high:+.4f}]"
    decided = verdict in (HELPS, HURTS)
    if len(term) > 1:
        word = {HELPS: "do more together", HURTS: "get in each other's way"}.get(
            verdict, verdict
        )
        joined = " and ".join(term)
        return f"{joined} {word}: {number}" if decided else f"{name}: {verdict}, {number}"
    first, second = factors.names[name]
    compared = f"{second} against {first} {number}"
    return f"{name} {verdict}: {compared}" if decided else f"{name}: {verdict}, {compared}"


def _aliases(term: str, equations: Sequence[str]) -> tuple[str, ...]:
    """What stands in one equation with a term, with its sign: gating = - muon x wsd."""
    for equation in equations:
        sides = equation.split(" = ")
        names = [side.removeprefix("- ") for side in sides]
        if term in names:
            own = sides[names.index(term)].startswith("- ")
            return tuple(
                name if side.startswith("- ") == own else f"- {name}"
                for side, name in zip(sides, names, strict=True)
                if name != term
            )
    return ()
