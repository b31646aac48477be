"""A SwiGLU feed-forward in 8-bit floats, its tensors cast by the kernels that make them.

    p = x A^T,  h = silu(g) u  of p's halves g and u,  y = h B^T          x, A, h, B in e4m3
    dh = dy B,  dp = silu's gradient of dh and p,  dx = dp A             dy, dp in e5m2 or e4m3
    dA = dp^T x,  dB = dy^T h                                            in 8 bits, or of the wide numbers

Made apart, each cast is two more passes over its tensor, one for the largest magnitude and one to cast, and a third
where dA and dB need it turned round; they take back all that the products gain.  Here h and dp leave their kernels in
8 bits, in both layouts: fewer bytes than in bf16.  Their scale must be known before, so it is a bound:

    |h|  <= |g| |u|                  <= |x|^2 |A_g| |A_u|
    |dp| <= 1.1 |dh| max(|g|, |u|)   <= 1.1 sqrt(W) max|dy| |B| |x| |A|

by Cauchy and Schwarz, |x| and |A| the largest norms of a row, |B| that of a column, silu' <= 1.1, times what rounding
to 8 bits may add.  An 8-bit float is as precise a hundred times below its largest number: h lies 80 to 150 times
below its bound and loses nothing (2.65 % of its norm in e4m3 either way, 2.9 % where channels differ by factors of
e); dp lies up to 5,000 times below, of e5m2's range of 2^32.  E4m3 has less room, and tokens differ: there dp's
largest magnitude is measured, in a pass more.  dy and the weights have scales of their own largest magnitude, and x
has where nobody bounds its numbers; those of a norm are at most sqrt(W) times its largest gain, five times what they
reach, and leave the norm in 8 bits.  |x| is measured even so: the bound on |h| has its square, and gains may differ.
No bound is exceeded, so nothing saturates, and no state of earlier steps is kept.  (|h| could exceed its own, by less
than 4 times, if of every gate and its up one had weights below 1/28,672 of the largest alone: e4m3 is coarser there.)

All products sum in short accumulators (kernels/fp8_projection.py).  dp out of the kernel that multiplies dy and B, dh
never in memory, took 0.89 to 1.06 ms on an H100 for the 0.21 + 0.53 of both (73,728 tokens, W 768, F 2048).

Tolerance: as kernels/fp8.py, of the numbers as they were cast.
"""

from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton import language as tl

from ablab.kernels import fp8, swiglu
from ablab.kernels.fp8_cast import (
    Cast,
    Scaled,
    Tile,
    both,
    cast,
    cast_weight,
    narrow,
    sixteen,
    store_columns,
    store_rows,
    tile_of,
    unset,
)
from ablab.kernels.fp8_cross_entropy import turned
from ablab.kernels.fp8_projection import Way

STEEPEST = 1.1  # silu'(2.4) = 1.0998
# What rounding may add to a number: half a step of its format.
E4M3 = 1 + 2.0**-4
E5M2 = 1 + 2.0**-3
BF16 = 1 + 2.0**-8
PRODUCT = E4M3 * E4M3 * BF16
BACK_PRODUCT = E5M2 * E4M3 * BF16


def reference(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gradient: str = "e5m2",
    weight_gradient: str = "fp8",
    longest: Tensor | None = None,
) -> Tensor:
    """The same in plain torch: each map casts for itself, by scales of largest magnitudes."""
    packed = fp8.fp8_linear(x, gate_up, gradient, weight_gradient)
    return fp8.fp8_linear(swiglu.reference(packed), down, gradient, weight_gradient)


# ---- bounds ----


class Bounds(NamedTuple):
    """fp32 0-D.  hidden: on |h|.  gradient: on |dp| of a dy whose largest magnitude is 1."""

    hidden: Tensor
    gradient: Tensor


def bounds_of(x: Tensor, gate_up: Tensor, down: Tensor) -> Bounds:
    """x [N,W], gate_up [2F,W], down [W,F]."""
    rows = PRODUCT * _longest(x, -1).amax()
    gate, up = _longest(gate_up, -1).chunk(2)
    columns = _longest(down, 0).amax()
    packed = rows * torch.maximum(gate, up).amax()
    dh = BACK_PRODUCT * len(down) ** 0.5 * columns
    return Bounds(
        hidden=rows.square() * (gate * up).amax(),
        gradient=STEEPEST * dh * packed,
    )


def _longest(matrix: Tensor, dim: int) -> Tensor:
    """The norms along a side, in fp32."""
    return torch.linalg.vector_norm(matrix.float(), dim=dim)


# ---- kernels ----


@triton.jit
def _halves(packed, row, column, there, width):
    """gate and up, fp32."""
    gate = packed + row * 2 * width + column
    g = tl.load(gate, mask=there, other=0.0)
    u = tl.load(gate + width, mask=there, other=0.0)
    return g.to(tl.float32), u.to(tl.float32)


@triton.jit
def _hidden(packed, row, column, there, width):
    """h, fp32."""
    g, u = _halves(packed, row, column, there, width)
    return g * tl.sigmoid(g) * u


@triton.jit
def _gradients(packed, dh, row, column, there, width):
    """dgate, dup and h, fp32."""
    g, u = _halves(packed, row, column, there, width)
    d = tl.load(dh + row * width + column, mask=there, other=0.0).to(tl.float32)
    s = tl.sigmoid(g)
    slope = s * (1.0 + g * (1.0 - s))
    return d * u * slope, d * g * s, g * s * u


@triton.jit
def _forward(packed, scale, h8, turned, rows, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row, column, there = tile_of(rows, width, ROWS, COLUMNS)
    wide = _hidden(packed, row, column, there, width)
    h = sixteen(wide, h8) * (1.0 / tl.load(scale))
    store_rows(h8, h, row, column, there, width)
    store_columns(turned, h, row, column, there, rows)


@triton.jit
def _forward_rows(packed, scale, h8, rows, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row, column, there = tile_of(rows, width, ROWS, COLUMNS)
    h = _hidden(packed, row, column, there, width) * (1.0 / tl.load(scale))
    store_rows(h8, h, row, column, there, width)


@triton.jit
def _peak(packed, dh, peaks, rows, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The largest magnitude of dp in each tile."""
    row, column, there = tile_of(rows, width, ROWS, COLUMNS)
    dgate, dup, _ = _gradients(packed, dh, row, column, there, width)
    largest = tl.maximum(tl.abs(dgate), tl.abs(dup))
    tl.store(peaks + tl.program_id(0), tl.max(largest))


@triton.jit
def _backward(
    packed, dh, scale, dp8, turned, rows, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    row, column, there = tile_of(rows, width, ROWS, COLUMNS)
    dgate, dup, _ = _gradients(packed, dh, row, column, there, width)
    finer = 1.0 / tl.load(scale)
    dgate = sixteen(dgate, dp8) * finer
    dup = sixteen(dup, dp8) * finer
    second = width + column
    store_rows(dp8, dgate, row, column, there, 2 * width)
    store_rows(dp8, dup, row, second, there, 2 * width)
    store_columns(turned, dgate, row, column, there, rows)
    store_columns(turned, dup, row, second, there, rows)


@triton.jit
def _backward_wide(
    packed, dh, scale, dp8, dp, h, rows, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """dp in 8 bits, and dp and h as packed is."""
    row, column, there = tile_of(rows, width, ROWS, COLUMNS)
    dgate, dup, hidden = _gradients(packed, dh, row, column, there, width)
    finer = 1.0 / tl.load(scale)
    second = width + column
    store_rows(dp8, dgate * finer, row, column, there, 2 * width)
    store_rows(dp8, dup * finer, row, second, there, 2 * width)
    store_rows(dp, dgate, row, column, there, 2 * width)
    store_rows(dp, dup, row, second, there, 2 * width)
    store_rows(h, hidden, row, column, there, width)


# ---- registration ----

FORWARD = Tile(rows=64, columns=64, warps=4)
BACKWARD = Tile(rows=64, columns=64, warps=8)
PEAK = Tile(rows=16, columns=512, warps=8)


@torch.library.custom_op("ablab::fp8_swiglu", mutates_args=())
def _swiglu(packed: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """packed [N,2F] -> h in e4m3, [N,F] and [F,N]."""
    rows, width = _half(packed)
    h8 = unset(packed, (rows, width), "e4m3")
    turned = unset(packed, (width, rows), "e4m3")
    FORWARD.launch(_forward, rows, width, packed.contiguous(), scale, h8, turned)
    return narrow(h8, "e4m3"), narrow(turned, "e4m3")


@_swiglu.register_fake
def _(packed, scale):
    rows, width = _half(packed)
    return _unset(packed, rows, width, "e4m3"), _unset(packed, width, rows, "e4m3")


@torch.library.custom_op("ablab::fp8_swiglu_rows", mutates_args=())
def _swiglu_rows(packed: Tensor, scale: Tensor) -> Tensor:
    """packed [N,2F] -> h in e4m3 [N,F]."""
    rows, width = _half(packed)
    h8 = unset(packed, (rows, width), "e4m3")
    FORWARD.launch(_forward_rows, rows, width, packed.contiguous(), scale, h8)
    return narrow(h8, "e4m3")


@_swiglu_rows.register_fake
def _(packed, scale):
    return _unset(packed, *_half(packed), "e4m3")


@torch.library.custom_op("ablab::fp8_swiglu_peaks", mutates_args=())
def _gradient_peaks(packed: Tensor, dh: Tensor) -> Tensor:
    """Largest magnitudes of dp, one a tile."""
    peaks = packed.new_empty(PEAK.programs(*dh.shape), dtype=torch.float32)
    PEAK.launch(_peak, *dh.shape, packed.contiguous(), dh.contiguous(), peaks)
    return peaks


@_gradient_peaks.register_fake
def _(packed, dh):
    return packed.new_empty(PEAK.programs(*dh.shape), dtype=torch.float32)


@torch.library.custom_op("ablab::fp8_swiglu_backward", mutates_args=())
def _swiglu_backward(
    packed: Tensor, dh: Tensor, scale: Tensor, form: str
) -> tuple[Tensor, Tensor]:
    """dp in 8 bits, [N,2F] and [2F,N]."""
    rows, width = _half(packed)
    dp8 = unset(packed, (rows, 2 * width), form)
    turned = unset(packed, (2 * width, rows), form)
    given = packed.contiguous(), dh.contiguous(), scale
    BACKWARD.launch(_backward, rows, width, *given, dp8, turned)
    return narrow(dp8, form), narrow(turned, form)


@_swiglu_backward.register_fake
def _(packed, dh, scale, form):
    rows, both = packed.shape
    return _unset(packed, rows, both, form), _unset(packed, both, rows, form)


@torch.library.custom_op("ablab::fp8_swiglu_backward_wide", mutates_args=())
def _swiglu_backward_wide(
    packed: Tensor, dh: Tensor, scale: Tensor, form: str
) -> tuple[Tensor, Tensor, Tensor]:
    """dp in 8 bits [N,2F], and dp [N,2F] and h [N,F] in the dtype of packed."""
    rows, width = _half(packed)
    dp8 = unset(packed, (rows, 2 * width), form)
    dp = packed.new_empty(rows, 2 * width)
    h = packed.new_empty(rows, width)
    given = packed.contiguous(), dh.contiguous(), scale
    BACKWARD.launch(_backward_wide, rows, width, *given, dp8, dp, h)
    return narrow(dp8, form), dp, h


@_swiglu_backward_wide.register_fake
def _(packed, dh, scale, form):
    rows, both = packed.shape
    dp8 = _unset(packed, rows, both, form)
    return dp8, packed.new_empty(packed.shape), packed.new_empty(dh.shape)


def _half(packed: Tensor) -> tuple[int, int]:
    """N and F of packed [N,2F]."""
    rows, both = packed.shape
    return rows, both // 2


def _unset(like: Tensor, rows: int, columns: int, form: str) -> Tensor:
    return like.new_empty((rows, columns), dtype=fp8.DTYPES[form])


@torch.library.custom_op("ablab::fp8_turned", mutates_args=())
def _turned(numbers: Tensor) -> Tensor:
    """8-bit numbers [n,k] -> [k,n]."""
    return turned(numbers.contiguous())


@_turned.register_fake
def _(numbers):
    return numbers.new_empty(numbers.shape[::-1])


# ---- the input ----


def _both_layouts(x: Tensor, longest: Tensor | None) -> Cast:
    """x in e4m3; longest: a bound on the norms of its rows, where one is known before x is made."""
    if longest is None:
        return cast(x, "e4m3")
    rows = _as_it_is_made(x, longest)
    return Cast(rows, Scaled(_turned(rows.numbers), rows.scale))


def _rows(x: Tensor, longest: Tensor | None) -> Scaled:
    """The same in one layout."""
    if longest is None:
        return Scaled(*fp8.quantise(x, "e4m3"))
    return _as_it_is_made(x, longest)


def _as_it_is_made(x: Tensor, longest: Tensor) -> Scaled:
    """No number exceeds the norm of its row, so the compiler can join the cast to what makes x."""
    scale = fp8.scale_for(longest, "e4m3")
    return Scaled((x.float() / scale).to(fp8.DTYPES["e4m3"]), scale)


# ---- the feed-forward ----


def _way(x: Tensor, gate_up: Tensor, down: Tensor, gradient: str) -> Way:
    return Way(fp8.product_of(x, gate_up, down), gradient, x.dtype, gate_up.dtype)


def _bounded(packed: Tensor, dh: Tensor, bound: Tensor) -> Tensor:
    return bound


def _measured(packed: Tensor, dh: Tensor, bound: Tensor) -> Tensor:
    return _gradient_peaks(packed, dh).amax()


LARGEST = {"e5m2": _bounded, "e4m3": _measured}


def _gradient_scale(way: Way, packed: Tensor, dh: Tensor, dy: Scaled, bound: Tensor) -> Tensor:
    """Of dp; bound: on |dp| where the largest magnitude of dy is 1."""
    largest_dy = dy.scale * torch.finfo(dy.numbers.dtype).max
    largest = LARGEST[way.gradient](packed, dh, bound * largest_dy)
    return fp8.scale_for(largest, way.gradient)


class _Narrow(torch.autograd.Function):
    """dA and dB of 8-bit numbers: x and h are kept turned round, and not as they were."""

    @staticmethod
    def forward(ctx, x, gate_up, down, gradient, longest):
        way = _way(x, gate_up, down, gradient)
        bounds = bounds_of(x, gate_up, down)
        x8 = _both_layouts(x, longest)
        a8 = cast_weight(gate_up)
        b8 = cast_weight(down)
        packed = way.activations(x8.rows, a8.rows)
        h_scale = fp8.scale_for(bounds.hidden, "e4m3")
        h8 = both(_swiglu(packed, h_scale), h_scale)
        kept = (*x8.columns, *h8.columns, *a8.columns, *b8.columns)
        ctx.save_for_backward(packed, bounds.gradient, *kept)
        ctx.way = way
        return way.activations(h8.rows, b8.rows)

    @staticmethod
    def backward(ctx, dy):
        packed, bound, *kept = ctx.saved_tensors
        x8, h8, a8, b8 = map(Scaled, kept[::2], kept[1::2])
        way = ctx.way
        dy8 = cast(dy, way.gradient)
        dh = way.activations(dy8.rows, b8)
        scale = _gradient_scale(way, packed, dh, dy8.rows, bound)
        dp8 = both(_swiglu_backward(packed, dh, scale, way.gradient), scale)
        dx = way.activations(dp8.rows, a8)
        da = way.weights(dp8.columns, x8)
        db = way.weights(dy8.columns, h8)
        return dx, da, db, None, None


class _Wide(torch.autograd.Function):
    """dA and dB of x, dp, h and dy in their own dtype; h is made again."""

    @staticmethod
    def forward(ctx, x, gate_up, down, gradient, longest):
        way = _way(x, gate_up, down, gradient)
        bounds = bounds_of(x, gate_up, down)
        x8 = _rows(x, longest)
        a8 = cast_weight(gate_up)
        b8 = cast_weight(down)
        packed = way.activations(x8, a8.rows)
        h_scale = fp8.scale_for(bounds.hidden, "e4m3")
        h8 = Scaled(_swiglu_rows(packed, h_scale), h_scale)
        ctx.save_for_backward(packed, bounds.gradient, x, *a8.columns, *b8.columns)
        ctx.way = way
        return way.activations(h8, b8.rows)

    @staticmethod
    def backward(ctx, dy):
        packed, bound, x, *kept = ctx.saved_tensors
        a8, b8 = map(Scaled, kept[::2], kept[1::2])
        way = ctx.way
        dy8 = Scaled(*fp8.quantise(dy, way.gradient))
        dh = way.activations(dy8, b8)
        scale = _gradient_scale(way, packed, dh, dy8, bound)
        dp8, dp, h = _swiglu_backward_wide(packed, dh, scale, way.gradient)
        dx = way.activations(Scaled(dp8, scale), a8)
        da = dp.t() @ x
        db = dy.t() @ h
        return dx, da.to(way.weight_dtype), db.to(way.weight_dtype), None, None


WEIGHT_GRADIENTS = {"fp8": _Narrow, "wide": _Wide}


def fp8_swiglu(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gradient: str = "e5m2",
    weight_gradient: str = "fp8",
    longest: Tensor | None = None,
) -> Tensor:
    """x: [..., W], gate_up: [2F,W], down: [W,F] -> down(silu(gate x) * (up x)) [..., W].

    gradient: the format of y's and p's gradients, e5m2 (range) or e4m3 (precision).
    weight_gradient: `fp8`, or `wide`: of the numbers before they were cast, in the dtype of x.
    longest: a bound on the norms of the rows of x, 0-D, from which follows the scale of x; None: it is measured.
    Raises ValueError for another dtype.
    """
    if x.dtype not in swiglu.DTYPES:
        known = ", ".join(map(str, swiglu.DTYPES))
        raise ValueError(f"x is {x.dtype}; the SwiGLU kernel takes {known}")
    rows = x.reshape(-1, x.shape[-1])
    y = WEIGHT_GRADIENTS[weight_gradient].apply(rows, gate_up, down, gradient, longest)
    return y.view(x.shape)
