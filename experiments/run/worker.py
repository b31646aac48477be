"""A warm worker: one process that imports torch once and executes jobs sent to it, one after another."""

import contextlib
import ctypes
import multiprocessing
import os
import threading
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from ablab.core.errors import Pruned, UserError
from ablab.core.language.parse import parse
from ablab.core.recipe.recipe import Recipe, run_id
from ablab.core.runtime.runtime import Runtime, settle
from ablab.core.store.files import write_atomically, writing
from ablab.core.store.record import FAILED, RETRY, Record, Result

Message = tuple[str, Any]  # a word and what goes with it; processes.py says what each means


@dataclass(frozen=True)
class Job:
    """`train` a run, or take the liveness `trace` of a recipe.  Plain data: it crosses a pipe."""

    kind: str
    run: str
    recipe: dict[str, Any]
    runtime: dict[str, Any]
    folder: Path  # the run folder
    data: Path  # the token folder
    asked: int = 0  # nanoseconds; a failure from before does not count, so each call tries a failed run once
    about: dict[str, Any] = field(default_factory=dict)


def serve(
    pipe: Connection, plugins: list[str], environment: Mapping[str, str], turn: Path | None
) -> None:
    """Answer jobs until the pipe closes.  turn: a file to lock while a run trains, where workers share a GPU.

    Ctrl-C is the runner's to handle: processes.py keeps it from us.
    """
    threading.Thread(target=_end_with_the_runner, daemon=True).start()
    os.environ.update(environment)
    keep_freed_memory()
    from filelock import FileLock

    from ablab.ablations.registry import discover
    from ablab.core.train.trainer import Warm

    discover(plugins)
    how = {
        "warm": Warm(rehearse=turn is not None),
        "turn": FileLock(turn) if turn else contextlib.nullcontext(),
    }
    with contextlib.suppress(
        EOFError, BrokenPipeError, ConnectionResetError
    ):  # the runner is gone, so are we
        pipe.send(("ready", None))
        while job := pipe.recv():
            if not isinstance(job, Job):  # a stop that came after the end
                continue
            try:
                word, payload = (
                    _train(job, pipe, how) if job.kind == "train" else ("traced", _trace(job))
                )
            except UserError as refusal:
                word, payload = "refused", str(refusal)
            pipe.send((word, payload))
            if word == "done" and payload.status == FAILED:
                return  # nobody knows what the crash left behind; processes.py starts another worker


def keep_freed_memory() -> None:
    """glibc gives every freed tensor of some MB back to the system and faults it in again: 98 ms a quickstart step, 71 ms without."""
    with contextlib.suppress(OSError, AttributeError):  # another C library has no mallopt
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD, at its largest
        libc.mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD


def _end_with_the_runner() -> None:
    """A killed runner closes no pipe that a training step would notice; its process handle tells at once."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _read(job: Job) -> tuple[Recipe, Runtime]:
    """Raises UserError where this process cannot compute what the runner asked for."""
    recipe, runtime = parse(Recipe, job.recipe, ""), parse(Runtime, job.runtime, "runtime")
    settle(runtime, recipe.data.batch)
    if run_id(recipe) != job.run:
        raise UserError(
            "the file of an intervention changed while the grid ran; start the same command again"
        )
    return recipe, runtime


def _trace(job: Job) -> str:
    import torch

    from ablab.ablations.checks.liveness import trace
    from ablab.core.fusion.places import served

    recipe, runtime = _read(job)
    torch.set_num_threads(runtime.threads)
    settled = settle(runtime, recipe.data.batch)
    return trace(recipe, settled["device"], served(recipe, settled))


def _train(job: Job, pipe: Connection, how: dict[str, Any]) -> Message:
    """Execute one run under its lock: no two processes, here or elsewhere, ever train the same one."""
    from filelock import FileLock, Timeout

    recipe, runtime = _read(job)
    record, lock = Record(job.folder), FileLock(job.folder / ".lock")
    with writing(job.folder):
        job.folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            return "busy", None
    try:
        found = record.result()
        if found and not (found.status in RETRY and record.stamp() < job.asked):
            return "found", found
        pipe.send(("began", None))
        return "done", _run(job, recipe, runtime, record, pipe, how)
    finally:
        lock.release()


def _run(
    job: Job,
    recipe: Recipe,
    runtime: Runtime,
    record: Record,
    pipe: Connection,
    how: dict[str, Any],
) -> Result:
    """A crash is a result too: one line in the record, the traceback beside it."""
    from ablab.core.train.trainer import run

    try:
        return run(
            recipe,
            runtime,
            job.data,
            record,
            _PipeTracker(pipe, job.run),
            job.about,
            lambda line: pipe.send(("warning", line)),
            **how,
        )
    except (UserError, BrokenPipeError, ConnectionResetError):
        raise
    except Exception as fault:
        write_atomically(record.folder / "error.txt", traceback.format_exc().encode())
        result = Result(
            job.run,
            FAILED,
            0,
            0,
            error=f"{type(fault).__name__}: {_in_short(fault)} (see {record.folder / 'error.txt'})",
        )
        record.finish(result)
        return result


def _in_short(fault: Exception) -> str:
    refused, asked, _ = str(fault).partition(
        ", but you set 'torch.use_deterministic_algorithms(True)'"
    )
    return (
        f"{refused}; run it with runtime.deterministic=false, which need not repeat its bits"
        if asked
        else str(fault)
    )


class _PipeTracker:
    """Sends scalars to the runner, which alone talks to trackers and terminals."""

    def __init__(self, pipe: Connection, run: str):
        self.pipe, self.run = pipe, run

    def open(self, card) -> None: ...

    def log(self, step: int, scalars: Mapping[str, float], seconds: float) -> None:
        self.pipe.send(("log", (step, dict(scalars), seconds)))
        while self.pipe.poll():
            if self.pipe.recv() == self.run:
                raise Pruned

    def close(self, status: str, summary: Mapping[str, float]) -> None: ...
