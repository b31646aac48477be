"""The runner: from the runs that an experiment wants to results on disk.  Asking twice runs once.

The parent plans, watches and tracks; warm worker processes train.  A run that has a result is never run again, a run
that another process holds is waited for, a killed run resumes, a crash is a record and the grid goes on.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

from ablab.core.store.planned import GridPlan
from ablab.core.store.record import Record
from ablab.core.store.result import RETRY, Result
from ablab.core.store.store import Store
from ablab.experiments.plan.experiment import Experiment, PlannedRun
from ablab.experiments.plan.grid_plan import merged_plan
from ablab.experiments.run.gate import Gate
from ablab.experiments.run.pool import Outcome, Pool
from ablab.experiments.run.progress import Watcher
from ablab.experiments.track.trackers import trackers_for


def execute(
    experiment: Experiment,
    store: Store,
    runs: list[PlannedRun],
    watcher: Watcher,
    jobs: int | None = None,
    plugins: Iterable[str] = (),
    mlflow: bool = True,
    run_inert: bool = False,
    only: list[PlannedRun] | None = None,
) -> Outcome:
    """Train what is missing of `runs` (or of `only`); what was done.  Raises UserError, KeyboardInterrupt."""
    wanted = {run.id: run for run in (runs if only is None else only)}
    with Pool(experiment, store, watcher, jobs, plugins) as pool:
        missing = [
            run for id, run in wanted.items() if not result_of(store.run(id), watcher.say)
        ]
        missing_ids = {run.id for run in missing}
        done = [id for id in wanted if id not in missing_ids]
        watcher.planned(len(wanted), len(done), min(pool.jobs, len(missing)))
        desired = DesiredState(experiment, store, runs, missing, watcher.say)
        plan = desired.write(all_alive=run_inert)
        pool.trackers = trackers_for(store, plan, watcher.say) if mlflow else None
        gate = None
        if missing and not run_inert:
            gate = Gate(experiment, store, missing, desired.judged, pool.runtime)
        outcome = pool.train(missing, gate=gate)
    if pool.trackers:
        pool.trackers.finish(watcher.note)
    return replace(outcome, reused=done + outcome.reused, inert=desired.inert)


@dataclass
class DesiredState:
    """The plan of an experiment in its store, kept true while its runs are judged and trained."""

    experiment: Experiment
    store: Store
    runs: list[PlannedRun]  # all that the plan shall name
    missing: list[PlannedRun]  # those that train now
    say: Callable[[str], None]
    inert: dict[str, str] = field(default_factory=dict)  # cell -> reference

    def write(self, all_alive: bool) -> GridPlan:
        """all_alive: what was noted of the cells that train now is forgotten, for nobody will ask."""
        return self._write({run.cell: "" for run in self.missing} if all_alive else {})

    def judged(self, inert: dict[str, str]) -> None:
        """Name the arms that are not run, here and in the plan."""
        self.inert |= inert
        for cell, reference in self.inert.items():
            self.say(
                f"INERT: {cell} computes the same bits as {reference}; not run "
                "(--run-inert runs it all the same)"
            )
        self._write({run.cell: self.inert.get(run.cell, "") for run in self.missing})

    def _write(self, judged: Mapping[str, str]) -> GridPlan:
        return self.store.change_plan(
            self.experiment.name,
            lambda old: merged_plan(self.experiment, self.runs, old, judged),
            self.say,
        )


def result_of(record: Record, say: Callable[[str], None]) -> Result | None:
    """The result of a run, or None when it has to run (again).

    A damaged one is named, set aside, and counts as none.
    """
    result = record.sound_result(say)
    return None if result and result.status in RETRY else result
