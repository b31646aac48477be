"""Readout and cross-entropy as one operation whose matrices meet in 8-bit floats.

    logits = (q_x q_w^T) s_x s_w        x and W in e4m3, by their largest magnitudes (kernels/fp8.py)
    g      = dloss/dlogits              in 8 bits by a scale that is known beforehand (kernels/fp8_cross_entropy.py)
    dx     = (q_g q_w) s_g s_w          dW = (q_g^T q_x) s_g s_x, or g^T x of the wide numbers

Otherwise as kernels/linear_cross_entropy.py: some rows at a time, both gradients ready after the forward pass.  x and W
are cast once; W is turned round once, x and g a piece at a time.

On an H100, 73,728 rows of 768 channels and 32,000 logits take 15.8 ms, with a wide dW 17.1, and 20.1 in bf16.

Tolerance: that of kernels/fp8.py, of the numbers as they were cast; logits, dx and a wide g are rounded to the dtype of
x besides.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ablab.kernels import fp8
from ablab.kernels.fp8_cast import Scaled
from ablab.kernels.fp8_cross_entropy import (
    Objective,
    cast_gradient,
    fp8_gradient,
    gradient_of,
    sums_of,
    turned,
)
from ablab.kernels.linear_cross_entropy import (
    LOGITS,
    _backward,
    _chunks,
    _keep,
    _product,
    _sums,
    linear_cross_entropy,
)

SIDE = 16  # the matrix units take sides that are multiples of it


def flaw(vocab: int, width: int) -> str:
    """Which side the matrix units do not take, or that this machine's GPU has none, in words; "" where all is well."""
    for name, side in (("vocabulary", vocab), ("width", width)):
        if side % SIDE:
            return f"8-bit products need sides of multiples of {SIDE}, and the {name} is {side}"
    if torch.cuda.is_available() and not fp8.multiplies(torch.device("cuda")):
        return f"{torch.cuda.get_device_name()} has no matrix units for 8-bit floats"
    return ""


# ---- reference ----


class Result(NamedTuple):
    """nats and logsumexp of rows, fp32 [N]; dx [N,W] in the dtype of x; dW [V,W] in fp32."""

    nats: Tensor
    lses: Tensor
    dx: Tensor
    dw: Tensor


def reference(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    objective: Objective,
    gradient: str = "e5m2",
    weight_gradient: str = "fp8",
) -> Result:
    """The same in plain torch, all rows at once."""
    x8 = Scaled(*fp8.quantise(x, "e4m3"))
    w8 = Scaled(*fp8.quantise(weight, "e4m3"))
    logits = times(fp8.emulated, x8, w8, x.dtype)
    nats, lses = sums_of(logits, targets, objective)
    g = gradient_of(logits, targets, objective)
    unit = objective.unit(gradient, len(weight))
    g8 = Scaled(cast_gradient(g, unit, gradient), torch.full_like(x8.scale, unit))
    dx = times(fp8.emulated, g8, _transposed(w8), x.dtype)
    if weight_gradient == "wide":
        dw = g.to(x.dtype).float().t() @ x.float()
    else:
        dw = times(fp8.emulated, _transposed(g8), _transposed(x8), torch.float32)
    return Result(nats, lses, dx, dw)


def _transposed(matrix: Scaled) -> Scaled:
    return Scaled(matrix.numbers.t(), matrix.scale)


def times(
    product: fp8.Product, a: Scaled, b: Scaled, dtype: torch.dtype, fast: bool = False
) -> Tensor:
    """a [m,k], b [n,k] -> a b^T in dtype."""
    return product(a.numbers, b.numbers, a.scale, b.scale, dtype, fast)


# ---- pieces of rows ----


@dataclass(frozen=True)
class Readout:
    """W in both layouts, and how pieces of x meet it.

    gradient: the format of the logits' gradient; unit: what a 1 of it stands for.
    """

    weight: Scaled
    turned_weight: Scaled
    unit: Tensor
    objective: Objective
    gradient: str
    product: fp8.Product

    def logits(self, x8: Scaled, dtype: torch.dtype) -> Tensor:
        return times(self.product, x8, self.weight, dtype, fast=True)

    def dx(self, g8: Tensor, dtype: torch.dtype) -> Tensor:
        return times(self.product, Scaled(g8, self.unit), self.turned_weight, dtype)

    def dw(self, g8: Tensor, x8: Scaled) -> Tensor:
        g = Scaled(turned(g8), self.unit)
        return times(self.product, g, _turned(x8), torch.float32)


def _turned(matrix: Scaled) -> Scaled:
    return Scaled(turned(matrix.numbers), matrix.scale)


def _narrow(
    readout: Readout, x: Tensor, x8: Scaled, targets: Tensor, dw: Tensor | None
) -> Result:
    """A piece of rows.  dw: the sum over earlier ones, to which its own is added; None before the first."""
    logits = readout.logits(x8, x.dtype)
    g = fp8_gradient(logits, targets, readout.objective, readout.gradient)
    del logits  # whose memory the turned numbers take
    dx = readout.dx(g.numbers, x.dtype)
    more = readout.dw(g.numbers, x8)
    total = more if dw is None else dw.add_(more)
    return Result(g.nats, g.lses, dx, total)


def _wide(
    readout: Readout, x: Tensor, x8: Scaled, targets: Tensor, dw: Tensor | None
) -> Result:
    """The same with dW of the wide numbers."""
    logits = readout.logits(x8, x.dtype)
    g = fp8_gradient(logits, targets, readout.objective, readout.gradient, wide=True)
    dx = readout.dx(g.numbers, x.dtype)
    more = dw is not None
    if dw is None:
        dw = x.new_empty(logits.shape[1], x.shape[1], dtype=torch.float32)
    _product(logits.mT, x, dw, add=more)
    return Result(g.nats, g.lses, dx, dw)


TAKE = {"fp8": _narrow, "wide": _wide}


# ---- operator ----


@torch.library.custom_op("ablab::fp8_linear_cross_entropy", mutates_args=())
def _with_gradients(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    x8: Tensor,
    x_scale: Tensor,
    w8: Tensor,
    w_scale: Tensor,
    multiplier: float,
    cap: float,
    cap_form: str,
    z_weight: float,
    gradient: str,
    weight_gradient: str,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, nats, dx [N, W] in the dtype of x, dW [V, W] in fp32)."""
    count = len(x)
    short = -count % SIDE
    # Rows of zeros, which add nothing to dW.
    rows = F.pad(x, (0, 0, 0, short))
    targets = F.pad(targets, (0, short))
    x8 = F.pad(x8.view(torch.uint8), (0, 0, 0, short)).view(x8.dtype)
    objective = Objective(multiplier, cap, cap_form, z_weight)
    unit = objective.unit(gradient, len(weight))
    readout = Readout(
        weight=Scaled(w8, w_scale),
        turned_weight=_turned(Scaled(w8, w_scale)),
        unit=torch.full_like(x_scale, unit),
        objective=objective,
        gradient=gradient,
        product=fp8.product_of(rows, weight),
    )
    nats = x.new_empty(len(rows), dtype=torch.float32)
    lses = torch.empty_like(nats)
    dx = torch.empty_like(rows)
    dw = None
    for piece in _chunks(len(rows), chunk):
        cast = Scaled(x8[piece], x_scale)
        taken = TAKE[weight_gradient](readout, rows[piece], cast, targets[piece], dw)
        nats[piece] = taken.nats
        lses[piece] = taken.lses
        dx[piece] = taken.dx
        dw = taken.dw
    if dw is None:
        dw = weight.new_zeros(weight.shape, dtype=torch.float32)
    loss, reported = _sums(nats[:count], lses[:count], z_weight)
    return loss, reported, dx[:count], dw


@_with_gradients.register_fake
def _(x, weight, *rest):
    loss = x.new_empty((), dtype=torch.float32)
    dw = x.new_empty(weight.shape, dtype=torch.float32)
    return loss, torch.empty_like(loss), torch.empty_like(x), dw


_with_gradients.register_autograd(_backward, setup_context=_keep)


# ---- the function ----


def fp8_linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    multiplier: float = 1.0,
    cap: float = 0.0,
    cap_form: str = "none",
    z_weight: float = 0.0,
    gradient: str = "e5m2",
    weight_gradient: str = "fp8",
    chunk: int = 0,
) -> tuple[Tensor, Tensor]:
    """(loss, nats) as `linear_cross_entropy` gives them; where no gradient is wanted, its very numbers.

    weight: [V, W] in any dtype, its gradient in the same; V and W as `flaw` says.  gradient: the format of the logits'
    gradient, e5m2 (range) or e4m3 (precision).  weight_gradient: `fp8`, or `wide`: dW of x and g as they were, in the
    dtype of x.  chunk: rows of logits in memory at a time, rounded up to a multiple of SIDE; 0: as few equal chunks as
    fit into the memory of `linear_cross_entropy`.  Raises ValueError for a multiplier that is not positive.
    """
    if multiplier <= 0:
        raise ValueError(f"multiplier is {multiplier}; 8-bit gradients need one above 0")
    objective = Objective(float(multiplier), float(cap), cap_form, float(z_weight))
    if not torch.is_grad_enabled():
        return linear_cross_entropy(x, weight.to(x.dtype), targets, *objective)
    loss, nats, *_ = _with_gradients(
        x,
        weight,
        targets,
        *_cast(x.detach()),
        *_cast(weight.detach()),
        *objective,
        gradient,
        weight_gradient,
        _up(chunk) if chunk else _rows_within(x, weight),
    )
    return loss, nats


def _cast(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """In e4m3, in plain torch, which a compiler makes two passes; no numbers by a scale of 1."""
    if not matrix.numel():
        return matrix.to(fp8.DTYPES["e4m3"]), matrix.new_ones((), dtype=torch.float32)
    return fp8.quantise(matrix, "e4m3")


def _up(rows: int) -> int:
    """To whole SIDEs."""
    return -(-rows // SIDE) * SIDE


def _rows_within(x: Tensor, weight: Tensor) -> int:
    """Rows in as few equal chunks as fit.

    Logits, 8 bits of each, and x in 8 bits, in the place of LOGITS and of a dx in fp32.
    """
    rows = len(x)
    row_bytes = len(weight) * (x.element_size() + 1)
    saved = x.numel() * (4 - x.element_size() - 1)
    chunks = max(-(-rows * row_bytes // (LOGITS + saved)), 1)
    return max(_up(-(-rows // chunks)), SIDE)
