"""Evaluations on other machines: each is a task with its needs, whose answers stand in the store that all see."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from ablab.core.errors import UserError
from ablab.core.runtime.runtime import Runtime
from ablab.core.store.evaluation import Evaluation
from ablab.core.store.store import Store
from ablab.experiments.evaluate.asking import Request
from ablab.experiments.evaluate.evaluating import Sitting, Watch
from ablab.experiments.evaluate.exam import Examination
from ablab.experiments.evaluate.subjects import How, Subject
from ablab.experiments.run.executor import Launcher, Task
from ablab.experiments.run.halting import Interrupted, halted_by_it, is_halted
from ablab.experiments.run.messages import (
    Asked,
    Busy,
    EvalJob,
    Evaluated,
    Halted,
    Job,
    Lost,
    Message,
    Refused,
    Unevaluated,
    Warned,
)


@dataclass(frozen=True)
class Wanted:
    """One evaluation: of whom, and which.  request: of a single exam."""

    subject: Subject
    request: Request
    title: str  # of the exam
    bundle: str  # digest of what is asked

    @classmethod
    def of(cls, subject: Subject, request: Request, exam: Examination) -> "Wanted":
        return cls(subject.anywhere(), request.anywhere(), exam.title, exam.bundle)

    @property
    def name(self) -> str:
        return f"{self.subject.folder.name}-{self.title}"

    def standing(self, dtype: str) -> Evaluation | None:
        """What is written of it."""
        return Sitting(self.subject.folder, self.subject.weights, dtype).standing(self)

    def job(self, how: How) -> EvalJob:
        return EvalJob(self.name, self.subject, self.request, how, self.bundle)


@dataclass
class Hearing:
    """An executor's Listener."""

    watch: Watch
    say: Callable[[str], None]
    asked: dict[str, Asked] = field(default_factory=dict)  # name -> how far it is
    done: set[str] = field(default_factory=set)
    failed: set[str] = field(default_factory=set)
    waiting: set[str] = field(default_factory=set)  # for another process, which was said

    def __call__(self, job: Job, message: Message) -> Iterable[Task]:
        """Raises UserError where a machine cannot ask what it should."""
        match message:
            case Asked():
                self.asked[job.run] = message
                known = sum(one.known for one in self.asked.values())
                self.watch(known, sum(one.total for one in self.asked.values()))
            case Evaluated():
                self.done.add(job.run)
            case Refused(why):
                raise UserError(f"{job.run}: {why}")
            case Unevaluated(why):
                self.failed.add(job.run)
                self.say(f"{job.run}: {why}; the same command goes on from its answers so far")
            case Halted(step):
                self.say(f"{job.run}: {step:,} answers are saved")
            case Busy() if job.run not in self.waiting:
                self.waiting.add(job.run)
                self.say(f"{job.run}: another process asks it; waiting for it")
            case Lost(why) | Warned(why):
                self.say(f"{job.run}: {why}")
        return ()


@dataclass(frozen=True)
class Told:
    """What came of them: those that are written, and the names of those that failed."""

    found: list[tuple[Subject, Evaluation]]
    failed: list[str]


def evaluate_there(
    wanted: Sequence[Wanted],
    launcher: Launcher,
    how: How,
    store: Store,
    jobs: int | None,
    watch: Watch,
    say: Callable[[str], None],
) -> Told:
    """Ask what is not known yet.

    jobs: at a time; None: as many as the launcher carries.  Raises UserError, and Interrupted where it was stopped.
    """
    runtime = launcher.settled(Runtime(device=how.device), [], how.plugins)
    how = replace(how, device=runtime.device)
    dtype = how.settled_dtype(runtime.device)
    missing = [one for one in wanted if one.standing(dtype) is None]
    hearing = Hearing(watch, say)
    if missing:
        if jobs is None:
            launcher.carried(runtime)  # or it says that no machine can take one
        executor = launcher.start(store, runtime, jobs, how.plugins)
        try:
            with halted_by_it(executor):
                executor.execute([Task(partial(one.job, how)) for one in missing], hearing)
        finally:
            executor.close()
    if is_halted() and len(hearing.done | hearing.failed) < len(missing):
        raise Interrupted
    found = [(one.subject, written) for one in wanted if (written := one.standing(dtype))]
    return Told(found, sorted(hearing.failed))
