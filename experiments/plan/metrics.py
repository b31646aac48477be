"""What an experiment is judged by: any number that its runs leave (core/store/metrics.py), and which way is better."""

from collections.abc import Iterable

from ablab.core.errors import UserError
from ablab.core.language.parse import near
from ablab.core.recipe.recipe import Recipe
from ablab.core.store.metrics import EVALUATED, LOGGED, MEASURED, OPEN, known
from ablab.experiments.plan.sheets import Metric, StudySheet

RAW = "raw/"  # before a name: of the trained weights, where an average of them is what is evaluated


def check_direction(metric: Metric) -> None:
    """Raises UserError where the direction contradicts the metric."""
    usual = known(metric.name).better
    if usual and metric.better != usual:
        raise UserError(
            f"metric.better={metric.better} contradicts {metric.name}, of which {usual} is better; "
            "drop metric.better, or name another metric"
        )


def check_left(metric: str, recipes: Iterable[tuple[str, Recipe]]) -> None:
    """Raises UserError for a metric that an arm will not leave.  recipes: (cell, recipe of its last stage)."""
    if metric.startswith(OPEN):
        return
    names_of = {cell: _names(recipe) for cell, recipe in recipes}
    every = dict.fromkeys(name for names in names_of.values() for name in names)
    lacking = [cell for cell, names in names_of.items() if metric not in names]
    if metric not in every:
        open_names = " and ".join(f"{lead}..." for lead in OPEN)
        raise UserError(
            f"metric.name={metric!r:.80} is nothing that these runs leave. {near(metric, every)}"
            f"They leave: {', '.join(every)}; {open_names} where they are asked for"
        )
    if lacking:
        raise UserError(
            f"metric {metric} is left by runs with an average such as ema alone, not by {lacking[0]!r}; "
            f"name {metric.removeprefix(RAW)}"
        )


def _names(recipe: Recipe) -> list[str]:
    names = [*LOGGED, *(f"{EVALUATED}bits_per_byte/{source}" for source in recipe.data.mix)]
    if recipe.after_step:
        names += [f"{RAW}{name}" for name in names if name.startswith(EVALUATED)]
    return [*names, *MEASURED]


def check_study(metric: str, study: StudySheet | None) -> None:
    """Raises UserError where a pruner would wait for what no evaluation logs."""
    if study and study.pruner != "none" and not metric.startswith((EVALUATED, RAW)):
        raise UserError(
            f"study.pruner={study.pruner} judges by what every evaluation logs, and {metric} is not among that; "
            "write pruner: none, or metric: val/bits_per_byte"
        )
