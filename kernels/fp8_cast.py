"""A matrix in 8-bit floats, as it is and turned round, in one pass over it.

    q = cast(x / s),    q^T beside it

Matrix units multiply 8-bit numbers along the summed side alone, so dW = g^T x needs both turned round.  Plain torch
casts in one pass and turns in another.

Tolerance: x / s rounded once to the format; both layouts hold the same numbers.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton import language as tl

from ablab.kernels.fp8 import DTYPES, quantise, scale_for


class Scaled(NamedTuple):
    """8-bit numbers [m,k], k being the side that products sum over, and their scale, fp32 0-D."""

    numbers: Tensor
    scale: Tensor


class Cast(NamedTuple):
    """Of a matrix [n,k]: rows [n,k], and the same turned round, columns [k,n]."""

    rows: Scaled
    columns: Scaled


def cast(x: Tensor, form: str) -> Cast:
    """Activations x [n,k] by their own largest magnitude.

    By rows first: so the compiler joins that to the kernel that makes x a row at a time, as a norm does.
    """
    largest = x.abs().amax(-1).amax()
    scale = scale_for(largest, form)
    return both(_both_layouts(x, scale, form), scale)


def cast_made(x: Tensor, form: str) -> Cast:
    """The same of what stands in memory already, with long rows.

    A kernel of ours finds the largest magnitude: the compiler's takes 0.236 ms for 340 MB on an H100, rows of 2,304,
    which is half the rate of memory.
    """
    scale = scale_for(_peaks(x).amax(), form)
    return both(_both_layouts(x, scale, form), scale)


def cast_weight(weight: Tensor) -> Cast:
    """A weight [n,k] by its own largest magnitude, in e4m3; small enough for plain torch."""
    numbers, scale = quantise(weight, "e4m3")
    return both((numbers, numbers.t().contiguous()), scale)


def both(layouts: tuple[Tensor, Tensor], scale: Tensor) -> Cast:
    rows, columns = layouts
    return Cast(Scaled(rows, scale), Scaled(columns, scale))


# ---- pieces of kernels ----


@dataclass(frozen=True)
class Tile:
    """What one program takes of a matrix."""

    rows: int
    columns: int
    warps: int

    def programs(self, rows: int, columns: int) -> int:
        return triton.cdiv(rows, self.rows) * triton.cdiv(columns, self.columns)

    def launch(self, kernel: Any, rows: int, columns: int, *tensors: Tensor) -> None:
        """The kernel on every tile of [rows,columns]; nothing where there is none."""
        programs = self.programs(rows, columns)
        how = {"ROWS": self.rows, "COLUMNS": self.columns, "num_warps": self.warps}
        if programs:
            kernel[(programs,)](*tensors, rows, columns, **how)


@triton.jit
def tile_of(rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """This program's rows [R,1], in 64 bits, and columns [1,C], and which of them are there."""
    across = tl.cdiv(columns, COLUMNS)
    down = tl.program_id(0) // across
    along = tl.program_id(0) % across
    row = down * ROWS + tl.arange(0, ROWS)
    column = along * COLUMNS + tl.arange(0, COLUMNS)
    row = row.to(tl.int64)[:, None]
    column = column[None, :]
    return row, column, (row < rows) & (column < columns)


@triton.jit
def sixteen(values, numbers):
    """values as they are turned round on their way into 8-bit numbers: in bf16, and back in fp32.

    Triton turns a tile in shared memory where it is narrowest.  In 16 bits by `ldmatrix`, right; in 8 bits a byte at a
    time, and on an H100 (Triton 3.6) a quarter of the bytes were not those that had been stored.  Of fp32 nothing is
    narrower than the result, so plain torch casts and turns fp32 on a GPU.
    """
    if numbers.dtype.element_ty.primitive_bitwidth == 8:
        values = values.to(tl.bfloat16).to(tl.float32)
    return values


@triton.jit
def store_rows(numbers, values, row, column, there, columns):
    """values [R,C] -> their places in numbers [rows,columns], rounded to its type."""
    narrow = values.to(numbers.dtype.element_ty)
    tl.store(numbers + row * columns + column, narrow, mask=there)


@triton.jit
def store_columns(turned, values, row, column, there, rows):
    """values [R,C] -> their places in turned [columns,rows], rounded to its type."""
    narrow = values.to(turned.dtype.element_ty)
    places = turned + tl.trans(column).to(tl.int64) * rows + tl.trans(row)
    tl.store(places, tl.trans(narrow), mask=tl.trans(there))


@triton.jit
def _both(x, scale, numbers, turned, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row, column, there = tile_of(rows, columns, ROWS, COLUMNS)
    wide = tl.load(x + row * columns + column, mask=there, other=0.0)
    value = wide.to(tl.float32) * (1.0 / tl.load(scale))
    store_rows(numbers, value, row, column, there, columns)
    store_columns(turned, value, row, column, there, rows)


@triton.jit
def _peak(x, peaks, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The largest magnitude in each tile."""
    row, column, there = tile_of(rows, columns, ROWS, COLUMNS)
    wide = tl.load(x + row * columns + column, mask=there, other=0.0)
    tl.store(peaks + tl.program_id(0), tl.max(tl.abs(wide.to(tl.float32))))


def unset(like: Tensor, shape: tuple[int, ...], form: str) -> Tensor:
    """Where a kernel stores 8-bit numbers; `narrow` is what then stands there.

    Triton's interpreter stores them wide: its own cast loses the carry into the exponent, 7.98 becomes 4.
    """
    dtype = DTYPES[form] if like.is_cuda else torch.float32
    return torch.empty(shape, dtype=dtype, device=like.device)


def narrow(stored: Tensor, form: str) -> Tensor:
    return stored.to(DTYPES[form])


# ---- registration ----

TILE = Tile(rows=64, columns=64, warps=4)
PEAK = Tile(rows=16, columns=512, warps=8)


@torch.library.custom_op("ablab::fp8_both_layouts", mutates_args=())
def _both_layouts(x: Tensor, scale: Tensor, form: str) -> tuple[Tensor, Tensor]:
    if x.is_cuda and x.dtype == torch.float32:
        plain = (x / scale).to(DTYPES[form])
        return plain, plain.t().contiguous()
    rows, columns = x.shape
    numbers = unset(x, (rows, columns), form)
    turned = unset(x, (columns, rows), form)
    TILE.launch(_both, rows, columns, x.contiguous(), scale, numbers, turned)
    return narrow(numbers, form), narrow(turned, form)


@_both_layouts.register_fake
def _(x, scale, form):
    rows, columns = x.shape
    numbers = x.new_empty((rows, columns), dtype=DTYPES[form])
    turned = x.new_empty((columns, rows), dtype=DTYPES[form])
    return numbers, turned


@torch.library.custom_op("ablab::fp8_peaks", mutates_args=())
def _peaks(x: Tensor) -> Tensor:
    """Largest magnitudes of x [n,k], one a tile, fp32; of no tile, 0."""
    count = PEAK.programs(*x.shape)
    peaks = x.new_zeros(max(count, 1), dtype=torch.float32)
    PEAK.launch(_peak, *x.shape, x.contiguous(), peaks)
    return peaks


@_peaks.register_fake
def _(x):
    count = PEAK.programs(*x.shape)
    return x.new_empty(max(count, 1), dtype=torch.float32)
