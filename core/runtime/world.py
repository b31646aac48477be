"""The ranks of one run: processes that train it together, on a GPU each.  One rank alone builds none of this.

Two groups of the same ranks: tensors are added up and handed on by NCCL (on CPUs gloo); words, such as which run comes
next, by gloo, so that nobody who waits for them holds a GPU.
"""

from collections.abc import Sequence
from datetime import timedelta
from functools import cached_property
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ablab.core.errors import UserError
from ablab.core.runtime.runtime import NO_NCCL

# A rank may compile, evaluate or save while the others wait for it; one that dies is seen by the others' agent.
PATIENCE = timedelta(minutes=30)
IDLE = timedelta(days=365)  # that a rank waits for its next run

T = TypeVar("T")


class Rows(NamedTuple):
    """How many rows of a tensor go to each rank, and come from each."""

    given: Sequence[int]
    received: Sequence[int]


class Handle(Protocol):
    """Something under way between the ranks."""

    def wait(self) -> Any:
        """What the device does from here on sees it done.  The host waits only where there is no GPU."""
        ...


class World(Protocol):
    """Who takes part, and what they do together: each call is made by every rank, in the same order."""

    rank: int  # from 0, which plans and records
    size: int
    recordable: (
        bool  # whether its messages can be part of a CUDA graph; else they are sent one by one
    )

    def all_reduce(self, tensor: Tensor) -> Handle:
        """The sum over ranks, in place, everywhere."""
        ...

    def reduce(self, tensor: Tensor, owner: int) -> Handle:
        """The sum over ranks, in place at its owner; what the others hold means nothing afterwards."""
        ...

    def broadcast(self, tensor: Tensor, owner: int) -> Handle:
        """The owner's values, in place, everywhere."""
        ...

    def all_gather(self, whole: Tensor, own: Tensor) -> Handle:
        """whole: equal parts in the order of ranks, of which `own` is a view of ours; the others' are filled in."""
        ...

    def reduce_scatter(self, whole: Tensor, own: Tensor) -> Handle:
        """whole: as `all_gather` takes it.  `own` becomes the sum over ranks; the rest means nothing afterwards."""
        ...

    def told(self, word: T) -> T:
        """What rank 0 says: any plain value."""
        ...

    def agreed(self, wish: bool) -> bool:
        """What rank 0 wishes; cheap enough for every step, as no device is asked."""
        ...


class Joined:
    """A World of torch.distributed, whose process group this process has joined."""

    def __init__(self, words: dist.ProcessGroup | None, recordable: bool):
        """words: the group for what is said."""
        self.rank = dist.get_rank()
        self.size = dist.get_world_size()
        self.backend = dist.get_backend()
        self.recordable = recordable
        self.words = words

    def all_reduce(self, tensor: Tensor) -> Handle:
        return _begun(dist.all_reduce(tensor, async_op=True))

    def reduce(self, tensor: Tensor, owner: int) -> Handle:
        return _begun(dist.reduce(tensor, dst=owner, async_op=True))

    def broadcast(self, tensor: Tensor, owner: int) -> Handle:
        return _begun(dist.broadcast(tensor, src=owner, async_op=True))

    def all_gather(self, whole: Tensor, own: Tensor) -> Handle:
        return _begun(dist.all_gather_into_tensor(whole, own, async_op=True))

    def reduce_scatter(self, whole: Tensor, own: Tensor) -> Handle:
        return _begun(dist.reduce_scatter_tensor(own, whole, async_op=True))

    def all_to_all(self, received: Tensor, given: Tensor, rows: Rows) -> Handle:
        """Rows of `given` go to each rank, in the order of ranks; `received` is filled with theirs, in that order."""
        theirs, ours = list(rows.received), list(rows.given)
        sent = dist.all_to_all_single(received, given, theirs, ours, async_op=True)
        return _begun(sent)

    @cached_property
    def mesh(self) -> DeviceMesh:
        """The ranks in a row, as torch's own engines take them."""
        kind = "cuda" if self.backend == "nccl" else "cpu"
        return init_device_mesh(kind, (self.size,))

    def told(self, word: T) -> T:
        words = [word]
        dist.broadcast_object_list(words, src=0, group=self.words)
        return words[0]

    def agreed(self, wish: bool) -> bool:
        said = torch.tensor([wish])
        dist.broadcast(said, src=0, group=self.words)
        return bool(said.item())


def _begun(handle: Handle | None) -> Handle:
    assert handle, "we are in the group"
    return handle


def join(device: str, local_rank: int) -> Joined:
    """Meet the other ranks, as the environment that a launcher set says (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT).

    device: cpu or cuda.  local_rank: our place on this host, and so our GPU.  Raises UserError without NCCL.
    """
    if device == "cpu":
        dist.init_process_group("gloo", timeout=PATIENCE)
        return Joined(_for_words(), recordable=False)
    if not dist.is_nccl_available():
        raise UserError(NO_NCCL)
    own = torch.device("cuda", local_rank)
    torch.cuda.set_device(own)
    dist.init_process_group("nccl", timeout=PATIENCE, device_id=own)
    words = _for_words()
    everywhere = torch.tensor(int(_is_recorded()))
    dist.all_reduce(everywhere, op=dist.ReduceOp.MIN, group=words)
    return Joined(words, recordable=bool(everywhere.item()))


def _for_words() -> dist.ProcessGroup | None:
    return dist.new_group(backend="gloo", timeout=IDLE)


def _is_recorded() -> bool:
    """Whether a message of this NCCL can be recorded and replayed."""
    sent = torch.ones(1, device="cuda")
    dist.all_reduce(sent)  # as it is: the first one connects the ranks
    torch.cuda.synchronize()
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            dist.all_reduce(sent)
        graph.replay()
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def leave() -> None:
    """Part from the others; what is under way is lost."""
    if dist.is_initialized():
        dist.destroy_process_group()
