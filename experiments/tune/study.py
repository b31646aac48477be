"""A study: tune every cell on selection seeds (confirmation.py confirms the winners on others).

The coordinator asks each cell's search for a generation of candidates, the runner trains them, the searches store what
came out.  A candidate is a run (one for each selection seed) with its content id, so one that exists already costs
nothing.
"""

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace

from ablab.core.errors import UserError
from ablab.core.recipe.intervention import at
from ablab.core.store import study_record
from ablab.core.store.claim import Claim, place_beside, take_if_dead
from ablab.core.store.files import lock_beside, sqlite_url, writing
from ablab.core.store.planned import GridPlan, command
from ablab.core.store.result import PRUNED, Result
from ablab.core.store.store import Store
from ablab.core.store.study_record import StudyRecord
from ablab.experiments.plan.experiment import Experiment, PlannedRun
from ablab.experiments.plan.grid_plan import grid_plan_of
from ablab.experiments.run.executor import Launcher
from ablab.experiments.run.pool import Pool
from ablab.experiments.run.progress import Watcher
from ablab.experiments.run.runner import result_of, unheeded
from ablab.experiments.run.sharing import with_turns
from ablab.experiments.run.this_machine import ThisMachine
from ablab.experiments.track.chosen import Tracked
from ablab.experiments.track.trackers import trackers_for
from ablab.experiments.tune import soundness, storage
from ablab.experiments.tune.cell_search import CellSearch
from ablab.experiments.tune.generation import Generation, Proposed
from ablab.experiments.tune.importance import importance
from ablab.experiments.tune.leaderboard import Leaderboard
from ablab.experiments.tune.space import axes_of
from ablab.experiments.tune.trials import Candidate


class Study:
    """The coordinator of one experiment's study.  Nothing is written before the whole study has been found sound."""

    def __init__(
        self,
        experiment: Experiment,
        store: Store,
        watcher: Watcher,
        url: str | None = None,
        launcher: Launcher | None = None,
    ):
        """url: of the Optuna storage; default STORE/optuna.db.

        launcher: where runs train; default: on this machine.
        """
        sheet = experiment.sheet.study
        if sheet is None:
            raise UserError(
                f"{experiment.name} has no study: block; add one with a space, "
                f"or start it with: {command(experiment.name, sheet=experiment.origin, asked=experiment.asked)}"
            )
        self.experiment = experiment
        self.sheet = sheet
        self.store = store
        self.watcher = watcher
        self.launcher = launcher or ThisMachine()
        self.axes = axes_of(sheet.space)
        soundness.check(experiment, sheet, self.axes)
        self.searches = [
            CellSearch(experiment, sheet, cell, self.axes) for cell in experiment.cells
        ]
        for search in self.searches:
            soundness.check_points(search)
        self.url = url or sqlite_url(store.root / "optuna.db")
        with storage.opening(store.root):
            held = storage.open_storage(self.url)
            with storage.reaching(self.url):
                for search in self.searches:
                    storage.compare(held, search.name, search.facts)
                for search in self.searches:
                    search.open(held)
        self.leaderboard = Leaderboard(watcher, self.searches, experiment.sheet.metric)
        self.told: set[str] = set()  # settings of the runtime of which `unheeded` has spoken

    # -- tuning ----------------------------------------------------------------------------------------------------
    def tune(self, jobs: int | None, plugins: Iterable[str], tracked: Tracked) -> StudyRecord:
        """Run generations until every search is over or the hours are spent.  Returns what stands in the storage."""
        with self._alone() as claim, storage.reaching(self.url):
            trackers = trackers_for(self.store, self.plan(), self.watcher.say, tracked)
            pool = None
            self._say_unheeded(self._ended_before())
            try:
                for generation in self._generations():
                    plan = self.plan(generation.candidates)
                    self.store.write_plan(plan)
                    missing = self._missing(generation, jobs)
                    if missing:
                        pool = pool or self._pool(jobs, plugins)
                        pool.trackers = trackers.over(plan) if trackers else None
                        pool.train(missing, generation.stops)
                    self._still_ours(claim)
                    generation.tell()
                    self.write()
            finally:
                if pool:
                    pool.close()
            plan = self.plan()
            self.store.write_plan(plan)
            if trackers:
                trackers.over(plan).finish()
            return self.write(importances=True)

    @contextmanager
    def _alone(self) -> Iterator[Claim]:
        """Two coordinators of one study would store each trial twice."""
        from filelock import FileLock, Timeout

        path = study_record.study_path(self.store, self.experiment.name)
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            lock = FileLock(lock_beside(path))
            try:
                lock.acquire(timeout=0)
            except Timeout:
                raise self._tuned_elsewhere() from None
        try:
            claim = take_if_dead(place_beside(path))
            if claim is None:
                raise self._tuned_elsewhere()
            with claim.beating():
                yield claim
        finally:
            lock.release()

    def _still_ours(self, claim: Claim) -> None:
        """After a sleep in which another coordinator has gone on, there is nothing left to tell."""
        if claim.is_lost():
            raise self._tuned_elsewhere()

    def _tuned_elsewhere(self) -> UserError:
        return UserError(
            f"another process tunes {self.experiment.name} in {self.store.root}; "
            "wait for it, or use another --store"
        )

    def _generations(self) -> Iterator[Generation]:
        """One after another: the next is proposed when the last has been told."""
        began = time.monotonic()
        while proposed := self._proposed():
            hours = self.sheet.hours
            if hours is not None and time.monotonic() - began > hours * 3600:
                self.watcher.say(
                    f"stopped after {hours} h with {len(proposed)} proposed trials open; "
                    "the same command goes on"
                )
                return
            yield Generation(proposed, self.store, self.experiment.sheet.metric.name)

    def _proposed(self) -> list[Proposed]:
        return [
            Proposed(search, candidate)
            for search in self.searches
            for candidate in search.generation()
        ]

    def _pool(self, jobs: int | None, plugins: Iterable[str]) -> Pool:
        return Pool(self.experiment, self.store, self.leaderboard, jobs, plugins, self.launcher)

    def _missing(self, generation: Generation, jobs: int | None) -> list[PlannedRun]:
        """The runs to train: without a result, or pruned where this study would let them go on."""
        missing: list[PlannedRun] = []
        known: dict[str, Result] = {}  # by run id
        for id, run in generation.runs.items():
            record = self.store.run(id)
            if found := result_of(record, self.watcher.say):
                known[id] = found
                continue
            held = record.result()
            if held and held.status == PRUNED and generation.is_pruned(id):
                known[id] = held
            else:
                missing.append(run)
        self._say_unheeded(known)
        carried = jobs or self.launcher.carried(with_turns(self.experiment))
        at_once = min(carried, len(missing))
        steps = sum(run.recipe.steps for run in missing)
        self.watcher.planned(len(generation.runs), len(known), at_once, steps)
        self.leaderboard.generation(generation.candidates, known)
        return missing

    def _ended_before(self) -> dict[str, Result]:
        """The results of the trials that are stored; of a damaged one, none."""
        ended = {}
        for id in [
            id for search in self.searches for trial in search.spent() for id in trial.runs
        ]:
            with suppress(UserError):
                if result := self.store.run(id).result():
                    ended[id] = result
        return ended

    def _say_unheeded(self, results: Mapping[str, Result]) -> None:
        """What is asked of the runtime and cannot be had of runs that have ended; each setting once."""
        lines = unheeded(self.experiment.sheet.runtime, results)
        for setting, line in lines.items():
            if setting not in self.told:
                self.told.add(setting)
                self.watcher.say(line)

    # -- what is left behind ---------------------------------------------------------------------------------------
    def plan(self, coming: Sequence[Candidate] = ()) -> GridPlan:
        """NAME@study: every trial as a planned run."""
        rows = []
        for search in self.searches:
            own = [candidate for candidate in coming if candidate.cell is search.cell]
            rows += search.rows(own)
        empty = grid_plan_of(self.experiment, [])
        name = f"{self.experiment.name}@study"
        return replace(empty, name=name, design="study", rows=rows)

    def write(self, importances: bool = False) -> StudyRecord:
        """Leave STORE/studies/NAME.json: what the reports read."""
        experiment, sheet = self.experiment, self.sheet
        better = experiment.sheet.metric.better
        shares = {}
        if importances:
            shares = {
                search.cell.name: importance(search.axes, better, search.stored)
                for search in self.searches
            }
        of_recipes = [axis for axis in self.axes if not axis.dose_of]
        own = {
            axis.path: at(soundness.base_of(experiment, axis), axis.leaf) for axis in of_recipes
        }
        record = StudyRecord(
            name=experiment.name,
            question=experiment.sheet.question,
            metric=experiment.sheet.metric.name,
            better=better,
            space=sheet.space,
            hard={path: (low, high) for path, (low, high) in sheet.hard.items()},
            base=own,
            sampler=sheet.sampler,
            pruner=sheet.pruner,
            seeds=sheet.seeds,
            trials_per_cell=self.searches[0].total,
            trials=[trial for search in self.searches for trial in search.spent()],
            importance=shares,
            sheet=experiment.origin,
            asked=experiment.asked,
            tuned=f"{experiment.name}@tuned" if experiment.sheet.seeds else None,
        )
        study_record.write(self.store, record)
        return record
