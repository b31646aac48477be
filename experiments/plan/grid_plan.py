"""The grid plan of an experiment: which run answers which cell, as the store keeps it and the reports read it."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ablab.ablations.design import name_of
from ablab.core.recipe.intervention import REGISTRY, Intervention
from ablab.core.recipe.recipe import plain
from ablab.core.store.planned import GridPlan, Planned
from ablab.experiments.plan.experiment import Experiment, PlannedRun


def grid_plan_of(experiment: Experiment, runs: Sequence[PlannedRun]) -> GridPlan:
    """The plan of these runs alone, and of the stages before them."""
    sheet = experiment.sheet
    named = [name for cell in experiment.cells for name in cell.treatment]
    return GridPlan(
        name=experiment.name,
        question=sheet.question,
        metric=sheet.metric.name,
        better=sheet.metric.better,
        design=name_of(sheet.design),
        rows=[_row(experiment, run) for run in runs],
        trunks=_trunks(experiment, runs),
        treatments={
            cell.name: {name: _dose(one) for name, one in cell.treatment.items()}
            for cell in experiment.cells
        },
        settings={cell.name: cell.settings for cell in experiment.cells if cell.settings},
        off={name: REGISTRY[name].about.off for name in named},
        sheet=experiment.origin,
        factors=experiment.factors,
        infeasible=experiment.infeasible,
        equivalence=sheet.equivalence,
        looks=list(experiment.stopping.looks),
        start=experiment.start.run if experiment.start else "",
        asked=experiment.asked,
    )


def merged_plan(
    experiment: Experiment,
    runs: list[PlannedRun],
    old: GridPlan | None,
    inert: Mapping[str, str] = {},
) -> GridPlan:
    """The plan of these runs, and of earlier seeds of the same cells whose recipes are still the same.

    inert: for each cell just looked at, the reference from which it showed no difference, or "" where it is alive; any
    other cell keeps what was noted of it.
    """
    plan = grid_plan_of(experiment, runs)
    before = old.rows if old else []
    still = _still_wanted(experiment, before, plan.rows)
    kept = [_row(experiment, run) for run in still]
    noted = {row.run: row.note for row in before}
    found = {cell: _note(reference) for cell, reference in inert.items()}

    def note_of(row: Planned) -> str:
        return found.get(row.cell, noted.get(row.run, ""))

    rows = [replace(row, note=note_of(row)) for row in plan.rows + kept]
    trunks = _trunks(experiment, [*runs, *still])
    return replace(plan, rows=rows, trunks=trunks, registered=old.registered if old else "")


def _still_wanted(
    experiment: Experiment, before: list[Planned], now: list[Planned]
) -> list[PlannedRun]:
    """The runs of an earlier plan that this one lacks, where the experiment would ask for them again."""
    asked = {(row.cell, row.pair) for row in now}
    kept = []
    for row in before:
        cell = experiment.cell_named.get(row.cell)
        if cell is None or (row.cell, row.pair) in asked:
            continue
        run = experiment.run(cell, row.pair)
        if run.id == row.run:
            kept.append(run)
    return kept


def _note(reference: str) -> str:
    return f"inert: no difference from {reference} in the liveness check" if reference else ""


def _trunks(experiment: Experiment, runs: Iterable[PlannedRun]) -> list[Planned]:
    """The runs of earlier stages; of arms that share one, the first names it."""
    found: dict[str, Planned] = {}
    for run in runs:
        for one in run.before:
            if one.id not in found:
                found[one.id] = _trunk(experiment, one)
    return list(found.values())


def _trunk(experiment: Experiment, run: PlannedRun) -> Planned:
    tags = {"ablab.stage": run.stage}
    params = experiment.params(run)
    return Planned(run.title, run.pair, run.recipe.seed, run.id, tags=tags, params=params)


def _row(experiment: Experiment, run: PlannedRun) -> Planned:
    reference = experiment.cell_named[run.cell].reference
    params = experiment.params(run)
    tags = _levels(experiment, run.cell) | _staged(run)
    return Planned(
        run.cell, run.pair, run.recipe.seed, run.id, reference, tags=tags, params=params
    )


def _staged(run: PlannedRun) -> dict[str, str]:
    return {"ablab.stage": run.stage} if run.stage else {}


def _levels(experiment: Experiment, cell: str) -> dict[str, str]:
    """The level of each factor of a crossed design, in words: a tag each, to group by."""
    if not experiment.factors:
        return {}
    words = experiment.factors.names
    levels = experiment.factors.levels[cell]
    return {f"ablab.factor.{name}": words[name][level > 0] for name, level in levels.items()}


def _dose(intervention: Intervention) -> dict[str, Any]:
    return {name: value for name, value in plain(intervention).items() if name != "kind"}
