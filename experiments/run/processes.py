"""Worker processes of this machine: started, handed jobs, listened to, replaced when they die."""

import multiprocessing
import signal
import time
from collections import deque
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

from ablab.core.errors import UserError
from ablab.core.runtime.runtime import Runtime
from ablab.core.store.claim import Watch, take
from ablab.core.store.record import Record
from ablab.core.store.result import FAILED, Result
from ablab.experiments.run.capacity import gpus_for
from ablab.experiments.run.executor import Listener, Task
from ablab.experiments.run.halting import GRACE, SIGNALS
from ablab.experiments.run.messages import (
    Began,
    Busy,
    Done,
    Halt,
    Job,
    Logged,
    Message,
    Order,
    Ready,
    Stop,
    TraceJob,
    TrainJob,
    Untraced,
    Warned,
)
from ablab.experiments.run.turns import Turn
from ablab.experiments.run.worker import ends_itself, serve

PATIENCE = 1.0  # seconds before a run that another process holds is asked for again
SECONDS_TO_TIDY = 3.0  # that an idle worker has between the end of its pipe and its own
CONTEXT = multiprocessing.get_context("spawn")


def local_processes(runtime: Runtime, jobs: int, plugins: Iterable[str]) -> "LocalProcesses":
    """One GPU each where there are several.  More jobs than GPUs take turns on them, unless runtime.turns is off.

    While one trains at its full pace, the other compiles.
    """
    gpus = gpus_for(runtime)
    return LocalProcesses(
        jobs,
        plugins,
        gpus=gpus if len(gpus) > 1 else (),
        share=gpus if runtime.turns and jobs > len(gpus) else (),
    )


class LocalProcesses:
    """Up to `count` processes, started as work comes: an Executor.

    gpus: one of these each, in rotation; empty: all see what we see.  share: likewise, those on which they take turns;
    empty: all train at once.
    """

    def __init__(
        self,
        count: int,
        plugins: Iterable[str] = (),
        gpus: Sequence[str] = (),
        share: Sequence[str] = (),
    ):
        self.count = count
        self.plugins = list(plugins)
        self.gpus = gpus
        # of this host and this call: nobody else trains for us
        self.turns = [Turn() for _ in share]
        self.workers: list[WorkerProcess] = []
        self.halting: float | None = None  # since when, on the clock

    def execute(self, tasks: Iterable[Task], heard: Listener) -> None:
        waiting = Waiting(tasks)
        wanted = len(self.workers)
        while self._goes_on(waiting):
            wanted = max(wanted, min(self.count, len(waiting.tasks)))
            self._start_missing(wanted)
            self._give_out(waiting)
            for worker in self._speaking():
                self._listen(worker, waiting, heard)

    def stop(self, run: str) -> None:
        for worker in self.workers:
            if worker.job and worker.job.run == run:
                worker.tell(Stop(run))

    def halt(self) -> None:
        self.halting = time.monotonic()

    def close(self) -> None:
        """An idle worker sees its pipe close and tidies up behind itself; one at work is ended."""
        for worker in self.workers:
            worker.pipe.close()
            if not worker.is_free:
                worker.process.kill()
        until = time.monotonic() + SECONDS_TO_TIDY
        for worker in self.workers:
            worker.process.join(timeout=max(until - time.monotonic(), 0.01))
            worker.process.kill()
            worker.process.join(timeout=1)  # at once, but for one that the kernel holds
        self.workers = []
        for turn in self.turns:
            turn.close()

    # -- the steps of `execute` ------------------------------------------------------------------------------------
    def _goes_on(self, waiting: "Waiting") -> bool:
        if self.halting is None:
            return bool(waiting) or any(worker.job for worker in self.workers)
        waiting.clear()
        training = [worker for worker in self.workers if isinstance(worker.job, TrainJob)]
        for worker in training:
            worker.halt()
        return bool(training) and time.monotonic() - self.halting < GRACE

    def _start_missing(self, wanted: int) -> None:
        taken = {worker.slot for worker in self.workers}
        for slot in range(wanted):
            if slot not in taken:
                self.workers.append(self._start(slot))

    def _start(self, slot: int) -> "WorkerProcess":
        environment = {}
        if self.gpus:
            environment["CUDA_VISIBLE_DEVICES"] = self.gpus[slot % len(self.gpus)]
        turn = self.turns[slot % len(self.turns)] if self.turns else None
        return start_worker(slot, self.plugins, environment, turn)

    def _give_out(self, waiting: "Waiting") -> None:
        for worker in self.workers:
            while worker.is_free and waiting.is_due:
                taken = {one.affinity for one in self.workers}
                task = waiting.take(worker.affinity, taken)
                if job := task.make():
                    worker.give(job, task.affinity)

    def _speaking(self) -> list["WorkerProcess"]:
        """The workers that have said something, or died; waits a little for the first."""
        pipes = wait([worker.pipe for worker in self.workers], timeout=PATIENCE / 2)
        return [worker for worker in self.workers if worker.pipe in pipes]

    def _listen(self, worker: "WorkerProcess", waiting: "Waiting", heard: Listener) -> None:
        job = worker.job
        said = worker.hear()
        if said is None:
            said = self._bury(worker)
        if job is None or said is None or isinstance(said, Ready):
            return
        if isinstance(said, Busy):
            waiting.postpone(job, worker.affinity)
        waiting.tasks.extend(heard(job, said))

    def _bury(self, worker: "WorkerProcess") -> Done | Busy | Untraced | None:
        """A worker died: what it had in hand is a failure, and another will take its place.

        Raises UserError where it died before it was ready.
        """
        self.workers.remove(worker)
        worker.pipe.close()
        worker.process.join(timeout=10)
        code = worker.process.exitcode
        if not worker.was_ready:
            raise UserError(
                f"a worker ended with exit code {code} before it was ready; what it said stands above"
            )
        cause = (
            f"the worker died with exit code {code} (-9: killed, often for lack of host memory)"
        )
        match worker.job:
            case TraceJob():
                return Untraced(cause)
            case TrainJob() as job:
                cure = "run again to resume from its last checkpoint"
                return _lost(job, f"{cause}; {cure}")
            case None:  # it died idle, as one does after a crash that may have poisoned it
                return None


def _lost(job: TrainJob, cause: str) -> Done | Busy:
    """The result of a run whose worker died: what it had just written, else a failure, unless another goes on."""
    record = Record(job.folder, job.run)
    with suppress(UserError):  # half of it is no result
        written = record.result() if record.stamp() != job.before else None
        if written:
            return Done(written)
    claim = take(record.claim_path, Watch())
    if claim is None:
        return Busy()
    result = Result(job.run, FAILED, step=0, tokens=0, error=cause)
    record.finish(result)
    claim.release()
    return Done(result)


# -- one of them -------------------------------------------------------------------------------------------------------
@dataclass(eq=False)
class WorkerProcess:
    """One worker, as the runner sees it."""

    slot: int
    process: BaseProcess
    pipe: Connection
    was_ready: bool = False
    is_free: bool = False  # ready, with nothing in hand, and fit for more
    affinity: str = ""  # of its last job
    job: Job | None = None  # in hand
    told_to_halt: bool = False

    def give(self, job: Job, affinity: str) -> None:
        self.job = job
        self.affinity = affinity
        self.is_free = False
        self.tell(job)

    def halt(self) -> None:
        """Once."""
        if not self.told_to_halt:
            self.told_to_halt = True
            self.tell(Halt())

    def tell(self, order: Order) -> None:
        with suppress(BrokenPipeError, ConnectionResetError):  # dead: `hear` will find out
            self.pipe.send(order)

    def hear(self) -> Ready | Message | None:
        """What it says next; None where it is dead."""
        try:
            said: Ready | Message = self.pipe.recv()
        except (EOFError, ConnectionResetError):
            return None
        if not isinstance(said, Began | Logged | Warned):
            self.was_ready = True
            self.job = None
            self.is_free = not ends_itself(said)
        return said


def start_worker(
    slot: int, plugins: list[str], environment: Mapping[str, str], turn: Turn | None
) -> WorkerProcess:
    ours, theirs = CONTEXT.Pipe()
    process = CONTEXT.Process(
        target=serve, args=(theirs, plugins, environment, turn), daemon=True
    )
    with _no_signals():
        process.start()
    theirs.close()
    return WorkerProcess(slot, process, ours)


@contextmanager
def _no_signals() -> Iterator[None]:
    """A process started in here gets none of SIGNALS, not even while it imports; ours come at the end.

    A terminal and a scheduler send them to all processes, and the runner alone knows what to do.
    """
    resource_tracker.ensure_running()  # would otherwise be started along, and unblock the signal
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# -- what they will be given -------------------------------------------------------------------------------------------
class Waiting:
    """Tasks in the order in which they came, and jobs that another process held when they were given out."""

    def __init__(self, tasks: Iterable[Task]):
        self.tasks = deque(tasks)
        self.postponed: deque[tuple[float, Task]] = deque()  # when it is due, and what

    def __bool__(self) -> bool:
        return bool(self.tasks or self.postponed)

    @property
    def is_due(self) -> bool:
        """Whether there is something to give out now."""
        if self.tasks or not self.postponed:
            return bool(self.tasks)
        due, _ = self.postponed[0]
        return due < time.monotonic()

    def clear(self) -> None:
        self.tasks.clear()
        self.postponed.clear()

    def postpone(self, job: Job, affinity: str) -> None:
        due = time.monotonic() + PATIENCE
        self.postponed.append((due, Task(lambda: job, affinity)))

    def take(self, own: str, taken: Collection[str]) -> Task:
        """Take out the first task of the affinity `own`; else of one that is not `taken`; else the first.

        own: of the worker that asks, warm for it.  taken: of all workers; the others find another affinity.
        """
        if not self.tasks:
            _, task = self.postponed.popleft()
            return task
        of_own = (i for i, task in enumerate(self.tasks) if task.affinity == own)
        of_nobody = (i for i, task in enumerate(self.tasks) if task.affinity not in taken)
        place = next(chain(of_own, of_nobody), 0)
        task = self.tasks[place]
        del self.tasks[place]
        return task
