"""A branch joins the stream, and the next branch reads the sum's norm: one pass forward, one backward.

    s = x + y                                  rounded, as the stream is stored
    z = s r factor gain,   r = (mean(s^2) + eps)^-1/2
    with g = dz factor gain:   dx = dy = ds + r (g - s r mean(g s r)),   dgain = sum over rows of dz factor s r

The compiler keeps x and y instead of s, so that each later pass reads both, and gathers the gains' gradients of both
norms of a block in one kernel, which reads them a third time: 11 reads and writes of [N, W] a norm where 8 are enough.
On one H100 a norm takes 0.42 ms of a step by the compiler and 0.34 by these at [73728, 768], 0.34 and 0.25 at
[36864, 1152].  Where two products read the norm, as with gates, their gradients are added in a pass before (0.11 ms),
which the compiler does within.  Saved for the backward pass: s, the stream that goes on, and one fp32 number a row.

Tolerance: inside all is fp32 and each result is rounded once, where plain torch rounds the norm before the factor too:
errors must be no more than those of the plain path, dgain's 1.1 times.  The gain's gradient is summed in one order,
of the rows of each of PROGRAMS and then over these: the same inputs give the same bits.
"""

from typing import NamedTuple

import torch
import triton
from torch import Tensor
from torch.nn import functional as F
from triton import language as tl

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
PROGRAMS = 528  # of a backward pass, 4 for each of 132 multiprocessors: each sums the gain's gradient over its rows
WIDEST = 8192  # channels: a program holds whole rows


class Tile(NamedTuple):
    """rows: that a program takes at once.  stages: that its loads are ahead of its arithmetic."""

    rows: int
    warps: int
    stages: int = 1


FORWARD = Tile(2, 4)
BACKWARD = Tile(2, 4, 3)


def reference(
    x: Tensor, y: Tensor, gain: Tensor, eps: float, factor: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The same in plain torch."""
    total = x + y
    normed = F.rms_norm(total, gain.shape, gain.to(x.dtype), eps)
    return total, normed if factor is None else (normed * factor).to(x.dtype)


@triton.jit
def _wide(numbers, there):
    return tl.load(numbers, mask=there, other=0.0).to(tl.float32)


@triton.jit
def _forward(
    x,
    y,
    gain,
    factor,
    total,
    normed,
    inverse,
    rows,
    width,
    eps,
    SCALED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    inside = column < width
    there = (row < rows)[:, None] & inside[None, :]
    place = row.to(tl.int64)[:, None] * width + column[None, :]
    s = _wide(x + place, there) + _wide(y + place, there)
    stored = s.to(total.dtype.element_ty)
    tl.store(total + place, stored, mask=there)
    s = stored.to(tl.float32)
    r = tl.rsqrt(tl.sum(s * s, 1) / width + eps)
    tl.store(inverse + row, r, mask=row < rows)
    g = _wide(gain + column, inside)
    if SCALED:
        g *= tl.load(factor)
    z = s * r[:, None] * g[None, :]
    tl.store(normed + place, z.to(normed.dtype.element_ty), mask=there)


@triton.jit
def _backward(
    of_total,
    of_normed,
    total,
    inverse,
    gain,
    factor,
    of_sum,
    of_gain,
    rows,
    width,
    SCALED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """of_gain: [programs, width], the sums over each program's rows."""
    column = tl.arange(0, BLOCK)
    inside = column < width
    g = _wide(gain + column, inside)
    scale = 1.0
    if SCALED:
        scale = tl.load(factor)
    share = tl.cdiv(tl.cdiv(rows, tl.num_programs(0)), ROWS) * ROWS
    begin = tl.program_id(0) * share
    end = tl.minimum(begin + share, rows)
    summed = tl.zeros((BLOCK,), tl.float32)
    for first in tl.range(begin, end, ROWS, num_stages=STAGES):
        row = first + tl.arange(0, ROWS)
        there = (row < end)[:, None] & inside[None, :]
        place = row.to(tl.int64)[:, None] * width + column[None, :]
        dz = _wide(of_normed + place, there) * scale
        s = _wide(total + place, there)
        ds = _wide(of_total + place, there)
        r = _wide(inverse + row, row < end)
        unit = s * r[:, None]
        product = dz * unit
        summed += tl.sum(product, 0)
        dz *= g[None, :]
        mean = tl.sum(product * g[None, :], 1) / width
        dx = ds + r[:, None] * (dz - unit * mean[:, None])
        tl.store(of_sum + place, dx.to(of_sum.dtype.element_ty), mask=there)
    tl.store(of_gain + tl.program_id(0) * width + column, summed, mask=inside)


@torch.library.custom_op("ablab::residual_norm", mutates_args=())
def _residual_norm(
    x: Tensor, y: Tensor, gain: Tensor, eps: float, factor: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The sum, its norm, and r of each row, fp32."""
    x = x.contiguous()
    y = y.contiguous()
    width = gain.numel()
    rows = x.numel() // width
    total = torch.empty_like(x)
    normed = torch.empty_like(x)
    inverse = x.new_empty(x.shape[:-1], dtype=torch.float32)
    if rows:
        _forward[(triton.cdiv(rows, FORWARD.rows),)](
            x,
            y,
            gain,
            gain if factor is None else factor,
            total,
            normed,
            inverse,
            rows,
            width,
            eps,
            SCALED=factor is not None,
            ROWS=FORWARD.rows,
            BLOCK=triton.next_power_of_2(width),
            num_warps=FORWARD.warps,
        )
    return total, normed, inverse


@_residual_norm.register_fake
def _(x, y, gain, eps, factor):
    inverse = x.new_empty(x.shape[:-1], dtype=torch.float32)
    return x.new_empty(x.shape), x.new_empty(x.shape), inverse


@torch.library.custom_op("ablab::residual_norm_backward", mutates_args=())
def _residual_norm_backward(
    of_total: Tensor,
    of_normed: Tensor,
    total: Tensor,
    inverse: Tensor,
    gain: Tensor,
    factor: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The gradient of x, which is that of y, and the gain's, one row a program [programs, W]."""
    of_total = of_total.contiguous()
    of_normed = of_normed.contiguous()
    width = gain.numel()
    rows = total.numel() // width
    programs = min(PROGRAMS, max(rows, 1))
    of_sum = torch.empty_like(total)
    of_gain = gain.new_empty(programs, width, dtype=torch.float32)
    _backward[(programs,)](
        of_total,
        of_normed,
        total,
        inverse,
        gain,
        gain if factor is None else factor,
        of_sum,
        of_gain,
        rows,
        width,
        SCALED=factor is not None,
        ROWS=BACKWARD.rows,
        BLOCK=triton.next_power_of_2(width),
        STAGES=BACKWARD.stages,
        num_warps=BACKWARD.warps,
    )
    return of_sum, of_gain


@_residual_norm_backward.register_fake
def _(of_total, of_normed, total, inverse, gain, factor):
    programs = min(PROGRAMS, max(total.numel() // gain.numel(), 1))
    of_gain = gain.new_empty(programs, gain.numel(), dtype=torch.float32)
    return total.new_empty(total.shape), of_gain


def _save(ctx, inputs, output):
    _, _, gain, _, factor = inputs
    total, _, inverse = output
    ctx.save_for_backward(total, inverse, gain, factor)
    ctx.mark_non_differentiable(inverse)


def _differentiate(ctx, of_total, of_normed, _):
    saved = ctx.saved_tensors
    of_sum, of_gain = _residual_norm_backward(of_total, of_normed, *saved)
    return of_sum, of_sum, of_gain.sum(0), None, None


_residual_norm.register_autograd(_differentiate, setup_context=_save)


def residual_norm(
    x: Tensor, y: Tensor, gain: Tensor, eps: float, factor: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """x + y, and its norm times gain and factor; both as x, [..., W].  Differentiable in x, y and gain.

    gain: [W]; factor: fp32 [1], or None.  Raises ValueError naming what it does not take.
    """
    if not _taken(x, y, gain):
        given = f"{x.dtype} {list(x.shape)} and {y.dtype} {list(y.shape)}"
        known = ", ".join(map(str, DTYPES))
        raise ValueError(
            f"x and y are {given} beside {gain.numel()} gains; the norm's kernel takes two of one shape,"
            f" as wide as the gains and at most {WIDEST}, in {known}"
        )
    total, normed, _ = _residual_norm(x, y, gain, eps, factor)
    return total, normed


def _taken(x: Tensor, y: Tensor, gain: Tensor) -> bool:
    alike = x.shape == y.shape and x.dtype == y.dtype
    wide = x.shape[-1:] == gain.shape and gain.numel() <= WIDEST
    return alike and wide and x.dtype in DTYPES
