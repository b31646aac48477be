"""How a run ended: its status and its final numbers.  A run without a result is missing or interrupted."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ablab.core.store.metrics import MEASURED

FINISHED = "finished"
DIVERGED = "diverged"
OUT_OF_MEMORY = "out_of_memory"
FAILED = "failed"
PRUNED = "pruned"
STATUSES = (FINISHED, DIVERGED, OUT_OF_MEMORY, FAILED, PRUNED)
# Of runs without a result that can be read:
INTERRUPTED = "interrupted"  # a folder and no result: killed, or still running
DAMAGED = "damaged"
# Asked for again, these run again: code and runtime may have changed.
RETRY = (FAILED, OUT_OF_MEMORY, PRUNED)


def said(statuses: Mapping[str, int]) -> str:
    """Counts in words: 2 finished, 1 out of memory."""
    return ", ".join(
        f"{count} {status.replace('_', ' ')}" for status, count in statuses.items()
    )


def mean_of(results: Sequence["Result"], metric: str) -> float | None:
    """Of their final values; None where one has not left it."""
    found = [result.final(metric) for result in results]
    values = [value for value in found if value is not None]
    return sum(values) / len(values) if values and len(values) == len(found) else None


@dataclass(frozen=True)
class Result:
    """How a run ended.  `metrics` are final values; losses in nats/token, times in seconds."""

    run: str
    status: str
    step: int
    tokens: int
    metrics: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0  # training time (core/train/stopwatch.py), summed over resumes
    tokens_per_second: float = 0.0
    peak_bytes: int = 0
    error: str = ""
    code: str = ""  # fingerprint of the code that ran
    runtime: dict[str, Any] = field(default_factory=dict)
    # [first step, ranks] of each part of a run that went on with another number of ranks
    segments: list[list[int]] = field(default_factory=list)
    weights: str = ""  # digest of the final weights' bits, as trained
    # digest of the weights that were evaluated, where these are others: an average of them
    evaluated: str = ""
    log: str = ""  # digest of metrics.jsonl
    held_out: str = ""  # digest of held_out.npz
    dynamics: str = ""  # digest of dynamics.jsonl; "": nobody looked
    kernels: dict[str, str] = field(default_factory=dict)  # place -> what served it
    # Why its pace is that of a shared machine, in words: "2 runs at once"; "" where nothing was seen to share it.
    contended: str = ""

    def final(self, metric: str) -> float | None:
        """A final metric, or what was measured of the machine; None where the run has not left it."""
        if metric in MEASURED:
            measured: float = getattr(self, metric)
            return measured or None  # zero: not measured
        return self.metrics.get(metric)
