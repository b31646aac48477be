"""Search spaces and proposals.  Optuna proposes; nothing here trains.

A proposal is a pure function of (study, generation, completed generations): every generation is asked from a fresh,
seeded sampler in memory that knows only the generations before it.  So a killed study proposes the same points again,
whatever the number of workers, and the storage holds finished trials alone: no zombies, no duplicates.
"""

import hashlib
import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from msgspec import Meta

from ablab.core.errors import UserError

Whole = Annotated[int, Meta(ge=1)]


@dataclass(frozen=True)
class StudySheet:
    """The `study:` block of an experiment file."""

    space: dict[str, dict[str, Any]]  # path -> {log: [a, b]} | {uniform: [a, b]} | {int: [a, b]} | {choices: [...]}; `points` for a grid
    trials_per_cell: Whole = 8  # for a grid: all of its points, whatever this says
    seeds: list[int] = field(default_factory=lambda: [100])  # selection seeds; a trial's value is the mean over them
    sampler: Literal["gp", "tpe", "qmc", "random", "grid"] = "gp"
    sampler_seed: int = 0
    generation: Whole = 4  # trials proposed at once for each cell; fixes the proposals, whatever --jobs is
    pruner: Literal["none", "median", "asha", "hyperband"] = "none"
    hard: dict[str, list[float]] = field(default_factory=dict)  # path -> bounds within which an edge optimum widens the range
    widenings: Annotated[int, Meta(ge=0)] = 4  # extra trials a cell may spend on that
    hours: float | None = None  # no new generation is started after so long


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
        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

        if self.kind == "choices":
            return CategoricalDistribution(self.values)
        return IntDistribution(*self.values) if self.kind == "int" else FloatDistribution(*self.values, log=self.kind == "log")

    def at(self, share: float) -> Any:
        """The value at a share of the axis in [0, 1]."""
        if self.kind == "choices":
            return self.values[min(int(share * len(self.values)), len(self.values) - 1)]
        low, high = self.values
        value = low * (high / low) ** share if self.kind == "log" else low + (high - low) * share
        return round(value) if self.kind == "int" else tidy(value)

    def grid(self) -> list[Any]:
        if self.kind == "choices":
            return list(self.values)
        return list(dict.fromkeys(self.at(i / max(self.points - 1, 1)) for i in range(self.points)))


def tidy(value: Any) -> Any:
    """Four significant digits: proposals that differ by less are one run."""
    return float(f"{value:.4g}") if isinstance(value, float) else value


def axes_of(space: Mapping[str, Mapping[str, Any]]) -> list[Axis]:
    """Read a `space:` block.  Raises UserError for an empty or inverted range and for an unknown kind."""
    if not space:
        raise UserError("study.space is empty; name at least one path, such as optim.lr: {log: [1.0e-3, 3.0e-2]}")
    return [_axis(path, dict(spec)) for path, spec in space.items()]


def _axis(path: str, spec: dict[str, Any]) -> Axis:
    points = spec.pop("points", 5)
    kind, values = next(iter(spec.items()), ("", None))
    if len(spec) != 1 or kind not in ("log", "uniform", "int", "choices"):
        raise UserError(f"study.space.{path} must be one of log, uniform, int: [low, high] or choices: [...]; it says {spec}")
    if not isinstance(values, list) or not values:
        raise UserError(f"study.space.{path}: {kind} needs a list, not {values!r}")
    if kind == "choices":
        return Axis(path, kind, tuple(values))
    try:
        low, high = (int(v) if kind == "int" else float(v) for v in values)
    except (TypeError, ValueError):
        raise UserError(f"study.space.{path}: {kind} needs two numbers [low, high], not {values!r}") from None
    if not low < high or (kind == "log" and low <= 0):
        raise UserError(f"study.space.{path}: [{low}, {high}] is empty or inverted; write the lower bound first" + (", above 0" if kind == "log" else ""))
    return Axis(path, kind, (low, high), points)


def corners(axes: Iterable[Axis]) -> list[dict[str, Any]]:
    """Every combination of the ends of the axes: what must be buildable before anything runs."""
    axes = list(axes)
    return [dict(zip([axis.path for axis in axes], ends, strict=True)) for ends in itertools.islice(itertools.product(*(a.ends for a in axes)), 4096)]


def total_trials(axes: list[Axis], sheet: StudySheet) -> int:
    if sheet.sampler != "grid":
        return sheet.trials_per_cell
    size = 1
    for axis in axes:
        size *= len(axis.grid())
    return size


def propose(axes: list[Axis], sheet: StudySheet, study: str, better: str, before: list[Any], count: int) -> list[dict[str, Any]]:
    """`count` points for the trials that follow `before` (frozen Optuna trials of whole generations).

    The first half of a study (at least 4 points) is spread evenly: a log grid in one dimension, a scrambled Sobol
    sequence in more.  A grid is all that, and nothing else.
    """
    first = len(before)
    fixed = _fixed(axes, sheet, study)
    spread = fixed[first : first + count]
    if len(spread) == count or sheet.sampler in ("grid", "qmc"):
        return spread
    return spread + _asked(axes, sheet, study, better, before, count - len(spread))


def _fixed(axes: list[Axis], sheet: StudySheet, study: str) -> list[dict[str, Any]]:
    names = [axis.path for axis in axes]
    if sheet.sampler == "grid":
        return [dict(zip(names, point, strict=True)) for point in itertools.product(*(axis.grid() for axis in axes))]
    count = {"qmc": sheet.trials_per_cell, "random": 0}.get(sheet.sampler, min(max(sheet.trials_per_cell // 2, 4), sheet.trials_per_cell))
    if len(axes) == 1:
        shares = [[i / max(count - 1, 1)] for i in range(count)]
    else:
        from scipy.stats.qmc import Sobol

        power = max(count - 1, 1).bit_length()
        shares = Sobol(len(axes), rng=_seed(sheet, study, 0)).random_base2(power)[:count].tolist()
    return [{axis.path: axis.at(share) for axis, share in zip(axes, row, strict=True)} for row in shares]


def _asked(axes: list[Axis], sheet: StudySheet, study: str, better: str, before: list[Any], count: int) -> list[dict[str, Any]]:
    """Ask a fresh sampler; each open point gets the mean value so far, lest the next one repeat it (constant liar)."""
    import optuna

    seed = _seed(sheet, study, len(before))
    sampler = {
        "gp": lambda: optuna.samplers.GPSampler(seed=seed, n_startup_trials=2, deterministic_objective=False),
        "tpe": lambda: optuna.samplers.TPESampler(seed=seed, n_startup_trials=4, multivariate=True),
        "random": lambda: optuna.samplers.RandomSampler(seed=seed),
    }[sheet.sampler]()
    memory = optuna.create_study(direction=direction(better), sampler=sampler)
    memory.add_trials(before)
    done = [trial.value for trial in before if trial.value is not None]
    points = []
    for _ in range(count):
        trial = memory.ask({axis.path: axis.distribution() for axis in axes})
        points.append({path: tidy(value) for path, value in trial.params.items()})
        memory.tell(trial, sum(done) / len(done) if done else 0.0)
    return points


def direction(better: str) -> str:
    return "minimize" if better == "lower" else "maximize"


def _seed(sheet: StudySheet, study: str, number: int) -> int:
    digest = hashlib.sha256(f"{sheet.sampler_seed}/{study}/{number}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1


def open_storage(url: str) -> Any:
    """`journal:PATH`, or any Optuna URL.  Raises UserError when it cannot be reached."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        if url.startswith("journal:"):
            from optuna.storages.journal import JournalFileBackend

            return optuna.storages.JournalStorage(JournalFileBackend(url.removeprefix("journal:")))
        return optuna.storages.RDBStorage(url)
    except Exception as cause:
        line = " ".join(str(cause).split("(Background on")[0].split())[:200]
        raise UserError(f"the Optuna storage {hide(url)} cannot be opened ({line or type(cause).__name__}); check --storage") from None


def hide(url: str) -> str:
    """A URL without its password."""
    import re

    return re.sub(r"//[^/@\s]*@", "//", url)


def open_study(storage: Any, name: str, better: str, facts: dict[str, Any]) -> Any:
    """The Optuna study of one cell.  One that exists must have been made with the same facts; else it says which differs."""
    import optuna

    study = optuna.create_study(study_name=name, storage=storage, direction=direction(better), load_if_exists=True)
    held = study.user_attrs
    for key, value in facts.items():
        if key not in held:
            study.set_user_attr(key, value)
        elif held[key] != value:
            raise UserError(f"the storage holds a study {name!r} whose {key} is {held[key]}, but this one has {value}; rename the experiment or use another --storage")
    return study
