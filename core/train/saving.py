"""Saving off the hot path: the device copies while the next step computes, and a thread writes.

    step t ends      the host asks for copies of all that a checkpoint holds, into pinned memory, on a stream of its own
    step t + 1       goes forward and backward meanwhile; before its optimizer moves anything, the device waits for them
    a thread         waits for the copies too, then writes, and nothing of training waits for the disk

What the backward pass itself changes (the window of losses, some bytes) is copied at once.  On a CPU the copy is made
at once, and the thread writes.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress

import torch
from torch import Tensor

from ablab.core.train.checkpoint import Tensors

SMALL = 4096  # bytes, copied at once on the device
Write = Callable[[Tensors], object]  # what becomes of the copies, on the host


class Saver:
    """One checkpoint at a time, on its way from the device to the disk.  It keeps its memory for the next."""

    def __init__(self, device: torch.device):
        self.device = device
        self.on_gpu = device.type == "cuda"
        self.stream = torch.cuda.Stream(device) if self.on_gpu else None
        self.host: Tensors = {}
        # Of a save for which no step has waited yet; what it copies stays in memory until then.
        self.copied: torch.cuda.Event | None = None
        self.steady: list[Tensor] = []
        self.thread = ThreadPoolExecutor(1, "ablab-saver")
        self.under_way: Future[object] | None = None

    def is_idle(self) -> bool:
        """Whether the last one is on the disk.  Raises what writing it raised."""
        if self.under_way is None:
            return True
        if not self.under_way.done():
            return False
        self.wait()
        return True

    def wait(self) -> None:
        """Until the last one is on the disk.  Raises what writing it raised."""
        ended, self.under_way = self.under_way, None
        if ended is not None:
            ended.result()

    def settle(self) -> None:
        """As `wait`, for a run that ends and needs it no more: what writing it raised is of no use."""
        with suppress(Exception):
            self.wait()

    @torch.no_grad()
    def save(self, tensors: Tensors, write: Write) -> None:
        """Copy them as they are now, and write the copies.  Nothing waits, but for a save that is still under way."""
        self.wait()
        self._fit(tensors)
        if self.on_gpu:
            self.copied = self._copy_on_the_device(tensors)
        else:
            for name, tensor in tensors.items():
                self.host[name].copy_(tensor)
        self.under_way = self.thread.submit(self._write, write, self.copied)

    def write(self, on_host: Tensors, write: Write) -> None:
        """As `save`, of tensors on the host that nobody else has: nothing is copied."""
        self.wait()
        self.under_way = self.thread.submit(write, on_host)

    def before_the_next_move(self) -> None:
        """The device goes no farther until it has copied.  The host does not wait."""
        if self.copied is not None:
            torch.cuda.current_stream(self.device).wait_event(self.copied)
            self.copied = None
            self.steady = []

    def _fit(self, tensors: Tensors) -> None:
        """Memory of the host for these, by name."""
        fits = self.host.keys() == tensors.keys() and all(
            self.host[name].shape == tensor.shape and self.host[name].dtype == tensor.dtype
            for name, tensor in tensors.items()
        )
        if not fits:
            self.host = {
                name: torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=self.on_gpu)
                for name, tensor in tensors.items()
            }

    def _copy_on_the_device(self, tensors: Tensors) -> torch.cuda.Event:
        assert self.stream, "a GPU has one"
        steady = {name: _steady(tensor) for name, tensor in tensors.items()}
        self.steady = list(steady.values())
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            for name, tensor in steady.items():
                self.host[name].copy_(tensor, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record(self.stream)
        return copied

    def _write(self, write: Write, copied: torch.cuda.Event | None) -> object:
        if copied is not None:
            copied.synchronize()
        return write(self.host)


def _steady(tensor: Tensor) -> Tensor:
    """What stays as it is until the optimizer moves: small ones, which the backward pass may add to, as a copy."""
    return tensor.clone() if tensor.is_cuda and tensor.nbytes <= SMALL else tensor
