"""Initial values, each parameter from its own generator.

The generator is seeded by (seed, name): a parameter that two arms share starts with the same bits in both, whatever
else they switch on or off.  Drawn on the CPU, so the device does not matter.
"""

import hashlib
import math

import torch
from torch import Tensor, nn

from ablab.core.model.layers import declaration
from ablab.core.parts.parametrize import Scales
from ablab.core.recipe.recipe import Recipe


@torch.no_grad()
def initialise(model: nn.Module, recipe: Recipe) -> None:
    for name, value in model.named_parameters():
        declared = declaration(value)
        if declared.fill is not None:
            value.fill_(declared.fill)
        else:
            scales = recipe.parametrization.scales(name, declared, recipe.model, "adam")
            value.copy_(_drawn(declared.shape, scales, generator(recipe.seed, name)))


def _drawn(shape: tuple[int, ...], scales: Scales, source: torch.Generator) -> Tensor:
    """Where the tails are cut, what lies there is drawn again: everything else keeps its bits."""
    drawn = torch.empty(shape).normal_(0.0, scales.std, generator=source)
    end = scales.cut * scales.std if scales.cut else math.inf
    while (outside := drawn.abs() > end).any():
        again = torch.empty(shape).normal_(0.0, scales.std, generator=source)
        drawn = torch.where(outside, again, drawn)
    return drawn


def generator(seed: int, name: str) -> torch.Generator:
    digest = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
