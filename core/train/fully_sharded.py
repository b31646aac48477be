"""A run whose ranks share its weights and gradients too, for models that no GPU holds: torch's FSDP2, on banks.

    matrices     each rank has 1/R of each, of its gradient and its average (ZeRO stage 3: arXiv:1910.02054)
    a block      its matrices are gathered before it, in the dtype they multiply in, and let go behind it; so again in
                 the backward pass, whose gradients are summed and cut in one message
    a move       each rank moves its part where every step of the chain is elementwise; else it is handed whole matrices
                 of some layers, moves them as sharded.py does, and hands the parts back
    the rest     gains, small and odd matrices are whole on every rank, and so are their gradients' sums

The parts that a rank has of the members of a bank are that bank [N, r/R, c], and FSDP2's shards are views into it:
averages, restarts and elementwise chains are what they are on one rank.  No rank's device holds all of the weights at
any time; a checkpoint, of whole tensors under the names of one rank, is put together on the host of rank 0.
"""

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ablab.core.language.declare import Param
from ablab.core.model.init import initial
from ablab.core.model.layers import declaration
from ablab.core.model.objective import Head
from ablab.core.model.transformer import Transformer
from ablab.core.parts.transforms import Now
from ablab.core.recipe.recipe import Recipe
from ablab.core.runtime.compilation import OfRows, compiled
from ablab.core.runtime.replay import Recorder
from ablab.core.runtime.runtime import Runtime
from ablab.core.runtime.world import Joined, Rows
from ablab.core.train import scattered
from ablab.core.train.banks import (
    ON_GRADIENT,
    Bank,
    GradientScale,
    Move,
    Optimizer,
    named_state,
)
from ablab.core.train.checkpoint import Tensors
from ablab.core.train.cutting import (
    SMALL,
    Called,
    axis_of,
    cut,
    cut_like,
    own_of,
    parameter_like,
)
from ablab.core.train.dealing import Share, is_elementwise, like_of_state, part_of, shares_of
from ablab.core.train.evaluate import Spans
from ablab.core.train.saving import Write
from ablab.core.train.scattered import Scattered, evenly, gathered, likes
from ablab.core.train.sharded import Given, PartChainMove, ShardedStep, ShardedTrainer
from ablab.core.train.step import OPTIMIZER, Loss, TrainingStep


# -- whole matrices, for as long as a move takes -----------------------------------------------------------------------
class Exchange:
    """Parts of all members of a bank, on every rank <-> whole members, on the rank that moves them."""

    def __init__(self, bank: Bank, shares: list[Share], world: Joined):
        self.bank = bank
        self.shares = shares
        self.world = world
        self.whole = without_memory(bank)
        self.part = part_of(self.whole, shares[world.rank])
        self.nothing = self.part.weight
        sizes = zip(bank.weight.shape, self.whole.weight.shape, strict=True)
        self.axis = [part == whole for part, whole in sizes].index(False)
        counts = [len(share) for share in shares]
        ours = [counts[world.rank]] * world.size
        self.there = Rows(given=counts, received=ours)
        self.back = Rows(given=ours, received=counts)

    def begin(self) -> None:
        """From here on our members are whole, in `part`."""
        self.part.grad = self._joined(self.bank.grad)
        self.part.weight = self._joined(self.bank.weight)

    def end(self) -> None:
        """What has moved goes back."""
        pieces = self.part.weight.chunk(self.world.size, dim=self.axis)
        sent = torch.cat(pieces)
        self.world.all_to_all(self.bank.weight, sent, self.back).wait()
        self.bank.grad.zero_()
        self.part.weight = self.nothing
        self.part.grad = self.nothing

    def _joined(self, parts: Tensor) -> Tensor:
        """Parts of all members -> our members [n, r, c]."""
        rows = sum(self.there.received)
        came = parts.new_empty(rows, *parts.shape[1:])
        self.world.all_to_all(came, parts, self.there).wait()
        return torch.cat(came.chunk(self.world.size), dim=self.axis)

    def state(self) -> dict[str, Scattered]:
        """By its names on one rank: rows of it go with members."""
        members = len(self.bank.names)
        own: Mapping[str, Tensor] = {}
        if self.part.names:
            own = named_state(self.bank.names[0], self.part.state)
        found = {}
        for name, like in like_of_state(self.whole).items():
            rows = like.shape[0] // members if like.dim() else 1
            spans = tuple(range(one.start * rows, one.stop * rows) for one in self.shares)
            nothing = like.new_empty(0, device=self.bank.weight.device)
            found[name] = Scattered(like, own.get(name, nothing), 0, spans)
        return found


def without_memory(bank: Bank) -> Bank:
    """The bank of whole members, which nobody has: their shapes."""
    shape = len(bank.names), *bank.declared.shape
    zero = bank.weight.new_zeros(()).expand(shape)
    return replace(bank, weight=zero, grad=zero, state={})


class VisitMove:
    """Moves a bank whose members must be whole: those that are ours, which come for it and go."""

    def __init__(self, exchange: Exchange, given: Given):
        self.exchange = exchange
        self.given = given
        self.move = PartChainMove([exchange.part], given)

    def __call__(self, lr: Tensor, fraction: Tensor, now: Now) -> Tensor:
        self.exchange.begin()
        if self.exchange.part.names:
            self.move(lr, fraction, now)
        self.exchange.end()
        return self.given.norm


# -- the optimizer -----------------------------------------------------------------------------------------------------
class FullyShardedOptimizer(Optimizer):
    """Banks of parts of matrices, and of whole parameters that all ranks move alike."""

    def __init__(self, model: nn.Module, recipe: Recipe, world: Joined):
        self.model = model
        self.world = world
        super().__init__(model, recipe)

    def _stacked(self, members: Sequence[nn.Parameter]) -> Tensor:
        return torch.stack([own_of(value) for value in members])

    def _move_into(self, bank: Bank, members: Sequence[nn.Parameter]) -> None:
        if axis_of(members[0]) is None:
            return super()._move_into(bank, members)
        made = {
            name: parameter_like(value, own)
            for name, value, own in zip(bank.names, members, bank.weight, strict=True)
        }
        # FSDP2 takes over what is assigned, and adds up gradients in what is there.
        self.model.load_state_dict(made, strict=False, assign=True)
        for value, grad in zip(made.values(), bank.grad, strict=True):
            value.grad = cut_like(value, grad)

    def _moved(self) -> list[Bank]:
        named = dict(self.model.named_parameters())
        self.whole: list[Bank] = []
        self.parted: list[Bank] = []  # of which we move our parts
        visiting: list[Bank] = []
        for bank in self.banks:
            if axis_of(named[bank.names[0]]) is None:
                self.whole.append(bank)
            elif is_elementwise(bank.chain):
                self.parted.append(bank)
            else:
                visiting.append(bank)
        shapes = [without_memory(bank) for bank in visiting]
        shares = shares_of(shapes, self.world.size, whole=0)
        dealt = zip(visiting, shares, strict=True)
        self.exchanges = [Exchange(bank, share, self.world) for bank, share in dealt]
        ours = [one.part for one in self.exchanges if one.part.names]
        return self.whole + self.parted + ours

    @property
    def cut(self) -> list[Bank]:
        """Whose gradients we have parts of."""
        return self.parted + [one.bank for one in self.exchanges]

    def _move(self, compiled: bool, kernels: Collection[str]) -> Move:
        given = Given(self.device)
        moves: list[Move] = [PartChainMove([bank], given) for bank in self.whole + self.parted]
        moves += [VisitMove(one, given) for one in self.exchanges]
        return FullyShardedMove(self, moves, self.scaling, given)

    # -- saving --------------------------------------------------------------------------------------------------------
    def scattered(self) -> dict[str, Scattered]:
        """Every state tensor by its name on one rank."""
        ranks = self.world.size
        found: dict[str, Scattered] = {}
        for bank in self.whole + self.parted:
            shapes = like_of_state(without_memory(bank))
            for name, own in named_state(bank.names[0], bank.state).items():
                found[name] = evenly(own, shapes[name], ranks)
        for one in self.exchanges:
            found |= one.state()
        for name, own in named_state(ON_GRADIENT, self.scaling.state).items():
            found[name] = evenly(own, own.to("meta"), ranks)
        return found

    def tensors(self) -> Tensors:
        return gathered(self.scattered(), self.world)

    def like(self) -> Tensors:
        return likes(self.scattered())

    def put(self, saved: Mapping[str, Tensor]) -> None:
        scattered.take(self.scattered(), saved, self.world.rank)


class FullyShardedMove:
    """One step of every bank."""

    def __init__(
        self,
        optimizer: FullyShardedOptimizer,
        moves: Sequence[Move],
        scaling: GradientScale,
        given: Given,
    ):
        self.optimizer = optimizer
        self.moves = moves
        self.scaling = scaling
        self.given = given

    def __call__(self, lr: Tensor, fraction: Tensor, now: Now) -> Tensor:
        norm = self._norm()
        scale = self.scaling(norm / fraction, now)
        self.given.norm.copy_(norm)
        self.given.scale.copy_(scale)
        for move in self.moves:
            move(lr, fraction, now)
        return norm / fraction

    def _norm(self) -> Tensor:
        """Of all gradients, 0-D."""
        of_parts = self._squares(self.optimizer.cut)
        self.optimizer.world.all_reduce(of_parts).wait()
        of_whole = self._squares(self.optimizer.whole)
        return (of_parts + of_whole).sqrt()

    def _squares(self, banks: Sequence[Bank]) -> Tensor:
        """The sum of all squared gradients, 0-D."""
        found = [self.given.norm.new_zeros(())]
        found += [torch.linalg.vector_norm(bank.grad).square() for bank in banks]
        return torch.stack(found).sum()


# -- a step ------------------------------------------------------------------------------------------------------------
class WholeReduction:
    """Sums the gradients of what every rank has whole; FSDP2 sums the others within each backward pass."""

    def __init__(self, optimizer: FullyShardedOptimizer):
        self.world = optimizer.world
        self.banks = optimizer.whole

    def begin(self) -> None:
        """Nothing leaves before the end."""

    def end(self) -> None:
        handles = [self.world.all_reduce(bank.grad) for bank in self.banks]
        for handle in handles:
            handle.wait()


class FullyShardedStep(ShardedStep):
    """A training step of one rank, which has parts of averages too."""

    optimizer: FullyShardedOptimizer

    def scattered(self) -> dict[str, Scattered]:
        """Everything besides the parameters that a resumed run needs, by name."""
        ranks = self.optimizer.world.size
        states = self.optimizer.scattered()
        found = {f"{OPTIMIZER}{name}": one for name, one in states.items()}
        averages = self._averages()
        for name, own in self._beside().items():
            like = averages.get(name, own.to("meta"))
            found[name] = evenly(own, like, ranks)
        return found

    def _averages(self) -> Tensors:
        """Of whole weights, by name, without values."""
        whole = [without_memory(bank).weight.to("meta") for bank in self.optimizer.banks]
        return {
            f"after/{part.kind}/{name}": value
            for part, _ in self.after
            for name, value in part.begin(whole).items()
        }

    def tensors(self) -> Tensors:
        return gathered(self.scattered(), self.optimizer.world)

    def like(self) -> Tensors:
        return likes(self.scattered())

    def put(self, saved: Mapping[str, Tensor]) -> None:
        scattered.take(self.scattered(), saved, self.optimizer.world.rank)


# -- the trainer -------------------------------------------------------------------------------------------------------
class FullyShardedTrainer(ShardedTrainer):
    """A trainer of one rank, which has parts of the weights; all ranks make the same calls."""

    world: Joined
    optimizer: FullyShardedOptimizer
    training_step: FullyShardedStep

    def __init__(
        self,
        recipe: Recipe,
        runtime: Runtime,
        data_folder: Path,
        world: Joined,
        small: int = SMALL,
    ):
        """small: as `cut` takes it."""
        self.small = small
        super().__init__(recipe, runtime, data_folder, world)

    def _placed(self, model: Transformer) -> Transformer:
        self.within = cut(model, self.world.mesh, self.small)
        self.declared: dict[str, Param] = {
            name: declaration(value) for name, value in model.named_parameters()
        }
        return model

    def _losses(self, heads: tuple[Head, Head]) -> tuple[Loss, OfRows]:
        how = self.runtime.compile
        descend, measure = compiled(self.model, heads, how, hooked=True)
        return Called(self.within, descend), Called(self.within, measure)

    def _initialise(self, recipe: Recipe) -> None:
        for name, one in self._weights().items():
            whole = initial(name, self.declared[name], recipe)
            one.take(whole, self.world.rank)

    def _optimizer(
        self,
        recipe: Recipe,
        compiled: bool,
        kernels: Collection[str],
        recorder: Recorder | None,
    ) -> Optimizer:
        return FullyShardedOptimizer(self.model, recipe, self.world)

    def _training_step(
        self, loss: Loss, recipe: Recipe, recorder: Recorder | None
    ) -> TrainingStep:
        return FullyShardedStep(
            loss,
            self.optimizer,
            recipe,
            recipe.tokens_per_step,
            recorder=None,
            reduction=WholeReduction(self.optimizer),
            of_messages=None,
        )

    def _own_spans(self) -> Spans:
        found = super()._own_spans()
        spans = len(list(self.tokens.held_out_spans(self._own_rows)))
        if 0 < spans % self.world.size <= self.world.rank:
            self._give_weights()
        return found

    @torch.no_grad()
    def _give_weights(self) -> None:
        """To the others, who have a batch more to measure."""
        length = self.tokens.context + 1
        rows = torch.zeros(self._own_rows, length, dtype=torch.int64)
        self.nats(rows.to(self.device))

    # -- saving --------------------------------------------------------------------------------------------------------
    def _weights(self) -> dict[str, Scattered]:
        found = {}
        for name, value in self.model.named_parameters():
            like = torch.empty(value.shape, device="meta")
            found[name] = evenly(own_of(value), like, self.world.size)
        return found

    def scattered(self) -> dict[str, Scattered]:
        """Everything that a resumed run needs, by name."""
        weights = {f"model/{name}": one for name, one in self._weights().items()}
        return weights | self.training_step.scattered()

    def weights(self) -> Tensors:
        return gathered(self._weights(), self.world)

    def like(self) -> Tensors:
        return likes(self.scattered())

    def put(self, saved: Mapping[str, Tensor]) -> None:
        scattered.take(self.scattered(), saved, self.world.rank)

    def write_later(self, tensors: Tensors, write: Write) -> None:
        if self.world.rank == 0:
            self.saver.write(tensors, write)

    def _hand_out(self, saved: Tensors) -> None:
        for name, one in self.scattered().items():
            one.scatter(saved.get(name), self.world)

    def digest(self) -> str:
        total = hashlib.sha256()
        for name, one in self._weights().items():
            whole = one.gather(self.world)
            if whole is not None:
                total.update(name.encode() + whole.numpy().tobytes())
        return self.world.told(total.hexdigest()[:16])
