"""Banks: equal parameters of one role stacked in one tensor, moved by one chain.

Parameters and gradients are views into their bank, so a step stacks nothing; the whole chain of a bank is one
function, compiled once (hyper-parameters are 0-D tensors) or run eagerly.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ablab.core.parametrize import Scales
from ablab.core.recipe import Chain, Recipe
from ablab.core.transforms import Now


@dataclass
class Bank:
    """N parameters of one role and shape: weight, gradient and state tensors are [N, ...], fp32."""

    names: list[str]
    weight: Tensor
    grad: Tensor
    chain: Chain
    blocks: tuple[int, ...]  # rows of the matrices that the chain treats apart
    decay: float  # the parametrization's factor on the decay rate
    lr: float  # the parametrization's and the chain's factor on the learning rate
    matmul: torch.dtype  # for Newton-Schulz products
    state: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    step: Callable[..., None] | None = None


def chain_step(bank: Bank) -> Callable[[Tensor, Tensor, Now], None]:
    """The function that moves one bank, its steps bound once:  w <- w - lr * chain(clip * gradient)."""
    steps = [(part, bank.state[part.kind]) for part in bank.chain.steps]

    def step(lr: Tensor, clip: Tensor, now: Now) -> None:
        update = bank.grad * clip
        for part, state in steps:
            update, new = part.update(update, bank.weight, state, bank, now)
            for name, value in new.items():
                state[name].copy_(value)
        bank.weight.sub_(update * (lr * bank.lr))

    return step


class Optimizer:
    """All banks of a model.  After construction the model's parameters and gradients live in them."""

    def __init__(self, model: nn.Module, recipe: Recipe, compiled: bool = False):
        self.lr, self.schedule, self.steps = recipe.optim.lr, recipe.schedule, recipe.steps
        self.device = next(model.parameters()).device
        self.banks = [self._bank(members, recipe) for members in _grouped(model, recipe).values()]
        for bank in self.banks:
            bank.step = torch.compile(chain_step(bank), dynamic=False) if compiled else chain_step(bank)
        self.clip = _clip_to(recipe.optim.clip, self.device)

    def _bank(self, members: list[tuple[str, nn.Parameter, Scales]], recipe: Recipe) -> Bank:
        names, weights, scales = zip(*members, strict=True)
        declared, chain = weights[0].declared, recipe.optim.chains[weights[0].declared.role]
        weight = torch.stack([w.detach() for w in weights])
        bank = Bank(
            list(names), weight, torch.zeros_like(weight), chain, _blocks(declared, chain), scales[0].decay,
            scales[0].lr * chain.lr, torch.bfloat16 if self.device.type == "cuda" else torch.float32,
        )  # fmt: skip
        for i, view in enumerate(weights):
            view.data, view.grad = bank.weight[i], bank.grad[i]
        bank.state = {part.kind: part.state(weight, bank) for part in chain.steps}
        return bank

    @torch.no_grad()
    def step(self, t: int) -> Tensor:
        """Optimizer step t (from 1): clip, move, clear the gradients.  Returns the gradient norm before clipping, 0-D."""
        multiplier = self.schedule.multiplier(t, self.steps)
        lr, *now = self._scalars(self.lr * multiplier, t, t / self.steps, multiplier)
        norm = torch.stack([bank.grad.square().sum() for bank in self.banks]).sum().sqrt()
        clip = self.clip(norm)
        for bank in self.banks:
            bank.step(lr, clip, Now(*now))
            bank.grad.zero_()
        return norm

    def _scalars(self, *values: float) -> tuple[Tensor, ...]:
        """Numbers of this step as 0-D tensors on the device, in one copy that nobody waits for."""
        packed = torch.tensor(values, dtype=torch.float32)
        return (packed.pin_memory().to(self.device, non_blocking=True) if self.device.type == "cuda" else packed).unbind()

    def tensors(self) -> dict[str, Tensor]:
        """Every state tensor by name: what a checkpoint must hold besides the parameters."""
        return {f"{bank.names[0]}/{kind}/{name}": t for bank in self.banks for kind, s in bank.state.items() for name, t in s.items()}


def _grouped(model: nn.Module, recipe: Recipe) -> dict[Any, list]:
    groups: dict[Any, list] = {}
    for name, value in model.named_parameters():
        declared = value.declared
        chain = recipe.optim.chains[declared.role]
        scales = recipe.parametrization.scales(declared, recipe.model, width_rule(chain))
        key = (declared.role, declared.shape, declared.blocks, declared.head, scales.lr, scales.decay)
        groups.setdefault(key, []).append((name, value, scales))
    return groups


def width_rule(chain: Chain) -> str:
    """How the chain's learning rate scales with width under muP; '' when no step says."""
    return next((part.width_rule for part in chain.steps if part.width_rule), "")


def _blocks(declared: Any, chain: Chain) -> tuple[int, ...]:
    """Rows of the matrices to treat apart, as the chain's `split` asks."""
    split = next((part.split for part in chain.steps if hasattr(part, "split")), "joint")
    if split == "heads" and declared.head:
        return (declared.head,) * (declared.shape[0] // declared.head)
    return () if split == "joint" else declared.blocks


def _clip_to(limit: float | None, device: torch.device) -> Callable[[Tensor], Tensor]:
    """norm -> the factor for every gradient: min(1, limit / norm), or always 1; nobody waits for the device."""
    one = torch.ones((), device=device)
    if limit is None:
        return lambda norm: one
    return lambda norm: (limit / (norm + 1e-6)).clamp(max=1.0)
