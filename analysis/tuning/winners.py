"""What a study found: the best trial of each arm, whether it may be read, and what width does to the learning rate.

A winner is read only if it beats what was tried on both sides of it along the log-scaled path of the space (optim.lr),
all else at the winner's.  A diverged neighbour was tried and is worse, a pruned one too; one that failed or ran out of
memory says nothing.  Where the optimum lies between the trials, a quadratic says, x = log2(lr / winner's lr) in octaves:

    loss = a + b x + c x^2,   optimum x* = -b / 2c,   a trial weighs (1 - (|x| / 1.3 X)^3)^3,   X = the largest |x| used

over the finished trials within 1.5 octaves of the winner, at least the five nearest (four if there are no more).
The 95 % interval is Fieller's (1954), the profile of x*: all x whose slope b + 2 c x is within t(0.975, n-3) se of zero.
It stops at the outermost trials used.  No optimum if c <= 0 or x* lies beyond them; no interval if c is not told
from zero, nor from four trials: by one degree of freedom, a lucky fit looks exact.

Measured, 3,000 simulations each, trials 1 / 0.5 / 0.25 octaves apart, noise of sd 0.1 c (c per octave^2): the interval
covers the optimum of a true quadratic in 97 / 96 / 97 %.  Real curves are steeper on one side, at high rates or,
in short runs, at low ones: that of exp(x/2) - x/2 - 1 is read 0.17 / 0.09 / 0.09 octaves off, on its flat side, which costs
c/35 or less in loss, and covered in 99 / 65 / 18 %.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import stdtrit

from ablab.core.store.study_record import COMPLETE, EVALUATED, LR, Trial, finished

WINDOW, NEAREST, FEWEST, REACH = (
    1.5,
    5,
    4,
    1.3,
)  # of the quadratic: octaves, trials, trials, times the farthest trial
CLOSE = 1 / 8  # octaves; nearer trials differ by noise alone, so they are no neighbours
LEAST_STEP = 1 / 4  # octaves; random samplers crowd, and a search must not creep


@dataclass(frozen=True)
class Fit:
    """The quadratic: value + curvature log2(lr / optimum)^2."""

    optimum: float
    low: float | None  # 95 % interval of the optimum
    high: float | None
    value: float  # at the optimum
    curvature: float  # metric per octave^2
    span: tuple[float, float]  # of the trials used
    n: int  # trials used

    def at(self, lr: float | np.ndarray) -> float | np.ndarray:
        return self.value + self.curvature * np.log2(lr / self.optimum) ** 2


@dataclass(frozen=True)
class Winner:
    """The best finished trial of an arm."""

    params: dict[str, Any]
    value: float
    admissible: bool
    reason: str  # why, or why not
    neighbours: tuple[
        Trial | None, Trial | None
    ]  # the nearest evaluated trials below and above
    fit: Fit | None
    path: str | None  # the log-scaled path; None if the space has none
    line: list[
        Trial
    ]  # the trials that differ from the winner along that path alone, and the winner

    @property
    def lr(self) -> float | None:
        return self.params[self.path] if self.path else None

    @property
    def optimum(self) -> float | None:
        return self.fit and self.fit.optimum

    @property
    def low(self) -> float | None:
        return self.fit and self.fit.low

    @property
    def high(self) -> float | None:
        return self.fit and self.fit.high


def axis(space: Mapping[str, Any]) -> str | None:
    """The path that winners are judged along: optim.lr if it is searched, else the first log-scaled one."""
    return (
        LR if LR in space else next((path for path, how in space.items() if "log" in how), None)
    )


def winner(
    trials: Sequence[Trial],
    space: Mapping[str, Any],
    hard: Mapping[str, Sequence[float]],
    better: str = "lower",
) -> Winner:
    """The best finished trial of one arm, and whether it may be read.  UserError when none has finished."""
    done = finished(trials, f"cell {trials[0].cell!r}" if trials else "the cell")
    best = (min if better == "lower" else max)(done, key=lambda trial: trial.value)
    path = axis({path: how for path, how in space.items() if path in best.params})
    if path is None:
        return Winner(
            best.params,
            best.value,
            True,
            "no log-scaled path in the space, so no edge to check",
            (None, None),
            None,
            None,
            [best],
        )
    line = [trial for trial in trials if {**trial.params, path: 0} == {**best.params, path: 0}]
    sides = _neighbour(best, line, path, -1), _neighbour(best, line, path, +1)
    wrong = _wrong(best, line, path, sides, space[path]["log"], hard.get(path))
    points = [trial for trial in line if trial.state == COMPLETE]
    fit = quadratic(
        np.array([trial.params[path] for trial in points]),
        np.array([trial.value for trial in points]),
        best.params[path],
        better,
    )
    return Winner(
        best.params, best.value, not wrong, wrong or _right(path, sides), sides, fit, path, line
    )


def _neighbour(best: Trial, line: list[Trial], path: str, side: int) -> Trial | None:
    """The nearest evaluated trial below (-1) or above (+1) the best one; of several at one place, a finished one."""
    away = [
        (side * float(np.log2(trial.params[path] / best.params[path])), trial)
        for trial in line
        if trial.state in EVALUATED
    ]
    beyond = [
        (x, EVALUATED.index(trial.state), trial.number, trial)
        for x, trial in away
        if x >= CLOSE
    ]
    return min(beyond, key=lambda one: one[:3])[3] if beyond else None


def _wrong(
    best: Trial,
    line: list[Trial],
    path: str,
    sides: tuple,
    searched: Sequence[float],
    hard: Sequence[float] | None,
) -> str:
    """Why the winner may not be read; empty if it may."""
    name, lr, tried = path.rpartition(".")[2], best.params[path], _tried(line, path)
    if len(tried) == 1:
        return f"{name}={lr:.4g} won, but no evaluated trial differs from it in {name} alone; add some before reading the result"
    for end, declared, bound, neighbour, side in zip(
        (tried[0], tried[-1]), searched, hard or (None, None), sides, (-1, 1), strict=True
    ):
        if neighbour is None:
            if bound and side * np.log2(bound / end) < CLOSE:
                return f"{name}={lr:.4g} won, but it is the edge of the hard bounds [{hard[0]:.4g}, {hard[1]:.4g}]; move them before reading the result"
            lost = [
                f"; {name}={trial.params[path]:.4g}: {trial.state.replace('_', ' ')}"
                for trial in line
                if side * (trial.params[path] - end) > 0
            ]
            what, cure = (
                "the searched range",
                "widen it, or raise study.widenings," if bound else "widen it",
            )
            if (
                side * np.log2(declared / end) >= CLOSE
            ):  # the range goes on, but no trial of this line went there
                what, cure = "what was tried here,", "add trials"
            return f"{name}={lr:.4g} won, but it is the edge of {what} [{tried[0]:.4g}, {tried[-1]:.4g}]; {cure} before reading the result{''.join(lost)}"
        if neighbour.value == best.value:
            return f"{name}={lr:.4g} won, but {name}={neighbour.params[path]:.4g} ends at the same {best.value:.6g}; check that {path} reaches the run"
    return ""


def _right(path: str, sides: tuple[Trial, Trial]) -> str:
    ends = (
        f"{path.rpartition('.')[2]}={trial.params[path]:.4g} ({f'{trial.value:.4f}' if trial.state == COMPLETE else trial.state})"
        for trial in sides
    )
    return f"beats {' and '.join(ends)}"


def _tried(line: Sequence[Trial], path: str) -> list[float]:
    return sorted({trial.params[path] for trial in line if trial.state in EVALUATED})


def spacing(line: Sequence[Trial], path: str) -> float:
    """Octaves between neighbouring evaluated trials: the median, at least a quarter; one octave for a single trial."""
    tried = _tried(line, path)
    return max(LEAST_STEP, float(np.median(np.diff(np.log2(tried))))) if len(tried) > 1 else 1.0


def widen(
    trials: Sequence[Trial],
    space: Mapping[str, Any],
    hard: Mapping[str, Sequence[float]],
    better: str = "lower",
) -> float | None:
    """The next value beyond an edge that won, one spacing on and three digits long; None when there is nothing to try.

    That is: the winner has neighbours, the hard bounds are reached (or unknown), or a trial beyond the edge is running, has
    failed or ran out of memory.  Each call moves outwards by a quarter octave or more, or to the bound: the search ends.
    """
    won = winner(trials, space, hard, better)
    if won.path is None or won.path not in hard:
        return None
    tried, bounds = _tried(won.line, won.path), hard[won.path]
    for side, end, neighbour in zip(
        (-1, 1), (tried[0], tried[-1]), won.neighbours, strict=True
    ):
        beyond = any(side * (trial.params[won.path] - end) > 0 for trial in won.line)
        further = float(f"{end * 2 ** (side * spacing(won.line, won.path)):.3g}")
        further = min(max(further, bounds[0]), bounds[1])
        if neighbour is None and not beyond and side * np.log2(further / end) >= CLOSE:
            return further
    return None


def quadratic(
    at: np.ndarray, values: np.ndarray, centre: float, better: str = "lower"
) -> Fit | None:
    """The weighted quadratic of this module around `centre`.  at, values: [N] finished trials.  None if they do not carry one."""
    sign, x = (1 if better == "lower" else -1), np.log2(at / centre)
    near = np.argsort(np.abs(x), kind="stable")[
        : max(NEAREST, int((np.abs(x) < WINDOW + 1e-9).sum()))
    ]
    x, y, n = x[near], sign * values[near], len(near)
    if n < FEWEST or len(np.unique(x.round(6))) < 3 or np.ptp(y) == 0:
        return None
    weight = (1 - (np.abs(x) / (REACH * np.abs(x).max())) ** 3) ** 3
    X = np.vander(x, 3, increasing=True)
    inverse = np.linalg.inv(X.T @ (weight[:, None] * X))
    a, b, c = inverse @ (X.T @ (weight * y))
    if c <= 0 or not x.min() <= -b / (2 * c) <= x.max():
        return None
    covariance = inverse * (weight * (y - X @ (a, b, c)) ** 2).sum() / (n - 3)
    ends = _fieller(b, c, covariance, n - 3) if n > FEWEST else None
    low, high = (
        (float(centre * 2**end) for end in np.clip(ends, x.min(), x.max()))
        if ends
        else (None, None)
    )
    best = float(centre * 2 ** (-b / (2 * c)))
    return Fit(
        best,
        low,
        high,
        float(sign * (a - b * b / (4 * c))),
        float(sign * c),
        (float(at[near].min()), float(at[near].max())),
        n,
    )


def _fieller(
    b: float, c: float, covariance: np.ndarray, degrees: int
) -> tuple[float, float] | None:
    """Where (b + 2cx)^2 = t^2 var(b + 2cx), in octaves; None where that bounds no interval."""
    t2 = stdtrit(degrees, 0.975) ** 2
    p, q, r = (
        c * c - t2 * covariance[2, 2],
        b * c - t2 * covariance[1, 2],
        b * b - t2 * covariance[1, 1],
    )
    root = np.sqrt(max(q * q - p * r, 0.0))
    return ((-q - root) / (2 * p), (-q + root) / (2 * p)) if p > 0 else None


def seed_sd(trials: Sequence[Trial]) -> float | None:
    """The sd between seeds, pooled over finished trials; None where each has one seed."""
    groups = [
        np.array(list(trial.values.values()))
        for trial in trials
        if trial.state == COMPLETE and len(trial.values) > 1
    ]
    degrees = sum(len(group) - 1 for group in groups)
    return (
        float(np.sqrt(sum(((group - group.mean()) ** 2).sum() for group in groups) / degrees))
        if degrees
        else None
    )
