"""What the cases of whole feed-forwards share: N tokens, W channels, F channels inside."""

import torch
from torch import Tensor
from torch.nn import functional as F

from ablab.experiments.bench.kernels.case import activations
from ablab.kernels import swiglu


def inputs(n: int, w: int, f: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Activations [N,W], gate_up [2F,W] and down [W,F], each to have a gradient."""
    x = torch.randn(n, w, device=device, dtype=activations(device))
    gate_up = w**-0.5 * torch.randn(2 * f, w, device=device)
    down = f**-0.5 * torch.randn(w, f, device=device)
    return x.requires_grad_(), gate_up.requires_grad_(), down.requires_grad_()


def flops(n: int, w: int, f: int) -> int:
    """Forward and backward: gate, up and down, three products each."""
    return 6 * n * w * 3 * f


def plain(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    packed = F.linear(x, gate_up.to(x.dtype))
    return F.linear(swiglu.reference(packed), down.to(x.dtype))
