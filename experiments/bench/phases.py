"""Where the time of a step goes: its phases on the host, and what they keep busy on the device."""

import bisect
import json
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from ablab.experiments.bench.clocks import settled

PHASES = ("data", "forward", "backward", "optimizer")
PREFIX = "bench/"  # of our ranges in a trace
ON_DEVICE = (
    "kernel",
    "gpu_memcpy",
    "gpu_memset",
)  # categories of a trace: what occupies the device
LAUNCHING = ("cuda_runtime", "cuda_driver")
LONGEST = 25  # kernels to name
MICROSECONDS = 1e6  # in a second; a trace counts in them
MILLISECOND = 1e3  # in microseconds

Event = Mapping[str, Any]  # of a trace: "cat", "name", "ts" and "dur" in microseconds, "args"


class Marks:
    """`marks(phase)` ends the phase before it.

    Host seconds add up in `seconds`; a profiler sees each phase as a range.  Nothing happens while `on` is false.
    """

    def __init__(self) -> None:
        self.on = False
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._open: _Phase | None = None

    def __call__(self, phase: str | None) -> None:
        if not self.on:
            return
        if self._open:
            self.seconds[self._open.name] += self._open.close()
        self._open = _Phase(phase) if phase else None

    def around(self, owner: Any, method: str, phase: str, then: str) -> None:
        """From here on a call of the owner's method is in `phase`, and what follows it in `then`."""
        call: Callable[..., Any] = getattr(owner, method)

        def marked(*given: Any) -> Any:
            self(phase)
            result = call(*given)
            self(then)
            return result

        setattr(owner, method, marked)


class _Phase:
    """A range of the profiler that is open, and since when."""

    def __init__(self, name: str) -> None:
        self.name = name
        self._range = torch.profiler.record_function(PREFIX + name)
        self._range.__enter__()
        self._began = time.perf_counter()

    def close(self) -> float:
        """Seconds since it was opened."""
        ended = time.perf_counter()
        self._range.__exit__(None, None, None)
        return ended - self._began


def host_split(step: Callable[[], Any], marks: Marks, count: int) -> dict[str, float]:
    """Seconds a step that the host spends in each phase."""
    marks.seconds.clear()
    marks.on = True
    for _ in range(count):
        step()
        marks(None)
    marks.on = False
    return {phase: marks.seconds[phase] / count for phase in PHASES}


@dataclass(frozen=True)
class Kernel:
    """All launches of one kernel in one phase."""

    phase: str
    name: str
    ms: float  # a step
    times: float  # a step


@dataclass(frozen=True)
class DeviceSplit:
    """What a device did, all a step.

    Work that overlaps on several queues counts once in `seconds`: phases add up to the time that the device was busy.
    """

    seconds: dict[str, float]  # of each phase
    kernels: float
    launches: float  # by the host; the replay of a graph is one
    longest: list[Kernel]


def device_split(
    step: Callable[[], Any],
    marks: Marks,
    device: torch.device,
    count: int = 3,
) -> DeviceSplit:
    """Profile `count` steps.  A kernel belongs to the phase that launched it."""
    events = trace(lambda: host_split(step, marks, count), device, host=True)
    return split_of(events, count)


def busy_share(step: Callable[[], Any], device: torch.device, count: int = 5) -> float | None:
    """Of the time between the first and the last kernel of `count` steps, the share that the device works.

    None: the profiler saw nothing.
    """

    def steps() -> None:
        for _ in range(count):
            step()

    work = _on_device(trace(steps, device, host=False))
    if not work:
        return None
    began = min(event["ts"] for event in work)
    ended = max(event["ts"] + event["dur"] for event in work)
    return sum(_uncovered(work)) / (ended - began)


def trace(work: Callable[[], Any], device: torch.device, host: bool) -> list[Event]:
    """Events of a profile.  host: the launching side too, which slows it."""
    activities = [ProfilerActivity.CUDA]
    if host:
        activities.append(ProfilerActivity.CPU)
    settled(device)
    with tempfile.TemporaryDirectory() as folder:
        with profile(activities=activities) as seen:
            work()
            settled(device)
        path = Path(folder) / "trace.json"
        seen.export_chrome_trace(str(path))
        return json.loads(path.read_text())["traceEvents"]


def _on_device(events: Iterable[Event]) -> list[Event]:
    work = [event for event in events if "dur" in event and event.get("cat") in ON_DEVICE]
    return sorted(work, key=lambda event: event["ts"])


def _uncovered(work: Iterable[Event]) -> Iterator[float]:
    """Of each in turn, the microseconds that no earlier one covers."""
    until = float("-inf")
    for event in work:
        end = event["ts"] + event["dur"]
        yield max(end - max(event["ts"], until), 0.0)
        until = max(until, end)


class _Launches:
    """Who launched what: the phase in which the host launched a kernel."""

    def __init__(self, events: Iterable[Event]) -> None:
        timed = [event for event in events if "dur" in event]
        spans = sorted(_spans(timed))
        self._starts = [start for start, _ in spans]
        self._phases = [phase for _, phase in spans]
        self._by_correlation = {
            event["args"]["correlation"]: event
            for event in timed
            if event.get("cat") in LAUNCHING and "correlation" in event.get("args", {})
        }

    def phase_of(self, event: Event) -> str:
        launch = self._by_correlation.get(event["args"].get("correlation"), event)
        last = bisect.bisect_right(self._starts, launch["ts"]) - 1
        return self._phases[max(last, 0)]

    def count(self) -> int:
        launches = self._by_correlation.values()
        return sum("launch" in event["name"].lower() for event in launches)


def _spans(events: Iterable[Event]) -> Iterator[tuple[float, str]]:
    """(start, phase) of our ranges."""
    for event in events:
        ours = event["name"].startswith(PREFIX)
        if ours and event.get("cat") == "user_annotation":
            yield event["ts"], event["name"].removeprefix(PREFIX)


def split_of(events: Iterable[Event], count: int) -> DeviceSplit:
    """The split of `count` steps, from the events of their trace."""
    events = list(events)
    launches = _Launches(events)
    work = _on_device(events)
    seconds = dict.fromkeys(PHASES, 0.0)
    ms: defaultdict[tuple[str, str], float] = defaultdict(float)
    times: defaultdict[tuple[str, str], int] = defaultdict(int)
    for event, uncovered in zip(work, _uncovered(work), strict=True):
        phase = launches.phase_of(event)
        seconds[phase] += uncovered / MICROSECONDS / count
        ms[phase, event["name"]] += event["dur"] / MILLISECOND / count
        times[phase, event["name"]] += 1
    named = [Kernel(*which, spent, times[which] / count) for which, spent in ms.items()]
    named.sort(key=lambda kernel: -kernel.ms)
    kernels = sum(event["cat"] == "kernel" for event in work)
    return DeviceSplit(seconds, kernels / count, launches.count() / count, named[:LONGEST])
