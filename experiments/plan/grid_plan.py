"""The grid plan of an experiment: which run answers which cell, as the store keeps it and the reports read it."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from ablab.ablations.design import name_of
from ablab.core.recipe.intervention import REGISTRY, Intervention
from ablab.core.recipe.recipe import plain
from ablab.core.store.planned import GridPlan, Planned
from ablab.experiments.plan.experiment import Experiment, PlannedRun


def grid_plan_of(experiment: Experiment, runs: Iterable[PlannedRun]) -> GridPlan:
    """The plan of these runs alone."""
    sheet = experiment.sheet
    named = [name for cell in experiment.cells for name in cell.treatment]
    return GridPlan(
        name=experiment.name,
        question=sheet.question,
        metric=sheet.metric.name,
        better=sheet.metric.better,
        design=name_of(sheet.design),
        rows=[_row(experiment, run) for run in runs],
        treatments={
            cell.name: {name: _dose(one) for name, one in cell.treatment.items()}
            for cell in experiment.cells
        },
        off={name: REGISTRY[name].about.off for name in named},
        sheet=experiment.origin,
        factors=experiment.factors,
        infeasible=experiment.infeasible,
        equivalence=sheet.equivalence,
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
    kept = _still_wanted(experiment, before, plan.rows)
    noted = {row.run: row.note for row in before}
    found = {cell: _note(reference) for cell, reference in inert.items()}

    def note_of(row: Planned) -> str:
        return found.get(row.cell, noted.get(row.run, ""))

    rows = [replace(row, note=note_of(row)) for row in plan.rows + kept]
    return replace(plan, rows=rows)


def _still_wanted(
    experiment: Experiment, before: list[Planned], now: list[Planned]
) -> list[Planned]:
    """Rows of an earlier plan that this one lacks, and whose runs the experiment would ask for again."""
    asked = {(row.cell, row.pair) for row in now}
    kept = []
    for row in before:
        cell = experiment.cell_named.get(row.cell)
        if cell is None or (row.cell, row.pair) in asked:
            continue
        run = experiment.run(cell, row.pair)
        if run.id == row.run:
            kept.append(_row(experiment, run))
    return kept


def _note(reference: str) -> str:
    return f"inert: no difference from {reference} in the liveness check" if reference else ""


def _row(experiment: Experiment, run: PlannedRun) -> Planned:
    reference = experiment.cell_named[run.cell].reference
    params = experiment.params(run)
    return Planned(
        run.cell,
        run.pair,
        run.recipe.seed,
        run.id,
        reference,
        tags=_levels(experiment, run.cell),
        params=params,
    )


def _levels(experiment: Experiment, cell: str) -> dict[str, str]:
    """The level of each factor of a crossed design, in words: a tag each, to group by."""
    if not experiment.factors:
        return {}
    words = experiment.factors.names
    levels = experiment.factors.levels[cell]
    return {f"ablab.factor.{name}": words[name][level > 0] for name, level in levels.items()}


def _dose(intervention: Intervention) -> dict[str, Any]:
    return {name: value for name, value in plain(intervention).items() if name != "kind"}
