"""What a study searches: the axes of its space, and the points that they span."""

import itertools
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ablab.core.errors import UserError
from ablab.experiments.plan.sheets import StudySheet

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

Point = dict[str, Any]  # searched path -> value

STAGES = "stages"  # begins the path of what one stage has for itself
KINDS = ("log", "uniform", "int", "choices")
GRID_POINTS = 5  # of an axis that names no number of its own
MOST_TRIALS = (
    100_000  # of a cell: each is a run, and a row of a database that takes 3 ms to write
)
MOST_CORNERS = 4096  # built before anything runs; a space with more is trusted beyond them


@dataclass(frozen=True)
class Axis:
    """One searched path."""

    path: str
    kind: str  # one of KINDS
    values: tuple[Any, ...]  # (low, high), or the choices
    points: int = GRID_POINTS

    @property
    def stage(self) -> str:
        """The one stage in which it is searched, as stages.decay.optim.lr says; empty: in all."""
        head, _, rest = self.path.partition(".")
        return rest.partition(".")[0] if head == STAGES else ""

    @property
    def leaf(self) -> str:
        """The path without its stage: optim.lr, or with.NAME.DOSE."""
        return self.path.removeprefix(f"{STAGES}.{self.stage}.")

    @property
    def dose_of(self) -> str:
        """The intervention of which it is a dose; empty of a recipe path."""
        head, _, rest = self.leaf.partition(".")
        return rest.partition(".")[0] if head == "with" else ""

    @property
    def ends(self) -> tuple[Any, ...]:
        """The values at which it is most likely to fail: all choices, or the outermost."""
        if self.kind == "choices":
            return self.values
        low, high = self.values
        return low, high

    @property
    def size(self) -> float:
        """How many values it has."""
        match self.kind:
            case "choices":
                return len(self.values)
            case "int":
                low, high = self.values
                return high - low + 1
        return math.inf

    def distribution(self) -> "BaseDistribution":
        """As Optuna says it."""
        from optuna import distributions

        if self.kind == "choices":
            return distributions.CategoricalDistribution(self.values)
        low, high = self.values
        if self.kind == "int":
            return distributions.IntDistribution(low, high)
        return distributions.FloatDistribution(low, high, log=self.kind == "log")

    def at(self, share: float) -> Any:
        """The value at a share of the axis in [0, 1]."""
        if self.kind == "choices":
            last = len(self.values) - 1
            return self.values[min(int(share * len(self.values)), last)]
        low, high = self.values
        if self.kind == "log":
            return self.tidy(low * (high / low) ** share)
        value = low + (high - low) * share
        return self.tidy(round(value) if self.kind == "int" else value)

    def tidy(self, value: Any) -> Any:
        """Four significant digits, within the range: proposals that differ by less are one run."""
        if self.kind == "choices" or not isinstance(value, float):
            return value
        low, high = self.values
        return min(max(tidy(value), low), high)

    def grid(self) -> list[Any]:
        """The values of a grid, each once."""
        if self.kind == "choices":
            return list(self.values)
        steps = max(self.points - 1, 1)
        values = (self.at(i / steps) for i in range(self.points))
        return list(dict.fromkeys(values))


def tidy(value: Any) -> Any:
    """Four significant digits."""
    return float(f"{value:.4g}") if isinstance(value, float) else value


# -- reading a `space:` block ------------------------------------------------------------------------------------------
def axes_of(space: Mapping[str, Mapping[str, Any]]) -> list[Axis]:
    """Read a `space:` block.  Raises UserError for an empty or inverted range and for an unknown kind."""
    if not space:
        raise UserError(
            "study.space is empty; name at least one path, such as optim.lr: {log: [1.0e-3, 3.0e-2]}"
        )
    return [_axis(path, said) for path, said in space.items()]


def _axis(path: str, said: Any) -> Axis:
    keys = dict(said) if isinstance(said, Mapping) else {"": said}
    points = keys.pop("points", GRID_POINTS)
    kind, values = next(iter(keys.items()), ("", None))
    if len(keys) != 1 or kind not in KINDS:
        raise UserError(
            f"study.space.{path} must be one of log, uniform, int: [low, high] or choices: [...]; "
            f"it says {keys.get('', keys)}"
        )
    if not isinstance(values, list) or not values:
        raise UserError(
            f"study.space.{path}: {kind} needs a list with something in it, not {values!r}"
        )
    if type(points) is not int or not 1 <= points <= MOST_TRIALS:
        raise UserError(
            f"study.space.{path}: points={points!r} must be a whole number from 1 to {MOST_TRIALS:,}"
        )
    if kind == "choices":
        return Axis(path, kind, _choices(path, values))
    return Axis(path, kind, _range(path, kind, values), points)


def _choices(path: str, values: list[Any]) -> tuple[Any, ...]:
    plain = all(isinstance(value, (bool, int, float, str)) for value in values)
    if not plain or len(set(values)) < len(values):
        raise UserError(
            f"study.space.{path}: choices {values} must be numbers or words, each named once"
        )
    return tuple(values)


def _range(path: str, kind: str, values: list[Any]) -> tuple[float, float]:
    """(low, high): two finite numbers in this order, whole for `int`, above 0 for `log`."""
    try:
        low, high = map(float, values)
    except (TypeError, ValueError):
        raise UserError(
            f"study.space.{path}: {kind} needs two numbers [low, high], not {values!r}"
        ) from None
    whole = kind == "int"
    fits = float.is_integer if whole else math.isfinite
    if not (fits(low) and fits(high)):
        raise UserError(
            f"study.space.{path}: {kind} needs two {'whole' if whole else 'finite'} numbers [low, high], "
            f"not {values!r}"
        )
    positive = kind == "log"
    if not low < high or (positive and low <= 0):
        raise UserError(
            f"study.space.{path}: {values} is empty or inverted; write the lower bound first"
            + (", above 0" if positive else "")
        )
    return (int(low), int(high)) if whole else (low, high)


# -- the points that axes span -----------------------------------------------------------------------------------------
def corners(axes: Iterable[Axis]) -> list[Point]:
    """Every combination of the ends of the axes: what must be buildable before anything runs."""
    ends = {axis.path: axis.ends for axis in axes}
    return list(itertools.islice(_combinations(ends), MOST_CORNERS))


def grid_points(axes: Iterable[Axis]) -> list[Point]:
    """Every combination of the grids of the axes, the last path fastest."""
    return list(_combinations({axis.path: axis.grid() for axis in axes}))


def _combinations(values: Mapping[str, Iterable[Any]]) -> Iterable[Point]:
    for chosen in itertools.product(*values.values()):
        yield dict(zip(values, chosen, strict=True))


def size_of(axes: Iterable[Axis]) -> float:
    """How many points the space has."""
    return math.prod(axis.size for axis in axes)


def total_trials(axes: Iterable[Axis], sheet: StudySheet) -> int:
    """How many trials a cell gets, widenings aside.  Raises UserError for more than any machine trains."""
    grid = sheet.sampler == "grid"
    total = math.prod(len(axis.grid()) for axis in axes) if grid else sheet.trials_per_cell
    if total > MOST_TRIALS:
        what = "the points of study.space" if grid else "study.trials_per_cell"
        raise UserError(
            f"{what} ask for {total:,} trials a cell; at most {MOST_TRIALS:,}: ask for fewer"
        )
    return total
