"""Readout, cross-entropy and z-loss of activations, beside their peers.

Shapes: N tokens, V vocabulary, W channels.
"""

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ablab.experiments.bench.kernels.case import (
    OURS,
    Case,
    Form,
    activations,
    compiled,
    needs_gpu,
    one_after_the_other,
    ours,
    served,
)
from ablab.experiments.bench.kernels.cross_entropy import SHAPES, Z, entropy


def linear_cross_entropy(device: torch.device, folder: Path) -> Iterable[Case]:
    """Activations [N,W], readout [V,W] -> loss and both gradients.

    Floor: three products, then the logits and their gradient written once each.
    """
    n, v, w = SHAPES[device.type]
    dtype = activations(device)
    x = torch.randn(n, w, device=device, dtype=dtype, requires_grad=True)
    weight = w**-0.5 * torch.randn(v, w, device=device)
    weight = weight.to(dtype).requires_grad_()
    targets = torch.randint(v, (n,), device=device)
    chunks = {OURS: 0, f"{OURS}, all logits at once": n, f"{OURS}, chunks of 4096": 4096}
    forms: dict[str, Callable[[], Form]] = {
        "torch": lambda: Form(compiled(_plain, device)),
        "liger-kernel": lambda: _liger(device),
        **{name: partial(_own, device, dtype, chunk) for name, chunk in chunks.items()},
        f"{OURS}, fp8": lambda: _eight_bits(device, "fp8"),
        f"{OURS}, fp8, dW wide": lambda: _eight_bits(device, "wide"),
    }
    yield Case(
        kernel="linear_cross_entropy",
        name=f"N {n}, V {v}, W {w}",
        inputs=(x, weight, targets),
        forms=forms,
        reference=_plain,
        flops=6 * n * v * w,
        bytes=2 * n * v * x.element_size(),
        floor=one_after_the_other,
    )


def _plain(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return entropy(x @ weight.T, targets)


def _liger(device: torch.device) -> Form:
    needs_gpu(device)
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    loss = LigerFusedLinearCrossEntropyLoss(lse_square_scale=Z, reduction="sum")
    return Form(lambda x, weight, targets: loss(weight, x, targets))


def _own(device: torch.device, dtype: torch.dtype, chunk: int) -> Form:
    """chunk: rows of logits in memory at a time; 0: as the kernel chooses."""
    fused = ours(device, "linear_cross_entropy", "linear_cross_entropy")
    served(ours(device, "linear_cross_entropy", "serves")(dtype, device))

    def call(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        loss, _ = fused(x, weight, targets, z_weight=Z, chunk=chunk)
        return loss

    return Form(call)


def _eight_bits(device: torch.device, weight_gradient: str) -> Form:
    """Other numbers: shown for scale."""
    fused = ours(device, "fp8_linear_cross_entropy", "fp8_linear_cross_entropy")

    def call(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        loss, _ = fused(x, weight, targets, z_weight=Z, weight_gradient=weight_gradient)
        return loss

    return Form(call, same=False)
