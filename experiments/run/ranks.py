"""The ranks of one run on this host: started and watched by torch's elastic agent, which ends all when one dies.

runner -- pipe -- agent (a worker process) -- rank 0, which answers on the pipe
                                           -- rank 1 .. R-1, which follow what rank 0 says
"""

import logging
import os
import signal
import tempfile
import uuid
from collections.abc import Callable
from typing import Any

SECONDS_BETWEEN_LOOKS = 0.2  # of the agent at its ranks


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
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
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
    if failure.exitcode < 0:
        how = f"was killed by {failure.signal_name()} (SIGKILL: often for lack of host memory)"
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
