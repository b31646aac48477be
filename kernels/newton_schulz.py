"""Newton-Schulz on a batch of matrices, each symmetric product computed once and mirrored.

    x = m / (|m|_F divisor)                        for a, b, c in triples:
        gram = x x^T  (x^T x of a tall matrix)     half the tiles
        poly = a I + b gram + c gram gram^T        half the tiles; gram is symmetric, so gram gram^T is its square
        x = poly x    (x poly)                     one batched product

A program owns one square tile on or below the diagonal, adds in fp32 and stores it twice, as it is and transposed; the
tiles above the diagonal are in no grid.  A tile on the diagonal mirrors its lower triangle first, so that the result is
symmetric to the bit whatever the order of sums in a matrix unit.

Steps are not joined on the gram matrix, though long matrices would be met less often (430M: 21.9 ms for 24.1 on an
H100).  In fp16 such products passed 65,504 at the seventh step of a small run, and 5 of 20 runs of the 70M model ended
in NaN, where matrices at random and five hard spectra had shown nothing.

Tolerance: both this and plain products round gram, poly and x to `dtype`, and plain ones also b gram, c gram^2 and a x:
errors against fp64 must be no more than 1.1 times those of the plain path.
"""

import torch
import triton
from torch import Tensor
from triton import language as tl

# Rows up to which a tile serves -> (rows of the square tile, depth of a step, warps, stages).  Powers of two, at
# least 16.  On an H100, batches of 768 rows take 0.91 to 1.10 of the time of cuBLAS's full products, and poly needs
# no pass for its addends (`ablab bench kernels --only newton_schulz`); on an H200, 60 of 1,152 rows take 0.89, and 0.66
# to 0.70 where they are 3,072 long.  With masked loads they took half as long again.
TILES = {64: (64, 64, 4, 4), 2**31: (128, 64, 4, 3)}


# ---- reference ----


def plain_symmetric(
    x: Tensor,
    alpha: float = 1.0,
    beta: float = 0.0,
    y: Tensor | None = None,
    diagonal: float = 0.0,
) -> Tensor:
    """alpha x x^T + beta y + diagonal I by batched products.  x: [N, r, c], y: [N, r, r] -> [N, r, r]."""
    gram = alpha * (x @ x.mT)
    added = gram if y is None else gram + beta * y
    return added + diagonal * torch.eye(x.shape[1], dtype=x.dtype, device=x.device)


# ---- kernel ----


@triton.jit
def _tile_of(index, side):
    """The index-th of the side (side + 1) / 2 tiles on or below the diagonal: row, column.

    The triangle is folded into a rectangle, long rows at the left, short ones at the right: whole-number arithmetic
    alone.
    """
    odd = side % 2
    width = side + 1 - odd
    fold = index // width
    place = index % width
    left = place < side - fold
    return tl.where(left, side - 1 - fold, fold - odd), tl.where(
        left, place, place - (side - fold)
    )


@triton.jit
def _rows_times_rows(
    x,
    rows,
    columns,
    height,
    depth,
    row_stride,
    depth_stride,
    DEPTH: tl.constexpr,
    EVEN: tl.constexpr,
):
    """x[rows] x[columns]^T, [BLOCK, BLOCK] fp32."""
    steps = tl.arange(0, DEPTH)
    left = x + rows[:, None] * row_stride + steps[None, :] * depth_stride
    right = x + columns[:, None] * row_stride + steps[None, :] * depth_stride
    total = tl.zeros((rows.shape[0], rows.shape[0]), dtype=tl.float32)
    for start in range(0, depth, DEPTH):
        if EVEN:
            a, b = tl.load(left), tl.load(right)
        else:
            within = steps[None, :] < depth - start
            a = tl.load(left, mask=(rows[:, None] < height) & within, other=0.0)
            b = tl.load(right, mask=(columns[:, None] < height) & within, other=0.0)
        total = tl.dot(a, tl.trans(b), total, input_precision="ieee")
        left += DEPTH * depth_stride
        right += DEPTH * depth_stride
    return total


@triton.jit
def _store(out, tile, rows, columns, height, EVEN: tl.constexpr):
    address = out + rows[:, None] * height + columns[None, :]
    if EVEN:
        tl.store(address, tile)
    else:
        tl.store(address, tile, mask=(rows[:, None] < height) & (columns[None, :] < height))


@triton.jit
def _symmetric_kernel(
    x,
    y,
    scale,
    out,
    height,
    depth,
    side,
    x_batch,
    x_row,
    x_depth,
    y_batch,
    y_row,
    y_column,
    alpha,
    beta,
    diagonal,
    ADD: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPTH: tl.constexpr,
):
    tiles = side * (side + 1) // 2
    batch = (tl.program_id(0) // tiles).to(tl.int64)
    tile_row, tile_column = _tile_of(tl.program_id(0) % tiles, side)
    rows = tile_row * BLOCK + tl.arange(0, BLOCK)
    columns = tile_column * BLOCK + tl.arange(0, BLOCK)
    total = alpha * _rows_times_rows(
        x + batch * x_batch, rows, columns, height, depth, x_row, x_depth, DEPTH, EVEN
    )
    if ADD:
        address = y + batch * y_batch + rows[:, None] * y_row + columns[None, :] * y_column
        if EVEN:
            added = tl.load(address)
        else:
            added = tl.load(
                address, mask=(rows[:, None] < height) & (columns[None, :] < height), other=0.0
            )
        total += beta * added.to(tl.float32)
    total += tl.where(rows[:, None] == columns[None, :], diagonal, 0.0)
    total *= tl.load(scale + batch)
    out += batch * height * height
    if tile_row == tile_column:
        result = tl.where(rows[:, None] >= columns[None, :], total, tl.trans(total)).to(
            out.dtype.element_ty
        )
        _store(out, result, rows, columns, height, EVEN)
    else:
        result = total.to(out.dtype.element_ty)
        _store(out, result, rows, columns, height, EVEN)
        _store(out, tl.trans(result), columns, rows, height, EVEN)


# ---- operator ----


@torch.library.custom_op("ablab::symmetric_product", mutates_args=())
def _symmetric(
    x: Tensor,
    y: Tensor | None,
    scale: Tensor,
    alpha: float,
    beta: float,
    diagonal: float,
    block: int,
    depth: int,
    warps: int,
    stages: int,
) -> Tensor:
    """Opaque to the compiler (not a triton_op), because kernels in Triton's interpreter cannot be traced."""
    count, height, length = x.shape
    out = x.new_empty(count, height, height)
    side = triton.cdiv(height, block)
    if out.numel():
        _symmetric_kernel[(count * (side * (side + 1) // 2),)](
            x,
            x if y is None else y,
            scale,
            out,
            height,
            length,
            side,
            *x.stride(),
            *(0, 0, 0) if y is None else y.stride(),
            alpha,
            beta,
            diagonal,
            ADD=y is not None,
            EVEN=height % block == 0 and length % depth == 0,
            BLOCK=block,
            DEPTH=depth,
            num_warps=warps,
            num_stages=stages,
        )
    return out


@_symmetric.register_fake
def _(x, y, scale, alpha, beta, diagonal, block, depth, warps, stages):
    return x.new_empty(x.shape[0], x.shape[1], x.shape[1])


Tiles = dict[int, tuple[int, int, int, int]]


def symmetric(
    x: Tensor,
    alpha: float = 1.0,
    beta: float = 0.0,
    y: Tensor | None = None,
    diagonal: float = 0.0,
    scale: Tensor | None = None,
    tiles: Tiles = TILES,
) -> Tensor:
    """(alpha x x^T + beta y + diagonal I) scale in the dtype of x, summed in fp32, rounded once.

    Symmetric to the bit, without a gradient.
    x: [N, r, c] of any strides, each matrix within 2^31 elements; y: symmetric [N, r, r] of the same dtype; scale:
    [N] in fp32.  tiles: as TILES, for tuning.
    """
    scale = x.new_ones(len(x), dtype=torch.float32) if scale is None else scale
    return _symmetric(
        x,
        y,
        scale,
        float(alpha),
        float(beta),
        float(diagonal),
        *tiles[min(most for most in tiles if most >= x.shape[1])],
    )


Triples = tuple[tuple[float, float, float], ...]


def orthogonalise(
    matrices: Tensor, divisor: float, triples: Triples, dtype: torch.dtype, tiles: Tiles = TILES
) -> Tensor:
    """An approximate polar factor U V^T of each matrix [N, r, c], in the dtype of `matrices`.

    Products are in `dtype`, the norm is in fp32.  `divisor` and `triples` are one entry of the table of
    coefficients.  Matrices may be a view of any strides.
    """
    norms = matrices.norm(dim=(-2, -1), keepdim=True)
    x = (matrices / (norms * divisor + 1e-7)).to(dtype)
    return iterate(x, triples, tiles=tiles).to(matrices.dtype)


def iterate(
    x: Tensor, triples: Triples, scale: Tensor | None = None, tiles: Tiles = TILES
) -> Tensor:
    """Each step takes singular values s of the matrices x [N, r, c] to a s + b s^3 + c s^5; in the dtype of x.

    scale: [N] in fp32, what x must be multiplied by before the first step; it enters the first products instead.

    Not the Gram form, which iterates on [r, r] alone and multiplies by x at the end: on a 128 x 512 matrix with
    singular values from 0.001 to 1, in bf16 with the seven steps of polar7, it gave NaN, and with a restart after
    two steps values above 1e11, where this form takes them to [0.90, 1.09].
    """
    tall = x.shape[-2] > x.shape[-1]
    one = x.new_ones(len(x), dtype=torch.float32)
    scale, squared = (one, one) if scale is None else (scale, scale.square())
    for a, b, c in triples:
        gram = symmetric(x.mT if tall else x, scale=squared, tiles=tiles)
        poly = symmetric(gram, c, b, gram, a, scale, tiles)
        x = x @ poly if tall else poly @ x
        scale = squared = one
    return x
