"""Workers, wherever they are: given jobs, listened to, replaced when they are gone."""

import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from itertools import chain
from typing import Generic, TypeVar

from ablab.experiments.run.executor import Listener, Task
from ablab.experiments.run.halting import GRACE
from ablab.experiments.run.messages import (
    Answer,
    Busy,
    Halt,
    Job,
    Lost,
    Message,
    OnTheWay,
    Order,
    Ready,
    Saving,
    Stop,
)
from ablab.experiments.run.worker import ends_itself

PATIENCE = 1.0  # seconds before a run that another process holds is asked for again


@dataclass(eq=False, kw_only=True)
class WorkerHandle:
    """One worker, as the runner sees it."""

    slot: int
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
        """Send it an order; nothing happens where it is dead."""
        raise NotImplementedError

    def hear(self) -> Ready | Message | None:
        """What it says next; None where it is dead."""
        raise NotImplementedError

    def heard(self, said: Ready | Message) -> None:
        """Note what its words say of itself."""
        if not isinstance(said, OnTheWay):
            self.was_ready = True
            self.job = None
            self.is_free = not ends_itself(said)


W = TypeVar("W", bound=WorkerHandle)


class Workers(ABC, Generic[W]):
    """Up to `count` workers, started as work comes: an Executor."""

    def __init__(self, count: int):
        self.count = count
        self.workers: list[W] = []
        self.halting: float | None = None  # since when, on the clock

    def execute(self, tasks: Iterable[Task], heard: Listener) -> None:
        waiting = Waiting(tasks)
        wanted = len(self.workers)
        while self._goes_on(waiting):
            wanted = max(wanted, min(self.carried(), len(waiting.tasks)))
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

    def carried(self) -> int:
        """How many can be at work now."""
        return self.count

    # -- what differs from place to place --------------------------------------------------------------------------
    @abstractmethod
    def _start(self, slot: int) -> W:
        """A new one, which will say when it is ready."""

    @abstractmethod
    def _speaking(self) -> list[W]:
        """The workers that have said something, or died; waits a little for the first."""

    @abstractmethod
    def _bury(self, worker: W) -> Answer | None:
        """A worker died: what is to be said of the job that it had in hand.

        Raises UserError where another would die of the same.
        """

    # -- the steps of `execute` ------------------------------------------------------------------------------------
    def _goes_on(self, waiting: "Waiting") -> bool:
        if self.halting is None:
            return bool(waiting) or any(worker.job for worker in self.workers)
        waiting.clear()
        saving = [worker for worker in self.workers if isinstance(worker.job, Saving)]
        for worker in saving:
            worker.halt()
        return bool(saving) and time.monotonic() - self.halting < GRACE

    def _start_missing(self, wanted: int) -> None:
        taken = {worker.slot for worker in self.workers}
        for slot in range(wanted):
            if slot not in taken:
                self.workers.append(self._start(slot))

    def _give_out(self, waiting: "Waiting") -> None:
        for worker in self.workers:
            while worker.is_free and waiting.is_due:
                taken = {one.affinity for one in self.workers}
                task = waiting.take(worker.affinity, taken)
                if job := task.make():
                    worker.give(job, task.affinity)

    def _listen(self, worker: W, waiting: "Waiting", heard: Listener) -> None:
        job = worker.job
        said = worker.hear()
        if said is None:
            self.workers.remove(worker)
            said = self._bury(worker)
        if job is None or said is None or isinstance(said, Ready):
            return
        if isinstance(said, Busy | Lost):
            waiting.postpone(job, worker.affinity)
        waiting.tasks.extend(heard(job, said))


# -- what they will be given -------------------------------------------------------------------------------------------
class Waiting:
    """Tasks in the order in which they came, and jobs that nobody could take when they were given out."""

    def __init__(self, tasks: Iterable[Task], patience: float = PATIENCE):
        self.tasks = deque(tasks)
        self.patience = patience
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
        due = time.monotonic() + self.patience
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
