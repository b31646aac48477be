"""The attention's projections in 8-bit floats, operands cast in both layouts at once, beside casts apart and bf16.

Shapes: N tokens, k channels in, n out.
"""

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from ablab.experiments.bench.kernels.case import OURS, Case, Form, activations, compiled, ours
from ablab.experiments.bench.kernels.fp8_swiglu import at_twice_the_rate
from ablab.kernels import fp8

SHAPES = {  # N, k, n: queries, keys and values of the 70M model and of the 430M model, and the way back
    "cuda": [(73_728, 768, 2304), (73_728, 768, 768), (36_864, 1152, 1920)],
    "cpu": [(64, 16, 32)],
}


def fp8_projection(device: torch.device, folder: Path) -> Iterable[Case]:
    """Activations [N,k], weight [n,k] -> their product [N,n], and the gradients of both.

    Floor: three products at twice the rate of bf16, and the casts between them: activations and the gradient read
    once and written in both layouts.
    """
    dtype = activations(device)
    forms: dict[str, Callable[[], Form]] = {
        "torch": lambda: Form(compiled(fp8.fp8_linear, device)),
        "bf16": lambda: Form(compiled(_plain, device), same=False),
        OURS: lambda: Form(compiled(ours(device, "fp8_projection", "fp8_projection"), device)),
    }
    for rows, k, n in SHAPES[device.type]:
        x = torch.randn(rows, k, device=device, dtype=dtype, requires_grad=True)
        weight = k**-0.5 * torch.randn(n, k, device=device)
        yield Case(
            kernel="fp8_projection",
            name=f"N {rows}, k {k}, n {n}",
            inputs=(x, weight.requires_grad_()),
            forms=forms,
            reference=_plain,
            flops=6 * rows * k * n,
            bytes=4 * rows * (k + n),
            floor=at_twice_the_rate,
        )


def _plain(x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(x, weight.to(x.dtype))
