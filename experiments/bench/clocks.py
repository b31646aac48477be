"""How long a call takes on a device: between two events on a GPU's queue, or on the clock of a CPU."""

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch

FLUSH_BYTES = 512 << 20  # more than any GPU's cache holds
HEAD_START = 4_000_000  # clock cycles, some 2 ms: the host runs ahead by as much


def settled(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def host_seconds(call: Callable[[], Any]) -> float:
    """Of one call, on the host's clock."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


class QueueClock:
    """Times what is put on a GPU's queue between `with clock:` and its end."""

    def __init__(self) -> None:
        self.first = torch.cuda.Event(enable_timing=True)
        self.last = torch.cuda.Event(enable_timing=True)

    def __enter__(self) -> None:
        self.first.record()

    def __exit__(self, *_: Any) -> None:
        self.last.record()

    def seconds(self) -> float:
        self.last.synchronize()
        return self.first.elapsed_time(self.last) / 1e3


def seconds(call: Callable[[], Any], device: torch.device) -> float:
    """Of one call."""
    if device.type != "cuda":
        return host_seconds(call)
    clock = QueueClock()
    with clock:
        call()
    return clock.seconds()


def median_seconds(
    call: Callable[[Any], Any],
    device: torch.device,
    repeats: int,
    before: Callable[[], Any] = lambda: None,
    warm_up: int = 3,
) -> float:
    """Median over `repeats` of call(before()); only the call is timed, and a GPU is not waited for in between.

    Before each call a GPU writes 512 MB, which empties its cache, and waits some 2 ms, so that the host runs
    ahead and the time of launching is not counted as the kernel's.
    """
    for _ in range(warm_up):
        call(before())
    settled(device)
    if device.type == "cuda":
        return median(_queued(call, device, repeats, before))
    return median(_on_host(call, before()) for _ in range(repeats))


def _queued(
    call: Callable[[Any], Any],
    device: torch.device,
    repeats: int,
    before: Callable[[], Any],
) -> list[float]:
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device)
    clocks = [QueueClock() for _ in range(repeats)]
    for number, clock in enumerate(clocks):
        given = before()
        flush.fill_(number % 256)
        torch.cuda._sleep(HEAD_START)
        with clock:
            call(given)
    settled(device)
    return [clock.seconds() for clock in clocks]


def _on_host(call: Callable[[Any], Any], given: Any) -> float:
    return host_seconds(lambda: call(given))


def in_turn(
    steps: Sequence[Callable[[], Any]],
    count: int,
    windows: int,
    device: torch.device,
) -> list[list[float]]:
    """For each of `steps`, its seconds a step in each window of `count` steps.

    In the order A B B A A B ..., so that a drift of the clocks hits both alike.
    """

    def window_of(step: Callable[[], Any]) -> float:
        settled(device)
        return seconds(lambda: _many(step, count), device) / count

    times: list[list[float]] = [[] for _ in steps]
    for window in range(windows):
        order = list(zip(steps, times, strict=True))
        if window % 2:
            order.reverse()
        for step, spent in order:
            spent.append(window_of(step))
    return times


def _many(step: Callable[[], Any], count: int) -> None:
    for _ in range(count):
        step()
