"""What lies between the two projections of a feed-forward, beside the compiler's form.  Shapes: N tokens, F channels."""

from collections.abc import Iterable
from pathlib import Path

import torch

from ablab.experiments.bench.kernels.cases import Case, Form, activations, compiled, ours
from ablab.kernels.swiglu import reference


def swiglu(device: torch.device, folder: Path) -> Iterable[Case]:
    """Gate and up [N,2F] -> silu(gate) * up [N,F].  Floor: both read twice, y and dy once, both gradients written."""
    for n, f in [(36_864, 2048), (36_864, 3072)] if device.type == "cuda" else [(64, 32)]:
        packed = torch.randn(
            n, 2 * f, device=device, dtype=activations(device), requires_grad=True
        )
        forms = {
            "torch": lambda: Form(compiled(reference, device)),
            "ablab": lambda: Form(ours(device, "swiglu", "swiglu")),
        }
        yield Case(
            "swiglu",
            f"N {n}, F {f}",
            (packed,),
            forms,
            reference,
            bytes=8 * n * f * packed.element_size(),
        )
