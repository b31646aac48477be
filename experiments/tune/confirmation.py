"""What follows a study: every cell trained on the confirmation seeds, at the shared values and at its own best ones."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

from ablab.ablations.design import Cell
from ablab.analysis.tuning.winners import winner
from ablab.core.errors import UserError
from ablab.core.recipe.recipe import Recipe
from ablab.core.store.planned import command
from ablab.core.store.store import Store
from ablab.core.store.study_record import WIDTH, StudyRecord, finished
from ablab.experiments.plan.experiment import Experiment
from ablab.experiments.run.executor import Launcher
from ablab.experiments.run.progress import Watcher
from ablab.experiments.run.runner import execute
from ablab.experiments.track.chosen import Tracked
from ablab.experiments.tune.space import Point


@dataclass(frozen=True)
class Tuned(Experiment):
    """The experiment with each cell at its own best point."""

    best: dict[str, Point]  # by cell

    def _resolve(self, cell: Cell) -> list[Recipe]:
        return self.resolved(cell, self.best[cell.name])


def confirm(
    experiment: Experiment,
    store: Store,
    watcher: Watcher,
    record: StudyRecord,
    jobs: int | None,
    plugins: Iterable[str],
    tracked: Tracked,
    launcher: Launcher | None = None,
) -> None:
    """Train every cell twice on each confirmation seed: at the values of the experiment file, and at its own best ones.

    Raises UserError where no trial of any cell has finished.
    """
    best = winners(experiment, record, watcher)
    tuned = Tuned(
        name=f"{experiment.name}@tuned",
        sheet=experiment.sheet,
        stages=experiment.stages,
        arm_stages=experiment.arm_stages,
        cells=[_among(cell, best) for cell in experiment.cells if cell.name in best],
        best=best,
        origin=experiment.origin,
        asked=experiment.asked,
        start=experiment.start,
    )
    for asked in (experiment, tuned):
        execute(
            asked,
            store,
            asked.runs(),
            watcher,
            jobs,
            plugins,
            tracked,
            launcher=launcher,
        )


def _among(cell: Cell, best: dict[str, Point]) -> Cell:
    """The cell without a reference that has no best point."""
    return cell if cell.reference in best else replace(cell, reference=None)


def winners(experiment: Experiment, record: StudyRecord, watcher: Watcher) -> dict[str, Point]:
    """Cell -> its best point.  Where the width is searched, at the experiment's own: arms of two widths do not compare.

    Raises UserError where no trial of any cell has finished.
    """
    again = f"it with: {command(experiment.name, 'study', experiment.origin, experiment.asked)}"
    finished(record.trials, f"study {experiment.name!r}", again)
    best = {}
    width = experiment.base.model.width
    for cell, trials in record.cells.items():
        spent = [trial for trial in trials if trial.params.get(WIDTH, width) == width]
        try:
            won = winner(spent, record.space, record.hard, record.better)
        except UserError as dead:
            watcher.say(f"{dead}; the other arms are confirmed without it")
            continue
        best[cell] = won.params
        if not won.admissible:
            watcher.say(
                f"{cell}: its best setting says nothing yet (inadmissible): {won.reason}"
            )
    return best
