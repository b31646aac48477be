"""A command that torchrun started on every rank, on one host or several: rank 0 plans and records, the others follow.

torchrun --nnodes 2 --nproc-per-node 8 ... -m ablab.experiments.cli run EXPERIMENT
"""

import os
import signal
import time
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from ablab.core.errors import UserError
from ablab.core.runtime.runtime import Runtime
from ablab.core.store.claim import State, this_process
from ablab.experiments.run.capacity import gpus_for
from ablab.experiments.run.executor import Listener, Task
from ablab.experiments.run.halting import SIGNALS
from ablab.experiments.run.messages import (
    Busy,
    Halt,
    Job,
    Message,
    Order,
    Stop,
    TrainJob,
)
from ablab.experiments.run.processes import CURE, failure
from ablab.experiments.run.ranks import (
    SECONDS_TO_BE_ENDED,
    Leader,
    RankDied,
    follow,
    local_rank,
    warm_for,
)
from ablab.experiments.run.worker import keep_freed_memory
from ablab.experiments.run.workers import PATIENCE, Waiting

if TYPE_CHECKING:
    from ablab.core.runtime.world import Joined

LOOKING = 0.05  # seconds between two looks at who is left
SET_BY_TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def ranks_here() -> int:
    """How many ranks torchrun has started for this command; 1 where it did not."""
    if all(name in os.environ for name in SET_BY_TORCHRUN):
        return int(os.environ["WORLD_SIZE"])
    return 1


def is_follower() -> bool:
    return ranks_here() > 1 and os.environ["RANK"] != "0"


def follow_command(runtime: Runtime) -> None:
    """What every rank but the first does: take part in what rank 0 trains, until it has trained all."""
    from ablab.core.runtime.world import join, leave

    for number in SIGNALS:  # rank 0 hears them too, and says when all stop
        signal.signal(number, signal.SIG_IGN)
    keep_freed_memory()
    world = join(device_of(runtime), local_rank())
    neighbours = Neighbours.of(world)
    follow(world, warm_for(world, rehearse=False), partial(record_lost_leader, neighbours))
    leave()


@dataclass(frozen=True)
class Neighbours:
    """The ranks of torchrun's command, whose agents end all when one dies and tell nobody of what."""

    own: int  # rank
    processes: tuple[State, ...]  # of each rank

    @classmethod
    def of(cls, world: "Joined") -> "Neighbours":
        """Asked of all ranks at once."""
        import torch.distributed as dist

        found: list[Any] = [None] * world.size
        dist.all_gather_object(found, this_process(), group=world.words)
        return cls(world.rank, tuple(found))

    def gone(self) -> list[int]:
        """Ranks of this host whose processes have ended: waits for the first of them, as long as ranks are left."""
        until = time.monotonic() + SECONDS_TO_BE_ENDED
        while not (gone := self._gone()) and time.monotonic() < until:
            time.sleep(LOOKING)
        return gone

    def _gone(self) -> list[int]:
        return [rank for rank, process in enumerate(self.processes) if process.is_dead]

    def cause(self, gone: list[int]) -> str:
        ranks = " and ".join(map(str, gone))
        return f"rank {ranks} of {len(self.processes)} ended; torchrun's last lines say of what"


def name_the_dead(neighbours: Neighbours) -> None:
    """On rank 0, at a fault: raises RankDied where another rank is its cause."""
    if gone := neighbours.gone():
        raise RankDied(f"{neighbours.cause(gone)}; {CURE}")


def record_lost_leader(neighbours: Neighbours, job: TrainJob) -> None:
    """On any other rank, at a fault: where rank 0 has ended, the first that is left writes its record."""
    gone = neighbours.gone()
    left = [rank for rank in range(len(neighbours.processes)) if rank not in gone]
    if 0 in gone and neighbours.own == left[0]:
        failure(job, neighbours.cause(gone))


def device_of(runtime: Runtime) -> str:
    return "cuda" if gpus_for(runtime) else "cpu"


class InThisProcess:
    """Executes jobs on the ranks of torchrun, of which this process is the first: an Executor."""

    def __init__(self, runtime: Runtime):
        from ablab.core.runtime.world import join

        keep_freed_memory()
        self.world = join(device_of(runtime), local_rank())
        self.words = Words()
        warm = warm_for(self.world, rehearse=False)
        naming = partial(name_the_dead, Neighbours.of(self.world))
        self.leader = Leader(self.words, warm, nullcontext(), world=self.world, at_fault=naming)
        self.halting = False

    def execute(self, tasks: Iterable[Task], heard: Listener) -> None:
        waiting = Waiting(tasks)
        while waiting and not self.halting:
            if not waiting.is_due:
                time.sleep(PATIENCE / 2)
                continue
            task = waiting.take("", ())
            if job := task.make():
                self._answer(job, waiting, heard)

    def _answer(self, job: Job, waiting: Waiting, heard: Listener) -> None:
        self.words.say = partial(_passed_on, job, waiting, heard)
        answer = self.leader.answer(job)
        if isinstance(answer, Busy):
            waiting.postpone(job, "")
        self.words.say(answer)
        if self.leader.broken:
            raise UserError(
                f"run {job.run} ended on one rank alone, and the others cannot go on; "
                "its record says why; start the command again"
            )

    def stop(self, run: str) -> None:
        self.words.orders.append(Stop(run))

    def halt(self) -> None:
        self.halting = True
        self.words.orders.append(Halt())

    def close(self) -> None:
        from ablab.core.runtime.world import leave

        if not self.leader.broken:
            self.world.told(None)
            leave()


def _passed_on(job: Job, waiting: Waiting, heard: Listener, message: Message) -> None:
    waiting.tasks.extend(heard(job, message))


class Words:
    """What a worker and its runner say to each other, where both are one process: a Pipe."""

    def __init__(self) -> None:
        self.say: Callable[[Any], None]  # to the runner, of the job in hand
        self.orders: deque[Order] = deque()

    def send(self, said: Any) -> None:
        self.say(said)

    def poll(self) -> bool:
        return bool(self.orders)

    def recv(self) -> Any:
        return self.orders.popleft()
