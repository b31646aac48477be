"""`ablab check stats`: experiments whose truth is known, judged by the code that judges real ones.

Ten arms against one reference, seed sd 1.  A scenario draws the final metric of every cell and seed; all arms are dead
(coverage, family-wise error after Holm), or one of them is shifted by 2 sd (power).  A target is missed when the
measured share lies beyond it by more than three standard errors of the simulation.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from ablab.analysis.effects.intervals import on_shared_seeds
from ablab.analysis.effects.multiplicity import holm
from ablab.analysis.effects.power import ALPHA

ARMS = 10
SEEDS = (3, 5, 8)
LIVE = 2.0  # sd, the shift of the live arm
SIGMAS = 3.0  # of the simulation's own error, allowed on either side of a target

Draw = Callable[[np.random.Generator, tuple[int, int, int]], np.ndarray]


@dataclass(frozen=True)
class Target:
    """Bounds in per cent; None: nothing is asked."""

    least: float | None = None
    most: float | None = None

    def misses(self, share: float, error: float) -> bool:
        """Whether a share is surely outside.  Both in per cent."""
        low = self.least is not None and share + SIGMAS * error < self.least
        high = self.most is not None and share - SIGMAS * error > self.most
        return low or high

    @property
    def said(self) -> str:
        if self.least is not None and self.most is not None:
            return f"{self.least:g} to {self.most:g}"
        if self.least is not None:
            return f">= {self.least:g}"
        return f"<= {self.most:g}" if self.most is not None else ""


@dataclass(frozen=True)
class Scenario:
    """How seeds and arms vary, and what must hold at 3, 5 and 8 seeds."""

    name: str
    draw: Draw  # (random, (experiments, cells, seeds)) -> values; cell 0 is the reference
    coverage: dict[int, Target]
    false_verdicts: dict[int, Target]
    power: dict[int, Target]


@dataclass(frozen=True)
class Figure:
    """One measured share beside its target, in per cent."""

    scenario: str
    seeds: int
    method: str
    what: str  # "coverage", "family-wise error" or "power"
    share: float
    error: float  # of the share: the simulation's own standard error
    target: str
    missed: bool


def independent(random: np.random.Generator, size: tuple[int, int, int]) -> np.ndarray:
    return random.normal(size=size)


def alike(random: np.random.Generator, size: tuple[int, int, int]) -> np.ndarray:
    """Correlation 0.8 of any two cells over seeds."""
    experiments, _, seeds = size
    shared = random.normal(size=(experiments, 1, seeds))
    return np.sqrt(0.8) * shared + np.sqrt(0.2) * random.normal(size=size)


def opposed(random: np.random.Generator, size: tuple[int, int, int]) -> np.ndarray:
    """Correlation -0.5 of each arm with the reference."""
    values = random.normal(size=size)
    values[:, 1:] = np.sqrt(0.75) * values[:, 1:] - 0.5 * values[:, :1]
    return values


def heavy_tailed(random: np.random.Generator, size: tuple[int, int, int]) -> np.ndarray:
    """Student's t with 3 degrees of freedom, scaled to sd 1."""
    return random.standard_t(3, size=size) / np.sqrt(3)


def one_noisy(random: np.random.Generator, size: tuple[int, int, int]) -> np.ndarray:
    """One arm three times as noisy."""
    values = random.normal(size=size)
    values[:, 1] *= 3
    return values


def _coverage(few: Target) -> dict[int, Target]:
    """few: at 3 and 5 seeds; the plain paired t is exact, or nearly, whatever the arms do."""
    return {3: few, 5: few, 8: Target(94, 96)}


def _false_verdicts(few: float, many: float) -> dict[int, Target]:
    return {3: Target(most=few), 5: Target(most=few), 8: Target(most=many)}


def _power(*rounded: float) -> dict[int, Target]:
    """Never too much of it."""
    return {seeds: Target(one - 0.5) for seeds, one in zip(SEEDS, rounded, strict=True)}


SCENARIOS = (
    Scenario(
        "equal sd, rho 0",
        independent,
        coverage=_coverage(Target(94, 96)),
        false_verdicts=_false_verdicts(5, 5),
        power=_power(14, 46, 54),
    ),
    Scenario(
        "equal sd, rho .8",
        alike,
        coverage=_coverage(Target(94, 96)),
        false_verdicts=_false_verdicts(5, 5),
        power=_power(80, 100, 100),
    ),
    Scenario(
        "t3 noise",
        heavy_tailed,
        coverage=_coverage(Target(least=95)),
        false_verdicts=_false_verdicts(3, 3),
        power={},
    ),
    Scenario(
        "one arm 3 x as noisy",
        one_noisy,
        coverage=_coverage(Target(least=93)),
        false_verdicts=_false_verdicts(7.5, 5),
        power={},
    ),
    Scenario(
        "rho -.5",
        opposed,
        coverage=_coverage(Target(least=92)),
        false_verdicts=_false_verdicts(5, 5),
        power={},
    ),
)


def figures(experiments: int, seed: int = 0) -> Iterator[Figure]:
    """Every figure of every scenario, each from so many experiments."""
    for row, scenario in enumerate(SCENARIOS):
        for seeds in SEEDS:
            random = np.random.default_rng((seed, row, seeds))
            yield from _measured(scenario, seeds, experiments, random)


def _measured(
    scenario: Scenario, seeds: int, experiments: int, random: np.random.Generator
) -> Iterator[Figure]:
    values = scenario.draw(random, (experiments, ARMS + 1, seeds))
    dead = on_shared_seeds(values[:, 1:], values[:, 0])
    covered = np.abs(dead.delta) <= dead.half_width()
    false = (holm(dead.p) < ALPHA).any(-1)
    # Per experiment, in [0, 1].
    told = [
        ("coverage", covered.mean(-1), scenario.coverage),
        ("family-wise error", false, scenario.false_verdicts),
    ]
    if scenario.power:
        values[:, -1] += LIVE
        live = on_shared_seeds(values[:, 1:], values[:, 0])
        shown = holm(live.p)[:, -1] < ALPHA
        told.append(("power", shown, scenario.power))
    for what, each, targets in told:
        target = targets[seeds]
        share = 100 * float(each.mean())
        error = 100 * float(each.std() / np.sqrt(experiments))
        yield Figure(
            scenario=scenario.name,
            seeds=seeds,
            method=dead.method,
            what=what,
            share=share,
            error=error,
            target=target.said,
            missed=target.misses(share, error),
        )
