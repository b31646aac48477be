"""Tensors that are whole in a checkpoint, and of which each rank of a run has a part.

No rank's device holds more than one part of another at a time; whole tensors exist on the host of rank 0 alone.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ablab.core.runtime.world import World
from ablab.core.train.checkpoint import Tensors


@dataclass(frozen=True)
class Scattered:
    """One of them, as a rank sees it."""

    like: Tensor  # the whole one, without values
    own: Tensor  # our part
    axis: int | None  # along which it is cut; None: every rank has all of it
    spans: tuple[range, ...]  # of each rank, along the axis

    def of(self, rank: int, whole: Tensor) -> Tensor:
        """A view of what a rank has of the whole tensor."""
        if self.axis is None:
            return whole
        span = self.spans[rank]
        return whole.narrow(self.axis, span.start, len(span))

    @torch.no_grad()
    def take(self, whole: Tensor, rank: int) -> None:
        """Our part becomes that of the whole tensor."""
        self.own.copy_(self.of(rank, whole))

    def gather(self, world: World) -> Tensor | None:
        """The whole tensor on the host of rank 0, None on the others.  Every rank calls it."""
        whole = torch.empty_like(self.like, device="cpu") if world.rank == 0 else None
        for owner in self._owners():
            sent = self.own.contiguous() if owner == world.rank else self._room(owner)
            if self.axis is not None:
                world.broadcast(sent, owner).wait()
            if whole is not None:
                self.of(owner, whole).copy_(sent)
        return whole

    def scatter(self, whole: Tensor | None, world: World) -> None:
        """Every rank takes its part of what rank 0 has; None on the others.  Every rank calls it."""
        for owner in self._owners():
            sent = self._room(owner)
            if whole is not None:
                sent.copy_(self.of(owner, whole))
            world.broadcast(sent, 0).wait()
            if self.axis is None or owner == world.rank:
                self.own.copy_(sent)

    def _owners(self) -> list[int]:
        """Ranks with a part; where all have all, rank 0 stands for them."""
        if self.axis is None:
            return [0]
        return [rank for rank, span in enumerate(self.spans) if span]

    def _room(self, owner: int) -> Tensor:
        """Memory for the part of a rank."""
        part = self.of(owner, self.like)
        return torch.empty_like(part, device=self.own.device)


def evenly(own: Tensor, like: Tensor, ranks: int) -> Scattered:
    """`own` is all of a tensor like this, or an equal part along the one axis in which they differ."""
    axes = [axis for axis in range(own.dim()) if own.shape[axis] != like.shape[axis]]
    if not axes:
        return Scattered(like, own, None, ())
    (axis,) = axes
    each = own.shape[axis]
    spans = tuple(range(rank * each, (rank + 1) * each) for rank in range(ranks))
    return Scattered(like, own, axis, spans)


def likes(scattered: Mapping[str, Scattered]) -> Tensors:
    """The whole tensors by name, without values."""
    return {name: one.like for name, one in scattered.items()}


def gathered(scattered: Mapping[str, Scattered], world: World) -> Tensors:
    """The whole tensors by name on the host of rank 0, nothing on the others.  Every rank calls it."""
    found: Tensors = {}
    for name, one in scattered.items():
        whole = one.gather(world)
        if whole is not None:
            found[name] = whole
    return found


def take(scattered: Mapping[str, Scattered], saved: Mapping[str, Tensor], rank: int) -> None:
    """Our parts of those whole tensors that are given, by name."""
    for name, one in scattered.items():
        if name in saved:
            one.take(saved[name], rank)
