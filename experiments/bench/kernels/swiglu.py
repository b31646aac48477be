"""What lies between the two projections of a feed-forward, beside the compiler's form.

Shapes: N tokens, F channels.
"""

from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from ablab.experiments.bench.kernels.case import OURS, Case, Form, activations, compiled, ours
from ablab.kernels.swiglu import reference

SHAPES = {  # N, F
    "cuda": [(36_864, 2048), (36_864, 3072)],
    "cpu": [(64, 32)],
}


def swiglu(device: torch.device, folder: Path) -> Iterable[Case]:
    """Gate and up [N,2F] -> silu(gate) * up [N,F].

    Floor: both read twice, y and dy once, both gradients written.
    """
    dtype = activations(device)
    forms: dict[str, Callable[[], Form]] = {
        "torch": lambda: Form(compiled(reference, device)),
        OURS: lambda: Form(ours(device, "swiglu", "swiglu")),
    }
    for n, f in SHAPES[device.type]:
        packed = torch.randn(n, 2 * f, device=device, dtype=dtype, requires_grad=True)
        yield Case(
            kernel="swiglu",
            name=f"N {n}, F {f}",
            inputs=(packed,),
            forms=forms,
            reference=reference,
            bytes=8 * n * f * packed.element_size(),
        )
