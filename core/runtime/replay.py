"""Work for a GPU, recorded once as a CUDA graph and then replayed: one launch instead of hundreds."""

from collections import Counter
from collections.abc import Callable
from functools import cache
from typing import Any, Protocol

import torch
from torch import Tensor

Function = Callable[[Tensor], Any]  # of one tensor on the device

WARM_UP = 3  # calls that run as they are, in which compilers and libraries set themselves up


class Recording(Protocol):
    """One call, recorded.  height: bytes that it takes above what was in use; a replay reports none."""

    height: int

    def replay(self, given: Tensor) -> Any:
        """What the recorded call returned, computed anew from `given`; the next replay overwrites it."""
        ...


class Recorder(Protocol):
    """Records calls.  Those of one recorder take turns: they may use the same memory."""

    def record(self, function: Function, like: Tensor) -> Recording:
        """The function's work on a tensor of the shape of `like`, which lies on the host."""
        ...


def finest(device: torch.device) -> torch.dtype:
    """Of sums over many tokens: fp64, which Apple's GPUs lack."""
    return torch.float32 if device.type == "mps" else torch.float64


class OnDevice:
    """A function of a tensor on the device, called with one on the host; nobody waits for the copy.

    recorder: records the call that comes after WARM_UP others of its shape, and it is replayed from then on.  So the
    function must do the same work each time, on tensors that stay where they are, and must not wait for the device.
    Without one it runs as it is.
    """

    def __init__(
        self, function: Function, device: torch.device, recorder: Recorder | None = None
    ):
        self.function = function
        self.device = device
        self.recorder = recorder
        self.calls: Counter[torch.Size] = Counter()
        self.recordings: dict[torch.Size, Recording] = {}

    def __call__(self, given: Tensor) -> Any:
        shape = given.shape
        if shape in self.recordings:
            return self.recordings[shape].replay(given)
        if self.recorder and self.calls[shape] >= WARM_UP:
            self.recordings[shape] = self.recorder.record(self.function, given)
            return self.recordings[shape].replay(given)
        self.calls[shape] += 1
        if self.device.type == "cuda":
            given = given.pin_memory().to(self.device, non_blocking=True)
        return self.function(given.to(self.device))

    @property
    def height(self) -> int:
        """Bytes that the tallest recording takes above what was in use."""
        return max((one.height for one in self.recordings.values()), default=0)

    def stop_replaying(self) -> None:
        """From here on it runs as it is; the memory of its graphs is free once no other shares their pool."""
        self.recorder = None
        self.recordings.clear()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def on_device(
    function: Function, device: torch.device, recorder: Recorder | None = None
) -> Function:
    """The function as one calls it with tensors on the host: on a CPU, unrecorded, it is the function itself."""
    if device.type == "cpu" and recorder is None:
        return function
    return OnDevice(function, device, recorder)


class CudaGraphs:
    """Records calls as CUDA graphs, all in one pool of memory."""

    def __init__(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()

    def record(self, function: Function, like: Tensor) -> "CudaGraph":
        return CudaGraph(function, like, self.pool)


class CudaGraph:
    """One recorded call."""

    def __init__(self, function: Function, like: Tensor, pool: Any):
        self.given = torch.empty_like(like, device="cuda")
        self.graph = torch.cuda.CUDAGraph()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        # thread_local: a checkpoint may be on its way meanwhile (core/train/saving.py).
        with torch.cuda.graph(
            self.graph,
            pool=pool,
            stream=torch.cuda.current_stream(),
            capture_error_mode="thread_local",
        ):
            self.result = function(self.given)
        self.height = torch.cuda.max_memory_allocated() - before

    def replay(self, given: Tensor) -> Any:
        self.given.copy_(given.pin_memory(), non_blocking=True)
        self.graph.replay()
        return self.result


@cache
def _stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def use_recordable_stream(device: torch.device) -> None:
    """From here on this thread works on a stream of ours: the default one cannot be recorded."""
    if device.type == "cuda" and torch.cuda.current_stream() != _stream(device):
        _stream(device).wait_stream(torch.cuda.current_stream())
        torch.cuda.set_stream(_stream(device))
