"""Where the time of a step goes: the arithmetic of a trace is that of a hand."""

import pytest
import torch

from ablab.experiments.bench import phases

CPU = torch.device("cpu")
INSTANT = {"cat": "kernel", "name": "no duration"}


def event(category, ts, dur, correlation=None, name=""):
    args = {} if correlation is None else {"correlation": correlation}
    return {"cat": category, "ts": ts, "dur": dur, "name": name, "args": args}


def test_a_trace_gives_each_phase_its_busy_time_and_counts_overlap_once():
    """Microseconds.  Kernels run long after they are launched; 3 overlaps 2 by 10.

    4 is replayed by one launch of a graph, twice.
    """
    ranges = [
        event("user_annotation", start, 10, name=f"bench/{phase}")
        for phase, start in zip(phases.PHASES, (0, 10, 20, 30), strict=True)
    ]
    calls = [
        event("cuda_runtime", 5, 1, 1, "cudaMemcpyAsync"),
        event("cuda_driver", 12, 1, 2, "cuLaunchKernelEx"),
        event("cuda_runtime", 22, 1, 3, "cudaLaunchKernel"),
        event("cuda_runtime", 33, 1, 4, "cudaGraphLaunch"),
        event("cpu_op", 33, 1),
    ]
    work = [
        event("gpu_memcpy", 100, 5, 1),
        event("kernel", 110, 50, 2),
        event("kernel", 150, 30, 3),
        event("kernel", 200, 7, 4, "move"),
        event("kernel", 210, 8, 4, "move"),
    ]
    told = phases.split_of([*calls, *reversed(work), *ranges, INSTANT], count=2)
    assert told.seconds == pytest.approx(
        {"data": 2.5e-6, "forward": 25e-6, "backward": 10e-6, "optimizer": 7.5e-6}
    )
    assert told.kernels == 2
    assert told.launches == 1.5
    assert [(one.phase, one.ms) for one in told.longest] == [
        ("forward", 0.025),
        ("backward", 0.015),
        ("optimizer", 0.0075),
        ("data", 0.0025),
    ]
    assert told.longest[2].name == "move"
    assert told.longest[2].times == 1


def test_gaps_are_what_no_kernel_covers_between_the_first_and_the_last(monkeypatch):
    work = [
        event("kernel", 100, 50),
        event("kernel", 140, 20),
        event("gpu_memcpy", 180, 20),
        event("cpu_op", 0, 900),
    ]
    seen = [*reversed(work), INSTANT]
    monkeypatch.setattr(phases, "trace", lambda *given, **more: seen)
    assert phases.busy_share(lambda: None, CPU) == pytest.approx(80 / 100)
    monkeypatch.setattr(phases, "trace", lambda *given, **more: [])
    assert phases.busy_share(lambda: None, CPU) is None
