"""The pool: runs of one experiment become jobs, and what their executor says of them becomes what a person sees."""

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import assert_never

from ablab.core.errors import UserError
from ablab.core.recipe.recipe import Recipe, plain, structure
from ablab.core.runtime.runtime import NO_GPU, Runtime
from ablab.core.store.result import DIVERGED, FINISHED, RETRY, Result
from ablab.core.store.store import Store
from ablab.experiments.evaluate.judge import check
from ablab.experiments.plan.experiment import Experiment, PlannedRun
from ablab.experiments.run.capacity import default_jobs, gpus_for, training_at_once
from ablab.experiments.run.executor import Executor, Task
from ablab.experiments.run.gate import Gate
from ablab.experiments.run.messages import (
    Began,
    Busy,
    Done,
    Found,
    Job,
    Logged,
    Message,
    Refused,
    Traced,
    TraceJob,
    TrainJob,
    Untraced,
    Warned,
)
from ablab.experiments.run.processes import local_processes
from ablab.experiments.run.progress import Watcher
from ablab.experiments.run.service import settle_service
from ablab.experiments.run.succession import Succession, once
from ablab.experiments.track.trackers import Trackers

Stops = Callable[[PlannedRun, int, dict[str, float]], bool]


@dataclass
class Outcome:
    """What became of the runs, by their ids."""

    trained: list[str] = field(default_factory=list)  # here; a diverged run is trained
    # trained before, or by another process meanwhile
    reused: list[str] = field(default_factory=list)
    # crashed or out of memory: the next call tries again
    failed: list[str] = field(default_factory=list)
    # cell -> the reference from which the liveness check tells it by nothing
    inert: dict[str, str] = field(default_factory=dict)


def never(run: PlannedRun, step: int, scalars: dict[str, float]) -> bool:
    """No run is stopped early."""
    return False


class Pool:
    """Warm workers for the runs of one experiment.  Raises UserError where its data or its GPU is not there."""

    def __init__(
        self,
        experiment: Experiment,
        store: Store,
        watcher: Watcher,
        jobs: int | None = None,
        plugins: Iterable[str] = (),
    ):
        self.experiment = experiment
        self.store = store
        self.watcher = watcher
        asked = experiment.sheet.runtime
        self.before: dict[str, int] = {}  # run id -> the stamp of the result that it had
        self.parents: set[str] = set()  # ids of the runs from which others go on
        self.jobs = jobs or default_jobs(asked)
        self.gpus = gpus_for(asked)
        if asked.device == "cuda" and not self.gpus:
            raise UserError(NO_GPU)  # a worker would say so too, after seconds
        recipes = [one for chain in experiment.stage_recipes.values() for one in chain]
        self.runtime = settle_service(asked, recipes, plugins)
        # Name of the data -> their folder.
        self.data: dict[str, Path] = {}
        for stage in experiment.every_stage:
            folder = data_folder(stage.base, store, watcher.note)
            self.data[stage.base.data.name] = folder
        self.at_once = 1  # runs that train on one device at one time
        if judging := experiment.judging:
            check(judging.suites, judging.metric)
        self.executor: Executor = local_processes(self.runtime, self.jobs, plugins)
        self.trackers: Trackers | None = None

    def __enter__(self) -> "Pool":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        fault: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        self.executor.close()

    def train(
        self, runs: list[PlannedRun], stops: Stops = never, gate: Gate | None = None
    ) -> Outcome:
        """Train them; a run that goes on from another of them, or from none.

        A run may be named for each of its cells.
        stops: asked at every log whether the run should end there.  gate: holds runs back until their cells are known
        to be alive.  Raises UserError where a worker refuses one.
        """
        self.before |= {run.id: self.store.run(run.id).stamp() for run in runs}
        self.parents |= {run.recipe.before.run for run in runs}
        training = min(training_at_once(self.runtime, self.jobs), len({run.id for run in runs}))
        self.at_once = math.ceil(training / max(len(self.gpus), 1))
        reception = Reception(self, runs, stops, gate)
        self.executor.execute(reception.first_tasks(), reception.heard)
        return reception.outcome

    def training(self, run: PlannedRun) -> Task:
        """On GPUs, runs that share compiled graphs suit one worker: a change of graph costs tens of seconds.

        On CPUs all are alike.
        """
        affinity = structure(run.recipe, self.runtime) if self.gpus else ""
        return Task(partial(self._train_job, run), affinity)

    def tracing(self, run: PlannedRun) -> Task:
        return Task(partial(self._trace_job, run), "trace" if self.gpus else "")

    def _train_job(self, run: PlannedRun) -> TrainJob:
        return TrainJob(
            run=run.id,
            recipe=plain(run.recipe),
            runtime=asdict(self._runtime_of(run)),
            folder=self.store.run(run.id).folder,
            data=self.data[run.recipe.data.name],
            before=self.before[run.id],
            start=self.experiment.start.folder if self.experiment.start else None,
            judging=None if run.id in self.parents else self.experiment.judging,
            about={
                "experiment": self.experiment.name,
                "params": self.experiment.params(run),
                "at_once": self.at_once,
            },
        )

    def _runtime_of(self, run: PlannedRun) -> Runtime:
        """A run from which others go on leaves its state."""
        kept = self.runtime.keep_state or run.id in self.parents
        return replace(self.runtime, keep_state=kept)

    def _trace_job(self, run: PlannedRun) -> TraceJob:
        return TraceJob(run.id, plain(run.recipe), asdict(self.runtime))


class Reception:
    """Hears what is said of the jobs of one call of `train`, passes it on, and keeps the outcome."""

    def __init__(self, pool: Pool, runs: list[PlannedRun], stops: Stops, gate: Gate | None):
        self.pool = pool
        self.asked = runs
        self.runs = {run.id: run for run in once(runs)}
        self.succession = Succession(runs)
        self.stops = stops
        self.gate = gate
        self.outcome = Outcome()
        self.said: set[str] = set()  # what is said once: warnings of a cell, runs waited for

    def first_tasks(self) -> list[Task]:
        """What may begin at once: the missing traces, and the runs that wait for none and for no other run."""
        if self.gate is None:
            return self._admitted(self.asked)
        missing = self.gate.missing.values()
        if missing:
            cells = len({run.cell for run in missing})
            self.pool.watcher.note(f"checking that {cells} arms are alive ...")
        traces = [self.pool.tracing(run) for run in missing]
        return traces + self._admitted(self.gate.passing())

    def _admitted(self, runs: Iterable[PlannedRun]) -> list[Task]:
        return [self.pool.training(run) for run in self.succession.admit(runs)]

    def heard(self, job: Job, message: Message) -> Iterable[Task]:
        """An executor's Listener."""
        match message:
            case Traced(digest):
                return self._let_through(job.run, digest)
            case Untraced(why):
                unchecked = f"the liveness check failed, so it trains unchecked: {why}"
                self.pool.watcher.say(f"{self._title(job)}: {unchecked}")
                return self._let_through(job.run, None)
            case Refused(why):
                raise UserError(f"{self._title(job)}: {why}")
            case Done(result):
                return self._ended(self.runs[job.run], result, self.outcome.trained)
            case Found(result):
                return self._ended(self.runs[job.run], result, self.outcome.reused)
            case _:
                self._follow(self.runs[job.run], message)
                return ()

    def _let_through(self, run: str, trace: str | None) -> list[Task]:
        assert self.gate, "only a gate asks for traces"
        return self._admitted(self.gate.traced_as(run, trace))

    def _title(self, job: Job) -> str:
        match job:
            case TrainJob():
                return _named(self.runs[job.run])
            case TraceJob():
                assert self.gate, "only a gate asks for traces"
                return self.gate.missing[job.run].title

    def _follow(self, run: PlannedRun, message: Began | Logged | Warned | Busy) -> None:
        match message:
            case Began():
                self.pool.watcher.started(run)
            case Logged():
                self._logged(run, message)
            case Warned(line):
                self._say_once(f"{run.title}: {line}", f"{_named(run)}: {line}")
            case Busy():
                holder = f"another process holds run {run.id}; waiting for it"
                self._say_once(run.id, f"{_named(run)}: {holder}")
            case _:
                assert_never(message)

    def _logged(self, run: PlannedRun, message: Logged) -> None:
        step, scalars = message.step, message.scalars
        self.pool.watcher.logged(run, step, scalars)
        if self.pool.trackers:
            self.pool.trackers.log(run.id, step, scalars, message.seconds)
        if self.stops(run, step, scalars):
            self.pool.executor.stop(run.id)

    def _ended(self, run: PlannedRun, result: Result, among: list[str]) -> list[Task]:
        """among: where the run belongs, unless it is to be tried again.  Returns those that waited for it."""
        if result.status in RETRY:
            among = self.outcome.failed
        among.append(run.id)
        self.pool.watcher.finished(run, result)
        if self.pool.trackers:
            self.pool.trackers.close(run.id)
        if result.status in (FINISHED, DIVERGED):  # of a parent that diverged, each says so
            return [self.pool.training(one) for one in self.succession.ended(run.id)]
        for one in self.succession.lost(run.id):
            self.pool.watcher.say(
                f"{_named(one)}: not trained, for {_named(run)}, from which it goes on, "
                f"ended as {result.status.replace('_', ' ')}; the same command tries both again"
            )
        return []

    def _say_once(self, what: str, line: str) -> None:
        """what: of two lines about the same, the first is said; seeds of a cell share their warnings."""
        if what not in self.said:
            self.said.add(what)
            self.pool.watcher.say(line)


def _named(run: PlannedRun) -> str:
    return f"{run.title}, seed {run.recipe.seed}"


def data_folder(recipe: Recipe, store: Store, note: Callable[[str], None]) -> Path:
    """STORE/data/NAME, beside which the sources of a mix stand; the shipped text is tokenized on first use.

    Raises UserError where the tokens do not fit the recipe.
    """
    from ablab.core.data.corpus import ensure_embedded
    from ablab.core.data.sources import opened, sources_of

    folder = store.root / "data" / recipe.data.name
    if shipped := sources_of(recipe, folder).get("embedded"):
        if not shipped.exists():
            note(f"tokenizing the shipped text into {shipped} (once, about 15 s) ...")
        ensure_embedded(store.root)
    opened(recipe, folder)
    return folder
