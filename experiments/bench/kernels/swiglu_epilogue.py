"""A feed-forward whose products end in its gate, by quack-kernels, beside cuBLAS with our kernel between them.

Shapes: N tokens, W channels, F channels inside.
"""

from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from ablab.experiments.bench.kernels.case import (
    OURS,
    Case,
    Form,
    Unavailable,
    compiled,
    ours,
)
from ablab.experiments.bench.kernels.feed_forward import flops, inputs, plain

SHAPES = {  # N, W, F
    "cuda": [(36_864, 768, 2048), (73_728, 768, 2048), (36_864, 1152, 3072)],
    "cpu": [(64, 16, 32)],
}


def swiglu_epilogue(device: torch.device, folder: Path) -> Iterable[Case]:
    """Activations [N,W], gate_up [2F,W], down [W,F] -> down(silu(gate) * up), and the gradients of all three.

    Floor: six products.
    """
    forms: dict[str, Callable[[], Form]] = {
        "torch": lambda: Form(compiled(plain, device)),
        f"{OURS}, between": lambda: _between(device),
        OURS: lambda: _in_epilogues(device),
    }
    for n, w, f in SHAPES[device.type]:
        yield Case(
            kernel="swiglu_epilogue",
            name=f"N {n}, W {w}, F {f}",
            inputs=inputs(n, w, f, device),
            forms=forms,
            reference=plain,
            flops=flops(n, w, f),
        )


def _between(device: torch.device) -> Form:
    gated = ours(device, "swiglu", "swiglu")

    def call(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
        packed = F.linear(x, gate_up.to(x.dtype))
        return F.linear(gated(packed), down.to(x.dtype))

    return Form(compiled(call, device))


def _in_epilogues(device: torch.device) -> Form:
    if find_spec("quack") is None:
        raise Unavailable("quack-kernels is not installed")
    return Form(compiled(ours(device, "swiglu_epilogue", "feed_forward"), device))
