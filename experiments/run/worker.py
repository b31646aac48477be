"""A warm worker: one process that imports torch once and executes jobs sent to it, one after another."""

import contextlib
import ctypes
import multiprocessing
import os
import sys
import threading
import traceback
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from ablab.core.errors import Halted as HaltedRun
from ablab.core.errors import Pruned, UserError, one_line, said_by, told
from ablab.core.language.parse import parse
from ablab.core.recipe.recipe import Recipe, run_id
from ablab.core.runtime.runtime import Runtime, settle
from ablab.core.store.claim import Claim, Lost, Watch, take
from ablab.core.store.files import set_aside, write_atomically
from ablab.core.store.mirror import SECONDS_TO_END, Mirror, mirror_of
from ablab.core.store.record import Record
from ablab.core.store.result import FAILED, OUT_OF_MEMORY, RETRY, Result
from ablab.experiments.run.bytecode import keep_bytecode
from ablab.experiments.run.garbage import collect_seldom
from ablab.experiments.run.messages import (
    Answer,
    Began,
    Busy,
    Done,
    EvalJob,
    Found,
    Halt,
    Halted,
    Job,
    Logged,
    Message,
    Order,
    Ready,
    Refused,
    Stop,
    Traced,
    TraceJob,
    TrainJob,
    Unevaluated,
    Untraced,
    Warned,
)
from ablab.experiments.run.turns import Turn

if TYPE_CHECKING:
    from ablab.core.train.trainer import Warm
    from ablab.experiments.evaluate.judge import Judge

SECONDS_TO_COPY = 10.0  # of a run that is halted: its runner waits for it
GONE = (
    BrokenPipeError,
    ConnectionResetError,
)  # what a pipe says to one who sends to a dead runner


def serve(
    pipe: Connection, plugins: list[str], environment: Mapping[str, str], turn: Turn | None
) -> None:
    """Answer jobs until the pipe closes.  turn: held while a run trains, where workers share a GPU.

    Signals are the runner's to handle: processes.py keeps them from us.
    """
    end_with_the_parent()
    os.environ.update(environment)
    keep_bytecode()
    collect_seldom()
    keep_freed_memory()
    know_plugins(plugins)
    from ablab.core.train.trainer import Warm

    worker = Worker(
        pipe,
        warm=Warm(rehearse=turn is not None),
        turn=turn or contextlib.nullcontext(),
    )
    answer_all(pipe, worker)


def know_plugins(plugins: list[str]) -> None:
    from ablab.ablations.registry import discover

    try:
        discover(plugins)
    except UserError as refusal:
        sys.exit(str(refusal))  # it is said on stderr, above what the runner says of our end


def answer_all(pipe: Connection, worker: "Worker") -> None:
    """Until the pipe closes, or until the worker had better be replaced: processes.py starts another."""
    with contextlib.suppress(EOFError, *GONE):  # then so are we
        pipe.send(Ready())
        while order := pipe.recv():
            if isinstance(order, Stop | Halt):  # it came after the end
                continue
            answer = worker.answer(order)
            pipe.send(answer)
            if ends_itself(answer):
                return


def ends_itself(last: Ready | Message) -> bool:
    """Whether a worker ends after these words: a crash may poison its process, as CUDA errors do.

    One of several ranks that lacked memory has left the others in the midst of a step.
    """
    match last:
        case Done(result) if result.status == OUT_OF_MEMORY:
            return result.runtime.get("ranks", 1) > 1
        case Done(result):
            return result.status == FAILED
        case Untraced() | Unevaluated():
            return True
    return False


def keep_freed_memory() -> None:
    """glibc gives every freed tensor of some MB back to the system and faults it in again.

    A step of quickstart took 98 ms with that, 71 ms without.
    """
    with contextlib.suppress(OSError, AttributeError):  # another C library has no mallopt
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD, at its largest
        libc.mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD


def end_with_the_parent() -> None:
    """A killed runner closes no pipe that a training step would notice; its process handle tells at once."""
    threading.Thread(target=_end_with_it, daemon=True).start()


def _end_with_it() -> None:
    parent = multiprocessing.parent_process()
    assert parent, "a worker is started by a runner"
    parent.join()
    os._exit(1)


class Pipe(Protocol):
    """To the runner: a Connection, or what stands for one."""

    def send(self, said: Any, /) -> None: ...

    def poll(self) -> bool: ...

    def recv(self) -> Any: ...


@dataclass(frozen=True)
class Worker:
    """Executes jobs, one after another."""

    pipe: Pipe
    warm: "Warm"  # keeps the trainer for the next run of the same structure
    turn: AbstractContextManager[Any]  # held while a run trains
    watch: Watch = field(default_factory=Watch)  # of runs that others hold

    def answer(self, job: Job) -> Answer:
        try:
            match job:
                case TrainJob():
                    return self._train(job)
                case TraceJob():
                    return _trace(job)
                case EvalJob():
                    return self._ask(job)
        except UserError as refusal:
            return Refused(str(refusal))

    def _ask(self, job: EvalJob) -> Answer:
        from ablab.experiments.run.examiner import answer

        return answer(job, self.watch, self.pipe.send, self._orders)

    def _orders(self) -> list[Order]:
        """Those that have come."""
        found: list[Order] = []
        while self.pipe.poll():
            found.append(self.pipe.recv())
        return found

    def _train(self, job: TrainJob) -> Answer:
        """Train one run under its claim: no two processes, here or elsewhere, ever train the same one."""
        _clear_the_place(job.folder, self._warn)
        ended = Record(job.folder, job.run)
        if found := _ended(ended, job.before):
            return Found(found)
        claim = take(ended.claim_path, self.watch)
        if claim is None:
            return Busy()
        try:
            with claim.beating():
                return self._under(claim, job, Record(job.folder, job.run, claim.beat))
        except Lost:  # we were asleep for so long that another went on: it is asked for again
            return Busy()

    def _under(self, claim: Claim, job: TrainJob, record: Record) -> Answer:
        """Raises Lost, and UserError of a claim that is ours."""
        try:
            if found := _standing(record, job.before, self._warn):
                return Found(found)
            return self._trained(job, record)
        except UserError:
            claim.beat()
            raise

    def _warn(self, line: str) -> None:
        self.pipe.send(Warned(line))

    def _trained(self, job: TrainJob, record: Record) -> Answer:
        """Here, or found in the mirror, which has what came of it in the end."""
        recipe, runtime = read_job(job)
        mirror = mirror_of(runtime.mirror, record.folder, self._warn, record.fence)
        if mirror.fetch() and (found := _standing(record, job.before, self._warn)):
            return Found(found)
        self.pipe.send(Began())
        answer = self._run(job, recipe, runtime, record, mirror)
        mirror.finish(SECONDS_TO_COPY if isinstance(answer, Halted) else SECONDS_TO_END)
        return answer

    def _run(
        self, job: TrainJob, recipe: Recipe, runtime: Runtime, record: Record, mirror: Mirror
    ) -> Done | Halted:
        """A crash is a result too: one line in the record, the traceback beside it."""
        runner = Runner(self.pipe, job.run)
        try:
            result = self._run_called(job, recipe, runtime, record, runner, mirror.push)
        except HaltedRun as end:
            return Halted(end.step)
        except (UserError, Lost, *GONE):
            raise
        except (Exception, SystemExit) as fault:
            record.fence()
            result = _crash(job.run, fault, record.folder / "error.txt")
            record.finish(result)
        return Done(result)

    def _run_called(
        self,
        job: TrainJob,
        recipe: Recipe,
        runtime: Runtime,
        record: Record,
        runner: "Heard",
        saved: Callable[[], None],
    ) -> Result:
        """saved: called when a checkpoint is on the disk."""
        from ablab.core.train.run import run

        return run(
            recipe,
            runtime,
            job.data,
            record,
            log=runner.log,
            halts=runner.halts,
            saved=saved,
            about=job.about,
            shared=job.shared,
            warn=self._warn,
            warm=self.warm,
            turn=self.turn,
            parent=None if recipe.before.run else job.start,
            judge=_judge(job),
        )


def _judge(job: TrainJob) -> "Judge | None":
    if job.judging is None:
        return None
    from ablab.experiments.evaluate.judge import Judge

    asked = job.judging
    return Judge(asked.suites, asked.limit, job.folder, asked.metric)


def _clear_the_place(folder: Path, warn: Callable[[str], None]) -> None:
    """Set aside a file where the run folder should be."""
    if folder.exists() and not folder.is_dir():
        warn(f"{folder} is damaged (a folder for a file, or the reverse); set aside")
        set_aside(folder)


def read_job(job: TrainJob | TraceJob) -> tuple[Recipe, Runtime]:
    """Raises UserError where this process cannot compute what the runner asked for."""
    recipe = parse(Recipe, job.recipe, "")
    runtime = parse(Runtime, job.runtime, "runtime")
    settle(runtime, recipe.batches.largest_micro_batch)
    if run_id(recipe) != job.run:
        raise UserError(
            "the file of an intervention changed while the grid ran; start the same command again"
        )
    return recipe, runtime


def _trace(job: TraceJob) -> Traced | Untraced:
    import torch

    from ablab.ablations.checks.liveness import trace
    from ablab.core.fusion.places import served

    recipe, runtime = read_job(job)
    torch.set_num_threads(runtime.threads)
    settled = settle(runtime, recipe.batches.largest_micro_batch)
    try:
        return Traced(trace(recipe, settled.device, served(recipe, settled)))
    except UserError:
        raise
    except (Exception, SystemExit) as fault:
        return Untraced(told(fault) + _origin(fault, " (raised at {})"))


def _ended(record: Record, before: int) -> Result | None:
    """As `_standing`, at a glance and without a claim: what is damaged is looked at again under one."""
    stamp = record.stamp()
    if stamp in (0, before):
        return None
    with contextlib.suppress(UserError):
        found = record.result()
        if found and not record.hole(found):
            return found
    return None


def _standing(record: Record, before: int, warn: Callable[[str], None]) -> Result | None:
    """The result that a run has, unless it is a failure that stood there when it was asked for."""
    found = record.sound_result(warn)
    if found and found.status in RETRY and record.stamp() == before:
        return None
    return found


def _crash(run: str, fault: BaseException, path: Path) -> Result:
    """The result of a run that raised; its traceback goes to `path`."""
    write_atomically(path, traceback.format_exc().encode("utf-8", "backslashreplace"))
    see = f"(see {path}{_origin(fault, '; raised at {}')})"
    error = f"{type(fault).__name__}: {_in_short(fault)} {see}"
    return Result(run, FAILED, step=0, tokens=0, error=error)


def _in_short(fault: BaseException) -> str:
    """What was raised; of an operation that cannot repeat its bits, with the cure."""
    said = said_by(fault)
    refused, advice, _ = said.partition(
        ", but you set 'torch.use_deterministic_algorithms(True)'"
    )
    if not advice:
        return one_line(said)
    return f"{one_line(refused)}; run it with runtime.deterministic=false, which need not repeat its bits"


def _origin(fault: BaseException, words: str) -> str:
    """`words` with the line of the user's own code that raised it; '' where none did."""
    from ablab.ablations.registry import raised_at

    place = raised_at(fault)
    return words.format(place) if place else ""


class Heard(Protocol):
    """Who is told of a run that trains, and says when to stop."""

    def log(self, step: int, scalars: Mapping[str, float], seconds: float) -> None:
        """Raises Pruned where the run is to end here."""

    def halts(self) -> bool:
        """Asked after every step."""


@dataclass
class Runner:
    """The runner, as a run that trains sees it."""

    pipe: Pipe
    run: str
    stop: bool = False
    halt: bool = False

    def log(self, step: int, scalars: Mapping[str, float], seconds: float) -> None:
        self.pipe.send(Logged(step, dict(scalars), seconds))
        self._listen()
        if self.stop:
            raise Pruned

    def halts(self) -> bool:
        """Asked after every step: 10 us."""
        self._listen()
        return self.halt

    def _listen(self) -> None:
        while self.pipe.poll():
            order = self.pipe.recv()
            self.stop |= order == Stop(self.run)
            self.halt |= isinstance(order, Halt)
