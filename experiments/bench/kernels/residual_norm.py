"""A branch joins the stream and the next branch reads the norm of the sum, beside the compiler's form.

Both passes are timed as one, for two results have gradients.  Shapes: N tokens, W channels.
"""

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor

from ablab.experiments.bench.kernels.case import OURS, Case, Form, activations, compiled, ours
from ablab.kernels.residual_norm import reference

SHAPES = {  # N, W
    "cuda": [(73_728, 768), (36_864, 1152)],
    "cpu": [(64, 32)],
}
EPS = 1e-6


class BothPasses:
    """x, y [N,W], gain [W], factor [1], gradients of the sum and of its norm -> the norm, the gradient of x."""

    def __init__(self, function: Callable[..., tuple[Tensor, Tensor]]):
        self.function = function

    def __call__(self, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        x, y, gain, factor, of_total, of_normed = inputs
        results = self.function(x, y, gain, EPS, factor)
        learned = (x, y, gain)
        dx, *_ = torch.autograd.grad(results, learned, (of_total, of_normed))
        _, normed = results
        return normed.detach(), dx


def residual_norm(device: torch.device, folder: Path) -> Iterable[Case]:
    """Floor: x, y and their sum, its norm, and in the backward pass the sum and three gradients: eight of [N,W]."""
    dtype = activations(device)
    forms: dict[str, Callable[[], Form]] = {
        "torch": lambda: Form(BothPasses(compiled(reference, device))),
        OURS: lambda: Form(BothPasses(ours(device, "residual_norm", "residual_norm"))),
    }
    for n, w in SHAPES[device.type]:
        x, y, of_total, of_normed = torch.randn(4, n, w, device=device, dtype=dtype)
        gain = 1 + 0.1 * torch.randn(w, device=device)
        learned = [value.detach().requires_grad_() for value in (x, y, gain)]
        factor = torch.tensor([0.7], device=device)
        yield Case(
            kernel="residual_norm",
            name=f"N {n}, W {w}",
            inputs=(*learned, factor, of_total, of_normed),
            forms=forms,
            bytes=8 * n * w * x.element_size(),
        )
