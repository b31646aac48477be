"""A feed-forward in 8-bit floats, beside its maps that cast for themselves and beside bf16.

Shapes: N tokens, W channels, F channels inside.
"""

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

from ablab.experiments.bench.kernels.case import OURS, Case, Form, compiled, ours
from ablab.experiments.bench.kernels.feed_forward import flops, inputs, plain
from ablab.kernels import fp8, swiglu

SHAPES = {  # N, W, F
    "cuda": [(36_864, 768, 2048), (73_728, 768, 2048)],
    "cpu": [(64, 16, 32)],
}


def fp8_swiglu(device: torch.device, folder: Path) -> Iterable[Case]:
    """Activations [N,W], gate_up [2F,W], down [W,F] -> down(silu(gate) * up), and the gradients of all three.

    Floor: six products at twice the rate of bf16, and what lies between them: gate and up read twice, their gradients
    and what they make written in both layouts, the gradient of that read.
    """
    forms: dict[str, Callable[[], Form]] = {
        "torch": lambda: Form(compiled(_apart, device)),
        "bf16": lambda: Form(compiled(plain, device), same=False),
        OURS: lambda: Form(compiled(ours(device, "fp8_swiglu", "fp8_swiglu"), device)),
        f"{OURS}, weights' gradients wide": lambda: _wide(device),
    }
    for n, w, f in SHAPES[device.type]:
        yield Case(
            kernel="fp8_swiglu",
            name=f"N {n}, W {w}, F {f}",
            inputs=inputs(n, w, f, device),
            forms=forms,
            reference=plain,
            flops=flops(n, w, f),
            bytes=16 * n * f,
            floor=at_twice_the_rate,
        )


def at_twice_the_rate(flops: float, bytes: float) -> float:
    return flops / 2 + bytes


def _apart(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    packed = fp8.fp8_linear(x, gate_up)
    return fp8.fp8_linear(swiglu.reference(packed), down)


def _wide(device: torch.device) -> Form:
    fused = ours(device, "fp8_swiglu", "fp8_swiglu")

    def call(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        return fused(x, gate_up, down, weight_gradient="wide")

    return Form(compiled(call, device))
