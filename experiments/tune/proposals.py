"""Where the next trials go.  Optuna proposes; nothing here trains.

A proposal is a pure function of (study, generation, completed generations): every generation is asked from a fresh,
seeded sampler in memory that knows only the generations before it.  So a killed study proposes the same points again,
whatever the number of workers, and the storage holds finished trials alone: no zombies, no duplicates.
"""

import hashlib
import logging
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ablab.core.store.result import FAILED
from ablab.experiments.plan.sheets import StudySheet
from ablab.experiments.tune.space import (
    Axis,
    Point,
    grid_points,
    size_of,
    total_trials,
)
from ablab.experiments.tune.storage import STATE, direction

if TYPE_CHECKING:
    from optuna import Study
    from optuna.samplers import BaseSampler
    from optuna.trial import FrozenTrial, Trial

RETRIES = 4  # questions to a sampler that repeats itself: a GP on a small space does so for ever, at 0.1 to 1 s each
DRAWS = 100  # random points tried before one that was proposed already is taken again
LAID_OUT = ("grid", "qmc")  # samplers whose points are all fixed beforehand: they learn nothing


def spread_of(axes: list[Axis], sheet: StudySheet) -> int:
    """How many trials of a cell are spread evenly before the sampler is asked: the first half, at least 4."""
    total = total_trials(axes, sheet)
    if sheet.sampler in LAID_OUT:
        return total
    if sheet.sampler == "random":
        return 0
    return min(max(total // 2, 4), total)


class Taken:
    """The points of a space that were proposed already."""

    def __init__(self, axes: list[Axis]):
        self.axes = axes
        self.points: set[frozenset] = set()

    def __contains__(self, point: Point) -> bool:
        return frozenset(point.items()) in self.points

    def __len__(self) -> int:
        return len(self.points)

    def add(self, point: Point) -> None:
        self.points.add(frozenset(point.items()))

    def elsewhere(self, seed: int) -> Point:
        """A random point that is not taken, if one is found."""
        draw = random.Random(seed)  # noqa: S311  of points, of no secret
        for _ in range(DRAWS):
            point = {axis.path: axis.at(draw.random()) for axis in self.axes}
            if point not in self:
                break
        return point


class Memory:
    """An Optuna study in memory of what trials teach.

    A diverged, pruned or out-of-memory trial was tried and is worse: it counts as the worst value so far, or samplers
    would go there again.  One that failed teaches nothing.
    """

    def __init__(
        self,
        axes: list[Axis],
        better: str,
        trials: Sequence["FrozenTrial"],
        sampler: "BaseSampler | None" = None,
    ):
        import optuna

        self.axes = axes
        self.spaces = {axis.path: axis.distribution() for axis in axes}
        self.values = [trial.value for trial in trials if trial.value is not None]
        self.mean = sum(self.values) / len(self.values) if self.values else 0.0
        worst = max if better == "lower" else min
        self.worst = worst(self.values, default=0.0)
        self.study: Study = optuna.create_study(direction=direction(better), sampler=sampler)
        if self.values:
            self._learn(trials)

    def _learn(self, trials: Iterable["FrozenTrial"]) -> None:
        for trial in trials:
            if trial.value is not None:
                self.add(trial.params, trial.value)
            elif trial.user_attrs[STATE] != FAILED:
                self.add(trial.params, self.worst)

    def add(self, point: Point, value: float) -> None:
        from optuna.trial import create_trial

        trial = create_trial(params=point, distributions=self.spaces, value=value)
        self.study.add_trial(trial)

    def ask(self) -> tuple["Trial", Point]:
        """The sampler's next trial, and its point as it is trained."""
        trial = self.study.ask(self.spaces)
        point = {axis.path: axis.tidy(trial.params[axis.path]) for axis in self.axes}
        return trial, point


@dataclass(frozen=True)
class Proposer:
    """Proposes the points of one cell's search."""

    axes: list[Axis]
    sheet: StudySheet
    study: str  # the name of the search, by which its random numbers differ from another's
    better: str  # "lower" or "higher"
    spread: int  # how many trials are spread evenly before the sampler is asked

    def points(self, before: Sequence["FrozenTrial"], count: int) -> list[Point]:
        """`count` points for the trials that follow `before` (those of whole generations).

        The first `spread` of a study are spread evenly: a log grid in one dimension, a scrambled Sobol sequence in
        more.  A grid is all that, and nothing else.  No point is proposed twice unless the space has no other.
        """
        first = len(before)
        fixed = self._even()[first : first + count]
        if len(fixed) == count or self.sheet.sampler in LAID_OUT:
            return fixed
        return fixed + self._asked(before, fixed, count - len(fixed))

    def _even(self) -> list[Point]:
        """The evenly spread points, all of them."""
        if self.sheet.sampler == "grid":
            return grid_points(self.axes)
        taken = Taken(self.axes)
        points = []
        for i, shares in enumerate(self._shares()):
            pairs = zip(self.axes, shares, strict=True)
            point = {axis.path: axis.at(share) for axis, share in pairs}
            if point in taken:
                point = taken.elsewhere(self._seed(-1 - i))
            taken.add(point)
            points.append(point)
        return points

    def _shares(self) -> list[list[float]]:
        """Where the evenly spread points lie: a share in [0, 1] of each axis.  [spread][axes]"""
        count = self.spread
        if len(self.axes) == 1:
            if count == 1:
                return [[0.5]]
            return [[i / (count - 1)] for i in range(count)]
        from scipy.stats.qmc import Sobol

        power = max(count - 1, 1).bit_length()  # of the net of 2^power points that holds them
        net = Sobol(len(self.axes), rng=self._seed(0))
        return net.random_base2(power)[:count].tolist()

    def _asked(
        self, before: Sequence["FrozenTrial"], fixed: list[Point], count: int
    ) -> list[Point]:
        """Ask a fresh sampler.

        Each open point gets the mean value so far, lest the next one repeat it (constant liar).  One that was proposed
        before gets the worst, and the sampler is asked again, RETRIES times; then chance decides.
        """
        seed = self._seed(len(before))
        sampler = sampler_of(self.sheet.sampler, seed)
        memory = Memory(self.axes, self.better, before, sampler)
        taken = Taken(self.axes)
        for trial in before:
            taken.add(trial.params)
        for point in fixed:
            taken.add(point)
            memory.add(point, memory.mean)
        points = []
        for i in range(count):
            point = self._new(memory, taken) or taken.elsewhere(seed + i)
            taken.add(point)
            points.append(point)
        return points

    def _new(self, memory: Memory, taken: Taken) -> Point | None:
        """A point of the sampler's that is not taken; None where it only repeats itself."""
        retries = RETRIES if len(taken) < size_of(self.axes) else 1
        for _ in range(retries):
            trial, point = memory.ask()
            repeats = point in taken
            memory.study.tell(trial, memory.worst if repeats else memory.mean)
            if not repeats:
                return point
        return None

    def _seed(self, number: int) -> int:
        """31 bits, of the study and of what they are for."""
        text = f"{self.sheet.sampler_seed}/{self.study}/{number}"
        digest = hashlib.sha256(text.encode()).digest()
        return int.from_bytes(digest[:4], "big") >> 1


def sampler_of(name: str, seed: int) -> "BaseSampler":
    import optuna

    match name:
        case "gp":
            # Without greenlet it says at import that it optimises one start after another; the result is the same.
            logging.getLogger("optuna._gp.batched_lbfgsb").setLevel(logging.ERROR)
            return optuna.samplers.GPSampler(
                seed=seed, n_startup_trials=2, deterministic_objective=False
            )
        case "tpe":
            return optuna.samplers.TPESampler(seed=seed, n_startup_trials=4, multivariate=True)
    return optuna.samplers.RandomSampler(seed=seed)
