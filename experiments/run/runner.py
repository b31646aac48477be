"""The runner: from the runs that an experiment wants to results on disk.  Asking twice runs once.

The parent plans, watches and tracks; warm worker processes train.  A run that has a result is never run again, a run
that another process holds is waited for, a killed run resumes, a crash is a record and the grid goes on.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace

from ablab.core.runtime.runtime import Runtime
from ablab.core.store.evaluation import scores_of
from ablab.core.store.planned import GridPlan
from ablab.core.store.record import Record
from ablab.core.store.result import FINISHED, RETRY, Result
from ablab.core.store.store import Store
from ablab.experiments.evaluate.names import asked_of
from ablab.experiments.plan.experiment import Experiment, PlannedRun
from ablab.experiments.plan.grid_plan import merged_plan
from ablab.experiments.run.executor import Launcher
from ablab.experiments.run.gate import Gate
from ablab.experiments.run.mending import mend, sweep
from ablab.experiments.run.pool import Outcome, Pool
from ablab.experiments.run.progress import Watcher
from ablab.experiments.run.registering import registered
from ablab.experiments.run.succession import check_parents, needed, once
from ablab.experiments.track.chosen import USUAL, Tracked
from ablab.experiments.track.trackers import trackers_for

CHECKED = "the schedule, batches and optimizer of every step and four steps of the model"
# Settings that change what a run leaves; what it has left, no second call can change.
HEEDED_BY_TRAINING = ("dtype", "evaluations", "log_every", "keep_weights")


def execute(
    experiment: Experiment,
    store: Store,
    runs: list[PlannedRun],
    watcher: Watcher,
    jobs: int | None = None,
    plugins: Iterable[str] = (),
    tracked: Tracked = USUAL,
    run_inert: bool = False,
    only: list[PlannedRun] | None = None,
    launcher: Launcher | None = None,
) -> Outcome:
    """Train what is missing of `runs` (or of `only`); what was done.  Raises UserError, Interrupted.

    launcher: where; default: on this machine.
    """
    asked = runs if only is None else only
    with Pool(experiment, store, watcher, jobs, plugins, launcher) as pool:
        claims, known = needed(asked, lambda id: result_of(store.run(id), watcher.say))
        missing = once(claims)
        check_parents(missing, known, store)
        ended = [run for run in once(asked) if run.id in known]
        for run in ended:
            mend(store.run(run.id), run, experiment, known[run.id], watcher.say)
            pool.pace.learn(run, known[run.id].step, known[run.id].seconds)
        done = [run.id for run in ended]
        for line in unheeded(pool.runtime, known).values():
            watcher.say(line)
        if line := unasked(experiment, store, [known[run.id] for run in ended]):
            watcher.say(line)
        total = len(done) + len(missing)
        steps = sum(run.recipe.steps for run in missing)
        watcher.planned(total, len(done), min(pool.jobs, len(missing)), steps)
        entry = registered(experiment, store, runs, watcher.say) if missing else ""
        desired = DesiredState(experiment, store, runs, claims, watcher.say, entry)
        plan = desired.write(all_alive=run_inert)
        pool.trackers = trackers_for(store, plan, watcher.say, tracked)
        gate = None
        if missing and not run_inert:
            dear = pool.on_gpus and pool.jobs > 1
            gate = Gate(experiment, store, claims, desired.judged, pool.runtime, together=dear)
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
    missing: list[PlannedRun]  # those that train now, for each cell that has them
    say: Callable[[str], None]
    registered: str  # hash of the ledger's entry; "" where nothing trains, and the plan keeps the one it has
    inert: dict[str, str] = field(default_factory=dict)  # cell -> reference

    def write(self, all_alive: bool) -> GridPlan:
        """all_alive: what was noted of the cells that train now is forgotten, for nobody will ask."""
        return self._write({run.cell: "" for run in self.missing} if all_alive else {})

    def judged(self, inert: dict[str, str]) -> None:
        """Name the arms that are not run, here and in the plan."""
        self.inert |= inert
        for cell, reference in self.inert.items():
            self.say(
                f"INERT: {cell} shows no difference from {reference}, in {CHECKED}; not run "
                "(--run-inert runs it all the same; acts_late=True in its @register is for what shows later)"
            )
        self._write({run.cell: self.inert.get(run.cell, "") for run in self.missing})

    def _write(self, judged: Mapping[str, str]) -> GridPlan:
        def change(old: GridPlan | None) -> GridPlan:
            plan = merged_plan(self.experiment, self.runs, old, judged)
            return replace(plan, registered=self.registered or plan.registered)

        return self.store.change_plan(self.experiment.name, change, self.say)


def unheeded(asked: Runtime, results: Mapping[str, Result]) -> dict[str, str]:
    """What is asked of the runtime, of runs that ended with another: setting -> a line that says so."""
    usual = Runtime()
    lines = {}
    for name in HEEDED_BY_TRAINING:
        wish = getattr(asked, name)
        if wish == getattr(usual, name):
            continue
        others = [id for id, one in results.items() if one.runtime.get(name, wish) != wish]
        if others:
            lines[name] = (
                f"runtime.{name}={wish} is asked, but {len(others)} of the runs ended with "
                f"{results[others[0]].runtime[name]} and are kept, first {others[0]}; "
                "delete their folders in runs/ to train them so"
            )
    return lines


def unasked(experiment: Experiment, store: Store, results: Iterable[Result]) -> str:
    """A line on runs that ended before the experiment's metric was asked of them; empty without any."""
    judging = experiment.judging
    if not judging or not judging.metric:
        return ""
    lacking = [
        one.run
        for one in results
        if one.status == FINISHED
        and judging.metric not in one.metrics | scores_of(store.run(one.run), one)
    ]
    if not lacking:
        return ""
    suite = asked_of(judging.metric).suite
    limit = f" --max-per-task {judging.limit}" if judging.limit else ""
    return (
        f"{judging.metric} was not asked of {len(lacking)} runs that have ended, first {lacking[0]}; those that kept "
        f"their weights can be asked: ablab eval {experiment.name} --suite {suite} "
        f"--bundle {judging.suites[suite]}{limit}"
    )


def result_of(record: Record, say: Callable[[str], None]) -> Result | None:
    """The result of a run, or None when it has to run (again).

    A damaged one is named, set aside, and counts as none.  What a killed process left beside a sound one goes.
    """
    result = record.sound_result(say)
    if result is None or result.status in RETRY:
        return None
    sweep(record, result)
    return result
