"""Two products of one input, whose gradients meet in the second product's own sum.

    y = x V^T,  z = x W^T;      dx = dy V + dz W,  dV = dy^T x,  dW = dz^T x

Autograd adds the two halves of dx in a pass of its own: 3 reads and writes of [N, W] beside the two that a product
takes which adds to what stands there.  With 12 rows in W, one a head, that pass is half of what gates cost.

Tolerance: the first half is rounded before the second is added to it, as autograd rounds both: errors must be no more
than those of two plain products.
"""

import torch
from torch import Tensor


def reference(x: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """The same in plain torch."""
    return x @ first.mT, x @ second.mT


@torch.library.custom_op("ablab::two_products", mutates_args=())
def _two_products(x: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    return x @ first.mT, x @ second.mT


@_two_products.register_fake
def _(x, first, second):
    rows = len(x)
    return x.new_empty(rows, len(first)), x.new_empty(rows, len(second))


@torch.library.custom_op("ablab::two_products_backward", mutates_args=())
def _two_products_backward(
    dy: Tensor, dz: Tensor, x: Tensor, first: Tensor, second: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x, first and second."""
    dx = dy @ first
    dx.addmm_(dz, second)
    return dx, dy.mT @ x, dz.mT @ x


@_two_products_backward.register_fake
def _(dy, dz, x, first, second):
    dx, of_first, of_second = (value.new_empty(value.shape) for value in (x, first, second))
    return dx, of_first, of_second


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _differentiate(ctx, dy, dz):
    return _two_products_backward(dy, dz, *ctx.saved_tensors)


_two_products.register_autograd(_differentiate, setup_context=_save)


def two_products(x: Tensor, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
    """x [..., W], first [M,W] and second [K,W] of one dtype -> x V^T [..., M], x W^T [..., K]."""
    rows = x.shape[:-1]
    y, z = _two_products(x.flatten(0, -2), first, second)
    return y.unflatten(0, rows), z.unflatten(0, rows)
