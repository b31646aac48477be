"""What every launcher beyond this machine has: who stands on the far side, and what it must find there.

A launcher is one file: `ray.py`, `slurm.py`; this machine's own is experiments/run/this_machine.py.  Each gives an
Executor (experiments/run/executor.py), and tests/experiments/run/test_executors.py holds it to that.  On the far side
stands a Seat with a worker process, the same as on this machine: claims, checkpoints and results are its own.
"""

import importlib
import socket
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from ablab.core.errors import UserError
from ablab.core.language.parse import near, parse
from ablab.core.runtime.fingerprint import code_fingerprint
from ablab.core.runtime.runtime import Runtime
from ablab.core.store.store import Store
from ablab.experiments.run.messages import (
    Answer,
    EvalJob,
    Halt,
    Job,
    Message,
    Ready,
    Refused,
    Stop,
)
from ablab.experiments.run.processes import (
    Serving,
    WorkerProcess,
    buried,
    end,
    serving_of,
    start_worker,
)
from ablab.experiments.run.this_machine import check_room
from ablab.experiments.run.worker import serve

LOSSES = 3  # machines that one run may lose; the next loss counts as its own


@dataclass(frozen=True)
class Site:
    """What the far side must have in common with this one."""

    store: Path
    token: str  # that stands in the store
    code: str  # fingerprint of what can change a number
    plugins: tuple[str, ...]

    @classmethod
    def of(cls, store: Store, plugins: Iterable[str]) -> "Site":
        return cls(store.root, store.leave_token(), code_fingerprint(), tuple(plugins))

    def leave(self) -> None:
        """When nobody needs to see it any more."""
        Store(self.store).drop_token(self.token)

    def check(self) -> None:
        """On the far side.  Raises UserError for the first thing that differs there."""
        from ablab.ablations.registry import discover

        host = socket.gethostname()
        Store(self.store).shared_with(self.token)
        if code_fingerprint() != self.code:
            raise UserError(
                f"{host} has another ablab than the machine that asks: code {code_fingerprint()} there, "
                f"{self.code} here; install the same one on both"
            )
        try:
            discover(self.plugins)
        except UserError as flaw:
            raise UserError(f"{host}: {flaw}") from None


class Seat:
    """A worker process on the machine where this stands, for a runner elsewhere: in a Ray actor, in a SLURM job."""

    def __init__(self, site: Site):
        self.site = site
        self.worker: WorkerProcess | None = None

    def answers(self, job: Job) -> Iterator[Message]:
        """What is said of the job, as it is said; the last is its answer."""
        try:
            self.site.check()
            worker = self.worker = self._ready(job)
        except UserError as flaw:
            yield Refused(str(flaw))
            return
        worker.give(job, "")
        said: Message | Ready | None = None
        while not isinstance(said, Answer):
            said = worker.hear() or buried(worker)
            assert said and not isinstance(said, Ready), (
                "a worker with a job is ready, and dies with it"
            )
            yield said
        if not worker.is_free:  # it ends, or has ended
            self.worker = None

    def tell(self, order: Stop | Halt) -> None:
        """Of the run in hand: end it at its next log, or save it at its next step."""
        if self.worker:
            self.worker.tell(order)

    def close(self) -> None:
        """Leave nothing running."""
        if self.worker:
            end([self.worker])
        self.worker = None

    def _ready(self, job: Job) -> WorkerProcess:
        """Of all jobs of a command one worker serves.  Raises UserError where it cannot start."""
        worker = self.worker or start_worker(
            0, [*self.site.plugins], {}, None, serving_of_job(job)
        )
        while not worker.is_free:
            if worker.hear() is None:
                buried(worker)
        return worker


def saved_of(job: Job) -> str:
    """From where another machine goes on."""
    return "its answers so far" if isinstance(job, EvalJob) else "its last checkpoint"


def serving_of_job(job: Job) -> Serving:
    """Raises UserError where this machine has less than the job takes."""
    if isinstance(job, EvalJob):
        return Serving(serve, leads=True)  # a process a device
    runtime = parse(Runtime, job.runtime, "runtime")
    try:
        check_room(runtime)
    except UserError as flaw:
        raise UserError(f"{socket.gethostname()}: {flaw}") from None
    return serving_of(runtime)


def optional(module: str, extra: str) -> ModuleType:
    """A package that only this launcher needs.  Raises UserError where it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError as missing:
        raise UserError(
            f"--launcher {extra} needs {module}, which cannot be imported here ({missing}); "
            f"install it on every machine: pip install 'ablab[{extra}]'"
        ) from None


def check_keys(launcher: str, given: Mapping[str, Any], known: Iterable[str]) -> None:
    """Raises UserError for an option that the launcher does not have."""
    listed = [*known]
    for key in given:
        if key not in listed:
            raise UserError(
                f"--{launcher} {key}: no such option. {near(key, listed)}Known: {', '.join(listed)}"
            )
