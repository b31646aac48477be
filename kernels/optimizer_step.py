"""The banked optimizer step: what Newton-Schulz does not do, in as few passes over memory as there can be.

With g = clip * gradient, keep b, decay rate d and mask c (all ones, or 1[u w >= 0] of cautious decay):

    adam_step         m <- b1 m + (1-b1) g;  v <- b2 v + (1-b2) g^2;  u = (m / (1-b1^t)) / (sqrt(v / (1-b2^t)) + eps)
                      w <- w - lr (u + d c w)
    momentum_step     m <- b m + (1-b) g;  u = (1-b) g + b m, or m;  and 1 / (divisor |u|_F) of each matrix
    row_scales        e = shape^2 mean(o^2) of a row;  v <- b2 v + (1-b2) e;
                      s = shape / (sqrt(v) + eps), times a factor
                      that leaves each matrix its Frobenius norm
    apply_rows        w <- w - lr (s o + d c w)

Gradients are cleared where they are read for the last time.  |u|_F is not divided out here: kernels/newton_schulz.py
multiplies its first products by it, so u is rounded once and read by nobody else.  A gradient, a mean and a weight are
thus read once and written once, u and the polar factor o are of the dtype of the products.

The reference is the chain that these replace: Adam, Momentum, Orthogonalize, NorMuon and the decays, step for step.
Tolerance: fp32 arithmetic in another order, 3e-5 of the norm, 3e-4 for the row energies v (Newton-Schulz multiplies the
rounding of a singular value near 1 by up to 1,700); in bf16 u is rounded before its norm is divided out and not after,
so o differs by the rounding of one input.

What moves over a run (clip, lr, step from 1, keep, the decay's strength) comes as fp32 0-D tensors on the device.
"""

import math

import torch
import triton
from torch import Tensor
from triton import language as tl

CHUNK = 2048  # elements of a program
BLOCK = 1024  # numbers at a time of a program that adds up all of a matrix
ROWS, COLUMNS = 8, 256  # of the tile of a program that works on rows
MASKS = (
    "none",
    "plain",
    "cautious",
    "strictly cautious",
)  # what decays: nothing, every coordinate, where u w >= 0, where u w > 0


# ---- kernels ----


@triton.jit
def _decayed(u, w, strength, MASK: tl.constexpr):
    """u + strength * mask * w."""
    if MASK == 0:
        return u
    decay = tl.load(strength) * w
    if MASK == 2:
        decay = tl.where(u * w >= 0, decay, 0.0)
    if MASK == 3:
        decay = tl.where(u * w > 0, decay, 0.0)
    return u + decay


@triton.jit
def _bias_correction(step, log_keep):
    """1 - keep^step, within 3e-7 of its value: exp(x) near 1 leaves nothing of 1 - exp(x) but its rounding.

    So a series where x = step * log(keep) > -0.35; eight terms leave 1e-7 there.
    """
    x = step * log_keep
    near = tl.maximum(x, -0.35)
    series = 1.0 + near * (1.0 / 8)
    series = 1.0 + near * series * (1.0 / 7)
    series = 1.0 + near * series * (1.0 / 6)
    series = 1.0 + near * series * (1.0 / 5)
    series = 1.0 + near * series * (1.0 / 4)
    series = 1.0 + near * series * (1.0 / 3)
    series = 1.0 + near * series * (1.0 / 2)
    return tl.where(x > -0.35, -near * series, 1.0 - tl.exp(x))


@triton.jit
def _adam_kernel(
    weight,
    grad,
    mean,
    square,
    clip,
    lr,
    step,
    strength,
    size,
    keep1,
    change1,
    keep2,
    change2,
    log_keep1,
    log_keep2,
    eps,
    MASK: tl.constexpr,
    CHUNK: tl.constexpr,
):
    at = tl.program_id(0).to(tl.int64) * CHUNK + tl.arange(0, CHUNK)
    within = at < size
    step = tl.load(step)
    g = tl.load(grad + at, mask=within, other=0.0) * tl.load(clip)
    m = tl.load(mean + at, mask=within, other=0.0)
    v = tl.load(square + at, mask=within, other=0.0)
    w = tl.load(weight + at, mask=within, other=0.0)
    m = keep1 * m + change1 * g
    v = keep2 * v + change2 * (g * g)
    unbiased = tl.sqrt_rn(v / _bias_correction(step, log_keep2)) + eps
    u = m / unbiased / _bias_correction(step, log_keep1)
    u = _decayed(u, w, strength, MASK)
    tl.store(weight + at, w - u * tl.load(lr), mask=within)
    tl.store(mean + at, m, mask=within)
    tl.store(square + at, v, mask=within)
    tl.store(grad + at, tl.zeros_like(g), mask=within)


@triton.jit
def _momentum_kernel(
    grad, mean, out, squares, clip, keep, stride, size, nesterov, CHUNK: tl.constexpr
):
    chunk, matrix = tl.program_id(0), tl.program_id(1).to(tl.int64)
    at = chunk * CHUNK + tl.arange(0, CHUNK)
    within = at < size
    keep = tl.load(keep)
    change = 1.0 - keep
    g = tl.load(grad + matrix * stride + at, mask=within, other=0.0) * tl.load(clip)
    m = tl.load(mean + matrix * stride + at, mask=within, other=0.0)
    m = keep * m + change * g
    u = m + change * nesterov * (g - m)
    tl.store(mean + matrix * stride + at, m, mask=within)
    tl.store(grad + matrix * stride + at, tl.zeros_like(g), mask=within)
    tl.store(out + matrix * size + at, u.to(out.dtype.element_ty), mask=within)
    tl.store(squares + matrix * tl.num_programs(0) + chunk, tl.sum(u * u, 0))


@triton.jit
def _inverse_norm_kernel(squares, out, chunks, divisor, BLOCK: tl.constexpr):
    start, total = (
        squares + tl.program_id(0).to(tl.int64) * chunks,
        tl.zeros((BLOCK,), dtype=tl.float32),
    )
    for first in range(0, chunks, BLOCK):
        at = first + tl.arange(0, BLOCK)
        total += tl.load(start + at, mask=at < chunks, other=0.0)
    tl.store(out + tl.program_id(0), 1.0 / (tl.sqrt_rn(tl.sum(total, 0)) * divisor + 1e-7))


@triton.jit
def _energy_kernel(
    matrices, energy, height, width, shape_factor, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """shape_factor^2 * the mean square of each row."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    matrix = tl.program_id(1).to(tl.int64)
    start = matrices + matrix * height * width + rows[:, None] * width
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for first in range(0, width, COLUMNS):
        columns = first + tl.arange(0, COLUMNS)
        o = tl.load(
            start + columns[None, :],
            mask=(rows[:, None] < height) & (columns[None, :] < width),
            other=0.0,
        ).to(tl.float32)
        total += o * o
    mean = tl.sum(total, 1) / width * (shape_factor * shape_factor)
    tl.store(energy + matrix * height + rows, mean, mask=rows < height)


@triton.jit
def _scale_kernel(
    energy,
    square,
    scales,
    square_stride,
    height,
    width,
    shape_factor,
    keep,
    change,
    eps,
    BLOCK: tl.constexpr,
):
    """All rows twice: what keeps the norm is known when the last one has been seen."""
    matrix = tl.program_id(0).to(tl.int64)
    energy, square, scales = (
        energy + matrix * height,
        square + matrix * square_stride,
        scales + matrix * height,
    )
    whole, scaled = tl.zeros((BLOCK,), dtype=tl.float32), tl.zeros((BLOCK,), dtype=tl.float32)
    for first in range(0, height, BLOCK):
        rows = first + tl.arange(0, BLOCK)
        within = rows < height
        e = tl.load(energy + rows, mask=within, other=0.0)
        v = keep * tl.load(square + rows, mask=within, other=0.0) + change * e
        s = 1.0 / (tl.sqrt_rn(v) + eps)
        whole += e
        scaled += e * s * s
        tl.store(square + rows, v, mask=within)
        tl.store(scales + rows, s, mask=within)
    kept = (
        shape_factor
        * tl.sqrt_rn(tl.sum(whole, 0) * width)
        / (tl.sqrt_rn(tl.sum(scaled, 0) * width) + eps)
    )
    tl.debug_barrier()  # another thread may have stored what this one loads
    for first in range(0, height, BLOCK):
        rows = first + tl.arange(0, BLOCK)
        tl.store(
            scales + rows,
            kept * tl.load(scales + rows, mask=rows < height, other=0.0),
            mask=rows < height,
        )


@triton.jit
def _apply_kernel(
    weight,
    matrices,
    scales,
    lr,
    strength,
    weight_stride,
    height,
    width,
    shape_factor,
    SCALED: tl.constexpr,
    MASK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    rows = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    matrix = tl.program_id(2).to(tl.int64)
    at, within = (
        rows[:, None] * width + columns[None, :],
        (rows[:, None] < height) & (columns[None, :] < width),
    )
    o = tl.load(matrices + matrix * height * width + at, mask=within, other=0.0).to(tl.float32)
    w = tl.load(weight + matrix * weight_stride + at, mask=within, other=0.0)
    if SCALED:
        u = o * tl.load(scales + matrix * height + rows, mask=rows < height, other=0.0)[:, None]
    else:
        u = o * shape_factor
    u = _decayed(u, w, strength, MASK)
    tl.store(weight + matrix * weight_stride + at, w - u * tl.load(lr), mask=within)


# ---- operators ----


@torch.library.custom_op("ablab::adam_step", mutates_args=("weight", "grad", "mean", "square"))
def adam_step(
    weight: Tensor,
    grad: Tensor,
    mean: Tensor,
    square: Tensor,
    clip: Tensor,
    lr: Tensor,
    step: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    mask: str,
    strength: Tensor | None,
) -> None:
    """Adam and a decay.

    weight, grad, mean, square: contiguous fp32 of one shape; mask: of MASKS; strength: of the decay, if there is one.
    """
    _adam_kernel[(triton.cdiv(weight.numel(), CHUNK),)](
        weight,
        grad,
        mean,
        square,
        clip,
        lr,
        step,
        lr if strength is None else strength,
        weight.numel(),
        beta1,
        1 - beta1,
        beta2,
        1 - beta2,
        _log(beta1),
        _log(beta2),
        eps,
        MASK=MASKS.index(mask),
        CHUNK=CHUNK,
    )


def _log(keep: float) -> float:
    return math.log(keep) if keep else -1e30  # of 0: exp(step * this) is 0 from step 1 on


@torch.library.custom_op("ablab::momentum_step", mutates_args=("grad", "mean"))
def momentum_step(
    grad: Tensor,
    mean: Tensor,
    clip: Tensor,
    keep: Tensor,
    nesterov: bool,
    divisor: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Momentum of matrices: (u [N,r,c] of `dtype`, 1 / (divisor |u|_F) [N] in fp32).

    grad, mean: [N,r,c] in fp32, of the same strides, each matrix contiguous.
    """
    count, height, width = grad.shape
    chunks = triton.cdiv(height * width, CHUNK)
    out = grad.new_empty(grad.shape, dtype=dtype)
    squares, inverse = grad.new_empty(count, chunks), grad.new_empty(count)
    _momentum_kernel[(chunks, count)](
        grad,
        mean,
        out,
        squares,
        clip,
        keep,
        grad.stride(0),
        height * width,
        float(nesterov),
        CHUNK=CHUNK,
    )
    _inverse_norm_kernel[(count,)](squares, inverse, chunks, divisor, BLOCK=BLOCK)
    return out, inverse


@momentum_step.register_fake
def _(grad, mean, clip, keep, nesterov, divisor, dtype):
    return grad.new_empty(grad.shape, dtype=dtype), grad.new_empty(grad.shape[0])


@torch.library.custom_op("ablab::row_scales", mutates_args=("square",))
def row_scales(
    matrices: Tensor, square: Tensor, shape_factor: float, keep: float, eps: float
) -> Tensor:
    """What NorMuon multiplies the rows of contiguous matrices [N,r,c] by, [N,r] in fp32.

    square: [N,r,1], its running mean.
    """
    count, height, width = matrices.shape
    energy = matrices.new_empty(count, height, dtype=torch.float32)
    scales = torch.empty_like(energy)
    _energy_kernel[(triton.cdiv(height, ROWS), count)](
        matrices, energy, height, width, shape_factor, ROWS=ROWS, COLUMNS=COLUMNS
    )
    _scale_kernel[(count,)](
        energy,
        square,
        scales,
        square.stride(0),
        height,
        width,
        shape_factor,
        keep,
        1 - keep,
        eps,
        BLOCK=BLOCK,
    )
    return scales


@row_scales.register_fake
def _(matrices, square, shape_factor, keep, eps):
    return matrices.new_empty(matrices.shape[:2], dtype=torch.float32)


@torch.library.custom_op("ablab::apply_rows", mutates_args=("weight",))
def apply_rows(
    weight: Tensor,
    matrices: Tensor,
    scales: Tensor | None,
    shape_factor: float,
    lr: Tensor,
    mask: str,
    strength: Tensor | None,
) -> None:
    """Move weight [N,r,c], fp32, each matrix contiguous, by contiguous matrices [N,r,c] times scales [N,r].

    Without scales, times shape_factor; decay as in `adam_step`.
    """
    count, height, width = weight.shape
    _apply_kernel[(triton.cdiv(width, COLUMNS), triton.cdiv(height, ROWS), count)](
        weight,
        matrices,
        matrices if scales is None else scales,
        lr,
        lr if strength is None else strength,
        weight.stride(0),
        height,
        width,
        shape_factor,
        SCALED=scales is not None,
        MASK=MASKS.index(mask),
        ROWS=ROWS,
        COLUMNS=COLUMNS,
    )
