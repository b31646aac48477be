"""A warm worker: one process that imports torch once and executes runs sent to it, one after another."""

import contextlib
import os
import signal
import traceback
from collections.abc import Mapping
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from ablab.core.errors import UserError
from ablab.core.files import write_atomically
from ablab.core.part import parse
from ablab.core.recipe import Recipe
from ablab.core.record import FAILED, Record, Result
from ablab.core.runtime import Runtime


@dataclass(frozen=True)
class Job:
    """`train` a run, or take the liveness `trace` of a recipe.  Plain data: it crosses a pipe."""

    kind: str
    run: str
    recipe: dict[str, Any]
    runtime: dict[str, Any]
    folder: Path  # the run folder
    data: Path  # the token folder
    about: dict[str, Any] = field(default_factory=dict)


def serve(pipe: Connection, plugins: list[str], environment: Mapping[str, str]) -> None:
    """Answer jobs until the pipe closes.  Messages: (word, run, payload)."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the runner's to handle
    os.environ.update(environment)
    from ablab.ablations.registry import discover
    from ablab.core.trainer import Warm

    discover(plugins)
    warm = Warm()
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):  # the runner is gone, so are we
        pipe.send(("ready", "", None))
        while job := pipe.recv():
            try:
                pipe.send(_train(job, pipe, warm) if job.kind == "train" else ("traced", job.run, _trace(job)))
            except UserError as refusal:
                pipe.send(("refused", job.run, str(refusal)))


def _trace(job: Job) -> str:
    from ablab.ablations.liveness import trace
    from ablab.core.runtime import settle

    recipe = parse(Recipe, job.recipe, "")
    return trace(recipe, settle(parse(Runtime, job.runtime, "runtime"), recipe.data.batch)["device"])


def _train(job: Job, pipe: Connection, warm: Any) -> tuple[str, str, Any]:
    """Execute one run under its lock: no two processes, here or elsewhere, ever train the same one."""
    from filelock import FileLock, Timeout

    from ablab.core.files import writing
    from ablab.core.trainer import run

    record = Record(job.folder)
    with writing(job.folder):
        job.folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(job.folder / ".lock", timeout=0):
            if (done := record.result()) and done.status != FAILED and not job.about.get("again"):
                return "done", job.run, done
            warn = lambda line: pipe.send(("warning", job.run, line))  # noqa: E731
            try:
                recipe, runtime = parse(Recipe, job.recipe, ""), parse(Runtime, job.runtime, "runtime")
                return "done", job.run, run(recipe, runtime, job.data, record, _PipeTracker(pipe, job.run), job.about, warn, warm)
            except (UserError, BrokenPipeError, ConnectionResetError):
                raise
            except Exception as fault:
                return "done", job.run, _failed(record, job.run, fault)
    except Timeout:
        return "busy", job.run, None


def _failed(record: Record, run: str, fault: Exception) -> Result:
    """A crash is a result: one line in the record, the traceback beside it."""
    write_atomically(record.folder / "error.txt", traceback.format_exc().encode())
    result = Result(run, FAILED, 0, 0, error=f"{type(fault).__name__}: {fault} (see {record.folder / 'error.txt'})")
    record.finish(result)
    return result


class _PipeTracker:
    """Sends scalars to the runner, which alone talks to trackers and terminals."""

    def __init__(self, pipe: Connection, run: str):
        self.pipe, self.run = pipe, run

    def open(self, card) -> None: ...

    def log(self, step: int, scalars: Mapping[str, float], seconds: float) -> None:
        self.pipe.send(("log", self.run, (step, dict(scalars), seconds)))

    def close(self, status: str, summary: Mapping[str, float]) -> None: ...
