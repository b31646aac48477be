"""Initial values, each parameter from its own generator.

The generator is seeded by (seed, name): a parameter that two arms share starts with the same bits in both, whatever
else they switch on or off.  Drawn on the CPU, so the device does not matter.
"""

import hashlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ablab.core.language.declare import Param
from ablab.core.model.layers import declaration
from ablab.core.parts.parametrize import Scales
from ablab.core.recipe.recipe import Recipe

# Numbers of a model that are drawn by many threads: 106 M took 0.9 s of one.
MANY = 1 << 22


@torch.no_grad()
def initialise(model: nn.Module, recipe: Recipe) -> None:
    draws = [_Draw(name, value, recipe) for name, value in model.named_parameters()]
    for one, drawn in zip(draws, _all_drawn(draws), strict=True):
        one.value.copy_(drawn)


def initial(name: str, declared: Param, recipe: Recipe) -> Tensor:
    """The first value of a parameter, on the CPU."""
    if declared.fill is not None:
        return torch.full(declared.shape, declared.fill)
    scales = recipe.parametrization.scales(name, declared, recipe.model, "adam")
    return _drawn(declared.shape, scales, generator(recipe.seed, name))


@dataclass(frozen=True)
class _Draw:
    """A parameter that is to begin."""

    name: str
    value: Tensor
    recipe: Recipe

    def __call__(self) -> Tensor:
        return initial(self.name, declaration(self.value), self.recipe)


def _all_drawn(draws: Sequence[_Draw]) -> Iterator[Tensor]:
    """In their order, each on the CPU.  Each has its own generator, so it does not matter which thread draws it."""
    if sum(one.value.numel() for one in draws) < MANY:
        yield from (one() for one in draws)
        return
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        yield from pool.map(_Draw.__call__, draws)


def _drawn(shape: tuple[int, ...], scales: Scales, source: torch.Generator) -> Tensor:
    """Where the tails are cut, what lies there is drawn again: everything else keeps its bits."""
    drawn = torch.empty(shape).normal_(0.0, scales.std, generator=source)
    if not scales.cut:
        return drawn
    end = scales.cut * scales.std
    while (outside := drawn.abs() > end).any():
        again = torch.empty(shape).normal_(0.0, scales.std, generator=source)
        drawn = torch.where(outside, again, drawn)
    return drawn


def generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
