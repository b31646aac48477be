"""Banks: equal parameters of one role stacked in one tensor, moved by one chain.

Parameters and gradients are views into their bank, so a step stacks nothing; the step of all banks is one function of
tensors (hyper-parameters too): kernels (core/fusion/optimizer.py), or compiled once, or run eagerly.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ablab.core.fusion.optimizer import FusedMove
from ablab.core.language.declare import Param
from ablab.core.parts.transforms import COEFFICIENTS, Now, newton_schulz
from ablab.core.recipe.recipe import Chain, Recipe
from ablab.core.runtime.replay import OnDevice


@dataclass
class Bank:
    """N parameters of one role and shape: weight, gradient and state tensors are [N, ...], fp32."""

    names: list[str]
    declared: Param  # what all of them were declared as
    weight: Tensor
    grad: Tensor
    chain: Chain
    blocks: tuple[int, ...]  # rows of the matrices that the chain treats apart
    matmul: torch.dtype  # for Newton-Schulz products
    newton_schulz: Callable[[Tensor, str, torch.dtype], Tensor]
    lr: Tensor  # 0-D: the parametrization's and the chain's factor on the learning rate
    decay: Tensor  # 0-D: the parametrization's factor on the decay rate
    state: dict[str, dict[str, Tensor]] = field(default_factory=dict)


class Optimizer:
    """All banks of a model.  After construction the model's parameters and gradients live in them.

    compiled: the whole step is one compiled function; all that may differ between runs of one structure (learning
    rate, schedule, scales, state) enters as tensors, so `restart` recompiles nothing.  kernels: places that kernels serve,
    `optimizer` (then there is nothing to compile) and `newton_schulz` (symmetric products).  replay, pool: the whole step
    is one CUDA graph (core/runtime/replay.py), if its parts can be recorded.
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        compiled: bool = False,
        kernels: Collection[str] = (),
        replay: bool = False,
        pool: Any = None,
    ):
        self.device = next(model.parameters()).device
        self.newton_schulz = _symmetric() if "newton_schulz" in kernels else newton_schulz
        self.banks = [self._bank(members, recipe) for members in _grouped(model).values()]
        self.restart(recipe)
        replay = replay and all(
            part.recordable for bank in self.banks for part in bank.chain.steps
        )
        move = (FusedMove if "optimizer" in kernels else partial(_move, compiled))(
            self.banks, _clip_to(recipe.optim.clip)
        )
        self.move = OnDevice(move, self.device, replay, pool)

    def _bank(self, members: list[tuple[str, nn.Parameter]], recipe: Recipe) -> Bank:
        names, weights = zip(*members, strict=True)
        declared, chain = weights[0].declared, recipe.optim.chains[weights[0].declared.role]
        weight = torch.stack([w.detach() for w in weights])
        lr, decay = torch.zeros((), device=self.device), torch.zeros((), device=self.device)
        matmul = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        bank = Bank(
            list(names),
            declared,
            weight,
            torch.zeros_like(weight),
            chain,
            _blocks(declared, chain),
            matmul,
            self.newton_schulz,
            lr,
            decay,
        )
        for i, view in enumerate(weights):
            view.data, view.grad = bank.weight[i], bank.grad[i]
        bank.state = {part.kind: part.state(weight, bank) for part in chain.steps}
        return bank

    def restart(self, recipe: Recipe) -> None:
        """Fresh state for a run of the same structure: another seed, learning rate, schedule or parametrization."""
        self.lr, self.schedule, self.steps = recipe.optim.lr, recipe.schedule, recipe.steps
        for bank in self.banks:
            scales = recipe.parametrization.scales(
                bank.names[0], bank.declared, recipe.model, width_rule(bank.chain)
            )
            bank.lr.fill_(scales.lr * bank.chain.lr)
            bank.decay.fill_(scales.decay)
            bank.grad.zero_()
            for part in bank.chain.steps:
                for name, value in part.state(bank.weight, bank).items():
                    bank.state[part.kind][name].copy_(value)

    @torch.no_grad()
    def step(self, t: int) -> Tensor:
        """Optimizer step t (from 1): clip, move, clear the gradients.  Returns the gradient norm before clipping, 0-D."""
        multiplier = self.schedule.multiplier(t, self.steps)
        return self.move(torch.tensor([self.lr * multiplier, t, t / self.steps, multiplier]))

    def tensors(self) -> dict[str, Tensor]:
        """Every state tensor by name: what a checkpoint must hold besides the parameters."""
        return {
            f"{bank.names[0]}/{kind}/{name}": t
            for bank in self.banks
            for kind, s in bank.state.items()
            for name, t in s.items()
        }


def _grouped(model: nn.Module) -> dict[Any, list[tuple[str, nn.Parameter]]]:
    groups: dict[Any, list[tuple[str, nn.Parameter]]] = {}
    for name, value in model.named_parameters():
        declared = value.declared
        groups.setdefault(
            (declared.role, declared.shape, declared.blocks, declared.head), []
        ).append((name, value))
    return groups


def _move(
    compiled: bool, banks: list[Bank], clip_to: Callable[[Tensor], Tensor]
) -> Callable[[Tensor], Tensor]:
    """The function that moves every bank:  w <- w - lr * chain(clip * gradient).

    It is called with [learning rate, step, step / steps, the schedule's value] and returns the norm of the gradient.
    """
    chains = [
        (bank, [(part, bank.state[part.kind]) for part in bank.chain.steps]) for bank in banks
    ]

    def move(lr: Tensor, now: Now) -> Tensor:
        norm = torch.stack([bank.grad.square().sum() for bank in banks]).sum().sqrt()
        clip = clip_to(norm)
        for bank, steps in chains:
            update = bank.grad * clip
            for part, state in steps:
                update, new = part.update(update, bank.weight, state, bank, now)
                for name, value in new.items():
                    state[name].copy_(value)
            bank.weight.sub_(update * (lr * bank.lr))
            bank.grad.zero_()
        return norm

    move = torch.compile(move, dynamic=False) if compiled else move
    return lambda numbers: move(numbers[0], Now(*numbers[1:].unbind()))


def _symmetric() -> Callable[[Tensor, str, torch.dtype], Tensor]:
    from ablab.kernels.newton_schulz import orthogonalise

    return lambda matrices, coefficients, dtype: orthogonalise(
        matrices, *COEFFICIENTS[coefficients], dtype
    )


def width_rule(chain: Chain) -> str:
    """How the chain's learning rate scales with width under muP; '' when no step says."""
    return next((part.width_rule for part in chain.steps if part.width_rule), "")


def _blocks(declared: Any, chain: Chain) -> tuple[int, ...]:
    """Rows of the matrices to treat apart, as the chain's `split` asks."""
    split = next((part.split for part in chain.steps if hasattr(part, "split")), "joint")
    if split == "heads" and declared.head:
        return (declared.head,) * (declared.shape[0] // declared.head)
    return () if split == "joint" else declared.blocks


def _clip_to(limit: float | None) -> Callable[[Tensor], Tensor]:
    """norm -> the factor for every gradient: min(1, limit / norm), or always 1; nobody waits for the device."""
    if limit is None:
        return torch.ones_like
    return lambda norm: (limit / (norm + 1e-6)).clamp(max=1.0)
