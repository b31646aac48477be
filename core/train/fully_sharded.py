"""A run whose ranks share its weights and gradients too, for models that no GPU holds: torch's FSDP2, on banks.

    matrices     each rank has 1/R of each, of its gradient and its average (ZeRO stage 3: arXiv:1910.02054)
    a block      its matrices are gathered before it, in the dtype they multiply in, and let go behind it; so again in
                 the backward pass, whose gradients are summed and cut in one message
    a move       each rank moves its part where every step of the chain is elementwise; else it is handed whole matrices
                 of some layers, moves them as sharded.py does, and hands the parts back
    the rest     gains, small and odd matrices are whole on every rank, and so are their gradients' sums

The parts that a rank has of the members of a bank are that bank [N, r/R, c], and FSDP2's shards are views into it:
averages, restarts and elementwise chains are what they are on one rank.  No rank holds all of the weights at any time;
a checkpoint, of whole tensors under the names of one rank, is put together in the host memory of rank 0.
"""

import hashlib
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard

from ablab.core.language.declare import Param
from ablab.core.language.offers import AdamDirection, Decays, RunningMean, offer_of
from ablab.core.model.init import initial
from ablab.core.model.layers import LinearMap, declaration, plain_product
from ablab.core.model.objective import Head
from ablab.core.model.rates import bank_of
from ablab.core.model.transformer import Transformer
from ablab.core.parts.transforms import Now
from ablab.core.recipe.recipe import Chain, Recipe
from ablab.core.runtime.compilation import OfRows, compiled
from ablab.core.runtime.replay import Recorder
from ablab.core.runtime.runtime import Runtime
from ablab.core.runtime.world import Joined, Rows
from ablab.core.train.banks import (
    ON_GRADIENT,
    Bank,
    GradientScale,
    Move,
    Optimizer,
    declared_of,
    named_state,
)
from ablab.core.train.checkpoint import Tensors
from ablab.core.train.evaluate import Spans
from ablab.core.train.saving import Write
from ablab.core.train.sharded import (
    Given,
    PartChainMove,
    ShardedStep,
    ShardedTrainer,
    Share,
    like_of_state,
    part_of,
    shares_of,
)
from ablab.core.train.step import OPTIMIZER, Loss, TrainingStep

SMALL = 1 << 16  # numbers of a parameter below which every rank has all of it
ELEMENTWISE = (AdamDirection, RunningMean, Decays)


# -- the model ---------------------------------------------------------------------------------------------------------
class Within(nn.Module):
    """The root of the sharded parts: what is called within it finds each weight whole when it comes to it."""

    def __init__(self, model: Transformer):
        super().__init__()
        self.model = model

    def forward(self, function: OfRows, rows: Tensor) -> Any:
        return function(rows)


class Held(NamedTuple):
    """A parameter by its name in the model, and who holds it by which name."""

    name: str
    value: nn.Parameter
    module: nn.Module
    attribute: str


def fully_sharded(
    model: Transformer, mesh: DeviceMesh, dtype: torch.dtype, small: int = SMALL
) -> Within:
    """Cut the model's matrices, a group of messages a block; it moves to the mesh's device block by block.

    dtype: of activations.  small: numbers below which a parameter stays whole.
    """
    ranks = mesh.size()
    device = torch.device(mesh.device_type)
    held = list(_held(model))
    axes = axes_of(model, ranks, small)
    declared = {one.name: declared_of(one.value) for one in held}
    whole = {one.value for one in held if one.name not in axes}
    for value in whole:
        value.data = value.data.to(device)
    for number, block in enumerate(model.blocks):
        inside = [one for one in held if one.name.startswith(f"blocks.{number}.")]
        parts = [one for one in inside if one.name in axes]
        plain = all(_multiplies_plainly(one.module) for one in parts)
        _shard(block, mesh, dtype if plain else torch.float32, whole)
    within = Within(model)
    # In fp32: tables are looked up before their rows are cast.
    _shard(within, mesh, torch.float32, whole)
    for name, value in model.named_parameters():
        value.declared = declared[name]  # type: ignore[attr-defined]
    # A stage may hand on a view; none changes a tensor in place, which alone would lose the hook.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
    return within


def _shard(
    module: nn.Module, mesh: DeviceMesh, dtype: torch.dtype, whole: set[nn.Parameter]
) -> None:
    """dtype: in which weights are gathered; what autograd keeps of them is let go with them."""
    policy = MixedPrecisionPolicy(
        param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    ranks = mesh.size()
    made = fully_shard(
        module,
        mesh=mesh,
        mp_policy=policy,
        reshard_after_forward=True,  # of the root too: after an evaluation its weights move
        shard_placement_fn=lambda value: Shard(cast(int, _axis(value.shape, ranks))),
        ignored_params=whole,
    )
    # Losses are sums over tokens, and so are gradients.
    made.set_gradient_divide_factor(1.0)
    made.set_force_sum_reduction_for_comms(True)


def axes_of(model: nn.Module, ranks: int, small: int) -> dict[str, int]:
    """The parameters of which each rank has a part, by name, and the axis along which they are cut."""
    held = list(_held(model))
    able = {one.name for one in held if _can_be_cut(one, ranks, small)}
    # A bank is cut as a whole.
    stays = {bank_of(declared_of(one.value)) for one in held if one.name not in able}
    return {
        one.name: cast(int, _axis(one.value.shape, ranks))
        for one in held
        if bank_of(declared_of(one.value)) not in stays
    }


def _held(model: nn.Module) -> Iterator[Held]:
    for path, module in model.named_modules():
        for attribute, value in module.named_parameters(recurse=False):
            name = f"{path}.{attribute}" if path else attribute
            yield Held(name, value, module, attribute)


def _can_be_cut(one: Held, ranks: int, small: int) -> bool:
    # FSDP2 finds a parameter as an attribute, which `half` or `type` is not (core/model/layers.py).
    is_found = getattr(one.module, one.attribute, None) is one.value
    is_large = isinstance(one.module, LinearMap) or one.value.numel() >= small
    return is_found and is_large and _axis(one.value.shape, ranks) is not None


def _axis(shape: Sequence[int], ranks: int) -> int | None:
    """Along which a matrix is cut: the first that the ranks divide."""
    axes = range(len(shape)) if len(shape) > 1 else ()
    return next((axis for axis in axes if shape[axis] % ranks == 0), None)


def _multiplies_plainly(module: nn.Module) -> bool:
    """Whether the weight is cast to the activations' dtype before anything else is done with it."""
    return isinstance(module, LinearMap) and module.product is plain_product


def cut_of(value: Tensor) -> int | None:
    """The axis along which a parameter is cut."""
    return value.placements[0].dim if isinstance(value, DTensor) else None  # type: ignore[attr-defined]


def own_of(value: Tensor) -> Tensor:
    """What this rank has of a parameter; its very memory."""
    value = value.detach()
    return value.to_local() if isinstance(value, DTensor) else value


# -- what ranks have of whole tensors ----------------------------------------------------------------------------------
@dataclass(frozen=True)
class Part:
    """A tensor that a checkpoint holds, and what each rank has of it."""

    like: Tensor  # the whole one, without values
    own: Tensor  # ours
    axis: int | None  # along which it is cut; None: every rank has all of it
    spans: tuple[range, ...]  # of each rank along the axis

    def of(self, rank: int, whole: Tensor) -> Tensor:
        """A view of what a rank has of the whole tensor."""
        if self.axis is None:
            return whole
        span = self.spans[rank]
        return whole.narrow(self.axis, span.start, len(span))

    @torch.no_grad()
    def take(self, whole: Tensor, rank: int) -> None:
        self.own.copy_(self.of(rank, whole))

    def gathered(self, world: Joined) -> Tensor | None:
        """The whole tensor on the host of rank 0, a rank's part at a time; None on the others.  All ranks call it."""
        whole = torch.empty_like(self.like, device="cpu") if world.rank == 0 else None
        if self.axis is None:
            return None if whole is None else whole.copy_(self.own)
        for owner, span in enumerate(self.spans):
            if not span:
                continue
            sent = self._room_for(owner) if owner != world.rank else self.own.contiguous()
            world.broadcast(sent, owner).wait()
            if whole is not None:
                self.of(owner, whole).copy_(sent)
        return whole

    def handed_out(self, whole: Tensor | None, world: Joined) -> None:
        """Every rank takes its part of what rank 0 has; None on the others.  All ranks call it."""
        owners = range(world.size) if self.axis is not None else range(1)
        for owner in owners:
            sent = self._room_for(owner)
            if not sent.numel():
                continue
            if whole is not None:
                sent.copy_(self.of(owner, whole))
            world.broadcast(sent, 0).wait()
            if self.axis is None or owner == world.rank:
                self.own.copy_(sent)

    def _room_for(self, owner: int) -> Tensor:
        return torch.empty_like(self.of(owner, self.like), device=self.own.device)


def part_between(own: Tensor, like: Tensor, ranks: int) -> Part:
    """own: of all of `like`, or of an equal part of it along one axis."""
    differs = [axis for axis in range(own.dim()) if own.shape[axis] != like.shape[axis]]
    if not differs:
        return Part(like, own, None, ())
    (axis,) = differs
    each = own.shape[axis]
    spans = tuple(range(rank * each, (rank + 1) * each) for rank in range(ranks))
    return Part(like, own, axis, spans)


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
        if cut_of(members[0]) is None:
            return super()._move_into(bank, members)
        shards = zip(bank.names, members, bank.weight, strict=True)
        moved = {name: _shard_like(value, own) for name, value, own in shards}
        self.model.load_state_dict(moved, strict=False, assign=True)
        for value, grad in zip(moved.values(), bank.grad, strict=True):
            value.grad = _dtensor_like(value, grad)

    def _moved(self) -> list[Bank]:
        named = dict(self.model.named_parameters())
        self.axes = [cut_of(named[bank.names[0]]) for bank in self.banks]
        cut = [
            bank for bank, axis in zip(self.banks, self.axes, strict=True) if axis is not None
        ]
        self.whole = [bank for bank in self.banks if not any(bank is one for one in cut)]
        self.cut = cut
        visited = [bank for bank in cut if not is_elementwise(bank.chain)]
        self.exchanges = self._exchanges(visited)
        at_home = [bank for bank in self.banks if not any(bank is one for one in visited)]
        self.at_home = at_home
        return at_home + [one.part for one in self.exchanges if one.part.names]

    def _exchanges(self, banks: Sequence[Bank]) -> list["Exchange"]:
        """Of banks whose members are moved whole: who moves which."""
        wholes = [_stand_in(bank) for bank in banks]
        shares = shares_of(wholes, self.world.size, whole=0)
        return [
            Exchange(bank, whole, share, self.world)
            for bank, whole, share in zip(banks, wholes, shares, strict=True)
        ]

    def _move(self, compiled: bool, kernels: Collection[str]) -> Move:
        given = Given(self.device)
        moves: list[Move] = [PartChainMove([bank], given) for bank in self.at_home]
        moves += [VisitMove(one, given) for one in self.exchanges]
        return FullyShardedMove(self, moves, self.scaling, given)

    # -- saving --------------------------------------------------------------------------------------------------------
    def parts(self) -> dict[str, Part]:
        """Every state tensor by its name on one rank."""
        ranks = self.world.size
        found: dict[str, Part] = {}
        for bank in self.at_home:
            likes = like_of_state(_stand_in(bank))
            for name, own in named_state(bank.names[0], bank.state).items():
                found[name] = part_between(own, likes[name], ranks)
        for one in self.exchanges:
            found |= one.parts()
        for name, own in named_state(ON_GRADIENT, self.scaling.state).items():
            found[name] = part_between(own, own.to("meta"), ranks)
        return found

    def tensors(self) -> dict[str, Tensor]:
        """As on one rank, on the host of rank 0 alone; every rank must call it."""
        return gathered(self.parts(), self.world)

    def like(self) -> dict[str, Tensor]:
        return {name: part.like for name, part in self.parts().items()}

    def put(self, saved: Mapping[str, Tensor]) -> None:
        take(self.parts(), saved, self.world.rank)


def _shard_like(value: Tensor, own: Tensor) -> nn.Parameter:
    """A parameter that is cut as `value` is, in other memory."""
    made = nn.Parameter(_dtensor_like(value, own))
    made.declared = declaration(value)  # type: ignore[attr-defined]
    return made


def _dtensor_like(value: Tensor, own: Tensor) -> DTensor:
    assert isinstance(value, DTensor)
    return DTensor.from_local(own, value.device_mesh, value.placements, run_check=False)


def is_elementwise(chain: Chain) -> bool:
    """Whether a part of a matrix moves as it does within it: every step offers arithmetic of one number at a time."""
    return all(isinstance(offer_of(step), ELEMENTWISE) for step in chain.steps)


def _stand_in(bank: Bank) -> Bank:
    """The bank of whole members, which nobody has: their shapes, and no memory."""
    shape = (len(bank.names), *bank.declared.shape)
    none = bank.weight.new_zeros(()).expand(shape)
    return replace(bank, weight=none, grad=none, state={})


class Exchange:
    """Parts of all members of a bank, on every rank <-> whole members, on the rank that moves them."""

    def __init__(self, bank: Bank, whole: Bank, shares: list[Share], world: Joined):
        """whole: `_stand_in` of the bank."""
        self.bank = bank
        self.whole = whole
        self.shares = shares
        self.world = world
        self.part = part_of(whole, shares[world.rank])
        self.nothing = self.part.weight
        shape = bank.declared.shape
        own = bank.weight.shape[1:]
        self.axis = 1 + next(axis for axis, size in enumerate(shape) if own[axis] != size)

    @property
    def rows(self) -> Rows:
        """Members that leave to each rank, and parts of ours that come from each."""
        counts = [len(share) for share in self.shares]
        return Rows(counts, [counts[self.world.rank]] * self.world.size)

    def begin(self) -> None:
        """From here on our members are whole, in `part`."""
        self.part.grad = self._collected(self.bank.grad)
        self.part.weight = self._collected(self.bank.weight)

    def end(self) -> None:
        """What has moved goes back."""
        pieces = self.part.weight.chunk(self.world.size, dim=self.axis)
        given = torch.cat(pieces)
        back = Rows(self.rows.received, self.rows.given)
        self.world.all_to_all(self.bank.weight, given, back).wait()
        self.bank.grad.zero_()
        self.part.grad = self.part.weight = self.nothing

    def _collected(self, parts: Tensor) -> Tensor:
        rows = self.rows
        there = parts.new_empty(sum(rows.received), *parts.shape[1:])
        self.world.all_to_all(there, parts, rows).wait()
        return torch.cat(there.chunk(self.world.size), dim=self.axis)

    def parts(self) -> dict[str, Part]:
        """The state, by its name on one rank: rows of it go with members."""
        own = {}
        if self.part.names:
            own = named_state(self.bank.names[0], self.part.state)
        found = {}
        for name, like in like_of_state(self.whole).items():
            rows = like.shape[0] // len(self.bank.names) if like.dim() else 0
            spans = tuple(range(one.start * rows, one.stop * rows) for one in self.shares)
            none = self.bank.weight.new_empty(0, *like.shape[1:], dtype=like.dtype)
            found[name] = Part(like, own.get(name, none), 0, spans)
        return found


class VisitMove:
    """Moves a bank whose members must be whole: our share of them, which is here for as long as that takes."""

    def __init__(self, exchange: Exchange, given: Given):
        self.exchange = exchange
        self.chain = PartChainMove([exchange.part], given)

    def __call__(self, lr: Tensor, fraction: Tensor, now: Now) -> Tensor:
        self.exchange.begin()
        if self.exchange.part.names:
            self.chain(lr, fraction, now)
        self.exchange.end()
        return self.chain.scaling.norm


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
        self.given.norm.copy_(norm)
        self.given.scale.copy_(self.scaling(norm / fraction, now))
        for move in self.moves:
            move(lr, fraction, now)
        return norm / fraction

    def _norm(self) -> Tensor:
        """Of all gradients, 0-D."""
        parts = _squares(self.optimizer.cut, self.given.norm)
        self.optimizer.world.all_reduce(parts).wait()
        return (parts + _squares(self.optimizer.whole, self.given.norm)).sqrt()


def _squares(banks: Sequence[Bank], like: Tensor) -> Tensor:
    """The sum of all squared gradients, 0-D."""
    found = [torch.linalg.vector_norm(bank.grad).square() for bank in banks]
    return torch.stack([like.new_zeros(()), *found]).sum()


def gathered(parts: Mapping[str, Part], world: Joined) -> Tensors:
    """Whole tensors by name on the host of rank 0, one after another; nothing on the others.  All ranks call it."""
    found: Tensors = {}
    for name, part in parts.items():
        whole = part.gathered(world)
        if whole is not None:
            found[name] = whole
    return found


def take(parts: Mapping[str, Part], saved: Mapping[str, Tensor], rank: int) -> None:
    """Our part of those whole tensors that are given, by name."""
    for name, part in parts.items():
        if name in saved:
            part.take(saved[name], rank)


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
    """A training step of one rank, of which a checkpoint holds parts."""

    optimizer: FullyShardedOptimizer

    def parts(self) -> dict[str, Part]:
        world = self.optimizer.world
        found = {f"{OPTIMIZER}{name}": part for name, part in self.optimizer.parts().items()}
        likes = self._like_beside()
        for name, own in self._beside().items():
            found[name] = part_between(own, likes.get(name, own.to("meta")), world.size)
        return found

    def _like_beside(self) -> dict[str, Tensor]:
        """Of averages of whole weights."""
        weights = [_stand_in(bank).weight.to("meta") for bank in self.optimizer.banks]
        return {
            f"after/{part.kind}/{name}": value
            for part, _ in self.after
            for name, value in part.begin(weights).items()
        }

    def tensors(self) -> dict[str, Tensor]:
        return gathered(self.parts(), self.optimizer.world)

    def like(self) -> dict[str, Tensor]:
        return {name: part.like for name, part in self.parts().items()}

    def put(self, saved: Mapping[str, Tensor]) -> None:
        take(self.parts(), saved, self.optimizer.world.rank)


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
        """small: numbers of a parameter below which every rank has all of it."""
        self.small = small
        super().__init__(recipe, runtime, data_folder, world)

    def _placed(self, model: Transformer) -> Transformer:
        self.within = fully_sharded(model, self.world.mesh(), model.dtype, self.small)
        return model

    def _losses(self, heads: tuple[Head, Head]) -> tuple[Loss, OfRows]:
        how = self.runtime.compile
        descend, measure = compiled(self.model, heads, how, hooked=True)
        return Called(self.within, descend), Called(self.within, measure)

    def _initialise(self, recipe: Recipe) -> None:
        for name, part in self._weights().items():
            part.take(initial(name, self.declared[name], recipe), self.world.rank)

    def _optimizer(
        self,
        recipe: Recipe,
        compiled: bool,
        kernels: Collection[str],
        recorder: Recorder | None,
    ) -> Optimizer:
        optimizer = FullyShardedOptimizer(self.model, recipe, self.world)
        self.declared: dict[str, Param] = {
            name: declaration(value) for name, value in self.model.named_parameters()
        }
        return optimizer

    def _training_step(
        self, loss: Loss, recipe: Recipe, recorder: Recorder | None
    ) -> TrainingStep:
        reduction = WholeReduction(self.optimizer)
        tokens = recipe.tokens_per_step
        return FullyShardedStep(loss, self.optimizer, recipe, tokens, None, reduction, None)

    def _own_spans(self) -> Spans:
        found = super()._own_spans()
        spans = len(list(self.tokens.held_out_spans(self._own_rows)))
        if 0 < spans % self.world.size <= self.world.rank:
            self._give_weights()
        return found

    @torch.no_grad()
    def _give_weights(self) -> None:
        """To the others, who have a batch more to measure."""
        rows = torch.zeros(self._own_rows, self.tokens.context + 1, dtype=torch.int64)
        self.nats(rows.to(self.device))

    # -- saving --------------------------------------------------------------------------------------------------------
    def _weights(self) -> dict[str, Part]:
        ranks = self.world.size
        return {
            name: part_between(own_of(value), torch.empty(value.shape, device="meta"), ranks)
            for name, value in self.model.named_parameters()
        }

    def parts(self) -> dict[str, Part]:
        """Everything that a resumed run needs, by name."""
        weights = {f"model/{name}": part for name, part in self._weights().items()}
        return weights | self.training_step.parts()

    def weights(self) -> dict[str, Tensor]:
        return gathered(self._weights(), self.world)

    def like(self) -> dict[str, Tensor]:
        return {name: part.like for name, part in self.parts().items()}

    def put(self, saved: Mapping[str, Tensor]) -> None:
        take(self.parts(), saved, self.world.rank)

    def write_later(self, tensors: Tensors, write: Write) -> None:
        if self.world.rank == 0:
            self.saver.write(tensors, write)

    def _hand_out(self, saved: Tensors) -> None:
        for name, part in self.parts().items():
            part.handed_out(saved.get(name), self.world)

    def digest(self) -> str:
        total = hashlib.sha256()
        for name, part in self._weights().items():
            whole = part.gathered(self.world)
            if whole is not None:
                total.update(name.encode() + whole.numpy().tobytes())
        return self.world.told(total.hexdigest()[:16])


@dataclass(frozen=True)
class Called:
    """A function of rows, called where it finds the weights."""

    within: Within
    function: OfRows

    def __call__(self, rows: Tensor) -> Any:
        return self.within(self.function, rows)
