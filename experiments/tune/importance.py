"""Which searched path matters: read from the trials of a cell."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ablab.experiments.tune.proposals import Memory
from ablab.experiments.tune.space import Axis

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.trial import FrozenTrial

FEWEST = 4  # complete trials
MOST = 2000  # trials judged; more are thinned out evenly


def importance(
    axes: list[Axis], better: str, trials: Sequence["FrozenTrial"]
) -> dict[str, float]:
    """PED-ANOVA importance of each axis, shares of 1; empty with fewer than FEWEST complete trials or with one axis."""
    from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

    spaces = {axis.path: axis.distribution() for axis in axes}
    inside = [one for one in trials if one.value is not None and _within(spaces, one)]
    if len(inside) < FEWEST or len(axes) < 2:
        return {}
    drawn = inside[:: math.ceil(len(inside) / MOST)]
    memory = Memory(axes, better, drawn)
    shares = get_param_importances(memory.study, evaluator=PedAnovaImportanceEvaluator())
    total = sum(shares.values())
    if not total:
        return {}
    return {path: share / total for path, share in shares.items()}


def _within(spaces: Mapping[str, "BaseDistribution"], trial: "FrozenTrial") -> bool:
    """False of a trial that lies in a widened part of the range."""
    return all(
        space._contains(space.to_internal_repr(trial.params[path]))
        for path, space in spaces.items()
    )
