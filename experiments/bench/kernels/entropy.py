"""Cross-entropy + z-loss beside its peers, on logits and from activations.  Shapes: N tokens, V vocabulary, W channels."""

from collections.abc import Iterable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from ablab.experiments.bench.kernels.cases import (
    Case,
    Form,
    activations,
    compiled,
    needs_gpu,
    ours,
    served,
)

Z = 1e-4  # weight of the z-loss


def _entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy + z-loss, summed over tokens, in nats."""
    logits = logits.float()
    return (
        F.cross_entropy(logits, targets, reduction="sum")
        + Z * logits.logsumexp(-1).square().sum()
    )


def _tokens(device: torch.device) -> tuple[int, int, int]:
    return (36_864, 32_000, 768) if device.type == "cuda" else (64, 256, 32)


def cross_entropy(device: torch.device, folder: Path) -> Iterable[Case]:
    """Logits [N,V] -> loss and its gradient.  Floor: the logits read once, their gradient written once."""
    n, v, _ = _tokens(device)
    logits = torch.randn(n, v, device=device, dtype=activations(device), requires_grad=True)
    targets = torch.randint(v, (n,), device=device)

    def liger() -> Form:
        needs_gpu(device)
        from liger_kernel.transformers import LigerCrossEntropyLoss

        return Form(LigerCrossEntropyLoss(lse_square_scale=Z, reduction="sum"))

    def own() -> Form:
        in_place = ours(device, "cross_entropy", "cross_entropy_")

        def call(logits, targets):
            nats, lse = in_place(gradient := logits.detach(), targets, z_weight=Z)
            return (nats + Z * lse.square()).sum(), gradient

        return Form(call)

    forms = {
        "torch": lambda: Form(compiled(_entropy, device)),
        "liger-kernel": liger,
        "ablab": own,
    }
    yield Case(
        "cross_entropy",
        f"N {n}, V {v}",
        (logits, targets),
        forms,
        _entropy,
        bytes=2 * logits.numel() * logits.element_size(),
    )


def linear_cross_entropy(device: torch.device, folder: Path) -> Iterable[Case]:
    """Activations [N,W], readout [V,W] -> loss and both gradients.  Floor: three products, then the logits as above."""
    n, v, w = _tokens(device)
    x = torch.randn(n, w, device=device, dtype=activations(device), requires_grad=True)
    weight = (torch.randn(v, w, device=device) * w**-0.5).to(x.dtype).requires_grad_()
    targets = torch.randint(v, (n,), device=device)
    plain = lambda x, weight, targets: _entropy(x @ weight.T, targets)  # noqa: E731

    def liger() -> Form:
        needs_gpu(device)
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        loss = LigerFusedLinearCrossEntropyLoss(lse_square_scale=Z, reduction="sum")
        return Form(lambda x, weight, targets: loss(weight, x, targets))

    def own(chunk: int) -> Form:
        fused = ours(device, "linear_cross_entropy", "linear_cross_entropy")
        served(ours(device, "linear_cross_entropy", "serves")(x.dtype, device))
        return Form(
            lambda x, weight, targets: fused(x, weight, targets, z_weight=Z, chunk=chunk)[0]
        )

    chunks = {"ablab": 0, "ablab, all logits at once": n, "ablab, chunks of 4096": 4096}
    forms = {"torch": lambda: Form(compiled(plain, device)), "liger-kernel": liger} | {
        name: partial(own, chunk) for name, chunk in chunks.items()
    }
    least = 2 * n * v * x.element_size()
    yield Case(
        "linear_cross_entropy",
        f"N {n}, V {v}, W {w}",
        (x, weight, targets),
        forms,
        plain,
        6 * n * v * w,
        least,
        lambda a, b: a + b,
    )
