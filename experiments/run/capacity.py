"""How many runs this machine carries at once.  No torch here."""

import math
import os
import subprocess

from ablab.core.runtime.runtime import Runtime, visible_gpus

# jobs a GPU that do not take turns: 36 runs of `quickstart` took 78 s one by one, 47 s with 4 jobs, 45 s with 8
AT_ONCE = 4
SOON = 10  # seconds that nvidia-smi may take: 0.1 on a card that is awake, 3 on one that is not


def gpus_for(runtime: Runtime) -> list[str]:
    """The GPUs that its runs may use, as CUDA_VISIBLE_DEVICES names them."""
    return [] if runtime.device in ("cpu", "mps") else visible_gpus()


def on_gpus(runtime: Runtime) -> bool:
    """Whether its runs are trained on GPUs: of this machine, unless the runtime names a device."""
    return runtime.device == "cuda" or bool(gpus_for(runtime))


def seats_for(runtime: Runtime) -> list[str]:
    """The GPUs of one run each, likewise: "0" and "1", or "0,1" where two train it.  Those left over stay idle."""
    gpus, each = gpus_for(runtime), runtime.ranks
    firsts = range(0, len(gpus) - each + 1, each)
    return [",".join(gpus[first : first + each]) for first in firsts]


def default_jobs(runtime: Runtime) -> int:
    """One worker a seat, AT_ONCE where they do not take turns; but no more than the cores carry at `threads` each.

    Without a GPU, as many as the cores carry.
    """
    if runtime.device == "mps":
        return 1  # there is one GPU, and its memory is the machine's
    carried = max(_cores() // (runtime.threads * runtime.ranks), 1)
    seats = len(seats_for(runtime))
    if not seats:
        return carried
    if in_turn(runtime):
        return seats
    return max(min(seats * AT_ONCE, carried), seats)


def training_at_once(runtime: Runtime, jobs: int) -> int:
    """Of so many jobs, those that train at one time: jobs that share a GPU may take turns on it."""
    seats = len(seats_for(runtime))
    return min(jobs, seats) if seats and in_turn(runtime) else jobs


def in_turn(runtime: Runtime) -> bool:
    """Whether jobs that share a GPU take turns; they do where nobody has settled it (experiments/run/sharing.py)."""
    return runtime.turns is not False


def runs_a_device(runtime: Runtime, jobs: int) -> int:
    """Of so many jobs, those that train on one device at one time; all CPUs of the machine are one."""
    return math.ceil(training_at_once(runtime, jobs) / max(len(gpus_for(runtime)), 1))


def shared_by(runtime: Runtime, jobs: int, strangers: int) -> str:
    """Why the pace of a run is that of a shared device, in words; empty where nothing shares it.

    strangers: other processes that computed on its GPUs before (`strangers_on`).
    """
    seen = []
    if (at_once := runs_a_device(runtime, jobs)) > 1:
        seen.append(f"{at_once} runs at once")
    if strangers:
        seen.append("another process on the card")
    return " and ".join(seen)


def strangers_on(gpus: list[str]) -> int:
    """Processes that compute on these GPUs, before one of ours does; 0 where nvidia-smi is not there or sees none.

    In a container it sees those of the container alone, if any.
    """
    if not gpus:
        return 0
    words = [
        "nvidia-smi",
        f"--id={','.join(gpus)}",
        "--query-compute-apps=pid",
        "--format=csv,noheader",
    ]
    try:
        # No shell; the program is looked for on the user's own PATH.
        asked = subprocess.run(words, capture_output=True, text=True, timeout=SOON)  # noqa: S603
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return sum(line.strip().isdigit() for line in asked.stdout.splitlines())


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
