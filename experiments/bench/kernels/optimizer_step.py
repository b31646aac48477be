"""The whole optimizer step of the full stack, beside torch's kernels and a fused AdamW."""

from collections.abc import Callable, Iterable
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from ablab.ablations.registry import discover
from ablab.core.model.transformer import Transformer
from ablab.core.parts.transforms import COEFFICIENTS, split_blocks
from ablab.core.recipe.recipe import Recipe
from ablab.core.runtime.runtime import Runtime
from ablab.core.train.banks import Bank, Optimizer
from ablab.core.train.trainer import Trainer
from ablab.experiments.bench.kernels import newton_schulz
from ablab.experiments.bench.kernels.case import OURS, Case, Form, one_after_the_other
from ablab.experiments.bench.random_tokens import NAME, experiment_on_random_tokens

WIDE = {  # the 430M model of IMU-1
    "model.width": 1152,
    "model.layers": 30,
    "model.attention.group": 3,
    "model.tied": True,
    "data.vocab": 49152,
}
# of a device: what a case is called -> its experiment, and what is changed of that
SIZES: dict[str, dict[str, tuple[str, dict[str, Any]]]] = {
    "cuda": {"loo_70m": ("loo_70m", {}), "430M": ("loo_70m", WIDE)},
    "cpu": {"quickstart": ("quickstart", {})},
}
FP32 = 4  # bytes


def optimizer_step(device: torch.device, folder: Path) -> Iterable[Case]:
    """Clip, move every bank, clear the gradients.  Floor: products, then every tensor read and written."""
    discover()
    for name, (sheet, changes) in SIZES[device.type].items():
        recipe = experiment_on_random_tokens(sheet, changes, folder / name).recipes["full"]
        yield _case(name, recipe, device, folder / name / "data" / NAME)


def _case(name: str, recipe: Recipe, device: torch.device, data: Path) -> Case:
    with torch.device("meta"):
        banks = Optimizer(Transformer(recipe, torch.float32), recipe).banks
    forms: dict[str, Callable[[], Form]] = {
        "torch": partial(_full, recipe, device, data, "torch"),
        OURS: partial(_full, recipe, device, data, "auto"),
        "torch, fused AdamW, for scale": partial(_adamw, banks, device),
    }
    return Case(
        kernel="optimizer",
        name=f"{name}, full",
        inputs=(),
        forms=forms,
        flops=sum(_flops(bank) for bank in banks),
        bytes=sum(_bytes(bank) for bank in banks),
        floor=one_after_the_other,
    )


def _full(
    recipe: Recipe,
    device: torch.device,
    data: Path,
    kernels: Literal["torch", "auto"],
) -> Form:
    where: Literal["cuda", "cpu"] = "cuda" if device.type == "cuda" else "cpu"
    made = Trainer(recipe, Runtime(device=where, kernels=kernels), data).optimizer
    steps = count(1)
    return _stepping(lambda: made.step(next(steps)), [bank.grad for bank in made.banks])


def _adamw(banks: list[Bank], device: torch.device) -> Form:
    """Of weights of the same shapes: other work."""
    weights = [torch.randn(bank.weight.shape, device=device) for bank in banks]
    gradients = [torch.empty_like(weight) for weight in weights]
    for weight, gradient in zip(weights, gradients, strict=True):
        weight.requires_grad_().grad = gradient
    step = torch.optim.AdamW(weights, fused=True).step
    return _stepping(step, gradients, same=False)


def _stepping(step: Callable[[], Any], gradients: list[Tensor], same: bool = True) -> Form:
    """A step clears the gradients, so each call finds the same random ones again."""
    random = [torch.randn_like(gradient) for gradient in gradients]

    def before() -> tuple:
        for gradient, value in zip(gradients, random, strict=True):
            gradient.copy_(value)
        return ()

    return Form(step, before, same)


def _flops(bank: Bank) -> float:
    """Of the bank's Newton-Schulz iterations."""
    chosen = [getattr(part, "coefficients", None) for part in bank.chain.steps]
    pieces = split_blocks(bank.weight, bank.blocks)
    return sum(
        newton_schulz.flops(piece.shape, one)
        for one in chosen
        if one in COEFFICIENTS
        for piece in pieces
    )


def _bytes(bank: Bank) -> int:
    """Weight and gradient read and written, the state likewise."""
    state = sum(value.numel() for held in bank.state.values() for value in held.values())
    return FP32 * (4 * bank.weight.numel() + 2 * state)
