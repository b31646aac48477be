"""Work for a GPU, recorded once as a CUDA graph and then replayed: one launch instead of hundreds."""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

WARM_UP = 3  # calls that run as they are, in which compilers and libraries set themselves up


class OnDevice:
    """A function of one tensor on the device, called with one on the host; nobody waits for the copy.

    replay: record the call that comes after WARM_UP others, and replay it from then on.  So the function must do the
    same work each time, on tensors that stay where they are, and must not wait for the device.  Off, it runs as it is.
    pool: of `torch.cuda.graph_pool_handle`, shared by functions that take turns: they use the same memory.  What one of
    them returns is overwritten by the next call of any.
    """

    def __init__(
        self,
        function: Callable[[Tensor], Any],
        device: torch.device,
        replay: bool,
        pool: Any = None,
    ):
        self.function, self.device, self.replay, self.pool = function, device, replay, pool
        self.calls, self.graph, self.given, self.result = 0, None, None, None
        self.height = (
            0  # bytes that the recorded call takes above what was in use: a replay reports none
        )

    def __call__(self, given: Tensor) -> Any:
        if self.device.type != "cuda":
            return self.function(given)
        given = given.pin_memory()
        if not self.replay or self.calls < WARM_UP:
            self.calls += 1
            return self.function(given.to(self.device, non_blocking=True))
        if self.graph is None:
            self._record(given)
        self.given.copy_(given, non_blocking=True)
        self.graph.replay()
        return self.result

    def _record(self, like: Tensor) -> None:
        given, graph, before = (
            torch.empty_like(like, device=self.device),
            torch.cuda.CUDAGraph(),
            torch.cuda.memory_allocated(),
        )
        torch.cuda.reset_peak_memory_stats()
        with torch.cuda.graph(graph, pool=self.pool, stream=torch.cuda.current_stream()):
            result = self.function(given)
        self.graph, self.given, self.result = (
            graph,
            given,
            result,
        )  # not before: it may lack the memory
        self.height = torch.cuda.max_memory_allocated() - before

    def stop_replaying(self) -> None:
        """From here on it runs as it is, and the memory of the graph is free once no other shares its pool."""
        self.replay, self.graph, self.given, self.result = False, None, None, None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def use_recordable_stream(device: torch.device) -> None:
    """From here on this thread works on a stream of ours: the default one cannot be recorded."""
    if device.type == "cuda" and torch.cuda.current_stream() != _stream(device):
        _stream(device).wait_stream(torch.cuda.current_stream())
        torch.cuda.set_stream(_stream(device))
