"""Which rank moves what of a bank: there its gradients are summed and its state lies, and from there its weights come.

    by members   consecutive members each (equal parameters, one behind another); whole matrices, as Newton-Schulz asks
    by rows      a bank of fewer members than ranks, such as a table of the vocabulary, whose chain is elementwise: an
                 equal part of all its rows each

Equal parts of all ranks travel at once, in both directions of every link: 2 x 98 MB of 70M's tables took as long on the
way to one owner each as all its other gradients.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from ablab.core.language.offers import AdamDirection, Decays, RunningMean, offer_of
from ablab.core.recipe.recipe import Chain
from ablab.core.runtime.world import Handle, World
from ablab.core.train.banks import Bank, named_state

ELEMENTWISE = (AdamDirection, RunningMean, Decays)  # offers of one number at a time
# Numbers of a bank below which one rank owns it: more messages would cost more than they share.
WHOLE = 1 << 20
# Bytes of gradients that go in one message, at least, where a share has as many.
PIECE = 32 << 20

Share = range  # of the members of a bank


def is_elementwise(chain: Chain) -> bool:
    """Whether a part of a matrix moves as it does within it."""
    return all(isinstance(offer_of(step), ELEMENTWISE) for step in chain.steps)


class Dealt(Protocol):
    """A bank, and what each rank has of it."""

    @property
    def bank(self) -> Bank: ...

    def part(self, rank: int) -> Bank:
        """Views of its tensors, without state; no names where the rank has nothing."""
        ...

    def pieces(self) -> "Iterator[Piece]":
        """What is summed in a message each."""
        ...

    def of_state(self, whole: Tensor) -> list[Tensor]:
        """Views of what each rank has of a tensor of the bank's state."""
        ...

    def hand_on(self, world: World) -> list[Handle]:
        """What each rank has moved goes to all others."""
        ...


def dealt(banks: Sequence[Bank], ranks: int, whole: int = WHOLE) -> list[Dealt]:
    """whole: numbers below which one rank owns all of a bank."""
    cut = [_is_cut_by_rows(bank, ranks, whole) for bank in banks]
    by_members = [bank for bank, is_cut in zip(banks, cut, strict=True) if not is_cut]
    shares = iter(shares_of(by_members, ranks, whole))
    return [
        ByRows(bank, ranks) if is_cut else ByMembers(bank, next(shares))
        for bank, is_cut in zip(banks, cut, strict=True)
    ]


# -- messages of gradients ---------------------------------------------------------------------------------------------
class Piece(Protocol):
    """Gradients that go in one message."""

    @property
    def names(self) -> frozenset[str]:
        """The parameters whose gradients these are."""
        ...

    def sum(self, world: World) -> Handle:
        """Those of all ranks, at whoever moves these parameters."""
        ...


@dataclass(frozen=True, eq=False)
class Members:
    """Consecutive members of a bank that one rank owns."""

    names: frozenset[str]
    grad: Tensor  # [n, ...], a view into the bank
    owner: int

    def sum(self, world: World) -> Handle:
        return world.reduce(self.grad, self.owner)


@dataclass(frozen=True, eq=False)
class AllRows:
    """A bank of which each rank owns an equal part."""

    names: frozenset[str]
    grad: Tensor  # [rows, ...], the bank's

    def sum(self, world: World) -> Handle:
        own = self.grad.chunk(world.size)[world.rank]
        return world.reduce_scatter(self.grad, own)


# -- by members --------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class ByMembers:
    bank: Bank
    shares: list[Share]  # of each rank

    def part(self, rank: int) -> Bank:
        return part_of(self.bank, self.shares[rank])

    def pieces(self) -> Iterator[Piece]:
        grad = self.bank.grad
        size = grad[0].numel() * grad.element_size()
        count = max(-(-PIECE // size), 1)
        for owner, share in enumerate(self.shares):
            for begin in range(share.start, share.stop, count):
                members = slice(begin, min(begin + count, share.stop))
                names = frozenset(self.bank.names[members])
                yield Members(names, grad[members], owner)

    def of_state(self, whole: Tensor) -> list[Tensor]:
        """The rows of a rank's members come one behind another."""
        return [self._of(share, whole) for share in self.shares]

    def _of(self, share: Share, whole: Tensor) -> Tensor:
        members = len(self.bank.names)
        if len(share) == members:
            return whole
        if not share:
            return whole.new_empty(0)
        rows = whole.shape[0] // members
        return whole[share.start * rows : share.stop * rows]

    def hand_on(self, world: World) -> list[Handle]:
        weight = self.bank.weight
        if len({len(share) for share in self.shares}) == 1:
            own = self.shares[world.rank]
            return [world.all_gather(weight, weight[own.start : own.stop])]
        return [
            world.broadcast(weight[share.start : share.stop], owner)
            for owner, share in enumerate(self.shares)
            if share
        ]


def shares_of(banks: Sequence[Bank], ranks: int, whole: int = WHOLE) -> list[list[Share]]:
    """For each bank, the members that each rank owns: consecutive, in the order of ranks, about as many numbers each.

    whole: numbers below which one rank owns all of a bank.  One whose state cannot be cut has one owner too.
    """
    owned = [0] * ranks  # numbers so far
    found: dict[int, list[Share]] = {}
    largest_first = sorted(range(len(banks)), key=lambda i: -banks[i].weight.numel())
    for i in largest_first:
        counts = _counts(banks[i], owned, whole)
        ends = [sum(counts[:rank]) for rank in range(ranks + 1)]
        found[i] = [range(begin, end) for begin, end in pairwise(ends)]
        for rank, count in enumerate(counts):
            owned[rank] += count * banks[i].weight[0].numel()
    return [found[i] for i in range(len(banks))]


def _counts(bank: Bank, owned: Sequence[int], whole: int) -> list[int]:
    """Members for each rank; those that cannot be dealt evenly go to whoever owns least."""
    members, ranks = len(bank.names), len(owned)
    by_load = sorted(range(ranks), key=lambda rank: owned[rank])
    if bank.weight.numel() < whole or not _can_be_cut(bank):
        return [members if rank == by_load[0] else 0 for rank in range(ranks)]
    each, left = divmod(members, ranks)
    return [each + (rank in by_load[:left]) for rank in range(ranks)]


def _can_be_cut(bank: Bank) -> bool:
    """Whether every state that it has is of its members, one behind another."""
    members = len(bank.names)
    of_members = (
        like.dim() and like.shape[0] % members == 0 for like in like_of_state(bank).values()
    )
    return all(of_members)


def part_of(bank: Bank, share: Share) -> Bank:
    """The bank of some members: views of its tensors, without state."""
    members = slice(share.start, share.stop)
    return replace(
        bank,
        names=bank.names[members],
        weight=bank.weight[members],
        grad=bank.grad[members],
        lr=bank.lr[members] if bank.lr.dim() else bank.lr,
        decay=bank.decay[members] if bank.decay.dim() else bank.decay,
        state={},
    )


# -- by rows -----------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class ByRows:
    """The rows of all members one behind another, cut into equal parts."""

    bank: Bank
    ranks: int

    def part(self, rank: int) -> Bank:
        """As a bank of one member, [1, rows, ...]."""
        weight = self.of_state(self.bank.weight)[rank]
        grad = self.of_state(self.bank.grad)[rank]
        return replace(self.bank, weight=weight, grad=grad, state={})

    def pieces(self) -> Iterator[Piece]:
        yield AllRows(frozenset(self.bank.names), self.bank.grad.flatten(0, 1))

    def of_state(self, whole: Tensor) -> list[Tensor]:
        parts = whole.flatten(0, 1).chunk(self.ranks)
        return [part[None] for part in parts]

    def hand_on(self, world: World) -> list[Handle]:
        rows = self.bank.weight.flatten(0, 1)
        own = rows.chunk(self.ranks)[world.rank]
        return [world.all_gather(rows, own)]


def _is_cut_by_rows(bank: Bank, ranks: int, whole: int) -> bool:
    weight = bank.weight
    members = len(bank.names)
    if members >= ranks or weight.numel() < whole or weight.dim() == 1:
        return False
    rows = members * weight.shape[1]
    states = like_of_state(bank).values()
    of_numbers = all(state.shape == weight.shape for state in states)
    rates_agree = not bank.lr.dim() and not bank.decay.dim()
    return rows % ranks == 0 and is_elementwise(bank.chain) and of_numbers and rates_agree


# -- states ------------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class StateOf:
    """One tensor of the state of a whole bank."""

    like: Tensor  # of its shape and type, without values
    bank: Dealt

    def dealt(self, whole: Tensor) -> list[Tensor]:
        """Views of what each rank has of it."""
        return self.bank.of_state(whole)


def like_of_state(bank: Bank) -> dict[str, Tensor]:
    """The state of a whole bank, by name, without values."""
    weight = torch.empty_like(bank.weight, device="meta")
    state = {part.kind: part.state(weight, bank) for part in bank.transforms}
    return named_state(bank.names[0], state)
