"""Newton-Schulz on a batch of matrices, each symmetric product computed once and mirrored.

    x = m / (|m|_F divisor), wide side last        for a, b, c in triples:
        gram = x x^T                               half the tiles
        poly = b gram + c gram gram^T              half the tiles; gram is symmetric, so gram gram^T is its square
        x = a x + poly x                           one batched product with an addend

A program owns one square tile on or below the diagonal, adds in fp32 and stores it twice, as it is and transposed; the
tiles above the diagonal are in no grid.  Of a tile on the diagonal only the lower triangle is stored and mirrored, so
that the result is symmetric to the bit whatever the order of sums in a matrix unit.

Tolerance: both this and plain products round gram, poly and x to `dtype`, and plain ones also b gram, c gram^2 and a x:
errors against fp64 must be no more than 1.1 times those of the plain path.
"""

import torch
import triton
from torch import Tensor
from triton import language as tl

# Rows up to which a tile serves -> (rows of the square tile, depth of a step, warps, stages).  Powers of two, at least 16.
TILES = {64: (64, 64, 4, 3), 2**31: (128, 64, 8, 3)}


# ---- reference ----


def plain_symmetric(x: Tensor, alpha: float = 1.0, beta: float = 0.0, y: Tensor | None = None) -> Tensor:
    """alpha x x^T + beta y by batched products.  x: [N, r, c], y: [N, r, r] -> [N, r, r]."""
    gram = alpha * (x @ x.mT)
    return gram if y is None else gram + beta * y


# ---- kernel ----


@triton.jit
def _tile_of(index, side):
    """The index-th of the side (side + 1) / 2 tiles on or below the diagonal: row, column.

    The triangle is folded into a rectangle, long rows at the left, short ones at the right: whole-number arithmetic alone.
    """
    odd = side % 2
    width = side + 1 - odd
    fold = index // width
    place = index % width
    left = place < side - fold
    return tl.where(left, side - 1 - fold, fold - odd), tl.where(left, place, place - (side - fold))


@triton.jit
def _rows_times_rows(x, rows, columns, height, depth, row_stride, depth_stride, BLOCK: tl.constexpr, DEPTH: tl.constexpr):
    """x[rows] x[columns]^T, [BLOCK, BLOCK] fp32."""
    steps = tl.arange(0, DEPTH)
    left = x + rows.to(tl.int64)[:, None] * row_stride + steps[None, :] * depth_stride
    right = x + columns.to(tl.int64)[None, :] * row_stride + steps[:, None] * depth_stride
    total = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
    for start in range(0, depth, DEPTH):
        rest = depth - start
        a = tl.load(left, mask=(rows[:, None] < height) & (steps[None, :] < rest), other=0.0)
        b = tl.load(right, mask=(columns[None, :] < height) & (steps[:, None] < rest), other=0.0)
        total = tl.dot(a, b, total, input_precision="ieee")
        left += DEPTH * depth_stride
        right += DEPTH * depth_stride
    return total


@triton.jit
def _symmetric_kernel(
    x, y, out, height, depth, side, x_batch, x_row, x_depth, y_batch, y_row, y_column, alpha, beta,
    ADD: tl.constexpr, BLOCK: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    tiles = side * (side + 1) // 2
    batch = (tl.program_id(0) // tiles).to(tl.int64)
    tile_row, tile_column = _tile_of(tl.program_id(0) % tiles, side)
    rows = tile_row * BLOCK + tl.arange(0, BLOCK)
    columns = tile_column * BLOCK + tl.arange(0, BLOCK)
    total = alpha * _rows_times_rows(x + batch * x_batch, rows, columns, height, depth, x_row, x_depth, BLOCK, DEPTH)
    inside = (rows[:, None] < height) & (columns[None, :] < height)
    tall, wide = rows.to(tl.int64)[:, None], columns.to(tl.int64)[None, :]
    if ADD:
        total += beta * tl.load(y + batch * y_batch + tall * y_row + wide * y_column, mask=inside, other=0.0).to(tl.float32)
    result = total.to(out.dtype.element_ty)
    out += batch * height * height
    if tile_row == tile_column:  # a mask that cuts between neighbours makes stores of one element each: here alone
        tl.store(out + tall * height + wide, result, mask=inside & (wide <= tall))
        tl.store(out + wide * height + tall, result, mask=inside & (wide < tall))
    else:
        tl.store(out + tall * height + wide, result, mask=inside)
        tl.store(out + wide * height + tall, result, mask=inside)


# ---- operator ----


@torch.library.custom_op("ablab::symmetric_product", mutates_args=())
def _symmetric(x: Tensor, y: Tensor | None, alpha: float, beta: float, block: int, depth: int, warps: int, stages: int) -> Tensor:
    """Opaque to the compiler (not a triton_op), because kernels in Triton's interpreter cannot be traced."""
    count, height, length = x.shape
    out = x.new_empty(count, height, height)
    side = triton.cdiv(height, block)
    if out.numel():
        _symmetric_kernel[(count * (side * (side + 1) // 2),)](
            x, x if y is None else y, out, height, length, side, *x.stride(), *(0, 0, 0) if y is None else y.stride(), alpha, beta,
            ADD=y is not None, BLOCK=block, DEPTH=depth, num_warps=warps, num_stages=stages,
        )  # fmt: skip
    return out


@_symmetric.register_fake
def _(x, y, alpha, beta, block, depth, warps, stages):
    return x.new_empty(x.shape[0], x.shape[1], x.shape[1])


def symmetric(x: Tensor, alpha: float = 1.0, beta: float = 0.0, y: Tensor | None = None, tiles: dict[int, tuple[int, int, int, int]] = TILES) -> Tensor:
    """alpha x x^T + beta y in the dtype of x, summed in fp32, rounded once, symmetric to the bit.  No gradient.

    x: [N, r, c] of any strides; y: symmetric [N, r, r] of the same dtype.
    tiles: as TILES, for tuning.
    """
    return _symmetric(x, y, float(alpha), float(beta), *tiles[min(most for most in tiles if most >= x.shape[1])])


def orthogonalise(
    matrices: Tensor, divisor: float, triples: tuple[tuple[float, float, float], ...], dtype: torch.dtype,
    tiles: dict[int, tuple[int, int, int, int]] = TILES,
) -> Tensor:  # fmt: skip
    """An approximate polar factor U V^T of each matrix [N, r, c], in the dtype of `matrices`; products in `dtype`, the norm in fp32.

    Each step takes singular values s to a s + b s^3 + c s^5; `divisor` and `triples` are one entry of the table of
    coefficients.  Matrices may be a view of any strides.

    Not the Gram form, which iterates on [r, r] alone and multiplies by x at the end: on a 128 x 512 matrix with singular
    values from 0.001 to 1, in bf16 with the seven steps of polar7, it gave NaN, and with a restart after two steps values
    above 1e11, where this form takes them to [0.90, 1.09].
    """
    x = matrices / (matrices.norm(dim=(-2, -1), keepdim=True) * divisor + 1e-7)
    tall = x.shape[-2] > x.shape[-1]
    x = (x.mT if tall else x).to(dtype)
    for a, b, c in triples:
        gram = symmetric(x, tiles=tiles)
        poly = symmetric(gram, c, b, gram, tiles)
        x = torch.baddbmm(x, poly, x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype)
