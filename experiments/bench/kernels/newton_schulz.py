"""Newton-Schulz on batches of the 70M and the 430M model, beside the compiler's form."""

from collections.abc import Iterable
from functools import partial
from pathlib import Path

import torch

from ablab.core.parts.transforms import COEFFICIENTS
from ablab.core.parts.transforms import newton_schulz as formula
from ablab.experiments.bench.kernels.case import OURS, Case, Form, activations, compiled, ours

SHAPES = {
    "cuda": [
        (24, 768, 768),
        (16, 2048, 768),
        (8, 768, 2048),
        (8, 768, 768),
        (60, 3072, 1152),
        (30, 1152, 3072),
        (30, 1152, 1152),
        (30, 384, 1152),
    ],
    "cpu": [(2, 32, 48)],
}
POLYNOMIALS = "polar7"


def flops(shape: Iterable[int], coefficients: str) -> float:
    """Of Newton-Schulz on [N,r,c], products counted in full.

    For each triple X X^T, its square, and their sum times X.
    """
    count, rows, columns = shape
    short, long = sorted((rows, columns))
    _, triples = COEFFICIENTS[coefficients]
    return count * len(triples) * (4 * short**2 * long + 2 * short**3)


def newton_schulz(device: torch.device, folder: Path) -> Iterable[Case]:
    """Batches of matrices -> approximate polar factors; products in bf16."""
    for shape in SHAPES[device.type]:
        yield _case(shape, device)


def _case(shape: tuple[int, ...], device: torch.device) -> Case:
    dtype = activations(device)
    plain = partial(formula, coefficients=POLYNOMIALS)

    def own() -> Form:
        fused = ours(device, "newton_schulz", "orthogonalise")
        return Form(lambda matrices: fused(matrices, *COEFFICIENTS[POLYNOMIALS], dtype))

    return Case(
        kernel="newton_schulz",
        name="x".join(map(str, shape)),
        inputs=(torch.randn(shape, device=device),),
        forms={
            "torch": lambda: Form(compiled(partial(plain, dtype=dtype), device)),
            OURS: own,
        },
        reference=partial(plain, dtype=torch.float32),
        flops=flops(shape, POLYNOMIALS),
    )
