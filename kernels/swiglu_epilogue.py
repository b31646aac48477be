"""A SwiGLU feed-forward whose gate, and its gradient, are computed where their products end: no pass for either.

    p = x A^T,  h = silu(g) u                  one kernel: p and h are stored, p is never read for h
    y = h B^T
    dp = silu's gradient of dy B and p         one kernel: dy B is never stored
    dx = dp A,  dA = dp^T x,  dB = dy^T h

A tile of p must hold a gate beside its own up, so in here A's rows alternate, gate, up, gate, up: a copy of the weight
in 16 bits, made where it is cast, and a gradient put back in order.

The two kernels are quack-kernels' GEMM for sm_90 with epilogues of ours (kernels/swiglu_quack.py).  No sums between
blocks, no scheduling by a counter: bits repeat.  On an H100 p and h of 73,728 tokens (768 channels, F 2048) take .64 ms
where cuBLAS and kernels/swiglu.py take 1.02, dp .54 for .83; the feed-forward with all its gradients 3.4 for 4.0.  Made
again from p in dp's kernel, h need not be kept, 300 MB a layer, and the whole takes 3.5.

Tolerance: h is made of p in fp32 and dp of dy B in fp32, where kernels/swiglu.py reads both rounded: errors must be no
more than those of the plain path (h 1.7e-3 for 3.1e-3, dp 2.5e-3 for 3.0e-3).
"""

from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor

LIBRARY = "quack"
INSTALLED = {"site-packages", "dist-packages"}
CAPABILITY = (9, 0)
MULTIPLE = 8  # of sides: rows are read 16 bytes at a time


def refusal(dtype: str, sides: Iterable[int], capability: tuple[int, int] | None) -> str:
    """Empty if the kernels serve this, else a line that says what they do not serve.  dtype: bf16 or another."""
    if not INSTALLED & set(_folders(LIBRARY)):
        return f"{LIBRARY} is not in site-packages, and reads its own epilogues nowhere else"
    if capability != CAPABILITY:
        return "quack's tiles are chosen for GPUs of compute capability 9.0"
    if dtype != "bf16":
        return f"dtype={dtype}: its products take bf16"
    if odd := sorted(side for side in sides if side % MULTIPLE):
        return f"its products take sides in multiples of {MULTIPLE}, and the feed-forward has {odd[0]}"
    return ""


def _folders(library: str) -> tuple[str, ...]:
    """Above its first file; none where it is not installed."""
    found = find_spec(library)
    return Path(found.origin).parts if found and found.origin else ()


# ---- order of rows ----


def alternating(weight: Tensor) -> Tensor:
    """[2F,W], the gate's rows and then up's -> gate, up, gate, up."""
    return weight.view(2, -1, weight.shape[1]).transpose(0, 1).reshape(weight.shape)


def one_after_the_other(weight: Tensor) -> Tensor:
    """The inverse of `alternating`."""
    return weight.view(-1, 2, weight.shape[1]).transpose(0, 1).reshape(weight.shape)


# ---- registration ----


@torch.library.custom_op("ablab::product_then_swiglu", mutates_args=())
def _product_then_swiglu(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """x [N,W], weight [2F,W] alternating -> p [N,2F] alternating, h [N,F]."""
    from ablab.kernels import swiglu_quack

    packed = x.new_empty(len(x), len(weight))
    hidden = x.new_empty(len(x), len(weight) // 2)
    if len(x):
        swiglu_quack.product_then_swiglu(x.contiguous(), weight, packed, hidden)
    return packed, hidden


@_product_then_swiglu.register_fake
def _(x, weight):
    return x.new_empty(len(x), len(weight)), x.new_empty(len(x), len(weight) // 2)


@torch.library.custom_op("ablab::product_then_swiglu_gradient", mutates_args=())
def _product_then_gradient(dy: Tensor, weight: Tensor, packed: Tensor) -> Tensor:
    """dy [N,W], weight [W,F], p [N,2F] alternating -> dp, as p."""
    from ablab.kernels import swiglu_quack

    gradient = torch.empty_like(packed)
    if len(dy):
        swiglu_quack.product_then_gradient(dy.contiguous(), weight, packed, gradient)
    return gradient


@_product_then_gradient.register_fake
def _(dy, weight, packed):
    return packed.new_empty(packed.shape)


# ---- the feed-forward ----


class _FeedForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, gate_up, down):
        first = alternating(gate_up.to(x.dtype))
        second = down.to(x.dtype)
        packed, hidden = _product_then_swiglu(x, first)
        ctx.save_for_backward(x, packed, hidden, first, second)
        ctx.weight_dtype = gate_up.dtype
        return hidden @ second.t()

    @staticmethod
    def backward(ctx, dy):
        x, packed, hidden, first, second = ctx.saved_tensors
        gradient = _product_then_gradient(dy, second, packed)
        dx = gradient @ first
        d_first = one_after_the_other(gradient.t() @ x)
        d_second = dy.t() @ hidden
        return dx, d_first.to(ctx.weight_dtype), d_second.to(ctx.weight_dtype)


def feed_forward(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """x: [..., W], gate_up: [2F,W], down: [W,F] -> down(silu(gate x) * (up x)) [..., W], weights cast to x's dtype."""
    rows = x.reshape(-1, x.shape[-1])
    return _FeedForward.apply(rows, gate_up, down).view(x.shape)
