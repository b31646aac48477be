"""Banks: equal parameters of one role stacked in one tensor, moved by one chain.

Parameters and gradients are views into their bank, so a step stacks nothing; the step of all banks is one function of
tensors (hyper-parameters too): kernels (core/fusion/optimizer.py), or compiled once, or run eagerly.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from ablab.core.fusion.optimizer import FusedMove
from ablab.core.language.declare import Param
from ablab.core.model.rates import Key, bank_of, chain_of, rates_of
from ablab.core.parts.transforms import COEFFICIENTS, Now, Transform, newton_schulz
from ablab.core.recipe.recipe import Chain, Optim, Recipe
from ablab.core.runtime.replay import OnDevice, Recorder, on_device

State = dict[str, dict[str, Tensor]]  # kind of a part -> name -> tensor
Orthogonal = Callable[[Tensor, str, torch.dtype], Tensor]


@dataclass
class Bank:
    """N parameters of one role and shape: weight, gradient and state tensors are [N, ...], fp32."""

    names: list[str]
    declared: Param  # what all of them were declared as
    chain: Chain
    weight: Tensor
    grad: Tensor
    blocks: tuple[int, ...]  # rows of the matrices that the chain treats apart
    matmul: torch.dtype  # for Newton-Schulz products
    newton_schulz: Orthogonal
    # The parametrization's factors, with the chain's on the learning rate; 0-D if members agree, else [N, 1, ...]
    lr: Tensor
    decay: Tensor
    state: State = field(default_factory=dict)

    @property
    def transforms(self) -> Sequence[Transform]:
        return cast(Sequence[Transform], self.chain.steps)


class Move(Protocol):
    """One step of every bank.  Returns the gradient norm before clipping, 0-D; gradients are cleared."""

    def __call__(self, lr: Tensor, fraction: Tensor, now: Now) -> Tensor:
        """lr: at this step, 0-D.  fraction: of a full batch that the gradients are a sum over, 0-D."""
        ...


class Optimizer:
    """All banks of a model.  After construction the model's parameters and gradients live in them.

    compiled: the whole step is one compiled function; all that may differ between runs of one structure (learning
    rate, schedule, scales, state) enters as tensors, so `restart` recompiles nothing.
    kernels: places that kernels serve: `optimizer` (then there is nothing to compile) and `newton_schulz` (symmetric
    products).
    recorder: records the whole step (core/runtime/replay.py), if its parts can be recorded.
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        compiled: bool = False,
        kernels: Collection[str] = (),
        recorder: Recorder | None = None,
    ):
        self.device = next(model.parameters()).device
        self.newton_schulz = _symmetric() if "newton_schulz" in kernels else newton_schulz
        self.banks = [self._bank(members, recipe) for members in _grouped(model)]
        self.moved = self._moved()
        for bank in self.moved:
            bank.state = {part.kind: part.state(bank.weight, bank) for part in bank.transforms}
        self.scaling = GradientScale(recipe.optim, self.device)
        self.periodic = [
            (bank, part)
            for bank in self.moved
            for part in bank.transforms
            if part.refresh_every
        ]
        self.restart(recipe)
        self.move = self._move(compiled, kernels)
        transforms = [part for bank in self.banks for part in bank.transforms]
        recordable = all(part.recordable for part in transforms)
        recordable = recordable and all(part.recordable for part in self.scaling.parts)
        self.numbered = Numbered(self.move)
        self.launch = on_device(self.numbered, self.device, recorder if recordable else None)

    def _bank(self, members: Sequence[tuple[str, nn.Parameter]], recipe: Recipe) -> Bank:
        names = [name for name, _ in members]
        declared = declared_of(members[0][1])
        chain = chain_of(declared, recipe)
        weight = self._stacked([value for _, value in members])
        rates = rates_of(names, declared, recipe)
        bank = Bank(
            names=names,
            declared=declared,
            chain=chain,
            weight=weight,
            grad=torch.zeros_like(weight),
            blocks=_blocks(declared, chain),
            matmul=torch.bfloat16 if self.device.type == "cuda" else torch.float32,
            newton_schulz=self.newton_schulz,
            lr=per_member(rates.lr, weight),
            decay=per_member(rates.decay, weight),
        )
        self._move_into(bank, [value for _, value in members])
        return bank

    def _stacked(self, members: Sequence[nn.Parameter]) -> Tensor:
        """What a bank of these holds: of all their numbers.  Of fully sharded ones it is a part (fully_sharded.py)."""
        return torch.stack([value.detach() for value in members])

    def _move_into(self, bank: Bank, members: Sequence[nn.Parameter]) -> None:
        """From here on the members and their gradients are views into their bank."""
        for i, value in enumerate(members):
            value.data = bank.weight[i]
            value.grad = bank.grad[i]

    def _moved(self) -> list[Bank]:
        """What this process moves, and has the state of: all banks.  Ranks have a share each (sharded.py)."""
        return self.banks

    def _move(self, compiled: bool, kernels: Collection[str]) -> Move:
        if "optimizer" in kernels:
            return FusedMove(self.banks, self.scaling)
        return chain_move(self.banks, self.scaling, compiled)

    def fits(self, recipe: Recipe) -> bool:
        """Whether `restart` can take the recipe, whose structure is ours: members of its banks agree where ours do."""
        for bank in self.banks:
            rates = rates_of(bank.names, bank.declared, recipe)
            if per_member(rates.lr, bank.weight).shape != bank.lr.shape:
                return False
            if per_member(rates.decay, bank.weight).shape != bank.decay.shape:
                return False
        return True

    def restart(self, recipe: Recipe) -> None:
        """Fresh state for a run of the same structure: another seed, learning rate, schedule or parametrization."""
        self.lr = recipe.optim.lr
        self.schedule = recipe.schedule
        self.steps = recipe.steps
        self.before = recipe.before.steps
        self.refreshed = self.before if "optimizer" in recipe.before.takes else 0
        for bank in self.banks:
            rates = rates_of(bank.names, bank.declared, recipe)
            bank.lr.copy_(per_member(rates.lr, bank.weight))
            bank.decay.copy_(per_member(rates.decay, bank.weight))
            bank.grad.zero_()
        for bank in self.moved:
            for part in bank.transforms:
                for name, value in part.state(bank.weight, bank).items():
                    bank.state[part.kind][name].copy_(value)
        self.scaling.restart()

    @torch.no_grad()
    def step(self, t: int, fraction: float = 1.0) -> Tensor:
        """Optimizer step t (from 1): clip, move, clear the gradients, refresh what is due.

        fraction: of a full batch that the gradients are a sum over; they are divided by it.
        Returns the gradient norm before clipping, 0-D.
        """
        multiplier = self.schedule.multiplier(t, self.steps)
        progress = (t - 1) / self.steps
        now = Now(step=t + self.before, progress=progress, multiplier=multiplier)
        norm = self.launch(torch.tensor([self.lr * multiplier, fraction, *now]))
        since_first = t - 1 + self.refreshed
        for bank, part in self.periodic:
            if since_first % part.refresh_every == 0:
                part.refresh(bank.state[part.kind], bank, since_first + 1)
        return norm

    @torch.no_grad()
    def rehearse(self) -> None:
        """Call what a step calls, its numbers views of one tensor as there: kernels are compiled for their alignment.

        Only where kernels are compiled and not launched (core/runtime/compilation.py): the numbers mean nothing.
        """
        self.numbered(torch.zeros(len(Now._fields) + 2, device=self.device))

    def tensors(self) -> dict[str, Tensor]:
        """Every state tensor by name: what a checkpoint must hold besides the parameters."""
        named: dict[str, Tensor] = {}
        for bank in self.banks:
            named |= named_state(bank.names[0], bank.state)
        return named | named_state(ON_GRADIENT, self.scaling.state)

    def like(self) -> dict[str, Tensor]:
        """Tensors of the shapes and types of `tensors`, without values."""
        return {name: value.to("meta") for name, value in self.tensors().items()}

    def put(self, saved: Mapping[str, Tensor]) -> None:
        """Take over those of `tensors` that are given, by name."""
        put(self.tensors(), saved)

    @property
    def replayed(self) -> list[OnDevice]:
        return [self.launch] if isinstance(self.launch, OnDevice) else []


class Numbered:
    """A move as a function of one tensor: [learning rate, fraction, and the fields of Now]."""

    def __init__(self, move: Move):
        self.move = move

    def __call__(self, numbers: Tensor) -> Tensor:
        lr, fraction, *now = numbers.unbind()
        return self.move(lr, fraction, Now(*now))


class Scaling(Protocol):
    """norm of the mean gradient, 0-D -> what every gradient is multiplied by, 0-D."""

    def __call__(self, norm: Tensor, now: Now) -> Tensor: ...


class ChainMove:
    """Moves every bank by its chain:  w <- w - lr * chain(scale * gradient)."""

    def __init__(self, banks: Sequence[Bank], scaling: Scaling):
        self.banks = banks
        self.scaling = scaling

    def norm(self) -> Tensor:
        """Of the gradients as they stand in the banks, 0-D."""
        squares = torch.stack([bank.grad.square().sum() for bank in self.banks])
        return squares.sum().sqrt()

    def __call__(self, lr: Tensor, fraction: Tensor, now: Now) -> Tensor:
        norm = self.norm() / fraction
        scale = self.scaling(norm, now) / fraction
        for bank in self.banks:
            update = bank.grad * scale
            for part in bank.transforms:
                state = bank.state[part.kind]
                update, new = part.update(update, bank.weight, state, bank, now)
                for name, value in new.items():
                    state[name].copy_(value)
            bank.weight.sub_(update * (lr * bank.lr))
            bank.grad.zero_()
        return norm


def chain_move(banks: Sequence[Bank], scaling: Scaling, compiled: bool) -> Move:
    move = ChainMove(banks, scaling)
    return torch.compile(move.__call__, dynamic=False) if compiled else move


class GradientScale:
    """What every gradient is multiplied by: the clip, times the factors of optim.on_gradient.

    Nobody waits for the device.
    """

    def __init__(self, optim: Optim, device: torch.device):
        self.clip = torch.ones_like if optim.clip is None else Clip(optim.clip)
        self.parts = optim.on_gradient
        self.like = torch.zeros((), device=device)
        self.state: State = {part.kind: part.state(self.like) for part in self.parts}

    def restart(self) -> None:
        for part in self.parts:
            for name, value in part.state(self.like).items():
                self.state[part.kind][name].copy_(value)

    def __call__(self, norm: Tensor, now: Now) -> Tensor:
        """norm: of the mean gradient, 0-D."""
        scale = self.clip(norm)
        for part in self.parts:
            state = self.state[part.kind]
            factor, new = part.factor(norm, state, now)
            for name, value in new.items():
                state[name].copy_(value)
            scale = scale * factor
        return scale


@dataclass(frozen=True)
class Clip:
    """min(1, limit / norm)."""

    limit: float

    def __call__(self, norm: Tensor) -> Tensor:
        return (self.limit / (norm + 1e-6)).clamp(max=1.0)


ON_GRADIENT = "on_gradient"  # the owner, by name, of the state of GradientScale


def named_state(owner: str, state: State) -> dict[str, Tensor]:
    """owner: the first member of a bank, or ON_GRADIENT."""
    return {
        f"{owner}/{kind}/{name}": value
        for kind, tensors in state.items()
        for name, value in tensors.items()
    }


@torch.no_grad()
def put(own: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    """Copy into `own` what is saved under its names; a name that is not is left as it is."""
    for name, value in own.items():
        if name in saved:
            value.copy_(saved[name])


def declared_of(value: nn.Parameter) -> Param:
    """What core/model/layers.py noted on a parameter."""
    return cast(Param, value.declared)  # type: ignore[attr-defined]


def _grouped(model: nn.Module) -> list[list[tuple[str, nn.Parameter]]]:
    groups: dict[Key, list[tuple[str, nn.Parameter]]] = {}
    for name, value in model.named_parameters():
        groups.setdefault(bank_of(declared_of(value)), []).append((name, value))
    return list(groups.values())


def per_member(values: Sequence[float], weight: Tensor) -> Tensor:
    """One number for each member of a bank: 0-D where they agree, else [N, 1, ...] as the weight [N, ...] has axes."""
    if len(set(values)) == 1:
        return weight.new_tensor(values[0])
    return weight.new_tensor(values).view(-1, *[1] * (weight.dim() - 1))


def _symmetric() -> Orthogonal:
    from ablab.kernels.newton_schulz import orthogonalise

    def symmetric(matrices: Tensor, coefficients: str, dtype: torch.dtype) -> Tensor:
        return orthogonalise(matrices, *COEFFICIENTS[coefficients], dtype)

    return symmetric


def _blocks(declared: Param, chain: Chain) -> tuple[int, ...]:
    """Rows of the matrices to treat apart, as the chain's `split` asks."""
    split = next((part.split for part in chain.steps if hasattr(part, "split")), "joint")
    if split == "heads" and declared.head:
        return (declared.head,) * (declared.shape[0] // declared.head)
    return () if split == "joint" else declared.blocks
