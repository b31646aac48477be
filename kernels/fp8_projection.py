"""A linear map in 8-bit floats whose operands are cast in both layouts, each in one pass.

    y = x W^T,  dx = g W,  dW = g^T x          x and W in e4m3, g in e5m2 or e4m3

The products of kernels/fp8.py and its scales.  There dW's operands are turned round by a pass of their own; here a
kernel reads each once and leaves it as it is and turned round (kernels/fp8_cast.py).

All products sum in the matrix units' short accumulators.  On an H100 dW of 73,728 tokens is off by 0.0075 of its norm,
where fp32 sums are by 0.0002, beside the 0.06 to 0.09 that rounding to 8 bits leaves; of [4096, 768] it takes 0.30 ms
for 0.37.  A gradient over 768 channels is off by no more than its rounding to bf16.

A layer's packed queries, keys and values, 73,728 tokens of 768 channels, took 1.28 ms forward and backward, and 1.29 in
bf16: products gain 0.3 ms, and the casts of the gradient, whose kernel does not know its largest magnitude, lose it.

Tolerance: as kernels/fp8.py, of the numbers as they were cast, and these accumulators.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ablab.kernels import fp8
from ablab.kernels.fp8_cast import Scaled, cast, cast_made, cast_weight

reference = fp8.fp8_linear


@dataclass(frozen=True)
class Way:
    """How a map multiplies.  gradient: the format of its output's.  dtype: of activations; weight_dtype: of dW."""

    product: fp8.Product
    gradient: str
    dtype: torch.dtype
    weight_dtype: torch.dtype

    def activations(self, a: Scaled, b: Scaled) -> Tensor:
        """a b^T of activations, or of gradients of them."""
        return self._times(a, b, self.dtype)

    def weights(self, a: Scaled, b: Scaled) -> Tensor:
        return self._times(a, b, self.weight_dtype)

    def _times(self, a: Scaled, b: Scaled, dtype: torch.dtype) -> Tensor:
        return self.product(a.numbers, b.numbers, a.scale, b.scale, dtype, True)


class _Narrow(torch.autograd.Function):
    """dW of 8-bit numbers: x is kept turned round, and not as it was."""

    @staticmethod
    def forward(ctx, x, weight, gradient):
        way = Way(fp8.product_of(x, weight), gradient, x.dtype, weight.dtype)
        x8 = cast(x, "e4m3")
        w8 = cast_weight(weight)
        ctx.save_for_backward(*x8.columns, *w8.columns)
        ctx.way = way
        return way.activations(x8.rows, w8.rows)

    @staticmethod
    def backward(ctx, g):
        kept = ctx.saved_tensors
        x8, w8 = map(Scaled, kept[::2], kept[1::2])
        way = ctx.way
        g8 = cast_made(g, way.gradient)
        dx = way.activations(g8.rows, w8)
        dw = way.weights(g8.columns, x8)
        return dx, dw, None


def fp8_projection(x: Tensor, weight: Tensor, gradient: str = "e5m2") -> Tensor:
    """x: [..., k], weight: [n,k] -> x W^T [..., n] in the dtype of x; n and k multiples of 16.

    gradient: the format of y's gradient, e5m2 (range) or e4m3 (precision).
    """
    rows = x.reshape(-1, x.shape[-1])
    y = _Narrow.apply(rows, weight, gradient)
    return y.view(*x.shape[:-1], -1)
