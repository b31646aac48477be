"""What an experiment asks, as the ledger keeps it: written down before its first run."""

from collections.abc import Iterable

from ablab.core.language.written import typed
from ablab.core.store.registration import Promise
from ablab.experiments.plan.experiment import Experiment, PlannedRun


def promise_of(experiment: Experiment, runs: Iterable[PlannedRun], seen: int) -> Promise:
    """runs: all that are asked for, every cell on every seed; a grid with looks promises all that these may need."""
    sheet = experiment.sheet
    stopping = experiment.stopping
    wanted = experiment.runs(stopping.seeds) if stopping.seeds else list(runs)
    by_cell: dict[str, list[str]] = {}
    for run in wanted:
        by_cell.setdefault(run.cell, []).append(run.id)
    return Promise(
        question=sheet.question,
        metric=sheet.metric.name,
        better=sheet.metric.better,
        equivalence=sheet.equivalence,
        design=typed(sheet.design),
        seeds=list(dict.fromkeys(run.pair for run in wanted)),
        looks=list(stopping.looks),
        hours=stopping.hours,
        references={cell: experiment.cell_named[cell].reference for cell in by_cell},
        runs=by_cell,
        seen=seen,
    )
