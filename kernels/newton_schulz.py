"""Newton-Schulz on a batch of matrices, each symmetric product computed once and mirrored.

    x = m / (|m|_F divisor)                        for a, b, c in triples:
        gram = x x^T  (x^T x of a tall matrix)     half the tiles
        poly = a I + b gram + c gram gram^T        half the tiles; gram is symmetric, so gram gram^T is its square
        x = poly x    (x poly)                     one batched product

On request a long matrix takes two or three steps on [r, r] alone, where all is symmetric, before x is met again: the
Gram form, after Zhang, Amsel, Chen and Dao (dao-lab.ai/blog/2026/gram-newton-schulz).

    gram = x x^T                                   for a, b, c in two or three of the triples:
        poly = a I + b gram + c gram^2
        whole = whole poly
        gram = poly gram poly                      two products, and none after the last of them
    x = whole x

A program owns one square tile on or below the diagonal, adds in fp32 and stores it twice, as it is and transposed; the
tiles above the diagonal are in no grid.  A tile on the diagonal mirrors its lower triangle first, so that the result is
symmetric to the bit whatever the order of sums in a matrix unit.

Tolerance: both this and plain products round gram, poly and x to `dtype`, and plain ones also b gram, c gram^2 and a x:
errors against fp64 must be no more than 1.1 times those of the plain path.
"""

from functools import partial

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
    other: Tensor | None = None,
) -> Tensor:
    """alpha x z^T + beta y + diagonal I by batched products; z: `other`, or x.

    x, z: [N, r, c], y: [N, r, r] -> [N, r, r].
    """
    gram = alpha * (x @ (x if other is None else other).mT)
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
    z,
    rows,
    columns,
    height,
    depth,
    x_row,
    x_depth,
    z_row,
    z_depth,
    DEPTH: tl.constexpr,
    EVEN: tl.constexpr,
):
    """x[rows] z[columns]^T, [BLOCK, BLOCK] fp32."""
    steps = tl.arange(0, DEPTH)
    left = x + rows[:, None] * x_row + steps[None, :] * x_depth
    right = z + columns[:, None] * z_row + steps[None, :] * z_depth
    total = tl.zeros((rows.shape[0], rows.shape[0]), dtype=tl.float32)
    for start in range(0, depth, DEPTH):
        if EVEN:
            a, b = tl.load(left), tl.load(right)
        else:
            within = steps[None, :] < depth - start
            a = tl.load(left, mask=(rows[:, None] < height) & within, other=0.0)
            b = tl.load(right, mask=(columns[:, None] < height) & within, other=0.0)
        total = tl.dot(a, tl.trans(b), total, input_precision="ieee")
        left += DEPTH * x_depth
        right += DEPTH * z_depth
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
    z,
    y,
    scale,
    out,
    height,
    depth,
    side,
    x_batch,
    x_row,
    x_depth,
    z_batch,
    z_row,
    z_depth,
    y_batch,
    y_row,
    y_column,
    alpha,
    beta,
    diagonal,
    SQUARE: tl.constexpr,
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
    x += batch * x_batch
    if SQUARE:
        total = _rows_times_rows(
            x, x, rows, columns, height, depth, x_row, x_depth, x_row, x_depth, DEPTH, EVEN
        )
    else:
        z += batch * z_batch
        total = _rows_times_rows(
            x, z, rows, columns, height, depth, x_row, x_depth, z_row, z_depth, DEPTH, EVEN
        )
    total *= alpha
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
    other: Tensor | None,
    y: Tensor | None,
    scale: Tensor,
    alpha: float,
    beta: float,
    diagonal: float,
    dtype: torch.dtype,
    block: int,
    depth: int,
    warps: int,
    stages: int,
) -> Tensor:
    """Opaque to the compiler (not a triton_op), because kernels in Triton's interpreter cannot be traced."""
    count, height, length = x.shape
    out = x.new_empty(count, height, height, dtype=dtype)
    side = triton.cdiv(height, block)
    z = x if other is None else other
    if out.numel():
        _symmetric_kernel[(count * (side * (side + 1) // 2),)](
            x,
            z,
            x if y is None else y,
            scale,
            out,
            height,
            length,
            side,
            *x.stride(),
            *z.stride(),
            *(0, 0, 0) if y is None else y.stride(),
            alpha,
            beta,
            diagonal,
            SQUARE=other is None,
            ADD=y is not None,
            EVEN=height % block == 0 and length % depth == 0,
            BLOCK=block,
            DEPTH=depth,
            num_warps=warps,
            num_stages=stages,
        )
    return out


@_symmetric.register_fake
def _(x, other, y, scale, alpha, beta, diagonal, dtype, block, depth, warps, stages):
    return x.new_empty(x.shape[0], x.shape[1], x.shape[1], dtype=dtype)


Tiles = dict[int, tuple[int, int, int, int]]


def symmetric(
    x: Tensor,
    alpha: float = 1.0,
    beta: float = 0.0,
    y: Tensor | None = None,
    diagonal: float = 0.0,
    scale: Tensor | None = None,
    other: Tensor | None = None,
    dtype: torch.dtype | None = None,
    tiles: Tiles = TILES,
) -> Tensor:
    """(alpha x z^T + beta y + diagonal I) scale, summed in fp32, rounded once; z: `other`, or x itself.

    Symmetric to the bit, without a gradient.  Of x z^T the lower triangle is computed: it must be symmetric, as that of
    polynomials of one matrix is.
    x, z: [N, r, c] of one dtype and any strides, each matrix within 2^31 elements; y: symmetric [N, r, r]; scale: [N]
    in fp32; dtype: of the result, else that of x.  tiles: as TILES, for tuning.
    """
    scale = x.new_ones(len(x), dtype=torch.float32) if scale is None else scale
    return _symmetric(
        x,
        other,
        y,
        scale,
        float(alpha),
        float(beta),
        float(diagonal),
        dtype or x.dtype,
        *tiles[min(most for most in tiles if most >= x.shape[1])],
    )


# ---- Newton-Schulz ----

Triple = tuple[float, float, float]
Triples = tuple[Triple, ...]


# Times as long as it is wide, from where on a matrix is met less often.  By count it pays from 1.5 on: in products of
# r^3, symmetric ones halved, two steps of an [r, c] take 6 c/r + 2 one at a time and 3 c/r + 5 together.  On an H100
# the matrices of the 430M model take 21.9 ms of polar7 instead of 24.1, and end nearer to fp64 (0.010, not 0.015).
LONG = 1.5


def orthogonalise(
    matrices: Tensor,
    divisor: float,
    triples: Triples,
    dtype: torch.dtype,
    tiles: Tiles = TILES,
    long: float = LONG,
) -> Tensor:
    """An approximate polar factor U V^T of each matrix [N, r, c], in the dtype of `matrices`.

    Products are in `dtype`, the norm is in fp32.  `divisor` and `triples` are one entry of the table of
    coefficients.  Matrices may be a view of any strides.
    """
    norms = matrices.norm(dim=(-2, -1), keepdim=True)
    x = (matrices / (norms * divisor + 1e-7)).to(dtype)
    return iterate(x, triples, tiles=tiles, long=long).to(matrices.dtype)


def iterate(
    x: Tensor,
    triples: Triples,
    scale: Tensor | None = None,
    tiles: Tiles = TILES,
    long: float = LONG,
) -> Tensor:
    """Each step takes singular values s of the matrices x [N, r, c] to a s + b s^3 + c s^5; in the dtype of x.

    scale: [N] in fp32, what x must be multiplied by before the first step; it enters the first products instead.
    long: as LONG.
    """
    short_side, long_side = sorted(x.shape[-2:])
    tall = x.shape[-2] > x.shape[-1]
    one = x.new_ones(len(x), dtype=torch.float32)
    scale = one if scale is None else scale
    for steps in runs(triples) if long_side >= long * short_side else singly(triples):
        whole = _composed(x.mT if tall else x, steps, scale, tiles)
        x = x @ whole if tall else whole @ x
        scale = one
    return x


def singly(triples: Triples) -> list[Triples]:
    return [(triple,) for triple in triples]


def runs(triples: Triples) -> list[Triples]:
    """The steps that a long matrix takes between two meetings.

    Two, but three at first of an odd number.  What was rounded in a gram matrix grows by a^2 at each step, and a
    negative eigenvalue runs away.  Of 256 singular values of five hard spectra, which polar7 takes to 1.085 at most,
    the largest was 1.087 by 3, 2, 2 steps (1.33 with gram matrices in bf16), 1.12 by 2, 2, 3, 1.74 by 2, 3, 2, 2,600
    by 2, 5, NaN by 7.
    """
    first = 3 if len(triples) % 2 else 2
    later = range(first, len(triples), 2)
    return [triples[:first], *(triples[i : i + 2] for i in later)]


# Of the gram matrices of a run: three more bits, and numbers are near 1 by then.
BETWEEN = {torch.bfloat16: torch.float16}
# They are kept so many times as large: rows of a matrix of norm 1 have products near 1e-5, where fp16 has lost half of
# its bits.
ENLARGED = 1024.0


def _composed(x: Tensor, steps: Triples, scale: Tensor, tiles: Tiles) -> Tensor:
    """The symmetric [N, r, r] that takes x scale through all the steps, times scale; in the dtype of x.

    Polynomials of longer runs go without their diagonal a I, whose rounding in fp16 would be that of all.
    """
    product = partial(symmetric, tiles=tiles)
    if len(steps) == 1:
        a, b, c = steps[0]
        gram = product(x, scale=scale.square())
        return product(gram, c, b, gram, a, scale)
    dtype = BETWEEN.get(x.dtype, x.dtype)
    gram = product(x, ENLARGED, scale=scale.square(), dtype=dtype)
    rests = [product(*_odd_powers(gram, steps[0]))]
    firsts = [first for first, _, _ in steps]
    for first, following in zip(firsts, steps[1:], strict=False):
        half = product(gram, 1.0, first, gram, other=rests[-1])
        gram = product(half, 1.0, first, half, other=rests[-1])
        rests.append(product(*_odd_powers(gram, following)))
    whole, *between, last = rests
    whole.diagonal(dim1=-2, dim2=-1).add_(firsts[0])
    for first, rest in zip(firsts[1:], between, strict=False):
        whole = product(whole, 1.0, first, whole, other=rest)
    return product(whole, 1.0, firsts[-1], whole, other=last, scale=scale, dtype=x.dtype)


def _odd_powers(gram: Tensor, triple: Triple) -> tuple[Tensor, float, float, Tensor]:
    """What `symmetric` takes for b gram + c gram^2, as x^3 and x^5 are of the gram matrix of x."""
    _, third, fifth = triple
    return gram, fifth / ENLARGED**2, third / ENLARGED, gram
