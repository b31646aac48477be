"""Worker processes of this machine: started, handed jobs, listened to, replaced when they die."""

import multiprocessing
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

from ablab.core.errors import UserError
from ablab.core.runtime.runtime import Runtime
from ablab.core.store.claim import Watch, take
from ablab.core.store.record import Record
from ablab.core.store.result import FAILED, Result
from ablab.experiments.run.capacity import gpus_for, in_turn, seats_for
from ablab.experiments.run.halting import SIGNALS
from ablab.experiments.run.messages import (
    Busy,
    Done,
    Dying,
    EvalJob,
    Job,
    Message,
    Order,
    Ready,
    TraceJob,
    Unevaluated,
    Untraced,
)
from ablab.experiments.run.ranks import serve_ranks
from ablab.experiments.run.turns import Turn
from ablab.experiments.run.worker import serve
from ablab.experiments.run.workers import PATIENCE, WorkerHandle, Workers

# That an idle worker has between the end of its pipe and its own: one alone, and one that leads others.
SECONDS_TO_TIDY = 3.0
SECONDS_TO_PART = 20.0
CURE = "run again to resume from its last checkpoint"
CONTEXT = multiprocessing.get_context("spawn")


def local_processes(runtime: Runtime, jobs: int, plugins: Iterable[str]) -> "LocalProcesses":
    """One GPU each where there are several.  More jobs than GPUs take turns on them, unless runtime.turns is off.

    While one trains at its full pace, the other compiles.
    """
    gpus = gpus_for(runtime)
    seats = seats_for(runtime)
    return LocalProcesses(
        jobs,
        plugins,
        gpus=seats if len(gpus) > 1 else (),
        share=seats if in_turn(runtime) and jobs > len(seats) else (),
        serving=serving_of(runtime),
    )


def serving_of(runtime: Runtime) -> "Serving":
    """What a worker does: it trains by itself, or leads ranks."""
    if runtime.ranks == 1:
        return Serving(serve)
    device = "cuda" if gpus_for(runtime) else "cpu"
    return Serving(partial(serve_ranks, ranks=runtime.ranks, device=device), leads=True)


@dataclass(frozen=True)
class Serving:
    """The call in a worker process."""

    call: Callable[..., None]  # as `serve`
    leads: bool = False  # other processes, which it starts


ALONE = Serving(serve)


class LocalProcesses(Workers["WorkerProcess"]):
    """Up to `count` processes, started as work comes: an Executor.

    gpus: one of these each, "0" or "0,1", in rotation; empty: all see what we see.  share: likewise, those on which
    they take turns; empty: all train at once.
    """

    def __init__(
        self,
        count: int,
        plugins: Iterable[str] = (),
        gpus: Sequence[str] = (),
        share: Sequence[str] = (),
        serving: Serving = ALONE,
    ):
        super().__init__(count)
        self.serving = serving
        self.plugins = list(plugins)
        self.gpus = gpus
        # of this host and this call: nobody else trains for us
        self.turns = [Turn() for _ in share]

    def close(self) -> None:
        """An idle worker sees its pipe close and tidies up behind itself; one at work is ended."""
        end(self.workers)
        self.workers = []
        for turn in self.turns:
            turn.close()

    def _start(self, slot: int) -> "WorkerProcess":
        environment = {}
        if self.gpus:
            environment["CUDA_VISIBLE_DEVICES"] = self.gpus[slot % len(self.gpus)]
        turn = self.turns[slot % len(self.turns)] if self.turns else None
        return start_worker(slot, self.plugins, environment, turn, self.serving)

    def _speaking(self) -> list["WorkerProcess"]:
        """The workers that have said something, or died; waits a little for the first."""
        pipes = wait([worker.pipe for worker in self.workers], timeout=PATIENCE / 2)
        return [worker for worker in self.workers if worker.pipe in pipes]

    def _bury(self, worker: "WorkerProcess") -> "Failure | None":
        return buried(worker)


Failure = Done | Busy | Untraced | Unevaluated


# -- one of them -------------------------------------------------------------------------------------------------------
@dataclass(eq=False)
class WorkerProcess(WorkerHandle):
    process: BaseProcess
    pipe: Connection
    leads: bool = False  # other processes, which it started
    cause: str = ""  # of its death, where it says one

    def tell(self, order: Order) -> None:
        with suppress(BrokenPipeError, ConnectionResetError):  # dead: `hear` will find out
            self.pipe.send(order)

    def hear(self) -> Ready | Message | None:
        """What it says next; None where it is dead."""
        try:
            said: Ready | Message | Dying = self.pipe.recv()
            while isinstance(said, Dying):
                self.cause = said.why
                said = self.pipe.recv()
        except (EOFError, ConnectionResetError):
            return None
        self.heard(said)
        return said


def buried(worker: WorkerProcess) -> Failure | None:
    """What is to be said of a worker that died: what it had in hand is a failure.

    Raises UserError where it died before it was ready.
    """
    worker.pipe.close()
    worker.process.join(timeout=10)
    code = worker.process.exitcode
    if not worker.was_ready and worker.cause:
        raise UserError(worker.cause)
    if not worker.was_ready:
        raise UserError(
            f"a worker ended with exit code {code} before it was ready; what it said stands above"
        )
    died = f"the worker died with exit code {code} (-9: killed, often for lack of host memory)"
    return failure(worker.job, worker.cause or died) if worker.job else None


def failure(job: Job, cause: str) -> Failure:
    """The answer of a job whose worker is gone: what it had just written, else a failure, unless another goes on."""
    if isinstance(job, TraceJob):
        return Untraced(cause)
    if isinstance(job, EvalJob):
        return Unevaluated(cause)
    record = Record(job.folder, job.run)
    with suppress(UserError):  # half of it is no result
        written = record.result() if record.stamp() != job.before else None
        if written:
            return Done(written)
    claim = take(record.claim_path, Watch())
    if claim is None:
        return Busy()
    result = Result(job.run, FAILED, step=0, tokens=0, error=f"{cause}; {CURE}")
    record.finish(result)
    claim.release()
    return Done(result)


def end(workers: Iterable[WorkerProcess]) -> None:
    """Leave none of them running."""
    ending = [*workers]
    for worker in ending:
        worker.pipe.close()
        if not worker.is_free:
            worker.process.kill()
    now = time.monotonic()
    for worker in ending:
        until = now + (SECONDS_TO_PART if worker.leads else SECONDS_TO_TIDY)
        worker.process.join(timeout=max(until - time.monotonic(), 0.01))
        worker.process.kill()
        worker.process.join(timeout=1)  # at once, but for one that the kernel holds


def start_worker(
    slot: int,
    plugins: list[str],
    environment: Mapping[str, str],
    turn: Turn | None,
    serving: Serving = ALONE,
) -> WorkerProcess:
    ours, theirs = CONTEXT.Pipe()
    process = CONTEXT.Process(
        target=serving.call,
        args=(theirs, plugins, environment, turn),
        daemon=not serving.leads,  # a daemon may start no process
    )
    with _no_signals():
        process.start()
    theirs.close()
    return WorkerProcess(process, ours, serving.leads, slot=slot)


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
