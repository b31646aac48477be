"""The gradient of cross-entropy in 8-bit floats, cast by the kernel that makes it, and turned round.

    q = cast(2^e dloss/draw / multiplier)               so  dloss/draw = q  multiplier 2^-e

Its scale is known without a look: |odds - hit| <= 1, the slope of a cap is at most 1, and the z-loss adds at most
2 z_weight |lse|.  So e is the largest exponent at which  2^e (1 + 2 z_weight |lse|)  is a number of the format, with
|lse| <= cap + log V under a soft cap, and up to FURTHEST without one.  Only beyond that, with a z-loss, is a gradient
cut off, to the largest number.

A program owns a row and casts what it would have written over the logits; another pass turns the bytes round.  Of
8,192 rows of 32,000 the first takes 0.266 ms on an H100, where reading the logits and writing the bytes takes 0.262 at
3 TB/s; both gradients at once take 0.447.  Before its rows were held in registers it took 0.40 on an H200, and the
second pass 0.15; from the logits straight into both layouts, a tile a program, which must know the sums of its rows
and so reads the logits once more, took 0.25 + 0.59, and the same in one launch, tiles waiting for their rows so that
the second read comes from the cache, 0.83.

Tolerance: the gradient in fp32, rounded once to the format; both layouts hold the same numbers.
"""

from math import floor, log, log2
from typing import NamedTuple

import torch
import triton
from torch import Tensor
from torch.nn import functional as F
from triton import language as tl

from ablab.kernels.cross_entropy import cross_entropy_, squash
from ablab.kernels.fp8 import DTYPES
from ablab.kernels.fp8_cast import Tile, narrow, store_columns, tile_of, unset

TILE = Tile(rows=128, columns=128, warps=8)
# Of |logsumexp| without a cap: a model this far out has lost more than the size of a penalty.
FURTHEST = 100.0


class Objective(NamedTuple):
    """Of squash(multiplier * logits), multiplier > 0: cross-entropy + z_weight * logsumexp^2."""

    multiplier: float = 1.0
    cap: float = 0.0
    cap_form: str = "none"
    z_weight: float = 0.0

    def exponent(self, form: str, vocab: int) -> int:
        """e: gradients over the multiplier, times 2^e, fit into the format, and twice that would not."""
        furthest = FURTHEST if self.cap_form == "none" else self.cap + log(vocab)
        bound = 1.0 + 2.0 * self.z_weight * furthest
        return floor(log2(torch.finfo(DTYPES[form]).max / bound))

    def unit(self, form: str, vocab: int) -> float:
        """What a 1 of the format stands for, in units of dloss/draw."""
        return self.multiplier * 2.0 ** -self.exponent(form, vocab)


# ---- reference ----


def sums_of(logits: Tensor, targets: Tensor, objective: Objective) -> tuple[Tensor, Tensor]:
    """Cross-entropy and logsumexp of each row in plain torch, in fp32 (fp64 for fp64)."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    z = squash(objective.multiplier * wide, objective.cap, objective.cap_form)
    return F.cross_entropy(z, targets, reduction="none"), z.logsumexp(-1)


def gradient_of(logits: Tensor, targets: Tensor, objective: Objective) -> Tensor:
    """dloss/draw in plain torch, in fp32 (fp64 for fp64)."""
    raw = logits.detach().to(torch.promote_types(logits.dtype, torch.float32)).requires_grad_()
    with torch.enable_grad():
        nats, lses = sums_of(raw, targets, objective)
        loss = (nats + objective.z_weight * lses.square()).sum()
    (g,) = torch.autograd.grad(loss, raw)
    return g


def cast_gradient(g: Tensor, unit: float, form: str) -> Tensor:
    """g over its unit, rounded to the format; what is beyond the largest number becomes it."""
    largest = torch.finfo(DTYPES[form]).max
    return (g / unit).clamp(-largest, largest).to(DTYPES[form])


# ---- kernel ----


@triton.jit
def _turn(numbers, turned, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    row, column, there = tile_of(rows, columns, ROWS, COLUMNS)
    bytes_ = tl.load(numbers + row * columns + column, mask=there, other=0)
    store_columns(turned, bytes_, row, column, there, rows)


# ---- launch ----


class Gradient(NamedTuple):
    """Cross-entropy and logsumexp of each row in nats, fp32 [N], and q [N,V]."""

    nats: Tensor
    lses: Tensor
    numbers: Tensor


def fp8_gradient(
    logits: Tensor, targets: Tensor, objective: Objective, form: str, wide: bool = False
) -> Gradient:
    """logits: contiguous [N, V]; targets: int64 [N] in [0, V), unchecked.

    wide: dloss/draw goes over the logits too, in their dtype; else they are left alone.
    """
    numbers = unset(logits, tuple(logits.shape), form)
    unit = objective.unit(form, logits.shape[1])
    sums = cross_entropy_(
        logits, targets, *objective, gradient=wide, eight=numbers, eight_factor=1.0 / unit
    )
    return Gradient(*sums, narrow(numbers, form))


def turned(numbers: Tensor) -> Tensor:
    """8-bit numbers [n,k], contiguous -> [k,n], contiguous."""
    rows, columns = numbers.shape
    raw = numbers.view(torch.uint8)
    out = raw.new_empty(columns, rows)
    TILE.launch(_turn, rows, columns, raw, out)
    return out.view(numbers.dtype)
