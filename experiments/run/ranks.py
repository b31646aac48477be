"""The ranks of one run on this host: started and watched by torch's elastic agent, which ends all when one dies.

runner -- pipe -- agent (a worker process) -- rank 0, which answers on the pipe
                                           -- rank 1 .. R-1, which follow what rank 0 says
"""

import logging
import os
import signal
import sys
import tempfile
import threading
import uuid
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ablab.core.errors import Halted, Pruned, UserError
from ablab.core.recipe.recipe import Recipe
from ablab.core.runtime.runtime import Runtime
from ablab.core.store.claim import Lost
from ablab.core.store.record import Record
from ablab.core.store.result import DIVERGED, FINISHED, PRUNED, Result
from ablab.experiments.run.garbage import collect_seldom
from ablab.experiments.run.messages import Dying, TrainJob
from ablab.experiments.run.turns import Turn
from ablab.experiments.run.worker import (
    GONE,
    Heard,
    Worker,
    answer_all,
    end_with_the_parent,
    keep_freed_memory,
    know_plugins,
    read_job,
)

if TYPE_CHECKING:
    from ablab.core.runtime.world import Joined, World
    from ablab.core.train.trainer import Warm

SECONDS_BETWEEN_LOOKS = 0.2  # of the agent at its ranks


CUT = "weights are cut by FSDP2: no recorded CUDA graphs, no kernels of ours, nothing compiled unasked"
# That a rank which cannot go on leaves to the agent: another may have died before it, and be the cause.
SECONDS_TO_BE_ENDED = 5.0
TOGETHER = (FINISHED, DIVERGED, PRUNED)  # so a run ends on all ranks, or on none


class RankDied(Exception):
    """One of the ranks ended before its time, and so did all: which, and of what."""


def launch(ranks: int, entry: Callable[..., Any], *given: Any) -> dict[int, Any]:
    """Call `entry` with what is given in as many processes of this host: what each of them returned, by rank.

    Each finds its place in the environment (RANK, LOCAL_RANK, WORLD_SIZE).  Raises RankDied; then none is left.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # What they say of a rank's death is said again here, in one line.
    for speaker in ("torch.distributed.elastic", "torch.multiprocessing"):
        logging.getLogger(speaker).setLevel(logging.CRITICAL)
    with tempfile.TemporaryDirectory(prefix="ablab-ranks-") as errors:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=ranks,
            run_id=uuid.uuid4().hex,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",  # a free port
            local_addr="localhost",  # else the host's name is looked up, which may take seconds
            max_restarts=0,
            monitor_interval=SECONDS_BETWEEN_LOOKS,
            logs_specs=DefaultLogsSpecs(log_dir=errors),
        )
        try:
            found: dict[int, Any] = elastic_launch(config, entry)(*given)
            return found
        except ChildFailedError as death:
            rank, failure = death.get_first_failure()
            raise RankDied(_cause(rank, ranks, failure)) from None


def _cause(rank: int, ranks: int, failure: Any) -> str:
    """failure: a ProcessFailure of torch's."""
    if failure.exitcode == -signal.SIGKILL:
        how = "was killed (SIGKILL, often for lack of host memory)"
    elif failure.exitcode < 0:
        how = f"was ended by {failure.signal_name()}"
    else:
        how = f"ended: {_said(failure)}"
    return f"rank {rank} of {ranks} {how}"


def _said(failure: Any) -> str:
    message = failure.error_file_data.get("message", "")
    if isinstance(message, dict):
        message = message.get("message", "")
    return str(message) or f"exit code {failure.exitcode}"


def local_rank() -> int:
    """Our place among the ranks of this host."""
    return int(os.environ["LOCAL_RANK"])


def end_when_told() -> None:
    """What ends ranks is a signal of their agent: it must not be blocked, as it is in whom we come from."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})


# -- a worker that leads ranks -----------------------------------------------------------------------------------------
def serve_ranks(
    pipe: Connection,
    plugins: list[str],
    environment: Mapping[str, str],
    turn: Turn | None,
    *,
    ranks: int,
    device: str,
) -> None:
    """As `worker.serve`, by so many processes; this one is their agent, and says of what they died."""
    end_with_the_parent()
    os.environ.update(environment)
    try:
        launch(ranks, serve_rank, pipe, plugins, turn, device)
    except RankDied as death:
        with suppress(*GONE):
            pipe.send(Dying(str(death)))
        sys.exit(1)


def serve_rank(pipe: Connection, plugins: list[str], turn: Turn | None, device: str) -> None:
    end_with_the_parent()
    end_when_told()
    collect_seldom()
    keep_freed_memory()
    know_plugins(plugins)
    from ablab.core.runtime.world import join, leave

    world = join(device, local_rank())
    warm = warm_for(world, rehearse=turn is not None)
    if world.rank == 0:
        lead(pipe, world, warm, turn)
    else:
        pipe.close()
        follow(world, warm)
    leave()


def warm_for(world: "Joined", rehearse: bool) -> "Warm":
    from ablab.core.train.sharded import ShardedTrainer
    from ablab.core.train.trainer import Trainer, Warm

    def make(recipe: Recipe, runtime: Runtime, data_folder: Path) -> Trainer:
        if runtime.shard == "weights":
            from ablab.core.train.fully_sharded import FullyShardedTrainer

            return FullyShardedTrainer(recipe, runtime, data_folder, world)
        return ShardedTrainer(recipe, runtime, data_folder, world)

    return Warm(rehearse, make)


def lead(pipe: Connection, world: "Joined", warm: "Warm", turn: Turn | None) -> None:
    """Rank 0: answer jobs, and let the others take part in them."""
    worker = Leader(pipe, warm, turn or nullcontext(), world=world, at_fault=wait_to_be_ended)
    answer_all(pipe, worker)
    if worker.broken:
        sys.exit(1)  # the others are in the midst of a step: the agent ends them
    world.told(None)


@dataclass(frozen=True, kw_only=True)
class Leader(Worker):
    """Executes jobs on all ranks."""

    world: "Joined"
    # Called before a fault becomes a result; may raise another in its place, its cause.
    at_fault: Callable[[], None]
    broken: list[str] = field(default_factory=list)  # runs that did not end on all ranks alike

    def _run_called(
        self,
        job: TrainJob,
        recipe: Recipe,
        runtime: Runtime,
        record: Record,
        runner: Heard,
        saved: Callable[[], None],
    ) -> Result:
        self.world.told(job)
        told = replace(job, about={**job.about, "world": self._about(runtime)})
        passed = Passed(runner, self.world)
        try:
            result = super()._run_called(told, recipe, runtime, record, passed, saved)
        except Halted:
            raise
        except (UserError, Lost, *GONE):
            self.broken.append(job.run)
            raise
        except Exception:
            self.broken.append(job.run)
            self.at_fault()
            raise
        if result.status not in TOGETHER:
            self.broken.append(job.run)
        return result

    def _about(self, runtime: Runtime) -> dict[str, Any]:
        """What run.json says of the ranks."""
        backend, recordable = self.world.backend, self.world.recordable
        if runtime.shard == "state":
            return {"backend": backend, "messages_in_graphs": recordable}
        self._warn(f"runtime.shard=weights: {CUT}")
        return {"backend": backend, "messages_in_graphs": False, "weights": CUT}


@dataclass(frozen=True)
class Passed:
    """What the runner says at a log, said to all ranks."""

    runner: Heard
    world: "World"

    def log(self, step: int, scalars: Mapping[str, float], seconds: float) -> None:
        try:
            self.runner.log(step, scalars, seconds)
        except Pruned:
            self.world.agreed(True)
            raise
        self.world.agreed(False)

    def halts(self) -> bool:
        return self.runner.halts()


def unheard(job: TrainJob) -> None:
    """The agent says what the ranks died of."""


def follow(world: "World", warm: "Warm", lost: Callable[[TrainJob], None] = unheard) -> None:
    """Every other rank: take part in each run that rank 0 names, until it names none.

    lost: called of a run that ends here by a fault, while the other ranks may still be there.
    """
    while job := world.told(None):
        try:
            take_part(job, world, warm)
        except Exception:
            lost(job)
            wait_to_be_ended()
            raise


def take_part(job: TrainJob, world: "World", warm: "Warm") -> None:
    """Train a run whose record is rank 0's; what is written here goes with the folder that it is written to.

    Raises Unfinished where it ended here and goes on elsewhere.
    """
    from ablab.core.train.run import run

    recipe, runtime = read_job(job)
    # Whoever has a part of the weights takes part in keeping them.
    kept = runtime.keep_weights and runtime.shard == "weights"
    before = recipe.before.run
    with tempfile.TemporaryDirectory(prefix="ablab-rank-") as own, suppress(Halted):
        result = run(
            recipe,
            replace(runtime, keep_weights=kept),
            job.data,
            Record(Path(own), job.run),
            log=Followed(world).log,
            warn=unsaid,
            warm=warm,
            parent=job.folder.parent / before if before else job.start,
        )
        if result.status not in TOGETHER:
            raise Unfinished(result.error)


class Unfinished(Exception):
    """A rank could not go on: out of memory, above all."""


@dataclass(frozen=True)
class Followed:
    """Rank 0's runner, as another rank hears of it."""

    world: "World"

    def log(self, step: int, scalars: Mapping[str, float], seconds: float) -> None:
        if self.world.agreed(False):
            raise Pruned


def unsaid(line: str) -> None:
    """Rank 0 says the same."""


def wait_to_be_ended() -> None:
    threading.Event().wait(SECONDS_TO_BE_ENDED)
