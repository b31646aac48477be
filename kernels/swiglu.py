"""silu(gate) * up of a packed projection, each number read once forward and once backward.

    y = silu(g) u            silu(x) = x s(x),  s(x) = 1 / (1 + exp(-x))
    dg = dy u s(g) (1 + g (1 - s(g)))           du = dy silu(g)

The compiler joins dg and du by a kernel that makes each half apart, and so reads g and dy twice: 7 reads and writes of
[N, F] where 5 are enough.  Tolerance: inside all is fp32 and each result is rounded once, where plain torch rounds
silu(g) too: errors must be no more than those of the plain path.
"""

import torch
import triton
from torch import Tensor
from torch.nn import functional as F
from triton import language as tl

BLOCK, WARPS = 2048, 4  # columns of a row that a program takes; 16 to a thread
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def reference(packed: Tensor) -> Tensor:
    """The same in plain torch."""
    gate, up = packed.chunk(2, dim=-1)
    return F.silu(gate) * up


@triton.jit
def _place(width, BLOCK: tl.constexpr):
    """This program's row, its columns and whether they are there."""
    blocks = tl.cdiv(width, BLOCK)
    columns = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    return (tl.program_id(0) // blocks).to(tl.int64), columns, columns < width


@triton.jit
def _forward(packed, y, width, BLOCK: tl.constexpr):
    row, columns, there = _place(width, BLOCK)
    packed += row * 2 * width
    g = tl.load(packed + columns, mask=there, other=0.0).to(tl.float32)
    u = tl.load(packed + width + columns, mask=there, other=0.0).to(tl.float32)
    tl.store(
        y + row * width + columns, (g * tl.sigmoid(g) * u).to(y.dtype.element_ty), mask=there
    )


@triton.jit
def _backward(packed, dy, grads, width, BLOCK: tl.constexpr):
    row, columns, there = _place(width, BLOCK)
    packed += row * 2 * width
    grads += row * 2 * width
    g = tl.load(packed + columns, mask=there, other=0.0).to(tl.float32)
    u = tl.load(packed + width + columns, mask=there, other=0.0).to(tl.float32)
    d = tl.load(dy + row * width + columns, mask=there, other=0.0).to(tl.float32)
    s = tl.sigmoid(g)
    tl.store(
        grads + columns,
        (d * u * s * (1.0 + g * (1.0 - s))).to(grads.dtype.element_ty),
        mask=there,
    )
    tl.store(grads + width + columns, (d * g * s).to(grads.dtype.element_ty), mask=there)


def _launch(kernel, width: int, *tensors: Tensor) -> None:
    programs = tensors[0].numel() // (2 * width) * triton.cdiv(width, BLOCK)
    if programs:
        kernel[(programs,)](*tensors, width, BLOCK=BLOCK, num_warps=WARPS)


@torch.library.custom_op("ablab::swiglu", mutates_args=())
def _swiglu(packed: Tensor) -> Tensor:
    packed = packed.contiguous()
    y = packed.new_empty(*packed.shape[:-1], packed.shape[-1] // 2)
    _launch(_forward, y.shape[-1], packed, y)
    return y


@_swiglu.register_fake
def _(packed):
    return packed.new_empty(*packed.shape[:-1], packed.shape[-1] // 2)


@torch.library.custom_op("ablab::swiglu_backward", mutates_args=())
def _swiglu_backward(packed: Tensor, dy: Tensor) -> Tensor:
    packed, dy = packed.contiguous(), dy.contiguous()
    grads = torch.empty_like(packed)
    _launch(_backward, dy.shape[-1], packed, dy, grads)
    return grads


@_swiglu_backward.register_fake
def _(packed, dy):
    return packed.new_empty(packed.shape)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


_swiglu.register_autograd(
    lambda ctx, dy: _swiglu_backward(*ctx.saved_tensors, dy), setup_context=_save
)


def swiglu(packed: Tensor) -> Tensor:
    """packed: [..., 2F], the gate's channels and then up's -> silu(gate) * up [..., F].

    Raises ValueError for an odd width or another dtype.
    """
    if packed.shape[-1] % 2 or packed.dtype not in DTYPES:
        known = ", ".join(map(str, DTYPES))
        raise ValueError(
            f"packed is {packed.dtype} {list(packed.shape)};"
            f" the SwiGLU kernel takes an even width in {known}"
        )
    return _swiglu(packed)
