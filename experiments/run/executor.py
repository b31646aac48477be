"""What the runner needs from somebody who executes jobs, wherever that happens."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from ablab.core.recipe.recipe import Recipe
from ablab.core.runtime.runtime import Runtime
from ablab.core.store.store import Store
from ablab.experiments.run.messages import Job, Message


@dataclass(frozen=True)
class Task:
    """A job that is made when it is given out: ten thousand of them would fill the memory.

    None: it is not to be begun any more, and is dropped.
    """

    make: Callable[[], Job | None]
    affinity: str = ""  # tasks of one affinity suit one worker: it is warm for the second


class Listener(Protocol):
    def __call__(self, job: Job, message: Message) -> Iterable[Task]:
        """What a job's executor says of it -> tasks that may begin now."""


class Executor(Protocol):
    """Local processes (processes.py), or machines elsewhere (experiments/launch/).

    tests/experiments/run/test_executors.py holds each of them to what is said here.
    """

    def execute(self, tasks: Iterable[Task], heard: Listener) -> None:
        """Execute each task, and those that `heard` returns, until each has been answered.

        `heard` is called in this thread, with every message of a job in the order in which it was said.  A job that is
        Busy, or Lost with a machine, is given out again after a while.  A run whose worker dies is Done with a failed
        result, a trace is Untraced.
        Raises UserError where nothing can be executed.
        """

    def stop(self, run: str) -> None:
        """End a run early, at its next log: it is Done with a pruned result."""

    def halt(self) -> None:
        """Give out nothing more; what trains is saved at its next step and Halted, and then `execute` returns.

        It waits for that halting.GRACE seconds at most, and for no trace.  Called in a signal handler, it only notes
        the wish.
        """

    def close(self) -> None:
        """Leave nothing running.  What was still at work resumes from its checkpoint when it is asked for again."""


class Launcher(Protocol):
    """Where the runs of a command are executed: on this machine (this_machine.py), or on others."""

    def checked(self, runtime: Runtime, recipes: Iterable[Recipe]) -> Runtime:
        """The runtime with its device and its ranks.  Starts nothing; raises UserError where nothing can execute it."""

    def settled(
        self, runtime: Runtime, recipes: Iterable[Recipe], plugins: Iterable[str | Path]
    ) -> Runtime:
        """The runtime as it is asked of every run: `checked`, with its kernels.  Raises UserError."""

    def place(self, runtime: Runtime) -> str:
        """Whose devices train, in words; empty where they are this machine's."""

    def carried(self, runtime: Runtime) -> int:
        """How many runs it carries at a time, where nobody says."""

    def sharing(self, runtime: Runtime, jobs: int) -> str:
        """Of so many runs at a time: why the pace of one is that of a shared device; empty where it is not."""

    def start(
        self, store: Store, runtime: Runtime, jobs: int | None, plugins: Iterable[str]
    ) -> Executor:
        """jobs: at a time; None: as many as it carries."""
