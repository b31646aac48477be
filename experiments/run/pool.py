"""The pool: runs of one experiment become jobs, and what their executor says of them becomes what a person sees."""

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import assert_never

from ablab.core.errors import UserError
from ablab.core.recipe.recipe import Recipe, plain, structure
from ablab.core.runtime.runtime import Runtime
from ablab.core.store.result import DIVERGED, FINISHED, RETRY, Result
from ablab.core.store.store import Store
from ablab.experiments.evaluate.judge import check
from ablab.experiments.plan.experiment import Experiment, PlannedRun
from ablab.experiments.run.capacity import on_gpus
from ablab.experiments.run.executor import Executor, Launcher, Task
from ablab.experiments.run.forecast import Pace
from ablab.experiments.run.gate import Gate
from ablab.experiments.run.halting import Interrupted, halted_by_it, is_halted, time_left
from ablab.experiments.run.messages import (
    Asked,
    Began,
    Busy,
    Done,
    EvalJob,
    Evaluated,
    Found,
    Halted,
    Job,
    Logged,
    Lost,
    Message,
    Refused,
    Traced,
    TraceJob,
    TrainJob,
    Unevaluated,
    Untraced,
    Warned,
)
from ablab.experiments.run.progress import Watcher, duration
from ablab.experiments.run.sharing import with_turns
from ablab.experiments.run.succession import Succession, once
from ablab.experiments.run.this_machine import ThisMachine
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
    # saved before their ends: the next call goes on
    halted: list[str] = field(default_factory=list)


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
        launcher: Launcher | None = None,
    ):
        """launcher: where they run; default: on this machine."""
        self.experiment = experiment
        self.store = store
        self.watcher = watcher
        launcher = launcher or ThisMachine()
        self.before: dict[str, int] = {}  # run id -> the stamp of the result that it had
        self.parents: set[str] = set()  # ids of the runs from which others go on
        recipes = [one for chain in experiment.stage_recipes.values() for one in chain]
        self.runtime = launcher.settled(with_turns(experiment), recipes, plugins)
        self.jobs = jobs or launcher.carried(self.runtime)
        self.on_gpus = on_gpus(self.runtime)
        # Name of the data -> their folder.
        self.data: dict[str, Path] = {}
        for stage in experiment.every_stage:
            folder = data_folder(stage.base, store, watcher.note)
            self.data[stage.base.data.name] = folder
        self.pace = Pace(self.runtime)
        self.launcher = launcher
        self.shared = ""  # why the pace of its runs is that of a shared device
        if judging := experiment.judging:
            check(judging.suites, judging.metric)
        self.executor: Executor = launcher.start(store, self.runtime, jobs, plugins)
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
        to be alive.  Raises UserError where a worker refuses one, Interrupted where they were stopped in time.
        """
        self.before |= {run.id: self.store.run(run.id).stamp() for run in runs}
        self.parents |= {run.recipe.before.run for run in runs}
        distinct = len({run.id for run in runs})
        self.shared = self.launcher.sharing(self.runtime, min(self.jobs, distinct))
        reception = Reception(self, runs, stops, gate)
        with halted_by_it(self.executor):
            self.executor.execute(reception.first_tasks(), reception.heard)
        reception.check_all_ended()
        return reception.outcome

    def affinity(self, run: PlannedRun) -> str:
        """On GPUs, runs that share compiled graphs suit one worker: a change of graph costs tens of seconds.

        On CPUs all are alike.
        """
        return structure(run.recipe, self.runtime) if self.on_gpus else ""

    def tracing(self, run: PlannedRun) -> Task:
        return Task(partial(self._trace_job, run), "trace" if self.on_gpus else "")

    def train_job(self, run: PlannedRun) -> TrainJob:
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
            },
            shared=self.shared,
        )

    def is_begun(self, run: PlannedRun) -> bool:
        """Whether it was saved on the way, by whoever trained it."""
        return any((self.store.run(run.id).folder / "checkpoints").glob("step-*"))

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
        # run id -> seconds that it would take, of those that cannot end before the deadline
        self.too_long: dict[str, float] = {}

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
        return [self._training(run) for run in self.succession.admit(runs)]

    def _training(self, run: PlannedRun) -> Task:
        return Task(partial(self._job_in_time, run), self.pool.affinity(run))

    def _job_in_time(self, run: PlannedRun) -> TrainJob | None:
        """None for a run that cannot end before the deadline: it is not begun.  One that was begun goes on."""
        left = time_left()
        if left is not None and not self.pool.is_begun(run):
            needed = self.pool.pace.seconds(run)
            if needed is not None and needed > left:
                self.too_long[run.id] = needed
                return None
        return self.pool.train_job(run)

    def check_all_ended(self) -> None:
        """Raises Interrupted where a run was saved before its end, or not begun for lack of time."""
        if self.too_long:
            least = min(self.too_long.values())
            left = max(time_left() or 0.0, 0.0)
            self.pool.watcher.say(
                f"--deadline: {len(self.too_long)} runs are not begun: each takes {duration(least)} or more, and "
                f"{duration(left)} are left; a longer deadline begins them, or none (signals save what runs)"
            )
        ended = {*self.outcome.trained, *self.outcome.reused, *self.outcome.failed}
        left_out = is_halted() and self.runs.keys() - ended
        if self.outcome.halted or self.too_long or left_out:
            raise Interrupted

    def heard(self, job: Job, message: Message) -> Iterable[Task]:
        """An executor's Listener."""
        match message:
            case Traced(digest):
                return self._let_through(job.run, digest)
            case Lost(why) if isinstance(job, TraceJob):
                self.pool.watcher.say(f"{self._title(job)}: {why}")
                return ()
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
            case Asked() | Evaluated() | Unevaluated():
                raise AssertionError("of evaluations, which a pool does not ask for")
            case Halted(step):
                run = self.runs[job.run]
                self.outcome.halted.append(run.id)
                self.pool.watcher.say(f"{_named(run)}: saved at step {step}")
                return ()
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
            case EvalJob():
                return job.run

    def _follow(self, run: PlannedRun, message: Began | Logged | Warned | Busy | Lost) -> None:
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
            case Lost(why):
                self.pool.watcher.say(f"{_named(run)}: {why}")
            case _:
                assert_never(message)

    def _logged(self, run: PlannedRun, message: Logged) -> None:
        step, scalars = message.step, message.scalars
        self.pool.pace.learn(run, step, message.seconds)
        self.pool.watcher.logged(run, step, scalars)
        if self.pool.trackers:
            self.pool.trackers.log(run.id, step, scalars, message.seconds)
        if self.stops(run, step, scalars):
            self.pool.executor.stop(run.id)

    def _ended(self, run: PlannedRun, result: Result, among: list[str]) -> list[Task]:
        """among: where the run belongs, unless it is to be tried again.  Returns those that waited for it."""
        self.pool.pace.learn(run, result.step, result.seconds)
        if result.status in RETRY:
            among = self.outcome.failed
        among.append(run.id)
        self.pool.watcher.finished(run, result)
        if self.pool.trackers:
            self.pool.trackers.close(run.id)
        if result.status in (FINISHED, DIVERGED):  # of a parent that diverged, each says so
            return [self._training(one) for one in self.succession.ended(run.id)]
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
