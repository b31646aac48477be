"""A linear map in 8-bit floats, each tensor scaled by its own largest magnitude.

    s_t = max |t| / largest,    q_t = cast(t / s_t)        largest = 448 in e4m3, 57344 in e5m2
    y  = (q_x q_w^T) s_x s_w                               x and w in e4m3
    dx = (q_g q_w) s_g s_w,     dW = (q_g^T q_x) s_g s_x   g, the gradient of y, in e5m2 or e4m3

Micikevicius et al., arXiv:2209.05433, with the scale taken from the tensor at hand instead of from its past.
Scales are 0-D tensors: nothing waits for the device.  A GPU with matrix units for 8-bit floats multiplies with them
(`torch._scaled_mm`); elsewhere, and where a side is no multiple of 16, the same 8-bit numbers are multiplied in
fp32.

Tolerance: two 8-bit numbers multiply exactly in fp32, so the two forms differ by the order of their sums, by the
rounding of the result to the dtype of x, and in y by the short accumulators of fast accumulation (the backward pass
does without).
"""

from collections.abc import Callable

import torch
from torch import Tensor

DTYPES = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
# a [m,k], b [n,k], their scales, dtype, fast -> a b^T [m,n]: `scaled` or `emulated`
Product = Callable[[Tensor, Tensor, Tensor, Tensor, torch.dtype, bool], Tensor]
# In place of a smaller maximum: the scale stays a normal fp32 number, and zeros stay 0 instead of 0 / 0.
SMALLEST = 1e-30


def quantise(x: Tensor, form: str) -> tuple[Tensor, Tensor]:
    """x -> 8-bit numbers of the same shape and their scale, fp32 0-D, whose product is about x.

    Not finite in, NaN out.  No clamp to the largest number: t / s_t exceeds it by a rounding of fp32 at most, which
    the cast takes back.
    """
    scale = scale_for(x.abs().amax(), form)
    return (x.float() / scale).to(DTYPES[form]), scale


def scale_for(largest: Tensor, form: str) -> Tensor:
    """0-D, of the largest magnitude or of a bound on it -> the scale, fp32 0-D.

    A bound may be generous: within the range of exponents the numbers are as precise as before.
    """
    return largest.float().clamp(min=SMALLEST) / torch.finfo(DTYPES[form]).max


def emulated(
    a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, dtype: torch.dtype, fast: bool
) -> Tensor:
    """a b^T a_scale b_scale for 8-bit a [m,k], b [n,k] -> [m,n] in dtype, multiplied and summed in fp32."""
    return (a.float() @ b.float().t() * a_scale * b_scale).to(dtype)


def scaled(
    a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, dtype: torch.dtype, fast: bool
) -> Tensor:
    """The same by matrix units, which read 8-bit numbers along k alone; m, n, k multiples of 16, not both sides e5m2.

    fast: sums in the matrix units' own accumulators, shorter than fp32.
    """
    return torch._scaled_mm(
        a.contiguous(),
        b.contiguous().t(),
        scale_a=a_scale,
        scale_b=b_scale,
        out_dtype=dtype,
        use_fast_accum=fast,
    )


def native(*matrices: Tensor) -> bool:
    """Whether the device has matrix units for 8-bit floats and they take matrices of these sides."""
    sides = [side for matrix in matrices for side in matrix.shape]
    return all(side % 16 == 0 for side in sides) and multiplies(matrices[0].device)


def product_of(*matrices: Tensor) -> Product:
    """How matrices of these sides multiply on their device."""
    return scaled if native(*matrices) else emulated


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, gradient, native):
        x8, x_scale = quantise(x, "e4m3")
        w8, w_scale = quantise(weight, "e4m3")
        ctx.save_for_backward(x8, x_scale, w8, w_scale)
        ctx.gradient = gradient
        ctx.product = scaled if native else emulated
        ctx.dtypes = (x.dtype, weight.dtype)
        return ctx.product(x8, w8, x_scale, w_scale, x.dtype, True)

    @staticmethod
    def backward(ctx, g):
        x8, x_scale, w8, w_scale = ctx.saved_tensors
        g8, g_scale = quantise(g, ctx.gradient)
        x_dtype, weight_dtype = ctx.dtypes
        dx = ctx.product(g8, w8.t(), g_scale, w_scale, x_dtype, False)
        dw = ctx.product(g8.t(), x8.t(), g_scale, x_scale, weight_dtype, False)
        return dx, dw, None, None


class _WideLinear(torch.autograd.Function):
    """The same with dW of x and g as they were, in the dtype of x."""

    @staticmethod
    def forward(ctx, x, weight, gradient, native):
        x8, x_scale = quantise(x, "e4m3")
        w8, w_scale = quantise(weight, "e4m3")
        ctx.save_for_backward(x, w8, w_scale)
        ctx.gradient = gradient
        ctx.product = scaled if native else emulated
        ctx.weight_dtype = weight.dtype
        return ctx.product(x8, w8, x_scale, w_scale, x.dtype, True)

    @staticmethod
    def backward(ctx, g):
        x, w8, w_scale = ctx.saved_tensors
        g8, g_scale = quantise(g, ctx.gradient)
        dx = ctx.product(g8, w8.t(), g_scale, w_scale, x.dtype, False)
        return dx, (g.t() @ x).to(ctx.weight_dtype), None, None


LINEAR = {"fp8": _Linear, "wide": _WideLinear}  # by what the weight's gradient is a product of


def fp8_linear(
    x: Tensor, weight: Tensor, gradient: str = "e5m2", weight_gradient: str = "fp8"
) -> Tensor:
    """x W^T with all three products of a training step in 8-bit floats, or two of them.

    x: [..., k], weight: [n, k] -> [..., n] in the dtype of x.
    gradient: the format of y's gradient, e5m2 (range) or e4m3 (precision).  dW comes in the dtype of the weight,
    unrounded where that is fp32 and it is of 8-bit numbers.  One scale serves the whole of x, so a row of y depends a
    little on all other rows.
    weight_gradient: `fp8`, or `wide`: dW of x and y's gradient before they were cast.
    """
    rows = x.reshape(-1, x.shape[-1])
    y = LINEAR[weight_gradient].apply(rows, weight, gradient, native(rows, weight))
    return y.view(*x.shape[:-1], -1)


@torch.compiler.assume_constant_result  # asked once, while a graph is traced
def multiplies(device: torch.device) -> bool:
    """Whether the device has matrix units for 8-bit floats of these formats: Ada, Hopper and later."""
    return (
        device.type == "cuda"
        and torch.version.hip is None
        and torch.cuda.get_device_capability(device) >= (8, 9)
    )
