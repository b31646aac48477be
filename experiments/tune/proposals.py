"""Search spaces and proposals.  Optuna proposes; nothing here trains.

A proposal is a pure function of (study, generation, completed generations): every generation is asked from a fresh,
seeded sampler in memory that knows only the generations before it.  So a killed study proposes the same points again,
whatever the number of workers, and the storage holds finished trials alone: no zombies, no duplicates.
"""

import hashlib
import itertools
import math
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from ablab.core.errors import UserError
from ablab.core.language.numbers import Natural, NonNegative, Whole
from ablab.core.store.result import FAILED

RETRIES = 4  # questions to a sampler that repeats itself: a GP on a small space does so for ever, at 0.1 to 1 s each


@dataclass(frozen=True)
class StudySheet:
    """The `study:` block of an experiment file."""

    space: dict[
        str, Any
    ]  # path -> {log: [a, b]} | {uniform: [a, b]} | {int: [a, b]} | {choices: [...]}; `points` for a grid
    trials_per_cell: Whole = 8  # for a grid: all of its points, whatever this says
    seeds: list[Natural] = field(
        default_factory=lambda: [100]
    )  # selection seeds; a trial's value is the mean over them
    sampler: Literal["gp", "tpe", "qmc", "random", "grid"] = "gp"
    sampler_seed: int = 0
    generation: Whole = (
        4  # trials proposed at once for each cell; fixes the proposals, whatever --jobs is
    )
    pruner: Literal["none", "median", "asha", "hyperband"] = "none"
    hard: dict[str, list[float]] = field(
        default_factory=dict
    )  # path -> bounds within which an edge optimum widens the range
    widenings: Natural = 4  # extra trials a cell may spend on that
    hours: NonNegative | None = None  # no new generation is started after so long


@dataclass(frozen=True)
class Axis:
    """One searched path."""

    path: str
    kind: str  # log, uniform, int or choices
    values: tuple[Any, ...]  # (low, high), or the choices
    points: int = 5  # of a grid

    @property
    def ends(self) -> tuple[Any, ...]:
        return self.values if self.kind == "choices" else (self.values[0], self.values[-1])

    def distribution(self):
        from optuna.distributions import (
            CategoricalDistribution,
            FloatDistribution,
            IntDistribution,
        )

        if self.kind == "choices":
            return CategoricalDistribution(self.values)
        return (
            IntDistribution(*self.values)
            if self.kind == "int"
            else FloatDistribution(*self.values, log=self.kind == "log")
        )

    def at(self, share: float) -> Any:
        """The value at a share of the axis in [0, 1]."""
        if self.kind == "choices":
            return self.values[min(int(share * len(self.values)), len(self.values) - 1)]
        low, high = self.values
        value = (
            low * (high / low) ** share if self.kind == "log" else low + (high - low) * share
        )
        return self.tidy(round(value) if self.kind == "int" else value)

    def tidy(self, value: Any) -> Any:
        """Four significant digits, within the range: proposals that differ by less are one run."""
        return (
            min(max(tidy(value), self.values[0]), self.values[1])
            if isinstance(value, float) and self.kind != "choices"
            else value
        )

    def grid(self) -> list[Any]:
        if self.kind == "choices":
            return list(self.values)
        return list(
            dict.fromkeys(self.at(i / max(self.points - 1, 1)) for i in range(self.points))
        )


def tidy(value: Any) -> Any:
    """Four significant digits."""
    return float(f"{value:.4g}") if isinstance(value, float) else value


def axes_of(space: Mapping[str, Mapping[str, Any]]) -> list[Axis]:
    """Read a `space:` block.  Raises UserError for an empty or inverted range and for an unknown kind."""
    if not space:
        raise UserError(
            "study.space is empty; name at least one path, such as optim.lr: {log: [1.0e-3, 3.0e-2]}"
        )
    return [_axis(path, spec) for path, spec in space.items()]


def _axis(path: str, spec: Any) -> Axis:
    spec = dict(spec) if isinstance(spec, Mapping) else {"": spec}
    points = spec.pop("points", 5)
    kind, values = next(iter(spec.items()), ("", None))
    if len(spec) != 1 or kind not in ("log", "uniform", "int", "choices"):
        raise UserError(
            f"study.space.{path} must be one of log, uniform, int: [low, high] or choices: [...]; it says {spec.get('', spec)}"
        )
    if not isinstance(values, list) or not values:
        raise UserError(
            f"study.space.{path}: {kind} needs a list with something in it, not {values!r}"
        )
    if type(points) is not int or points < 1:
        raise UserError(
            f"study.space.{path}: points={points!r} must be a whole number, 1 or more"
        )
    if kind == "choices":
        plain = [value for value in values if isinstance(value, (bool, int, float, str))]
        if plain != values or len(set(values)) < len(values):
            raise UserError(
                f"study.space.{path}: choices {values} must be numbers or words, each named once"
            )
        return Axis(path, kind, tuple(values))
    try:
        low, high = map(float, values)
    except (TypeError, ValueError):
        raise UserError(
            f"study.space.{path}: {kind} needs two numbers [low, high], not {values!r}"
        ) from None
    if not (math.isfinite(low) and math.isfinite(high)) or (
        kind == "int" and not (low.is_integer() and high.is_integer())
    ):
        raise UserError(
            f"study.space.{path}: {kind} needs two {'whole' if kind == 'int' else 'finite'} numbers [low, high], not {values!r}"
        )
    if not low < high or (kind == "log" and low <= 0):
        raise UserError(
            f"study.space.{path}: {values} is empty or inverted; write the lower bound first"
            + (", above 0" if kind == "log" else "")
        )
    return Axis(path, kind, (int(low), int(high)) if kind == "int" else (low, high), points)


def corners(axes: Iterable[Axis]) -> list[dict[str, Any]]:
    """Every combination of the ends of the axes: what must be buildable before anything runs."""
    axes = list(axes)
    return [
        dict(zip([axis.path for axis in axes], ends, strict=True))
        for ends in itertools.islice(itertools.product(*(a.ends for a in axes)), 4096)
    ]


def total_trials(axes: list[Axis], sheet: StudySheet) -> int:
    if sheet.sampler != "grid":
        return sheet.trials_per_cell
    size = 1
    for axis in axes:
        size *= len(axis.grid())
    return size


def spread_of(axes: list[Axis], sheet: StudySheet) -> int:
    """How many trials of a cell are spread evenly before the sampler is asked: the first half, at least 4."""
    whole = {"grid": total_trials(axes, sheet), "qmc": sheet.trials_per_cell, "random": 0}
    return whole.get(
        sheet.sampler, min(max(sheet.trials_per_cell // 2, 4), sheet.trials_per_cell)
    )


def propose(
    axes: list[Axis],
    sheet: StudySheet,
    study: str,
    better: str,
    before: list[Any],
    count: int,
    spread: int | None = None,
) -> list[dict[str, Any]]:
    """`count` points for the trials that follow `before` (frozen Optuna trials of whole generations).

    The first `spread` of a study are spread evenly: a log grid in one dimension, a scrambled Sobol sequence in more.
    A grid is all that, and nothing else.  No point is proposed twice unless the space has no other.
    """
    first = len(before)
    fixed = _fixed(axes, sheet, study, spread_of(axes, sheet) if spread is None else spread)[
        first : first + count
    ]
    if len(fixed) == count or sheet.sampler in ("grid", "qmc"):
        return fixed
    return fixed + _asked(axes, sheet, study, better, before, fixed, count - len(fixed))


def _fixed(axes: list[Axis], sheet: StudySheet, study: str, count: int) -> list[dict[str, Any]]:
    if sheet.sampler == "grid":
        return [
            dict(zip((axis.path for axis in axes), point, strict=True))
            for point in itertools.product(*(axis.grid() for axis in axes))
        ]
    if len(axes) == 1:
        shares = [[i / (count - 1) if count > 1 else 0.5] for i in range(count)]
    else:
        from scipy.stats.qmc import Sobol

        power = max(count - 1, 1).bit_length()
        shares = (
            Sobol(len(axes), rng=_seed(sheet, study, 0)).random_base2(power)[:count].tolist()
        )
    points, taken = [], set()
    for i, row in enumerate(shares):
        point = {axis.path: axis.at(share) for axis, share in zip(axes, row, strict=True)}
        points.append(
            _elsewhere(axes, taken, _seed(sheet, study, -1 - i))
            if _key(point) in taken
            else point
        )
        taken.add(_key(points[-1]))
    return points


def _asked(
    axes: list[Axis],
    sheet: StudySheet,
    study: str,
    better: str,
    before: list[Any],
    open_: list[dict],
    count: int,
) -> list[dict[str, Any]]:
    """Ask a fresh sampler.  Each open point gets the mean value so far, lest the next one repeat it (constant liar).

    One that was proposed before gets the worst, and the sampler is asked again, RETRIES times; then chance decides.
    """
    seed = _seed(sheet, study, len(before))
    memory, values = remembered(axes, better, before, _sampler(sheet.sampler, seed))
    mean = sum(values) / len(values) if values else 0.0
    worst = (max if better == "lower" else min)(values, default=0.0)
    spaces = {axis.path: axis.distribution() for axis in axes}
    taken = {_key(trial.params) for trial in before} | {_key(point) for point in open_}
    for point in open_:
        memory.add_trial(_frozen(spaces, point, mean))
    points = []
    for i in range(count):
        for _ in range(RETRIES if len(taken) < size_of(axes) else 1):
            trial = memory.ask(spaces)
            point = {axis.path: axis.tidy(trial.params[axis.path]) for axis in axes}
            memory.tell(trial, worst if _key(point) in taken else mean)
            if _key(point) not in taken:
                break
        else:
            point = _elsewhere(axes, taken, seed + i)
        taken.add(_key(point))
        points.append(point)
    return points


def _sampler(name: str, seed: int) -> Any:
    import logging

    import optuna

    match name:
        case "gp":  # without greenlet it says at import that it optimises one start after another; the result is the same
            logging.getLogger("optuna._gp.batched_lbfgsb").setLevel(logging.ERROR)
            return optuna.samplers.GPSampler(
                seed=seed, n_startup_trials=2, deterministic_objective=False
            )
        case "tpe":
            return optuna.samplers.TPESampler(seed=seed, n_startup_trials=4, multivariate=True)
    return optuna.samplers.RandomSampler(seed=seed)


def remembered(
    axes: list[Axis], better: str, trials: list[Any], sampler: Any = None
) -> tuple[Any, list[float]]:
    """A study in memory of what the trials teach, and their values.

    A diverged, pruned or out-of-memory trial was tried and is worse: it counts as the worst value so far, or samplers
    would go there again.  One that failed teaches nothing.
    """
    import optuna

    values = [trial.value for trial in trials if trial.value is not None]
    worst = (max if better == "lower" else min)(values, default=0.0)
    study = optuna.create_study(direction=direction(better), sampler=sampler)
    spaces = {axis.path: axis.distribution() for axis in axes}
    for trial in trials if values else ():
        if trial.value is not None or trial.user_attrs["state"] != FAILED:
            study._storage.create_new_trial(
                study._study_id,
                _frozen(spaces, trial.params, worst if trial.value is None else trial.value),
            )
    return study, values


def _frozen(spaces: dict[str, Any], params: dict[str, Any], value: float) -> Any:
    import optuna

    return optuna.trial.create_trial(params=params, distributions=spaces, value=value)


def _elsewhere(axes: list[Axis], taken: set, seed: int) -> dict[str, Any]:
    """A random point that is not taken, if one is found."""
    draw = random.Random(seed)
    for _ in range(100):
        point = {axis.path: axis.at(draw.random()) for axis in axes}
        if _key(point) not in taken:
            break
    return point


def _key(point: Mapping[str, Any]) -> frozenset:
    return frozenset(point.items())


def size_of(axes: Iterable[Axis]) -> float:
    """How many points the space has."""
    return math.prod(
        {"choices": len(axis.values), "int": axis.ends[1] - axis.ends[0] + 1}.get(
            axis.kind, math.inf
        )
        for axis in axes
    )


def direction(better: str) -> str:
    return "minimize" if better == "lower" else "maximize"


def _seed(sheet: StudySheet, study: str, number: int) -> int:
    digest = hashlib.sha256(f"{sheet.sampler_seed}/{study}/{number}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


def importance(axes: list[Axis], better: str, trials: list[Any]) -> dict[str, float]:
    """PED-ANOVA importance of each axis, shares of 1, from at most 2,000 trials evenly drawn; empty with fewer than four complete trials or one axis."""
    from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

    spaces = {axis.path: axis.distribution() for axis in axes}
    within = lambda one: all(
        space._contains(space.to_internal_repr(one.params[path]))
        for path, space in spaces.items()
    )  # noqa: E731
    inside = [one for one in trials if one.value is not None and within(one)]
    if len(inside) < 4 or len(axes) < 2:
        return {}
    drawn = inside[:: math.ceil(len(inside) / 2000)]
    shares = get_param_importances(
        remembered(axes, better, drawn)[0], evaluator=PedAnovaImportanceEvaluator()
    )
    total = sum(shares.values())
    return {path: share / total for path, share in shares.items()} if total else {}
