"""What a study found: the best trial of each arm, and whether it may be read.

A winner is read only if it beats what was tried on both sides of it along the log-scaled path of the space
(optim.lr), all else at the winner's.  A diverged neighbour was tried and is worse, a pruned one too; one that failed
or ran out of memory says nothing.  The optimum is that of the curve through the trials (analysis/tuning/fit.py).

A winner is the lowest of several noisy values, and beats its neighbours on a flat line too: of perfectly flat curves
72 to 78 % have such a winner.  So the curve must be told from a flat one: by its fitted curvature, or by a trial on
either side that is worse than the winner by more than the noise, t sqrt(2) sd with all pairs of N trials allowed for,
or by falling to the winner and rising from it at every step, which a V does that no parabola fits.
The sd is that of trials over shared seeds, trial and seed effects aside; of trials with one seed, that about the curve.
Measured, 1,000 simulations each: 2 to 5 % of flat curves are read all the same (7 trials an octave apart, 11 half an
octave, 17 a quarter); bowls with noise of 0.1 / 0.25 / 0.7 c are called flat in 0 / 0.1 / 7 % (7 trials, octaves).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from math import factorial
from typing import Any

import numpy as np
from scipy.special import stdtrit

from ablab.analysis.effects.intervals import block_error
from ablab.analysis.tuning.fit import Fit, fit, noise
from ablab.core.store.study_record import COMPLETE, EVALUATED, LR, Trial, finished

FEWEST_DEGREES = 2  # of freedom: by one, all noise is possible
CLOSE = 1 / 8  # octaves; nearer trials differ by noise alone, so they are no neighbours
LEAST_STEP = 1 / 4  # octaves; random samplers crowd, and a search must not creep
LOW, HIGH = -1, +1  # the sides of a winner
# How a winner stands; but for the first, it is not to be read.
INTERIOR = "interior"
FLAT = "flat"
EDGE = "edge"
TIE = "tie"

Space = Mapping[str, Mapping[str, Any]]  # path -> {"log": [low, high]} or {"choices": [...]}
# Path -> the low and the high end that no widening may pass.
Bounds = Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class Line:
    """The best trial of an arm, and the trials that differ from it along one log-scaled path alone."""

    path: str
    best: Trial
    trials: list[Trial]  # in the order they were asked for, the best among them

    @property
    def name(self) -> str:
        """The path's last word: lr of optim.lr."""
        return self.path.rpartition(".")[2]

    def at(self, trial: Trial) -> float:
        return trial.params[self.path]

    def said(self, trial: Trial) -> str:
        return f"{self.name}={self.at(trial):.4g}"

    @cached_property
    def evaluated(self) -> list[Trial]:
        return [trial for trial in self.trials if trial.state in EVALUATED]

    @cached_property
    def complete(self) -> list[Trial]:
        return [trial for trial in self.trials if trial.state == COMPLETE]

    @property
    def points(self) -> list[tuple[float, float]]:
        """Where the finished trials stand, and their values."""
        return [(self.at(trial), trial.final) for trial in self.complete]

    @cached_property
    def tried(self) -> list[float]:
        """Where trials were evaluated, from low to high, each place once."""
        return sorted({self.at(trial) for trial in self.evaluated})

    @cached_property
    def neighbours(self) -> tuple[Trial | None, Trial | None]:
        """The nearest evaluated trials below and above the best one."""
        return self._neighbour(LOW), self._neighbour(HIGH)

    def _neighbour(self, side: int) -> Trial | None:
        """Of several trials at one place, a finished one comes first, then the earliest."""
        centre = self.at(self.best)

        def rank(trial: Trial) -> tuple[float, int, int]:
            away = octaves(centre, self.at(trial), side)
            return away, EVALUATED.index(trial.state), trial.number

        beyond = [
            trial for trial in self.evaluated if octaves(centre, self.at(trial), side) >= CLOSE
        ]
        return min(beyond, key=rank, default=None)

    def beyond(self, side: int) -> list[Trial]:
        """Trials of any state past the outermost evaluated one."""
        end = end_of(self.tried, side)
        return [trial for trial in self.trials if side * (self.at(trial) - end) > 0]

    @property
    def spacing(self) -> float:
        """Octaves between neighbouring evaluated trials: the median, at least a quarter; one for a single trial."""
        if len(self.tried) == 1:
            return 1.0
        steps = np.diff(np.log2(self.tried))
        return max(LEAST_STEP, float(np.median(steps)))


def octaves(start: float, end: float, side: int = HIGH) -> float:
    """How far `end` lies beyond `start` on that side; negative on the other."""
    return side * float(np.log2(end / start))


def end_of(pair: Sequence[float], side: int) -> float:
    """The low or the high end of a range [low, ..., high]."""
    return pair[0] if side == LOW else pair[-1]


def sign(better: str) -> int:
    """What turns the metric into a loss: +1 where lower is better, else -1."""
    return 1 if better == "lower" else -1


@dataclass(frozen=True)
class Winner:
    """The best finished trial of an arm."""

    best: Trial
    admissible: bool
    reason: str  # why, or why not
    line: Line | None  # None if the space has no log-scaled path
    fit: Fit | None
    flat: bool = False  # no trial beside it is worse by more than the noise

    @property
    def standing(self) -> str:
        """Whether it may be read, in a word."""
        if self.admissible:
            return INTERIOR
        if self.flat:
            return FLAT
        return EDGE if None in self.neighbours else TIE

    @property
    def params(self) -> dict[str, Any]:
        return self.best.params

    @property
    def value(self) -> float:
        return self.best.final

    @property
    def path(self) -> str | None:
        """The log-scaled path along which the winner was judged."""
        return self.line.path if self.line else None

    @property
    def lr(self) -> float | None:
        """The winner's value on that path."""
        return self.line.at(self.best) if self.line else None

    @property
    def neighbours(self) -> tuple[Trial | None, Trial | None]:
        return self.line.neighbours if self.line else (None, None)

    @property
    def optimum(self) -> float | None:
        return self.fit.optimum if self.fit else None

    @property
    def low(self) -> float | None:
        return self.fit.low if self.fit else None

    @property
    def high(self) -> float | None:
        return self.fit.high if self.fit else None


def axis(space: Space) -> str | None:
    """The path that winners are judged along: optim.lr if it is searched, else the first log-scaled one."""
    if LR in space:
        return LR
    return next((path for path, how in space.items() if "log" in how), None)


def winner(
    trials: Sequence[Trial], space: Space, hard: Bounds, better: str = "lower"
) -> Winner:
    """The best finished trial of one arm, and whether it may be read.  UserError when none has finished."""
    done = finished(trials, f"cell {trials[0].cell!r}" if trials else "the cell")
    best = min(done, key=lambda trial: sign(better) * trial.final)
    held = {path: how for path, how in space.items() if path in best.params}
    path = axis(held)
    if path is None:
        reason = "no log-scaled path in the space, so no edge to check"
        return Winner(best, True, reason, line=None, fit=None)
    line = Line(path, best, [trial for trial in trials if _differs_along(path, trial, best)])
    at, values = np.array(line.points).T
    found = fit(at, values, line.at(best), sign(better))
    flaw = _flaw(line, space[path]["log"], hard.get(path))
    flat = not flaw and _is_flat(line, found, better)
    reason = flaw or (_flat_in_words(line) if flat else _beaten(line))
    return Winner(best, not flaw and not flat, reason, line, found, flat)


def _differs_along(path: str, trial: Trial, best: Trial) -> bool:
    """Whether two trials agree in everything but `path`."""
    return {**trial.params, path: None} == {**best.params, path: None}


def _flaw(line: Line, searched: Sequence[float], hard: Sequence[float] | None) -> str:
    """Why the winner may not be read; empty if it may.  `searched`, `hard`: the ends of the path's range and bounds."""
    won = f"{line.said(line.best)} won, but"
    if len(line.tried) == 1:
        return (
            f"{won} no evaluated trial differs from it in {line.name} alone; "
            "add some before reading the result"
        )
    for side, neighbour in zip((LOW, HIGH), line.neighbours, strict=True):
        if neighbour is None:
            return f"{won} it is the edge of {_edge(line, side, searched, hard)}"
        if neighbour.value == line.best.value:
            same = f"{line.said(neighbour)} ends at the same {line.best.value:.6g}"
            return f"{won} {same}; check that {line.path} reaches the run"
    return ""


def _edge(
    line: Line, side: int, searched: Sequence[float], hard: Sequence[float] | None
) -> str:
    """What ends where the winner stands, what to do about it, and what was lost beyond."""
    end = end_of(line.tried, side)
    if hard and octaves(end, end_of(hard, side), side) < CLOSE:
        return f"the hard bounds [{hard[0]:.4g}, {hard[1]:.4g}]; move them before reading the result"
    if octaves(end, end_of(searched, side), side) >= CLOSE:  # no trial of this line went there
        what, cure = "what was tried here,", "add trials"
    elif hard:
        what, cure = "the searched range", "widen it, or raise study.widenings,"
    else:
        what, cure = "the searched range", "widen it"
    tried = f"[{line.tried[0]:.4g}, {line.tried[-1]:.4g}]"
    lost = "".join(
        f"; {line.said(trial)}: {trial.state.replace('_', ' ')}" for trial in line.beyond(side)
    )
    return f"{what} {tried}; {cure} before reading the result{lost}"


def _beaten(line: Line) -> str:
    """What a winner without a flaw beats: its two neighbours, with their value or state."""
    beaten = []
    for trial in line.neighbours:
        if trial is not None:
            ended = f"{trial.value:.4f}" if trial.state == COMPLETE else trial.state
            beaten.append(f"{line.said(trial)} ({ended})")
    return f"beats {' and '.join(beaten)}"


def _flat_in_words(line: Line) -> str:
    low, high = line.tried[0], line.tried[-1]
    return (
        f"{line.said(line.best)} won, but the curve is flat from {low:.4g} to {high:.4g}: "
        "what it wins by is noise; any of these serves, or add seeds"
    )


def widen(
    trials: Sequence[Trial], space: Space, hard: Bounds, better: str = "lower"
) -> float | None:
    """The next value beyond an edge that won, one spacing on and three digits long; None when there is nothing to try.

    That is: the winner has neighbours, the hard bounds are reached (or unknown), or a trial beyond the edge is
    running, has failed or ran out of memory.  Each call moves outwards by a quarter octave or more, or to the bound:
    the search ends.
    """
    line = winner(trials, space, hard, better).line
    if line is None or line.path not in hard:
        return None
    low, high = hard[line.path]
    for side, neighbour in zip((LOW, HIGH), line.neighbours, strict=True):
        if neighbour is not None or line.beyond(side):
            continue
        end = end_of(line.tried, side)
        further = float(f"{end * 2 ** (side * line.spacing):.3g}")
        further = min(max(further, low), high)
        if octaves(end, further, side) >= CLOSE:
            return further
    return None


def _is_flat(line: Line, found: Fit | None, better: str) -> bool:
    """Whether the curve is not told from a flat one; what nothing can tell passes."""
    if found is not None and found.curved:
        return False
    if _is_valley(line, better):
        return False
    sd, degrees = _noise(line)
    if degrees < FEWEST_DEGREES:
        return False
    count = len(line.complete)
    # Bonferroni's over all pairs of trials, either way round.
    beyond = stdtrit(degrees, 1 - 0.05 / (count * (count - 1)))
    least = line.best.final * sign(better) + beyond * np.sqrt(2) * sd
    return not all(_rises(line, side, least, better) for side in (LOW, HIGH))


def _is_valley(line: Line, better: str) -> bool:
    """Whether every step towards the winner falls and every step from it rises, and noise does so in less than 5 %.

    Of the N! orders of N values on a flat line, 2^(N-1) do: 1.3 % of 7 trials.  No noise need be known.
    """
    values = [sign(better) * value for _, value in sorted(line.points)]
    lowest = values.index(min(values))
    steps = list(pairwise(values))
    falls = all(left > right for left, right in steps[:lowest])
    rises = all(left < right for left, right in steps[lowest:])
    by_chance = 2 ** (len(values) - 1) / factorial(len(values))
    return falls and rises and by_chance < 0.05


def _rises(line: Line, side: int, least: float, better: str) -> bool:
    """Whether a trial on that side was lost, or has a loss above `least`."""
    centre = line.at(line.best)
    return any(
        trial.state != COMPLETE or sign(better) * trial.final > least
        for trial in line.evaluated
        if octaves(centre, line.at(trial), side) > 0
    )


def _noise(line: Line) -> tuple[float, int]:
    """The sd of a trial's value, and its degrees of freedom; (infinity, 0) where nothing tells it."""
    seeds = {tuple(sorted(trial.values)) for trial in line.complete}
    shared = seeds.pop() if len(seeds) == 1 else ()
    if len(shared) > 1 and len(line.complete) > 1:
        table = [[trial.values[seed] for seed in shared] for trial in line.complete]
        variance = block_error(np.array(table, float))
        degrees = (len(line.complete) - 1) * (len(shared) - 1)
        return float(np.sqrt(variance / len(shared))), degrees
    at, values = np.array(line.points).T
    return noise(at, values, line.at(line.best))


def seed_sd(trials: Sequence[Trial]) -> float | None:
    """The sd between seeds, pooled over finished trials; None where each has one seed."""
    groups = [
        np.array(list(trial.values.values()), float)
        for trial in trials
        if trial.state == COMPLETE and len(trial.values) > 1
    ]
    if not groups:
        return None
    squares = sum(((group - group.mean()) ** 2).sum() for group in groups)
    degrees = sum(len(group) - 1 for group in groups)
    return float(np.sqrt(squares / degrees))
