"""What is refused before a study runs or writes anything."""

from collections.abc import Iterator, Sequence
from typing import Any

from ablab.analysis.tuning.winners import axis as judged_path
from ablab.core.errors import UserError
from ablab.core.language.parse import fields_of, near
from ablab.core.recipe.load import assign
from ablab.core.recipe.recipe import Recipe
from ablab.core.store.study_record import WIDTH
from ablab.experiments.plan.experiment import Experiment
from ablab.experiments.plan.sheets import StudySheet
from ablab.experiments.plan.stages import stage_named
from ablab.experiments.tune.cell_search import CellSearch
from ablab.experiments.tune.space import STAGES, Axis, Point, corners

ONE_FOLDER = (
    "all trials of a study read one token folder; start one study for each, with data.name=..."
)
FIXED = {  # path -> why no trial can differ in it
    "seed": "each trial runs on study.seeds; list more of them there",
    "data.name": ONE_FOLDER,
    "data.digest": ONE_FOLDER,
}


def check(experiment: Experiment, sheet: StudySheet, axes: Sequence[Axis]) -> None:
    """Raises UserError for the first thing that cannot be."""
    check_seeds(experiment, sheet)
    check_paths(experiment, axes)
    check_width(experiment, axes)
    check_bounds(sheet, axes)


def check_seeds(experiment: Experiment, sheet: StudySheet) -> None:
    """Selection and confirmation share none, and a pruner gets one."""
    seeds = sheet.seeds
    if shared := sorted(set(seeds) & set(experiment.sheet.seeds)):
        raise UserError(
            f"study.seeds and seeds share {shared}; selection and confirmation need disjoint seeds"
        )
    if not seeds or len(set(seeds)) < len(seeds):
        raise UserError(f"study.seeds={seeds} must name at least one seed, and each once")
    if sheet.pruner != "none" and len(seeds) > 1:
        raise UserError(
            f"study.pruner={sheet.pruner} works with one selection seed, not {len(seeds)}: "
            "a pruned seed has no mean; drop the pruner or keep one of study.seeds"
        )


def check_paths(experiment: Experiment, axes: Sequence[Axis]) -> None:
    """Refuse an unknown path, with the near miss, and an end that the path cannot hold."""
    holders: dict[str, Any] = {}  # dose -> an intervention that has it
    for cell in experiment.cells:
        for name, intervention in cell.treatment.items():
            for dose in fields_of(type(intervention)):
                holders[f"with.{name}.{dose}"] = intervention
    for axis in axes:
        if why := FIXED.get(axis.leaf):
            raise UserError(f"study.space: {axis.path} cannot be searched: {why}")
        check_stages(experiment, axis)
        holder, path = base_of(experiment, axis), axis.leaf
        if axis.dose_of:
            if axis.leaf not in holders:
                raise UserError(
                    f"study.space: unknown path {axis.path!r}. {near(axis.leaf, holders)}"
                    f"Doses of this experiment: {', '.join(holders) or 'none'}"
                )
            holder, path = holders[axis.leaf], axis.leaf.split(".")[2]
        check_arms(experiment, axis)
        for end in axis.ends:
            assign(holder, path, end)


def base_of(experiment: Experiment, axis: Axis) -> Recipe:
    """The recipe, before interventions, in which an axis moves a path: of its stage, else of the last one."""
    if axis.stage:
        return stage_named(experiment.stages, axis.stage).scaled_base
    return experiment.base


def check_arms(experiment: Experiment, axis: Axis) -> None:
    """Refuse a path that tells two arms apart: at each point of the search they would be one."""
    searched = {axis.path, axis.leaf}
    own = [cell.name for cell in experiment.cells if searched & cell.settings.keys()]
    if axis.dose_of:
        _, name, dose = axis.leaf.split(".")
        having = [cell for cell in experiment.cells if name in cell.treatment]
        values = [getattr(cell.treatment[name], dose) for cell in having]
        own += [
            cell.name for cell, value in zip(having, values, strict=True) if value != values[0]
        ]
    if own:
        raise UserError(
            f"study.space: {axis.path} is what tells arm {own[0]!r} from others, so it cannot be searched; "
            "search another path, or leave one value to the arms"
        )


def check_stages(experiment: Experiment, axis: Axis) -> None:
    """Refuse a path that some stage sets for itself: the search would move the others alone.

    Likewise a stage that is not there, and a dose of what does not act in it.
    """
    own = [stage.name for stage in experiment.sheet.stages if axis.path in stage.set]
    if own:
        raise UserError(
            f"study.space: {axis.path} is set by stage {', '.join(own)} for itself; "
            f"search {STAGES}.{own[0]}.{axis.path}, or a path that all stages share"
        )
    if not axis.stage:
        return
    stage = stage_named(experiment.stages, axis.stage)
    if axis.dose_of in stage.elsewhere:
        raise UserError(
            f"study.space: {axis.path}: {axis.dose_of} acts in other stages than {stage.name!r}; "
            "name one of those"
        )


def check_width(experiment: Experiment, axes: Sequence[Axis]) -> None:
    """Arms are confirmed at the experiment's own width, so that width must be among those searched."""
    if not experiment.sheet.seeds:
        return
    own = experiment.base.model.width
    for axis in axes:
        if axis.path == WIDTH and own not in axis.values:
            raise UserError(
                f"study.space.model.width={list(axis.values)} lacks {own}, the width at which arms are confirmed; "
                "add it, or write seeds: [] to confirm none"
            )


def check_bounds(sheet: StudySheet, axes: Sequence[Axis]) -> None:
    """Hard bounds belong to the path that widens, and hold its range."""
    ends = {axis.path: axis.ends for axis in axes}
    widened = judged_path(sheet.space)
    for path, bounds in sheet.hard.items():
        if path not in ends:
            raise UserError(
                f"study.hard: {path!r} is not searched. {near(path, sheet.space)}"
                f"study.space has: {', '.join(sheet.space)}"
            )
        if path != widened:
            raise UserError(
                f"study.hard.{path} has no effect: only {widened or 'a log-scaled path'} is widened; drop it"
            )
        low, high = min(ends[path]), max(ends[path])
        if len(bounds) != 2 or not 0 < bounds[0] <= low <= high <= bounds[1]:
            raise UserError(
                f"study.hard.{path}={bounds} must be [low, high] around the searched range [{low}, {high}], above 0"
            )


def check_points(search: CellSearch) -> None:
    """Every corner of the space must build, and so must the hard bounds and whole numbers between."""
    for what, point in _telling_points(search.axes, search.sheet.hard):
        try:
            search.recipes(point)
        except UserError as flaw:
            where = ", ".join(f"{path}={value}" for path, value in point.items())
            raise UserError(
                f"study.space of {search.experiment.name}: the {what} {where} of cell {search.cell.name!r} "
                f"cannot be built: {flaw}"
            ) from None


def _telling_points(
    axes: Sequence[Axis], hard: dict[str, list[float]]
) -> Iterator[tuple[str, Point]]:
    """Where a space is likely to fail first; what it is called, and the point."""
    for point in corners(axes):
        yield "corner", point
    lows = {axis.path: axis.ends[0] for axis in axes}
    for axis in axes:
        if axis.kind == "int":
            yield "point", lows | {axis.path: axis.ends[0] + 1}
    for path, bounds in hard.items():
        if path in lows:
            for bound in bounds:
                yield "hard bound", lows | {path: bound}
