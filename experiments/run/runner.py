"""The runner: from the runs that an experiment wants to results on disk.  Asking twice runs once.

The parent plans, watches and tracks; warm worker processes train.  A run that has a result is never run again, a run
that another process holds is waited for, a killed run resumes, a crash is a record and the grid goes on.
"""

import os
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from ablab.core.errors import UserError
from ablab.core.recipe.recipe import Recipe, plain, structure
from ablab.core.runtime.runtime import NO_GPU, Runtime, visible_gpus
from ablab.core.store.files import set_aside
from ablab.core.store.record import RETRY, GridPlan, Record, Result, Store
from ablab.experiments.plan.experiment import Experiment, Run, merged_plan
from ablab.experiments.run.gate import Check
from ablab.experiments.run.processes import Workers
from ablab.experiments.run.progress import Line
from ablab.experiments.run.worker import Job
from ablab.experiments.track.trackers import Trackers, trackers_for


class Watcher(Protocol):
    """Shows what happens.  Every method returns at once."""

    def planned(self, total: int, done: int, jobs: int) -> None: ...
    def started(self, run: Run) -> None: ...
    def logged(self, run: Run, step: int, scalars: dict[str, float]) -> None: ...
    def finished(self, run: Run, result: Result) -> None: ...
    def arms(self, lines: list[Line], metric: str) -> None: ...  # of a study
    def note(self, line: str) -> None: ...  # good to know
    def say(self, line: str) -> None: ...  # not to be missed


@dataclass
class Outcome:
    """What one call of `execute` did: run ids by what became of them."""

    trained: list[str] = field(default_factory=list)  # here; a diverged run is trained
    reused: list[str] = field(
        default_factory=list
    )  # trained before, or by another process meanwhile
    failed: list[str] = field(
        default_factory=list
    )  # crashed or out of memory: the next call tries again
    inert: dict[str, str] = field(
        default_factory=dict
    )  # cell -> the reference whose bits it computes


def execute(
    experiment: Experiment,
    store: Store,
    runs: list[Run],
    watcher: Watcher,
    jobs: int | None = None,
    plugins: Iterable[str] = (),
    mlflow: bool = True,
    run_inert: bool = False,
    only: list[Run] | None = None,
) -> Outcome:
    """Train what is missing of `runs` (or of `only`), and return what was done.  Raises UserError, KeyboardInterrupt."""
    unique = {run.id: run for run in (runs if only is None else only)}
    with Pool(experiment, store, watcher, jobs, plugins) as pool:
        todo = [run for id, run in unique.items() if not result_of(store.run(id), watcher.say)]
        watcher.planned(len(unique), len(unique) - len(todo), min(pool.jobs, len(todo)))
        inert: dict[str, str] = {}

        def planned(looked: dict[str, str]) -> GridPlan:
            return store.change_plan(
                experiment.name,
                lambda old: merged_plan(experiment, runs, old, looked),
                watcher.say,
            )

        def told(found: dict[str, str]) -> None:
            inert.update(found)
            for cell, reference in inert.items():
                watcher.say(
                    f"INERT: {cell} computes the same bits as {reference}; not run (--run-inert runs it all the same)"
                )
            planned({run.cell: inert.get(run.cell, "") for run in todo})

        plan = planned({run.cell: "" for run in todo} if run_inert else {})
        pool.trackers = trackers_for(store, plan, watcher.say) if mlflow else None
        outcome = pool.train(
            todo, check=None if run_inert or not todo else Check(experiment, store, todo, told)
        )
    if pool.trackers:
        pool.trackers.finish(watcher.note)
    missing = {run.id for run in todo}
    return replace(
        outcome,
        reused=[*(id for id in unique if id not in missing), *outcome.reused],
        inert=inert,
    )


def result_of(record: Record, say: Callable[[str], None]) -> Result | None:
    """The result of a run, or None when it has to run (again).  A damaged one is named, set aside, and counts as none."""
    try:
        result = record.result()
    except UserError as damage:
        say(str(damage))
        set_aside(record.result_path)
        return None
    return None if result and result.status in RETRY else result


def gpus_for(runtime: Runtime) -> list[str]:
    return [] if runtime.device == "cpu" else visible_gpus()


AT_ONCE = 4  # jobs a GPU that do not take turns: 36 runs of `quickstart` took 78 s one by one, 47 s with 4 jobs, 45 s with 8


def default_jobs(runtime: Runtime) -> int:
    """One worker a GPU, AT_ONCE where they do not take turns; but no more, and without a GPU as many, as the cores carry at `threads` each."""
    cores = (
        len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count() or 1
    )
    carried, gpus = max(cores // runtime.threads, 1), len(gpus_for(runtime))
    return (
        max(min(gpus * AT_ONCE, carried), gpus)
        if gpus and not runtime.turns
        else gpus or carried
    )


class Task(NamedTuple):
    """To `train` a run, or to take the liveness `trace` of its recipe."""

    kind: str
    run: Run


class Pool:
    """Warm workers for the runs of one experiment.  Raises UserError where its data or its GPU is not there.

    More jobs than GPUs take turns on them, unless runtime.turns is off: while one trains at its full pace, the other compiles.
    """

    def __init__(
        self,
        experiment: Experiment,
        store: Store,
        watcher: Watcher,
        jobs: int | None = None,
        plugins: Iterable[str] = (),
    ):
        self.experiment, self.store, self.watcher = experiment, store, watcher
        self.runtime, self.asked = experiment.sheet.runtime, time.time_ns()
        self.jobs = jobs or default_jobs(self.runtime)
        if not (gpus := gpus_for(self.runtime)) and self.runtime.device == "cuda":
            raise UserError(NO_GPU)  # a worker would say so too, after seconds
        self.data = data_folder(experiment.base, store, watcher.note)
        self.locks = tempfile.TemporaryDirectory(
            prefix="ablab-turns-"
        )  # of this host and this call: nobody else trains for us
        turns = (
            [Path(self.locks.name) / gpu for gpu in gpus]
            if self.runtime.turns and self.jobs > len(gpus)
            else ()
        )
        self.workers = Workers(self.jobs, plugins, gpus if len(gpus) > 1 else (), turns)
        self.trackers: Trackers | None = None

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def close(self) -> None:
        self.workers.close()
        self.locks.cleanup()

    def train(
        self,
        runs: list[Run],
        stops: Callable[[Run, int, dict[str, float]], bool] = lambda run, step, scalars: False,
        check: Check | None = None,
    ) -> Outcome:
        """Train them.  stops: asked at every log whether the run should end there.  check: keeps a run back until its cell is known to be alive.

        Raises UserError where a worker refuses one.
        """
        outcome, by_id, told = Outcome(), {run.id: run for run in runs}, set()

        def heard(word: str, job: Job, payload: Any) -> Iterable[Task]:
            if job.kind == "trace":
                return [Task("train", run) for run in self._traced(check, word, job, payload)]
            run = by_id[job.run]
            match word:
                case "began":
                    self.watcher.started(run)
                case "log":
                    self.watcher.logged(run, payload[0], payload[1])
                    if self.trackers:
                        self.trackers.log(run.id, *payload)
                    if stops(run, payload[0], payload[1]):
                        self.workers.stop(run.id)
                case "done" | "found":
                    kind = (
                        "failed"
                        if payload.status in RETRY
                        else "trained"
                        if word == "done"
                        else "reused"
                    )
                    getattr(outcome, kind).append(run.id)
                    self.watcher.finished(run, payload)
                    if self.trackers:
                        self.trackers.close(run.id)
                case _:
                    self._told(word, run, payload, told)
            return ()

        self.workers.work(
            self._tasks(runs, check),
            lambda task: self._job(task.kind, task.run),
            heard,
            self._kind,
        )
        return outcome

    def _tasks(self, runs: list[Run], check: Check | None) -> list[Task]:
        """What may begin at once: the missing traces, and the runs that wait for none."""
        if not check:
            return [Task("train", run) for run in runs]
        if check.missing:
            self.watcher.note(f"checking that {len(check.missing)} arms are alive ...")
        return [
            *(Task("trace", run) for run in check.missing.values()),
            *(Task("train", run) for run in check.at_once()),
        ]

    def _traced(self, check: Check, word: str, job: Job, payload: Any) -> list[Run]:
        if word == "refused":
            raise UserError(f"{check.missing[job.run].cell}: {payload}")
        return check.heard(job.run, payload)

    def _kind(self, task: Task) -> str:
        """On GPUs, equal for runs that share compiled graphs: a change of graph costs tens of seconds.  On CPUs all are alike."""
        if not gpus_for(self.runtime):
            return ""
        return structure(task.run.recipe, self.runtime) if task.kind == "train" else task.kind

    def _told(self, word: str, run: Run, payload: Any, told: set[str]) -> None:
        name = f"{run.cell}, seed {run.recipe.seed}"
        if word == "refused":
            raise UserError(f"{name}: {payload}")
        if (
            word == "warning" and (line := f"{run.cell}: {payload}") not in told
        ):  # once for all seeds of a cell
            told.add(line)
            self.watcher.say(f"{name}: {payload}")
        if word == "busy" and run.id not in told:
            told.add(run.id)
            self.watcher.say(f"{name}: another process holds run {run.id}; waiting for it")

    def _job(self, kind: str, run: Run) -> Job:
        about = {"experiment": self.experiment.name, "params": self.experiment.params(run)}
        return Job(
            kind,
            run.id,
            plain(run.recipe),
            asdict(self.runtime),
            self.store.run(run.id).folder,
            self.data,
            self.asked,
            about,
        )


def data_folder(recipe: Recipe, store: Store, note: Callable[[str], None]) -> Path:
    """The token folder of a recipe; the shipped text is tokenized on first use.  Raises UserError where none fits."""
    from ablab.core.data.corpus import check_meta, ensure_embedded, load_meta

    folder = store.root / "data" / recipe.data.name
    if recipe.data.name == "embedded":
        if not folder.exists():
            note(f"tokenizing the shipped text into {folder} (once, about 15 s) ...")
        ensure_embedded(store.root)
    check_meta(recipe, load_meta(folder), folder)
    return folder
