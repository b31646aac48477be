"""One run on many ranks: each takes its rows of a micro-batch, and moves its share of every bank.

    rows        micro-batch [M, T+1]  ->  rank r of R takes rows  r M/R .. (r+1) M/R - 1
    gradients   summed over ranks at their owner, piece by piece, while the backward pass goes on
    norm        of the whole gradient, from each rank's share
    weights     each rank moves its part of a bank, Newton-Schulz included, and hands it to the others

A rank's part of a bank (dealing.py) is some of its members or of their rows, and so is that of the optimizer's state
(ZeRO stage 1: Rajbhandari et al., arXiv:1910.02054).  Weights, gradients and averages of weights are whole on every
rank.  Losses are sums over tokens, so a sum over ranks weighs every token alike.  Each sum is taken in
one order on R ranks: R ranks repeat their bits, and differ from those of others by the rounding of sums.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from ablab.core.fusion.optimizer import FusedMove
from ablab.core.parts.transforms import Now
from ablab.core.recipe.recipe import Recipe
from ablab.core.runtime.replay import OnDevice, Recorder, on_device
from ablab.core.runtime.runtime import Runtime
from ablab.core.runtime.world import Handle, World
from ablab.core.train import checkpoint
from ablab.core.train.banks import (
    ON_GRADIENT,
    Bank,
    ChainMove,
    GradientScale,
    Move,
    Optimizer,
    named_state,
    put,
)
from ablab.core.train.checkpoint import Origin
from ablab.core.train.dealing import (
    WHOLE,
    Dealt,
    Piece,
    StateOf,
    dealt,
    is_elementwise,
    like_of_state,
)
from ablab.core.train.evaluate import Measured, Spans, scored, spans_measured
from ablab.core.train.saving import Write
from ablab.core.train.step import Loss, TrainingStep, at_once
from ablab.core.train.trainer import Trainer


# -- gradients ---------------------------------------------------------------------------------------------------------
@dataclass(eq=False)
class Waiting:
    """A piece of gradients, and what has not come of it yet."""

    piece: Piece
    place: int  # of its first parameter in the model; the backward pass ends with the lowest
    missing: set[str] = field(default_factory=set)


class Sums(Protocol):
    """Adds up the gradients of all ranks in a step's last backward pass."""

    @property
    def world(self) -> World: ...

    def begin(self) -> None:
        """From here on, gradients that come in are whole once they have come."""
        ...

    def end(self) -> None:
        """What has not left yet leaves; what follows sees the sums."""
        ...


class Reduction:
    """Sums the gradients of all ranks at their owners, each piece as soon as the backward pass has filled it.

    Pieces leave in one order on every rank, that of the parameters from the last to the first, whatever the order in
    which they are filled: so no two ranks ever wait for different messages.
    """

    def __init__(self, model: nn.Module, optimizer: "ShardedOptimizer", world: World):
        self.world = world
        self.pieces = _waiting(model, optimizer.dealt)
        self.under_way: list[Handle] = []
        self.next = len(self.pieces)  # the piece to leave next; all of them: nobody listens
        piece_of = {name: one for one in self.pieces for name in one.piece.names}
        for name, parameter in model.named_parameters():
            arrived = partial(self._arrived, piece_of[name], name)
            parameter.register_post_accumulate_grad_hook(arrived)

    def begin(self) -> None:
        """From here on, gradients that come in are whole once they have come."""
        for one in self.pieces:
            one.missing = set(one.piece.names)
        self.next = 0

    def end(self) -> None:
        """What has not left yet, parameters without a gradient among it, leaves; what follows sees the sums."""
        while self.next < len(self.pieces):
            self._send()
        for handle in self.under_way:
            handle.wait()
        self.under_way.clear()

    def send_all(self) -> None:
        """All at once, with no backward pass beside them."""
        self.begin()
        self.end()

    def _arrived(self, waiting: Waiting, name: str, parameter: Tensor) -> None:
        """A hook of autograd: `parameter` has its gradient of this backward pass."""
        waiting.missing.discard(name)
        while self.next < len(self.pieces) and not self.pieces[self.next].missing:
            self._send()

    def _send(self) -> None:
        piece = self.pieces[self.next].piece
        self.under_way.append(piece.sum(self.world))
        self.next += 1


def _waiting(model: nn.Module, dealt: Sequence[Dealt]) -> list[Waiting]:
    """Those of the last parameters first."""
    place_of = {name: place for place, (name, _) in enumerate(model.named_parameters())}
    found = []
    for one in dealt:
        for piece in one.pieces():
            place = min(place_of[name] for name in piece.names)
            found.append(Waiting(piece, place))
    return sorted(found, key=lambda one: -one.place)


class ShardedStep(TrainingStep):
    """A training step of one rank: the gradients of its last micro-batch are summed while they come."""

    def __init__(
        self,
        loss: Loss,
        optimizer: Optimizer,
        recipe: Recipe,
        tokens: int,
        recorder: Recorder | None,
        reduction: Sums,
        of_messages: Recorder | None,
    ):
        """of_messages: records what sends any."""
        self.reduction = reduction
        # of our own rows, since the last step: what all ranks had goes into the window
        self.nats = torch.zeros((), dtype=torch.float64, device=optimizer.device)
        super().__init__(loss, optimizer, recipe, tokens, recorder)
        self.descend_last = on_device(self._descend_last, optimizer.device, of_messages)

    def restart(self, recipe: Recipe) -> None:
        super().restart(recipe)
        self.nats.zero_()

    def take(
        self,
        t: int,
        blocks: Iterable[Tensor],
        tokens: int | None = None,
        before_move: Callable[[], None] = at_once,
    ) -> Tensor:
        *others, last = blocks
        for block in others:
            self.descend(block)
        self.descend_last(last)
        before_move()
        return self.move(t, tokens)

    def _descend(self, block: Tensor) -> None:
        loss, nats = self.loss(block)
        (loss / self.tokens).backward()
        self.nats += nats

    def _descend_last(self, block: Tensor) -> None:
        self.reduction.begin()
        self._descend(block)
        read = self.reduction.world.all_reduce(self.nats)
        self.reduction.end()
        read.wait()
        self.window[0] += self.nats
        self.nats.zero_()

    @property
    def replayed(self) -> list[OnDevice]:
        own = [self.descend_last] if isinstance(self.descend_last, OnDevice) else []
        return own + super().replayed


# -- the optimizer -----------------------------------------------------------------------------------------------------
class ShardedOptimizer(Optimizer):
    """Banks of which this rank moves its part, and has the state of no more."""

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        compiled: bool,
        kernels: Collection[str],
        recorder: Recorder | None,
        world: World,
        whole: int = WHOLE,
    ):
        self.world = world
        self.whole = whole
        super().__init__(model, recipe, compiled, kernels, recorder)

    def _moved(self) -> list[Bank]:
        self.dealt = dealt(self.banks, self.world.size, self.whole)
        self.parts = [one.part(self.world.rank) for one in self.dealt]
        self.states = {
            name: StateOf(like, one)
            for one in self.dealt
            for name, like in like_of_state(one.bank).items()
        }
        return [part for part in self.parts if part.names]

    def _move(self, compiled: bool, kernels: Collection[str]) -> Move:
        given = Given(self.device)
        turns = []
        for one, part in zip(self.dealt, self.parts, strict=True):
            move = _move_of(part, given, compiled, kernels) if part.names else None
            turns.append(Turn(one, move))
        return ShardedMove(self.world, self.moved, turns, self.scaling, given)

    def hand_on(self) -> None:
        """Every rank's part of every bank goes to all others, as behind their moves."""
        handles = [handle for one in self.dealt for handle in one.hand_on(self.world)]
        for handle in handles:
            handle.wait()

    # -- saving: whole states go in and out, whatever the number of ranks ------------------------------------------
    def tensors(self) -> dict[str, Tensor]:
        """As on one rank; every rank must call it."""
        own = self._own()
        whole = {}
        for name, state in self.states.items():
            whole[name] = torch.empty_like(state.like, device=self.device)
            for owner, there in enumerate(state.dealt(whole[name])):
                if owner == self.world.rank and there.numel():
                    there.copy_(own[name])
                if there.numel():
                    self.world.broadcast(there, owner).wait()
        return whole | named_state(ON_GRADIENT, self.scaling.state)

    def like(self) -> dict[str, Tensor]:
        gradient = named_state(ON_GRADIENT, self.scaling.state)
        on_gradient = {name: value.to("meta") for name, value in gradient.items()}
        return {name: state.like for name, state in self.states.items()} | on_gradient

    def put(self, saved: Mapping[str, Tensor]) -> None:
        own = self._own()
        rank = self.world.rank
        mine = {
            name: self.states[name].dealt(saved[name])[rank] for name in own if name in saved
        }
        put(own, mine)
        put(named_state(ON_GRADIENT, self.scaling.state), saved)

    def _own(self) -> dict[str, Tensor]:
        """The state of our shares, by the names that the states of the whole banks have."""
        named: dict[str, Tensor] = {}
        for bank, part in zip(self.banks, self.parts, strict=True):
            named |= named_state(bank.names[0], part.state)
        return named


class Given:
    """The norm and the scale of all gradients, of which a share of them knows nothing; a Scaling."""

    def __init__(self, device: torch.device):
        self.norm = torch.zeros((), device=device)
        self.scale = torch.zeros((), device=device)

    def __call__(self, norm: Tensor, now: Now) -> Tensor:
        return self.scale


class PartChainMove(ChainMove):
    scaling: Given

    def norm(self) -> Tensor:
        return self.scaling.norm


class PartFusedMove(FusedMove):
    scaling: Given

    def norm(self) -> Tensor:
        return self.scaling.norm


def _move_of(part: Bank, given: Given, compiled: bool, kernels: Collection[str]) -> Move:
    if "optimizer" in kernels:
        return PartFusedMove([part], given)
    move = PartChainMove([part], given)
    return torch.compile(move.__call__, dynamic=False) if compiled else move


@dataclass(frozen=True)
class Turn:
    """A bank that is dealt out, and the move of our own part; None where we have none."""

    dealt: Dealt
    move: Move | None


class ShardedMove:
    """One step of every bank: each rank moves its part, and hands it to the others while it moves the next."""

    def __init__(
        self,
        world: World,
        moved: Sequence[Bank],
        turns: Sequence[Turn],
        scaling: GradientScale,
        given: Given,
    ):
        self.world = world
        self.moved = moved
        self.turns = sorted(turns, key=_when)
        self.scaling = scaling
        self.given = given

    def __call__(self, lr: Tensor, fraction: Tensor, now: Now) -> Tensor:
        norm = self._norm()
        self.given.norm.copy_(norm)
        self.given.scale.copy_(self.scaling(norm / fraction, now))
        handles: list[Handle] = []
        for turn in self.turns:
            if turn.move:
                turn.move(lr, fraction, now)
            handles += turn.dealt.hand_on(self.world)
        # Behind all moves: the last of them are on their way meanwhile.
        for turn in self.turns:
            turn.dealt.bank.grad.zero_()
        for handle in handles:
            handle.wait()
        return norm / fraction

    def _norm(self) -> Tensor:
        """Of all gradients, 0-D."""
        squares = [self.given.norm.new_zeros(())]
        squares += [torch.linalg.vector_norm(bank.grad).square() for bank in self.moved]
        total = torch.stack(squares).sum()
        self.world.all_reduce(total).wait()
        return total.sqrt()


def _when(turn: Turn) -> tuple[bool, int]:
    """Tables of the vocabulary travel while polar factors are computed, and what travels last is small."""
    bank = turn.dealt.bank
    return not is_elementwise(bank.chain), -bank.weight.numel()


# -- the trainer -------------------------------------------------------------------------------------------------------
class ShardedTrainer(Trainer):
    """A trainer of one rank; all ranks make the same calls.  Rank 0 writes and reads checkpoints, whole ones."""

    def __init__(
        self,
        recipe: Recipe,
        runtime: Runtime,
        data_folder: Path,
        world: World,
        whole: int = WHOLE,
    ):
        """whole: as `dealt` takes it."""
        self.world = world
        self.whole = whole
        super().__init__(recipe, runtime, data_folder)

    @property
    def ranks(self) -> int:
        return self.world.size

    @property
    def _own_rows(self) -> int:
        return self.runtime.micro_batch // self.world.size

    def _optimizer(
        self,
        recipe: Recipe,
        compiled: bool,
        kernels: Collection[str],
        recorder: Recorder | None,
    ) -> Optimizer:
        of_messages = recorder if self.world.recordable else None
        return ShardedOptimizer(
            self.model, recipe, compiled, kernels, of_messages, self.world, self.whole
        )

    def _training_step(
        self, loss: Loss, recipe: Recipe, recorder: Recorder | None
    ) -> TrainingStep:
        optimizer = self.optimizer
        assert isinstance(optimizer, ShardedOptimizer)
        reduction = Reduction(self.model, optimizer, self.world)
        tokens = recipe.tokens_per_step
        of_messages = recorder if self.world.recordable else None
        return ShardedStep(loss, optimizer, recipe, tokens, recorder, reduction, of_messages)

    def _rows(self, step: int, first: int) -> Tensor:
        count = self._own_rows
        return self.tokens.rows(step, first + self.world.rank * count, count)

    def _measured(self) -> Measured:
        found = self._own_spans()
        for tensor in found:
            self.world.all_reduce(tensor).wait()  # to zeros: no sum is rounded
        return scored(found, self.tokens, self._own_rows)

    def _own_spans(self) -> Spans:
        rows, rank, ranks = self._own_rows, self.world.rank, self.world.size
        return spans_measured(self.nats, self.tokens, rows, self.device, rank, ranks)

    def write(self, folder: Path, tensors: Mapping[str, Tensor], origin: Origin) -> None:
        if self.world.rank == 0:
            super().write(folder, tensors, origin)

    def write_later(self, tensors: checkpoint.Tensors, write: Write) -> None:
        if self.world.rank == 0:
            super().write_later(tensors, write)

    def agreed(self, wish: bool) -> bool:
        return self.world.agreed(wish)

    def restore(self, folder: Path, warn: Callable[[str], None], logged: bytes = b"") -> None:
        """Rank 0 reads, and hands out what it found tensor by tensor."""
        found = self._newest(folder, warn, logged) if self.world.rank == 0 else None
        known = found and (found[0], {name: found[1][name] for name in self._beside()})
        known = self.world.told(known)
        if known is None:
            return
        saved = found[1] if found else {}
        self._go_on(*known)
        self._hand_out(saved)

    def _hand_out(self, saved: checkpoint.Tensors) -> None:
        """Every rank takes over what rank 0 has read."""
        for name, value in self._handed_out(saved):
            self.put({name: value})

    def _handed_out(self, saved: checkpoint.Tensors) -> Iterator[tuple[str, Tensor]]:
        for name, like in self.like().items():
            value = torch.empty_like(like, device=self.device)
            if saved:
                value.copy_(saved[name])
            self.world.broadcast(value, 0).wait()
            yield name, value
