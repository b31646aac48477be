"""Readout and cross-entropy as one differentiable operation that never holds logits and their gradient side by side.

    logits = x W^T          loss = sum_rows nats + z_weight lse^2, of squash(multiplier * logits)
    dx = g W                dW = g^T x                              with g = dloss/dlogits, written over the logits

Some rows at a time, so that at most LOGITS of them exist, and dx and dW are ready after the forward pass; the backward
pass multiplies them by the gradient that comes from above, where a compiler can fuse that with what follows.
The rows of logits are padded to whole 128-byte lines, so that a vocabulary such as 50,257 is read in wide words.

Tolerance: as the plain path, this rounds logits, g and the two results once each to the dtype of x, and nothing
else; so errors must be no more than 1.1 times those of the plain path.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from ablab.kernels.cross_entropy import CAPS, cross_entropy_, squash

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Bytes of logits in memory; halving it adds one read and write of dW for each further chunk.
LOGITS = 1 << 29


def serves(
    dtype: torch.dtype, device: torch.device, cap: float = 0.0, cap_form: str = "none"
) -> str:
    """Why `linear_cross_entropy` cannot be used, in a line; "" when it can."""
    if dtype not in DTYPES:
        return f"activations are {dtype}; the kernel reads bf16, fp16 and fp32"
    if device.type != "cuda":
        return f"the kernel needs a CUDA GPU, not {device.type}"
    if cap_form not in CAPS:
        return f"no soft cap {cap_form!r}; the kernel knows {', '.join(CAPS)}"
    if cap_form != "none" and cap <= 0:
        return f"a {cap_form} soft cap needs cap > 0, not {cap}"
    return ""


# ---- reference ----


def reference(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    multiplier: float = 1.0,
    cap: float = 0.0,
    cap_form: str = "none",
    z_weight: float = 0.0,
    chunk: int = 0,
) -> tuple[Tensor, Tensor]:
    """The same in plain torch; `chunk` is ignored.

    Logits [N, V] are in the dtype of x, all after them in fp32 (fp64 for fp64).
    """
    logits = F.linear(x, weight)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    z = squash(multiplier * wide, cap, cap_form)
    nats = F.cross_entropy(z, targets, reduction="sum")
    penalty = z_weight * z.logsumexp(-1).square().sum()
    return nats + penalty, nats.detach()


# ---- pieces ----


def _padded(rows: int, vocab: int, like: Tensor) -> Tensor:
    """An unset [rows, vocab] whose rows start on 128-byte lines."""
    line = 128 // like.element_size()
    return like.new_empty(rows, -(-vocab // line) * line)[:, :vocab]


def _sums(nats: Tensor, lses: Tensor, z_weight: float) -> tuple[Tensor, Tensor]:
    return (nats + z_weight * lses.square()).sum(), nats.sum()


def _chunks(rows: int, chunk: int) -> list[slice]:
    return [slice(start, min(start + chunk, rows)) for start in range(0, rows, chunk)]


def _product(a: Tensor, b: Tensor, out: Tensor, add: bool) -> None:
    """out = a b, or out + a b, in fp32 whatever the dtype of a and b."""
    if a.is_cuda and a.dtype != torch.float32:
        torch.addmm(out, a, b, beta=int(add), out_dtype=torch.float32, out=out)
    else:
        # The CPU has no product wider than its factors.
        out.addmm_(a.float(), b.float(), beta=int(add))


# ---- operators ----


@torch.library.custom_op("ablab::linear_cross_entropy_value", mutates_args=())
def _value(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    multiplier: float,
    cap: float,
    cap_form: str,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    """(nats, logsumexp) of each row, fp32 [N], without any gradient."""
    rows = x.shape[0]
    buffer = _padded(min(chunk, rows), weight.shape[0], x)
    nats = x.new_empty(rows, dtype=torch.float32)
    lses = torch.empty_like(nats)
    for piece in _chunks(rows, chunk):
        logits = torch.mm(x[piece], weight.mT, out=buffer[: x[piece].shape[0]])
        nats[piece], lses[piece] = cross_entropy_(
            logits, targets[piece], multiplier, cap, cap_form, gradient=False, padded=True
        )
    return nats, lses


@_value.register_fake
def _(x, weight, targets, multiplier, cap, cap_form, chunk):
    nats = x.new_empty(x.shape[0], dtype=torch.float32)
    return nats, torch.empty_like(nats)


@torch.library.custom_op("ablab::linear_cross_entropy", mutates_args=())
def _with_gradients(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    multiplier: float,
    cap: float,
    cap_form: str,
    z_weight: float,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(loss, nats, dx [N, W], dW [V, W]), all fp32."""
    rows = x.shape[0]
    buffer = _padded(min(chunk, rows), weight.shape[0], x)
    nats, lses = x.new_empty(2, rows, dtype=torch.float32)
    dx = x.new_empty(x.shape, dtype=torch.float32)
    dw = (x.new_empty if rows else x.new_zeros)(weight.shape, dtype=torch.float32)
    for piece in _chunks(rows, chunk):
        logits = torch.mm(x[piece], weight.mT, out=buffer[: x[piece].shape[0]])
        nats[piece], lses[piece] = cross_entropy_(
            logits, targets[piece], multiplier, cap, cap_form, z_weight, padded=True
        )
        _product(logits, weight, dx[piece], add=False)
        _product(logits.mT, x[piece], dw, add=piece.start > 0)
    return *_sums(nats, lses, z_weight), dx, dw


@_with_gradients.register_fake
def _(x, weight, targets, multiplier, cap, cap_form, z_weight, chunk):
    loss = x.new_empty((), dtype=torch.float32)
    nats = torch.empty_like(loss)
    dx = x.new_empty(x.shape, dtype=torch.float32)
    dw = x.new_empty(weight.shape, dtype=torch.float32)
    return loss, nats, dx, dw


def _keep(ctx, inputs, output):
    """Of (x, weight, ...) and (loss, nats, dx, dW)."""
    ctx.dtypes = [one.dtype for one in inputs[:2]]
    ctx.others = [None] * (len(inputs) - 2)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[2:])


def _backward(ctx, upstream, *_):
    given = zip(ctx.saved_tensors, ctx.dtypes, ctx.needs_input_grad, strict=False)
    scaled = [
        (gradient * upstream).to(dtype) if needed else None for gradient, dtype, needed in given
    ]
    return *scaled, *ctx.others


_with_gradients.register_autograd(_backward, setup_context=_keep)


# ---- the function ----


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    multiplier: float = 1.0,
    cap: float = 0.0,
    cap_form: str = "none",
    z_weight: float = 0.0,
    chunk: int = 0,
) -> tuple[Tensor, Tensor]:
    """(loss, nats): sums over rows, fp32 0-D, in nats.

    Of cross-entropy + z_weight * logsumexp^2, and of cross-entropy alone.
    x: activations [N, W]; weight: [V, W] of the same dtype; targets: int64 [N] in [0, V), unchecked.  Logits are
    multiplied by `multiplier`, then capped: cap_form "none", "tanh" or "rational" (`squash`).  nats has no
    gradient. chunk: rows of logits in memory at a time; 0: as few equal chunks as LOGITS allows.
    """
    rows = chunk or _rows_within(x, weight)
    if not torch.is_grad_enabled() or not (x.requires_grad or weight.requires_grad):
        nats, lses = _value(x, weight, targets, float(multiplier), float(cap), cap_form, rows)
        return _sums(nats, lses, z_weight)
    loss, nats, *_ = _with_gradients(
        x, weight, targets, float(multiplier), float(cap), cap_form, float(z_weight), rows
    )
    return loss, nats


def token_losses(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    multiplier: float = 1.0,
    cap: float = 0.0,
    cap_form: str = "none",
) -> Tensor:
    """Cross-entropy of each row in nats, fp32 [N], without any gradient; arguments as above."""
    rows = _rows_within(x, weight)
    nats, _ = _value(x, weight, targets, float(multiplier), float(cap), cap_form, rows)
    return nats


def _rows_within(x: Tensor, weight: Tensor) -> int:
    """Rows of logits in as few equal chunks as LOGITS allows."""
    rows = x.shape[0]
    if not rows:
        return 1
    row_bytes = weight.shape[0] * x.element_size()
    chunks = -(-rows * row_bytes // LOGITS)
    return max(-(-rows // chunks), 1)
