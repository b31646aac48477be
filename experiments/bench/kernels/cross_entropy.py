"""Cross-entropy + z-loss of logits, beside its peers.  Shapes: N tokens, V vocabulary, W channels."""

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from ablab.experiments.bench.kernels.case import (
    OURS,
    Case,
    Form,
    activations,
    compiled,
    needs_gpu,
    ours,
)

Z = 1e-4  # weight of the z-loss
SHAPES = {"cuda": (36_864, 32_000, 768), "cpu": (64, 256, 32)}  # N, V, W


def entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross-entropy + z-loss of [N,V], summed over tokens, in nats."""
    logits = logits.float()
    nats = F.cross_entropy(logits, targets, reduction="sum")
    return nats + Z * logits.logsumexp(-1).square().sum()


def cross_entropy(device: torch.device, folder: Path) -> Iterable[Case]:
    """Logits [N,V] -> loss and its gradient.  Floor: the logits read once, their gradient written once."""
    n, v, _ = SHAPES[device.type]
    dtype = activations(device)
    logits = torch.randn(n, v, device=device, dtype=dtype, requires_grad=True)
    targets = torch.randint(v, (n,), device=device)
    forms: dict[str, Callable[[], Form]] = {
        "torch": lambda: Form(compiled(entropy, device)),
        "liger-kernel": lambda: _liger(device),
        OURS: lambda: _own(device),
    }
    yield Case(
        kernel="cross_entropy",
        name=f"N {n}, V {v}",
        inputs=(logits, targets),
        forms=forms,
        reference=entropy,
        bytes=2 * logits.numel() * logits.element_size(),
    )


def _liger(device: torch.device) -> Form:
    needs_gpu(device)
    from liger_kernel.transformers import LigerCrossEntropyLoss

    return Form(LigerCrossEntropyLoss(lse_square_scale=Z, reduction="sum"))


def _own(device: torch.device) -> Form:
    in_place = ours(device, "cross_entropy", "cross_entropy_")

    def call(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        gradient = logits.detach()  # written over the logits
        nats, lse = in_place(gradient, targets, z_weight=Z)
        return (nats + Z * lse.square()).sum(), gradient

    return Form(call)
