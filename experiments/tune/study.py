"""Studies: tune every cell on selection seeds, then confirm the winners on other seeds.

The coordinator asks each arm for a generation of trials, the runner executes them, the arms store what came out.  A trial
is a run (one for each selection seed) with its content id, so one that exists already costs nothing.
"""

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from ablab.ablations.design import Cell
from ablab.analysis.tuning import winners as tuning
from ablab.core.errors import UserError
from ablab.core.language.parse import fields_of, near
from ablab.core.recipe.intervention import at
from ablab.core.recipe.load import assign
from ablab.core.recipe.recipe import Recipe
from ablab.core.store import study_record
from ablab.core.store.files import writing
from ablab.core.store.planned import GridPlan, command
from ablab.core.store.result import PRUNED, Result
from ablab.core.store.store import Store
from ablab.experiments.plan.experiment import Experiment, PlannedRun
from ablab.experiments.plan.grid_plan import grid_plan_of
from ablab.experiments.run.capacity import default_jobs
from ablab.experiments.run.pool import Pool
from ablab.experiments.run.progress import Watcher
from ablab.experiments.run.runner import execute, result_of
from ablab.experiments.track.trackers import trackers_for
from ablab.experiments.tune import storage
from ablab.experiments.tune.cell_search import Arm, Trial, tuned_recipe
from ablab.experiments.tune.leaderboard import Standing
from ablab.experiments.tune.proposals import Axis, axes_of, importance
from ablab.experiments.tune.pruning import check

Stops = Callable[[PlannedRun, int, dict[str, float]], bool]
FIXED = {  # path -> why no trial can differ in it
    "seed": "each trial runs on study.seeds; list more of them there",
    **dict.fromkeys(
        ("data.name", "data.digest"),
        "all trials of a study read one token folder; start one study for each, with data.name=...",
    ),
}


@dataclass(frozen=True)
class Tuned(Experiment):
    """The confirmation: each cell at its own best point."""

    best: dict[str, dict[str, Any]] = None  # cell -> params

    def _resolve(self, cell: Cell) -> Recipe:
        return tuned_recipe(self, cell, self.best[cell.name])


class Study:
    """The coordinator of one experiment's study.  Nothing is written before the whole study has been found sound."""

    def __init__(
        self, experiment: Experiment, store: Store, watcher: Watcher, url: str | None = None
    ):
        """url: of the Optuna storage; default STORE/optuna.db."""
        sheet = experiment.sheet.study
        if sheet is None:
            raise UserError(
                f"{experiment.name} has no study: block; add one with a space, or start it with: {command(experiment.name)}"
            )
        if shared := sorted(set(sheet.seeds) & set(experiment.sheet.seeds)):
            raise UserError(
                f"study.seeds and seeds share {shared}; selection and confirmation need disjoint seeds"
            )
        self.experiment, self.store, self.watcher, self.sheet = (
            experiment,
            store,
            watcher,
            sheet,
        )
        self.axes = axes_of(sheet.space)
        check(sheet.pruner, sheet.seeds)
        check_paths(experiment, self.axes)
        check_width(experiment, self.axes)
        check_bounds(sheet.space, sheet.hard, self.axes)
        self.arms = [Arm(experiment, cell, self.axes) for cell in experiment.cells]
        for arm in self.arms:
            arm.check()
        with writing(store.root):
            store.root.mkdir(parents=True, exist_ok=True)
        held = storage.open_storage(url or f"sqlite:///{store.root / 'optuna.db'}")
        for arm in self.arms:
            storage.compare(held, arm.name, arm.facts)
        for arm in self.arms:
            arm.open(held)
        self.watcher = Standing(watcher, self.arms, experiment.sheet.metric)

    # -- tuning ----------------------------------------------------------------------------------------------------
    def tune(
        self, jobs: int | None, plugins: Iterable[str], mlflow: bool
    ) -> study_record.StudyRecord:
        """Run generations until every arm is done or the hours are spent.  Returns what stands in the storage."""
        with self._alone():
            began, pool = time.monotonic(), None
            trackers = (
                trackers_for(self.store, self.plan(), self.watcher.say) if mlflow else None
            )
            try:
                while trials := [
                    (arm, trial) for arm in self.arms for trial in arm.generation()
                ]:
                    if (
                        self.sheet.hours is not None
                        and time.monotonic() - began > self.sheet.hours * 3600
                    ):
                        self.watcher.say(
                            f"stopped after {self.sheet.hours} h with {len(trials)} proposed trials open; the same command goes on"
                        )
                        break
                    plan = self.plan([trial for _, trial in trials])
                    self.store.write_plan(plan)
                    missing, known = self._missing(trials, jobs)
                    self.watcher.generation([trial for _, trial in trials], known)
                    if missing:
                        pool = pool or Pool(
                            self.experiment, self.store, self.watcher, jobs, plugins
                        )
                        pool.trackers = trackers.over(plan) if trackers else None
                        pool.train(missing, self._stops(trials))
                    for arm, trial in trials:
                        arm.tell(trial, self.store)
                    self.write()
            finally:
                if pool:
                    pool.close()
            self.store.write_plan(self.plan())
            if trackers:
                trackers.over(self.plan()).finish()
            return self.write(importances=True)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Two coordinators of one study would store each trial twice."""
        from filelock import FileLock, Timeout

        path = study_record.study_path(self.store, self.experiment.name)
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = FileLock(path.with_name(f".{path.name}.lock"))
            try:
                lock.acquire(timeout=0)
            except Timeout:
                raise UserError(
                    f"another process tunes {self.experiment.name} in {self.store.root}; wait for it, or use another --store"
                ) from None
        try:
            yield
        finally:
            lock.release()

    def _missing(
        self, trials: list[tuple[Arm, Trial]], jobs: int | None
    ) -> tuple[list[PlannedRun], dict[str, Result]]:
        """The runs to train: without a result, or pruned where this study would let them go on.  And the results of the others, by run id."""
        wanted, missing, known = _by_run(trials), [], {}
        for id, wanted_by in wanted.items():
            record = self.store.run(id)
            if found := result_of(record, self.watcher.say):
                known[id] = found
            elif (held := record.result()) and held.status == PRUNED and self._ends(wanted_by):
                known[id] = held
            else:
                missing.append(next(run for run in wanted_by[0][1].runs if run.id == id))
        at_once = min(jobs or default_jobs(self.experiment.sheet.runtime), len(missing))
        self.watcher.planned(len(wanted), len(known), at_once)
        return missing, known

    def _ends(self, wanted_by: list[tuple[Arm, Trial]]) -> bool:
        return all(arm.verdict(trial, self.store) is not None for arm, trial in wanted_by)

    def _stops(self, trials: list[tuple[Arm, Trial]]) -> Stops:
        """Whether a run that has just logged should end: asked at evaluations, of every trial that the run answers."""
        metric, wanted = self.experiment.sheet.metric.name, _by_run(trials)
        return lambda run, step, scalars: metric in scalars and self._ends(wanted[run.id])

    # -- what is left behind ---------------------------------------------------------------------------------------
    def plan(self, coming: list[Trial] = ()) -> GridPlan:
        """NAME@study: every trial as a planned run."""
        rows = [
            row
            for arm in self.arms
            for row in arm.rows([trial for trial in coming if trial.cell is arm.cell])
        ]
        return replace(
            grid_plan_of(self.experiment, []),
            name=f"{self.experiment.name}@study",
            design="study",
            rows=rows,
        )

    def write(self, importances: bool = False) -> study_record.StudyRecord:
        """Leave STORE/studies/NAME.json: what the reports read."""
        sheet, metric = self.sheet, self.experiment.sheet.metric
        shares = (
            {
                arm.cell.name: importance(arm.axes, metric.better, arm.stored)
                for arm in self.arms
            }
            if importances
            else {}
        )
        record = study_record.StudyRecord(
            name=self.experiment.name,
            question=self.experiment.sheet.question,
            metric=metric.name,
            better=metric.better,
            space=sheet.space,
            hard=sheet.hard,
            base={
                axis.path: at(self.experiment.base, axis.path)
                for axis in self.axes
                if not axis.path.startswith("with.")
            },
            sampler=sheet.sampler,
            pruner=sheet.pruner,
            seeds=sheet.seeds,
            trials_per_cell=self.arms[0].total,
            trials=[trial for arm in self.arms for trial in arm.spent()],
            importance=shares,
            tuned=f"{self.experiment.name}@tuned" if self.experiment.sheet.seeds else None,
        )
        study_record.write(self.store, record)
        return record

    def winners(self, record: study_record.StudyRecord) -> dict[str, dict[str, Any]]:
        """Cell -> its best point.  Where the width is searched, at the experiment's own: arms of two widths do not compare.

        Raises UserError where no trial of any arm has finished.
        """
        study_record.finished(
            record.trials,
            f"study {self.experiment.name!r}",
            f"it with: {command(self.experiment.name, 'study')}",
        )
        best, width = {}, self.experiment.base.model.width
        for cell, spent in record.cells.items():
            spent = [
                trial for trial in spent if trial.params.get(study_record.WIDTH, width) == width
            ]
            try:
                won = tuning.winner(spent, record.space, record.hard, record.better)
            except UserError as dead:
                self.watcher.say(f"{dead}; the other arms are confirmed without it")
                continue
            best[cell] = won.params
            if not won.admissible:
                self.watcher.say(f"{cell}: INADMISSIBLE: {won.reason}")
        return best

    def confirm(
        self,
        record: study_record.StudyRecord,
        jobs: int | None,
        plugins: Iterable[str],
        mlflow: bool,
    ) -> None:
        """Train every cell on the confirmation seeds: once at the shared values, once at its own best ones.

        Raises UserError where no trial of any arm has finished.
        """
        best = self.winners(record)
        fields = {name: getattr(self.experiment, name) for name in ("sheet", "base")}
        fields["cells"] = [
            replace(cell, reference=cell.reference if cell.reference in best else None)
            for cell in self.experiment.cells
            if cell.name in best
        ]
        tuned = Tuned(name=f"{self.experiment.name}@tuned", best=best, **fields)
        for experiment in (self.experiment, tuned):
            execute(
                experiment, self.store, experiment.runs(), self.watcher, jobs, plugins, mlflow
            )


def _by_run(trials: list[tuple[Arm, Trial]]) -> dict[str, list[tuple[Arm, Trial]]]:
    """Run id -> the trials that it answers: two cells may propose one recipe."""
    wanted: dict[str, list[tuple[Arm, Trial]]] = {}
    for arm, trial in trials:
        for run in trial.runs:
            wanted.setdefault(run.id, []).append((arm, trial))
    return wanted


# -- before anything runs ----------------------------------------------------------------------------------------------
def check_paths(experiment: Experiment, axes: list[Axis]) -> None:
    """Refuse an unknown path, with the near miss, and an end that the path cannot hold."""
    holders = {name: cell for cell in experiment.cells for name in cell.treatment}
    doses = [
        f"with.{name}.{dose}"
        for name, cell in holders.items()
        for dose in fields_of(type(cell.treatment[name]))
    ]
    for axis in axes:
        if why := FIXED.get(axis.path):
            raise UserError(f"study.space: {axis.path} cannot be searched: {why}")
        if axis.path.startswith("with.") and axis.path not in doses:
            raise UserError(
                f"study.space: unknown path {axis.path!r}. {near(axis.path, doses)}Doses of this experiment: {', '.join(doses) or 'none'}"
            )
        for end in axis.ends:
            if axis.path.startswith("with."):
                _, name, dose = axis.path.split(".")
                assign(holders[name].treatment[name], dose, end)
            else:
                assign(experiment.base, axis.path, end)


def check_width(experiment: Experiment, axes: list[Axis]) -> None:
    """Arms are confirmed at the experiment's own width, so that width must be among those searched."""
    for axis in axes:
        if (
            axis.path == study_record.WIDTH
            and experiment.sheet.seeds
            and experiment.base.model.width not in axis.values
        ):
            own, listed = experiment.base.model.width, list(axis.values)
            raise UserError(
                f"study.space.model.width={listed} lacks {own}, the width at which arms are confirmed; add it, or write seeds: [] to confirm none"
            )


def check_bounds(space: dict[str, Any], hard: dict[str, list[float]], axes: list[Axis]) -> None:
    """Hard bounds belong to the path that widens, and hold its range."""
    for path, bounds in hard.items():
        if path not in space:
            raise UserError(
                f"study.hard: {path!r} is not searched. {near(path, space)}study.space has: {', '.join(space)}"
            )
        if path != tuning.axis(space):
            raise UserError(
                f"study.hard.{path} has no effect: only {tuning.axis(space) or 'a log-scaled path'} is widened; drop it"
            )
        ends = next(axis.ends for axis in axes if axis.path == path)
        low, high = min(ends), max(ends)
        if len(bounds) != 2 or not 0 < bounds[0] <= low <= high <= bounds[1]:
            raise UserError(
                f"study.hard.{path}={bounds} must be [low, high] around the searched range [{low}, {high}], above 0"
            )
