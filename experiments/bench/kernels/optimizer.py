"""Newton-Schulz on the batches of the 70M model, and the whole optimizer step."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ablab.ablations.registry import discover
from ablab.core.language.parse import fields_of
from ablab.core.parts.transforms import COEFFICIENTS, newton_schulz, split_blocks
from ablab.core.runtime.runtime import Runtime
from ablab.core.train.trainer import Trainer
from ablab.experiments.bench.kernels.cases import OURS, Case, Form, activations, compiled, ours
from ablab.experiments.bench.random_tokens import NAME, experiment_on_random_tokens


def schulz_flops(shape: Iterable[int], coefficients: str) -> float:
    """Of Newton-Schulz on [N,r,c], products counted in full: X X^T, its square, and their sum times X, for each triple."""
    count, rows, columns = shape
    short, long = sorted((rows, columns))
    return count * len(COEFFICIENTS[coefficients][1]) * (4 * short**2 * long + 2 * short**3)


def orthogonal(device: torch.device, folder: Path) -> Iterable[Case]:
    """Batches of matrices -> approximate polar factors, the batches of the 70M model; products in bf16."""
    shapes = (
        [(24, 768, 768), (16, 2048, 768), (8, 768, 2048), (8, 768, 768)]
        if device.type == "cuda"
        else [(2, 32, 48)]
    )
    for shape in shapes:
        yield _schulz_case(shape, "polar7", device)


def _schulz_case(shape: tuple[int, ...], coefficients: str, device: torch.device) -> Case:
    dtype, plain = activations(device), partial(newton_schulz, coefficients=coefficients)

    def own() -> Form:
        fused = ours(device, "newton_schulz", "orthogonalise")
        return Form(lambda matrices: fused(matrices, *COEFFICIENTS[coefficients], dtype))

    forms = {"torch": lambda: Form(compiled(partial(plain, dtype=dtype), device)), "ablab": own}
    matrices = torch.randn(shape, device=device)
    return Case(
        "newton_schulz",
        "x".join(map(str, shape)),
        (matrices,),
        forms,
        partial(plain, dtype=torch.float32),
        schulz_flops(shape, coefficients),
    )


def optimizer(device: torch.device, folder: Path) -> Iterable[Case]:
    """The whole optimizer step of the full stack: clip, move every bank, clear the gradients.  Floor: products, then every tensor read and written."""
    discover()
    name = "loo_70m" if device.type == "cuda" else "quickstart"
    experiment = experiment_on_random_tokens(name, {}, folder)
    asked = (
        {"torch": {"kernels": "torch"}, OURS: {}}
        if "kernels" in fields_of(Runtime)
        else {OURS: {}}
    )

    data, trainer = folder / "data" / NAME, partial(Trainer, experiment.recipes["full"])
    banks = trainer(Runtime(device="cpu"), data).optimizer.banks
    shapes = [bank.weight.shape for bank in banks]

    def full(more: dict[str, Any]) -> Form:
        made, steps = (
            trainer(Runtime(device=device.type, **more), data).optimizer,
            iter(range(1, 1 << 30)),
        )
        return _stepping(lambda: made.step(next(steps)), [bank.grad for bank in made.banks])

    def adamw() -> Form:
        weights = [torch.randn(shape, device=device, requires_grad=True) for shape in shapes]
        for weight in weights:
            weight.grad = torch.empty_like(weight)
        return replace(
            _stepping(
                torch.optim.AdamW(weights, fused=True).step, [weight.grad for weight in weights]
            ),
            same=False,
        )

    forms = {form: partial(full, more) for form, more in asked.items()} | {
        "torch, fused AdamW, for scale": adamw
    }
    size = sum(
        4
        * (
            4 * bank.weight.numel()
            + 2 * sum(x.numel() for state in bank.state.values() for x in state.values())
        )
        for bank in banks
    )
    yield Case(
        "optimizer",
        f"{name}, full",
        (),
        forms,
        None,
        sum(map(_bank_flops, banks)),
        size,
        lambda a, b: a + b,
    )


def _stepping(step: Callable[[], Any], gradients: list[Tensor]) -> Form:
    """A step clears the gradients, so each call finds the same random ones again."""
    random = [torch.randn_like(gradient) for gradient in gradients]

    def before() -> tuple:
        for gradient, value in zip(gradients, random, strict=True):
            gradient.copy_(value)
        return ()

    return Form(step, before)


def _bank_flops(bank: Any) -> float:
    chosen = [
        part.coefficients
        for part in bank.chain.steps
        if getattr(part, "coefficients", None) in COEFFICIENTS
    ]
    return sum(
        schulz_flops(piece.shape, one)
        for one in chosen
        for piece in split_blocks(bank.weight, bank.blocks)
    )
