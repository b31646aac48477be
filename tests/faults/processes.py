"""`ablab` in a process of its own: forked from one that has imported everything, or started anew as people do.

What is forked is the real command line with real workers, locks, pipes and signals; it takes half a second of a
core where a new interpreter takes five, most of them for importing torch and pandas.
"""

import gc
import multiprocessing
import multiprocessing.util
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

PATIENCE = 240.0  # seconds that a command may take on a busy machine before it counts as hung
SECONDS_TO_END = 30.0  # that its processes have to follow it
PAUSE = 0.004


class Hung(Exception):
    """A command that does not end, or processes that outlive it."""


def nothing() -> None:
    """Done in a forked process before its command begins."""


@dataclass
class Ended:
    code: int  # negative: the signal that ended it
    said: str  # both streams


@dataclass
class Running:
    """A command on its way, in a session of its own."""

    pid: int
    log: Path
    began: float = field(default_factory=time.monotonic)
    code: int | None = None

    def is_over(self) -> bool:
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
        return self.code is not None

    def send(self, sign: signal.Signals, to: int | None = None) -> None:
        """to: one of its processes; nothing happens to one that has ended."""
        with suppress(ProcessLookupError):
            os.kill(to or self.pid, sign)

    def send_to_all(self, sign: signal.Signals) -> None:
        for pid in self.processes():
            self.send(sign, pid)

    def processes(self) -> list[int]:
        """Of its session, alive: itself first, then its workers and helpers."""
        return sorted(pid for pid in map(_of_session(self.pid), _all_processes()) if pid)

    def workers(self) -> list[int]:
        return [pid for pid in self.processes() if pid != self.pid and not _is_tracker(pid)]

    def end(self, patience: float = PATIENCE) -> Ended:
        """Wait for it, and for every process that it started.  Raises Hung."""
        wait_for(self.is_over, f"it had not ended after {patience:.0f} s", patience, self)
        wait_for(
            lambda: not self.processes(),
            f"a process outlived it by {SECONDS_TO_END:.0f} s",
            SECONDS_TO_END,
            self,
        )
        assert self.code is not None
        return Ended(self.code, self.log.read_text(errors="replace"))


def wait_for(holds: Callable[[], object], else_: str, patience: float, one: Running) -> None:
    until = time.monotonic() + patience
    while not holds():
        if time.monotonic() > until:
            one.send_to_all(signal.SIGKILL)
            raise Hung(f"{else_}; it said: {one.log.read_text(errors='replace')}")
        time.sleep(PAUSE)


def _all_processes() -> list[Path]:
    return list(Path("/proc").glob("[0-9]*"))


def _of_session(session: int) -> Callable[[Path], int]:
    """The id of a living process of that session, else 0."""

    def look(folder: Path) -> int:
        try:
            _, _, stat = (folder / "stat").read_text().rpartition(")")
        except OSError:
            return 0
        state, _, _, held = stat.split()[:4]
        return int(folder.name) if int(held) == session and state not in "ZX" else 0

    return look


def _is_tracker(pid: int) -> bool:
    """Python's own, which waits for shared memory that nobody released."""
    try:
        return b"resource_tracker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return True


# -- forked ------------------------------------------------------------------------------------------------------------
class Forked:
    """Stands in for multiprocessing's context in experiments/run/processes.py: workers have torch in memory already."""

    def __init__(self) -> None:
        self.context = multiprocessing.get_context("fork")
        self.ours: list[Connection] = []

    def Pipe(self) -> tuple[Connection, Connection]:
        ours, theirs = self.context.Pipe()
        self.ours.append(ours)
        return ours, theirs

    def Process(self, target: Callable, args: Sequence, daemon: bool):
        """Without the runner's ends of the pipes, which a worker that is started anew would not have."""
        return self.context.Process(
            target=_without, args=(self.ours, target, args), daemon=daemon
        )


def _without(inherited: list[Connection], target: Callable, args: Sequence) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # the runner's handler is its own
    for pipe in inherited:
        pipe.close()
    target(*args)


def warm_up(mlflow: bool = True) -> None:
    """Import what commands import, and let workers be forked.  No tensor is made: torch's threads do not survive it.

    mlflow: 4 s, for what is shown there.
    """
    import matplotlib.pyplot  # noqa: F401
    import optuna  # noqa: F401
    import pandas  # noqa: F401
    import scipy.stats  # noqa: F401
    import torch._dynamo  # noqa: F401
    import torch._inductor.config  # noqa: F401

    import ablab.core.train.run  # noqa: F401
    from ablab.ablations.registry import discover
    from ablab.core.runtime.fingerprint import code_fingerprint
    from ablab.experiments.cli import main  # noqa: F401
    from ablab.experiments.run import processes

    discover()
    if mlflow:
        _import_mlflow()
    code_fingerprint()  # of one state of the code, kept for all
    processes.CONTEXT = Forked()
    gc.freeze()  # a collection in a fork would copy every page of what was imported


def _import_mlflow() -> None:
    from ablab.experiments.track.mlflow_home import import_mlflow

    import_mlflow()
    import mlflow.store.tracking.sqlalchemy_store  # noqa: F401


def fork(
    words: Sequence[str],
    folder: Path,
    environment: dict[str, str],
    log: Path,
    before: Callable[[], None] = nothing,
    aside: Path | None = None,
) -> Running:
    """aside: where its standard error goes; None: beside its output."""
    sys.stdout.flush()
    pid = os.fork()
    if pid:
        return Running(pid, log)
    code = 1  # as of any process that ends by an exception
    try:
        os.setsid()
        for stream, path in ((1, log), (2, aside or log)):
            with open(path, "ab") as file:
                os.dup2(file.fileno(), stream)
        os.chdir(folder)
        os.environ.update(environment)
        tempfile.tempdir = None
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        sys.argv = ["ablab", *words]
        before()
        code = _called()
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)


def _called() -> int:
    """The exit code of the command that sys.argv asks for; what a Python process does at its end is done."""
    from ablab.experiments.cli.__main__ import start

    try:
        start()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0
    multiprocessing.util._exit_function()
    sys.stdout.flush()
    sys.stderr.flush()
    return code


# -- started anew ------------------------------------------------------------------------------------------------------
def start(
    words: Sequence[str], folder: Path, environment: dict[str, str], log: Path
) -> Running:
    with open(log, "wb") as file:
        begun = subprocess.Popen(
            [sys.executable, "-m", "ablab.experiments.cli", *words],
            cwd=folder,
            env=os.environ | environment,
            stdout=file,
            stderr=file,
            start_new_session=True,
        )
    return Running(begun.pid, log)
