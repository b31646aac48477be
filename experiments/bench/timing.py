"""Clocks and ceilings: how long a call takes on a device, how fast that device is, and what kept it busy."""

import bisect
import json
import platform
import subprocess
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

PEAK = 989e12  # FLOP/s, dense bf16, H100 SXM: NVIDIA's data sheet
PHASES = ("data", "forward", "backward", "optimizer")
PREFIX = "bench/"  # of our ranges in a trace
ON_DEVICE = (
    "kernel",
    "gpu_memcpy",
    "gpu_memset",
)  # categories of a trace: what occupies the device
LAUNCHING = ("cuda_runtime", "cuda_driver")
LONGEST = 25  # kernels to name


def settled(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(call: Callable[[], Any], device: torch.device) -> float:
    """Of one call: between two events on the device's queue, or on the clock of a CPU."""
    if device.type != "cuda":
        began = time.perf_counter()
        call()
        return time.perf_counter() - began
    first, last = _event(), _event()
    first.record()
    call()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1e3


def median_seconds(
    call: Callable[[Any], Any],
    device: torch.device,
    repeats: int,
    before: Callable[[], Any] = lambda: None,
    warm_up: int = 3,
) -> float:
    """Median over `repeats` of call(before()); only the call is timed, and a GPU is not waited for in between.

    Before each call a GPU writes 512 MB, which empties its cache, and waits some 2 ms, so that the host runs ahead and the
    time of launching is not counted as the kernel's.
    """
    for _ in range(warm_up):
        call(before())
    settled(device)
    if device.type != "cuda":
        return median(_timed(call, before()) for _ in range(repeats))
    flush, pairs = (
        torch.empty(512 << 20, dtype=torch.uint8, device=device),
        [(_event(), _event()) for _ in range(repeats)],
    )
    for number, (first, last) in enumerate(pairs):
        given = before()
        flush.fill_(number % 256)
        torch.cuda._sleep(4_000_000)  # clock cycles
        first.record()
        call(given)
        last.record()
    settled(device)
    return median(first.elapsed_time(last) / 1e3 for first, last in pairs)


def _timed(call: Callable[[Any], Any], given: Any) -> float:
    began = time.perf_counter()
    call(given)
    return time.perf_counter() - began


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)


def in_turn(
    steps: Sequence[Callable[[], Any]], count: int, windows: int, device: torch.device
) -> list[list[float]]:
    """For each of `steps`, its seconds in each window of `count` steps; A B B A A B ..., so that a drift of the clocks hits both alike."""
    times: list[list[float]] = [[] for _ in steps]
    for window in range(windows):
        for i in range(len(steps))[:: 1 if window % 2 == 0 else -1]:
            settled(device)
            times[i].append(
                seconds(lambda i=i: [steps[i]() for _ in range(count)], device) / count
            )
    return times


# -- ceilings ----------------------------------------------------------------------------------------------------------
def matmul_rate(device: torch.device) -> float:
    """FLOP/s of a large product of random matrices: 8192^3 in bf16 on a GPU, 512^3 in fp32 on a CPU."""
    side, dtype, repeats = (
        (8192, torch.bfloat16, 30) if device.type == "cuda" else (512, torch.float32, 5)
    )
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    return 2 * side**3 / _sustained(lambda: a @ b, device, repeats)


def copy_rate(device: torch.device) -> float:
    """Bytes a second of a copy within the device, read and written: of 2 GiB on a GPU, 64 MiB on a CPU."""
    size, repeats = (2 << 30, 30) if device.type == "cuda" else (64 << 20, 5)
    source = torch.randint(255, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / _sustained(lambda: target.copy_(source), device, repeats)


def _sustained(call: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """Seconds of a call among many back to back, the median of five windows after one to warm up."""
    return median(in_turn([call], repeats, 6, device)[0][1:])


def clocks(load: Callable[[], Any]) -> dict[str, float]:
    """What nvidia-smi says while `load` runs: MHz, W, degrees C; empty where it says nothing."""
    asked = {
        "clocks.sm": "sm_mhz",
        "clocks.max.sm": "max_sm_mhz",
        "clocks.mem": "memory_mhz",
        "power.draw": "watts",
        "temperature.gpu": "celsius",
    }
    line = ["nvidia-smi", f"--query-gpu={','.join(asked)}", "--format=csv,noheader,nounits"]
    try:
        told = subprocess.Popen(
            line, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
    except OSError:
        return {}
    while told.poll() is None:
        load()
    first = told.stdout.read().strip().splitlines()[:1]
    try:
        return dict(zip(asked.values(), map(float, first[0].split(",")), strict=True))
    except (IndexError, ValueError):
        return {}


def machine(device: torch.device) -> dict[str, Any]:
    import importlib.util

    triton = __import__("triton").__version__ if importlib.util.find_spec("triton") else None
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"cpu, {platform.machine()}, {torch.get_num_threads()} threads"
    )
    return {
        "device": name,
        "torch": str(torch.__version__),
        "triton": triton,
        "python": platform.python_version(),
    }


# -- where the time goes -----------------------------------------------------------------------------------------------
class Marks:
    """`marks(phase)` ends the phase before it.  Host seconds add up in `seconds`; a profiler sees each phase as a range."""

    def __init__(self) -> None:
        self.on, self.open, self.seconds = False, None, defaultdict(float)

    def __call__(self, phase: str | None) -> None:
        if not self.on:
            return
        now = time.perf_counter()
        if self.open:
            name, since, span = self.open
            span.__exit__(None, None, None)
            self.seconds[name] += now - since
        self.open = None
        if phase:
            span = torch.profiler.record_function(PREFIX + phase)
            span.__enter__()
            self.open = (phase, time.perf_counter(), span)

    def around(self, call: Callable, phase: str, then: str) -> Callable:
        def marked(*given: Any) -> Any:
            self(phase)
            result = call(*given)
            self(then)
            return result

        return marked


def host_split(step: Callable[[], Any], marks: Marks, count: int) -> dict[str, float]:
    """Seconds a step that the host spends in each phase."""
    marks.seconds.clear()
    marks.on = True
    for _ in range(count):
        step()
        marks(None)
    marks.on = False
    return {phase: marks.seconds[phase] / count for phase in PHASES}


def device_split(
    step: Callable[[], Any], marks: Marks, device: torch.device, count: int = 3
) -> dict[str, Any]:
    """Profile `count` steps: busy seconds of each phase, kernels and launches, all a step.  A kernel belongs to the phase that launched it."""
    return busy(_trace(lambda: host_split(step, marks, count), device, host=True), count)


def busy_share(step: Callable[[], Any], device: torch.device, count: int = 5) -> float | None:
    """Of the time between the first and the last kernel of `count` steps, the share that the device works.  None: the profiler saw nothing."""
    work = _on_device(_trace(lambda: [step() for _ in range(count)], device, host=False))
    whole = max((one["ts"] + one["dur"] for one in work), default=0) - min(
        (one["ts"] for one in work), default=0
    )
    return sum(_uncovered(work)) / whole if whole else None


def _trace(work: Callable[[], Any], device: torch.device, host: bool) -> list[dict[str, Any]]:
    """Events of a profile.  host: the launching side too, which slows it."""
    from torch.profiler import ProfilerActivity, profile

    settled(device)
    with tempfile.TemporaryDirectory() as folder:
        with profile(
            activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU][: 1 + host]
        ) as seen:
            work()
            settled(device)
        seen.export_chrome_trace(str(path := Path(folder) / "trace.json"))
        return json.loads(path.read_text())["traceEvents"]


def _on_device(events: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return sorted(
        (one for one in events if "dur" in one and one.get("cat") in ON_DEVICE),
        key=lambda one: one["ts"],
    )


def _uncovered(work: Iterable[Mapping[str, Any]]) -> Iterator[float]:
    """Of each in turn, the microseconds that no earlier one covers."""
    until = float("-inf")
    for one in work:
        end = one["ts"] + one["dur"]
        yield max(end - max(one["ts"], until), 0.0)
        until = max(until, end)


def busy(events: Iterable[Mapping[str, Any]], count: int) -> dict[str, Any]:
    """The same from a trace's events.  Work that overlaps on several queues counts once: phases add up to the time that the device was busy."""
    events = [one for one in events if "dur" in one]
    spans = sorted(
        (one["ts"], one["name"].removeprefix(PREFIX))
        for one in events
        if one.get("cat") == "user_annotation" and one["name"].startswith(PREFIX)
    )
    launches = {
        one["args"]["correlation"]: one
        for one in events
        if one.get("cat") in LAUNCHING and "correlation" in one.get("args", {})
    }
    starts, split = [span[0] for span in spans], dict.fromkeys(PHASES, 0.0)
    work, named = _on_device(events), defaultdict(lambda: [0.0, 0.0])
    for one, new in zip(work, _uncovered(work), strict=True):
        launch = launches.get(one["args"].get("correlation"), one)
        phase = spans[max(bisect.bisect_right(starts, launch["ts"]) - 1, 0)][1]
        split[phase] += new / 1e6 / count
        for i, more in enumerate((one["dur"] / 1e3, 1)):
            named[phase, one["name"]][i] += more / count
    kernels = sum(one["cat"] == "kernel" for one in work)
    calls = sum("launch" in one["name"].lower() for one in launches.values())
    longest = sorted(
        (
            {"phase": phase, "kernel": name, "ms": ms, "times": times}
            for (phase, name), (ms, times) in named.items()
        ),
        key=lambda one: -one["ms"],
    )
    return {
        "split": split,
        "kernels": kernels / count,
        "launches": calls / count,
        "longest": longest[:LONGEST],
    }
