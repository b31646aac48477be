"""Cross-entropy, logsumexp and their gradient from one pass over the logits, which the gradient overwrites.

    x = multiplier * raw                    z = x | cap tanh(x / cap) | cap x / sqrt(x^2 + cap^2)
    lse = log sum_j exp z_j                 nats = lse - z_target
    loss = nats + z_weight lse^2
    dloss/draw_j = (exp(z_j - lse) (1 + 2 z_weight lse) - [j = target]) dz_j/draw_j

A program owns a row, so nothing is added across programs and the bits repeat.  It reads the row once and holds it as it
came, two 16-bit logits a register, so that two rows fit into a multiprocessor's registers; they are widened anew for
the largest, for the sum and for the gradient.  On an H100, 8,192 rows of 32,000 take 0.357 ms so, and 4,096 of 49,152
0.282 (held in fp32, of which one row fits, 0.354); one read and one write at the rate of a copy take 98 % of that
(`ablab bench kernels --only cross_entropy`).

Rows of fp32, longer ones, and those with a cap, whose arithmetic needs the registers, are read twice, block by block;
the second read comes from a cache as far as that holds the row: 0.37 to 0.39 and 0.29 to 0.34 ms for the above.

The target's own number is written last, by itself, so that no other is compared with it.

Tolerance: sums in fp32.  An exponential below 2^-126 is 0.
"""

from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton import language as tl

CAPS = ("none", "tanh", "rational")
LOG2E = tl.constexpr(1.4426950408889634)
# Below every logit, and finite: where none was seen yet, -inf - -inf would be NaN.
LOWEST = tl.constexpr(-3.0e38)
# Adjoining logits a thread takes.  Left to itself, Triton stores 8-bit numbers 16 a thread, through shared memory.
WORD = tl.constexpr(8)
WARP = 32 * WORD.value  # the same of a warp
# Logits of a row that is held: 104 registers of 128 in each of 256 threads.
LONGEST = 53_248


# ---- reference ----


def squash(x: Tensor, cap: float, cap_form: str) -> Tensor:
    """The soft cap: x [...] -> values in (-cap, cap), or x itself for "none"."""
    match cap_form:
        case "tanh":
            return cap * (x / cap).tanh()
        case "rational":
            return cap * x * (x.square() + cap * cap).rsqrt()
    return x


# ---- pieces of kernels ----


@triton.jit
def _exp(x):
    """Of three instructions fewer than tl.exp, which keeps results below 2^-126."""
    return tl.exp2(x * LOG2E)


@triton.jit
def _squash(x, cap, FORM: tl.constexpr):
    """tanh by exp(-2|x|/cap), which cannot overflow."""
    z = x
    if FORM == "tanh":
        decay = _exp(-2.0 / cap * tl.abs(x))
        size = cap * (1.0 - decay) / (1.0 + decay)
        z = tl.where(x < 0.0, -size, size)
    elif FORM == "rational":
        z = cap * x * tl.rsqrt(x * x + cap * cap)
    return z


@triton.jit
def _through_cap(gradient, z, cap, FORM: tl.constexpr):
    """gradient dz/dx, which comes from z alone, so that no more than z is kept: with u = 1 - (z / cap)^2, it is u for
    tanh and u^1.5 for the rational form."""
    if FORM == "tanh":
        share = z * (1.0 / cap)
        gradient *= 1.0 - share * share
    elif FORM == "rational":
        share = z * (1.0 / cap)
        rest = tl.maximum(1.0 - share * share, 0.0)
        gradient *= rest * tl.sqrt(rest)
    return gradient


@triton.jit
def _x(raw, columns, vocab, multiplier, END: tl.constexpr):
    """In fp32.  END: some columns may be beyond the vocabulary, and are -inf."""
    x = multiplier * raw.to(tl.float32)
    if END:
        x = tl.where(columns < vocab, x, float("-inf"))
    return x


@triton.jit
def _z(raw, columns, vocab, multiplier, cap, FORM: tl.constexpr):
    """In fp32; -inf beyond the vocabulary."""
    z = _squash(multiplier * raw.to(tl.float32), cap, FORM)
    return tl.where(columns < vocab, z, float("-inf"))


@triton.jit
def _store(place, columns, value, width, END: tl.constexpr):
    narrow = value.to(place.dtype.element_ty)
    if END:
        tl.store(place + columns, narrow, mask=columns < width)
    else:
        tl.store(place + columns, narrow)


@triton.jit
def _again(held, zero, PACKED: tl.constexpr):
    """What is held, unknown to the compiler: else it keeps what was widened before, in twice the registers."""
    again = tl.tuple(())
    for i in tl.static_range(len(held)):
        raw = held[i]
        if PACKED:
            zeros = tl.full(raw.shape, 0, tl.int16) + zero.to(tl.int16)
            raw = tl.inline_asm_elementwise(
                "xor.b32 $0, $1, $2;",
                "=r,r,r",
                [raw, zeros],
                dtype=raw.dtype,
                is_pure=False,
                pack=2,
            )
        again += (raw,)
    return again


# ---- a row held in registers ----


@triton.jit
def _hold(
    logits,
    targets,
    nats,
    lses,
    eight,
    vocab,
    width,
    stride,
    multiplier,
    z_weight,
    scale,
    eight_scale,
    zero,
    GRADIENT: tl.constexpr,
    EIGHT: tl.constexpr,
    PACKED: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Without a cap.  A row is BLOCKS long, the last of which may go beyond it.  PACKED: 16-bit logits, on a GPU."""
    index = tl.program_id(0).to(tl.int64)
    row = logits + index * stride
    numbers = eight + index * vocab if EIGHT else row
    target = tl.load(targets + index)
    within = tl.max_contiguous(tl.arange(0, BLOCK), [WORD])
    LAST: tl.constexpr = BLOCKS - 1
    held = tl.tuple(())
    for i in tl.static_range(LAST):
        held += (tl.load(row + i * BLOCK + within),)
    last = LAST * BLOCK + within
    held += (tl.load(row + last, mask=last < width, other=0.0),)
    z_target = multiplier * tl.load(row + target).to(tl.float32)
    tops = tl.full((BLOCK,), LOWEST, tl.float32)
    for i in tl.static_range(BLOCKS):
        z = _x(held[i], i * BLOCK + within, vocab, multiplier, i == LAST)
        tops = tl.maximum(tops, z)
    top = tl.max(tops, axis=0)
    held = _again(held, zero, PACKED)
    sums = tl.zeros((BLOCK,), tl.float32)
    for i in tl.static_range(BLOCKS):
        z = _x(held[i], i * BLOCK + within, vocab, multiplier, i == LAST)
        sums += _exp(z - top)
    lse = top + tl.log(tl.sum(sums, axis=0))
    tl.store(nats + index, lse - z_target)
    tl.store(lses + index, lse)
    if GRADIENT or EIGHT:
        stretch = 1.0 + 2.0 * z_weight * lse
        held = _again(held, zero, PACKED)
        for i in tl.static_range(BLOCKS):
            columns = i * BLOCK + within
            z = _x(held[i], columns, vocab, multiplier, i == LAST)
            pull = _exp(z - lse)
            if GRADIENT:
                _store(row, columns, scale * stretch * pull, width, i == LAST)
            if EIGHT:
                _store(numbers, columns, eight_scale * stretch * pull, vocab, i == LAST)
        pull = _exp(z_target - lse) * stretch - 1.0
        tl.debug_barrier()  # after the thread that took the target for a column like others
        if GRADIENT:
            _store(row, target, scale * pull, width, False)
        if EIGHT:
            _store(numbers, target, eight_scale * pull, vocab, False)


# ---- a row read twice ----


@triton.jit
def _read_twice(
    logits,
    targets,
    nats,
    lses,
    eight,
    vocab,
    width,
    stride,
    multiplier,
    cap,
    z_weight,
    scale,
    eight_scale,
    FORM: tl.constexpr,
    GRADIENT: tl.constexpr,
    EIGHT: tl.constexpr,
    LINES: tl.constexpr,
    LANES: tl.constexpr,
):
    """In blocks of LINES x LANES, summed lane by lane, so that no thread waits for another before the end.

    Caches keep what is read for the first time, not what is written (".cs"): 9 % of the time at 131,072 logits.
    """
    index = tl.program_id(0).to(tl.int64)
    row = logits + index * stride
    numbers = eight + index * vocab if EIGHT else row
    target = tl.load(targets + index)
    z_target = _squash(multiplier * tl.load(row + target).to(tl.float32), cap, FORM)
    lines = LANES * tl.arange(0, LINES)[:, None]
    within = tl.max_contiguous(lines + tl.arange(0, LANES)[None, :], [1, WORD])
    tops = tl.full((LANES,), LOWEST, tl.float32)
    sums = tl.zeros((LANES,), tl.float32)
    for start in range(0, vocab, LINES * LANES):
        columns = start + within
        there = columns < width
        raw = tl.load(row + columns, mask=there, other=0.0, eviction_policy="evict_last")
        z = _z(raw, columns, vocab, multiplier, cap, FORM)
        higher = tl.maximum(tops, tl.max(z, axis=0))
        more = tl.sum(_exp(z - higher[None, :]), axis=0)
        sums = sums * _exp(tops - higher) + more
        tops = higher
    top = tl.max(tops, axis=0)
    lse = top + tl.log(tl.sum(sums * _exp(tops - top), axis=0))
    tl.store(nats + index, lse - z_target)
    tl.store(lses + index, lse)
    if GRADIENT or EIGHT:
        stretch = 1.0 + 2.0 * z_weight * lse
        for start in range(0, vocab, LINES * LANES):
            columns = start + within
            there = columns < width
            raw = tl.load(row + columns, mask=there, other=0.0, eviction_policy="evict_first")
            z = _z(raw, columns, vocab, multiplier, cap, FORM)
            pull = _through_cap(_exp(z - lse), z, cap, FORM)
            if GRADIENT:
                wide = (scale * stretch * pull).to(row.dtype.element_ty)
                tl.store(row + columns, wide, mask=there, cache_modifier=".cs")
            if EIGHT:
                narrow = (eight_scale * stretch * pull).to(eight.dtype.element_ty)
                tl.store(numbers + columns, narrow, mask=columns < vocab, cache_modifier=".cs")
        pull = _through_cap(_exp(z_target - lse) * stretch - 1.0, z_target, cap, FORM)
        tl.debug_barrier()  # after the thread that took the target for a column like others
        if GRADIENT:
            _store(row, target, scale * pull, width, False)
        if EIGHT:
            _store(numbers, target, eight_scale * pull, vocab, False)


# ---- launch ----


class Reading(NamedTuple):
    """How a program reads its row.

    held: in registers, or twice.  block: logits at a time, a power of two.  warps: 32 threads each.
    """

    held: bool
    block: int
    warps: int


def reading_of(logits: Tensor, cap_form: str) -> Reading:
    """As measured fastest for logits [N,V]."""
    vocab = logits.shape[1]
    whole = max(triton.next_power_of_2(vocab), 128)
    if cap_form != "none" or logits.element_size() != 2 or vocab > LONGEST:
        most = 16 if cap_form == "none" else 8
        return Reading(False, min(8192, whole), min(max(whole // 1024, 4), most))
    most = 16 if 8192 < vocab <= 32_768 else 8
    warps = min(max(whole // WARP, 1), most)
    return Reading(True, min(WARP * warps, whole), warps)


def cross_entropy_(
    logits: Tensor,
    targets: Tensor,
    multiplier: float = 1.0,
    cap: float = 0.0,
    cap_form: str = "none",
    z_weight: float = 0.0,
    scale: float = 1.0,
    gradient: bool = True,
    padded: bool = False,
    eight: Tensor | None = None,
    eight_factor: float = 1.0,
    reading: Reading | None = None,
) -> tuple[Tensor, Tensor]:
    """Per-row cross-entropy and logsumexp of squash(multiplier * logits), fp32 [N] each, in nats.

    logits: [N, V] with adjacent columns; if `gradient`, overwritten by scale * d(nats + z_weight lse^2)/d(logits)
    in their dtype, else left alone.  targets: int64 [N] in [0, V), unchecked.  padded: the columns from V to the
    row stride are there and may be overwritten; with a mask at an odd V, every logit is read and written on its
    own, 2 bytes at a time.  eight: contiguous [N, V] of 8-bit floats, which get eight_factor times the gradient.
    reading: None: by shape and dtype; one that holds rows takes no cap.
    """
    rows, vocab = logits.shape
    nats = torch.empty(rows, dtype=torch.float32, device=logits.device)
    lses = torch.empty_like(nats)
    if not rows:
        return nats, lses
    reading = reading or reading_of(logits, cap_form)
    width = logits.stride(0) if padded else vocab
    tensors = (logits, targets.contiguous(), nats, lses, eight)
    shape = (vocab, width, logits.stride(0))
    scales = (z_weight, multiplier * scale, multiplier * scale * eight_factor)
    how = {"GRADIENT": gradient, "EIGHT": eight is not None, "num_warps": reading.warps}
    if reading.held:
        # Triton's interpreter runs no assembly.
        packed = isinstance(_hold, triton.JITFunction) and logits.element_size() == 2
        _hold[(rows,)](
            *tensors,
            *shape,
            multiplier,
            *scales,
            0,
            **how,
            PACKED=packed,
            BLOCK=reading.block,
            BLOCKS=triton.cdiv(vocab, reading.block),
            # Two programs to the 65,536 registers of a multiprocessor; a thread has 255 at most.
            maxnreg=min(1024 // reading.warps, 255),
        )
    else:
        lanes = min(WARP * reading.warps, reading.block)
        _read_twice[(rows,)](
            *tensors,
            *shape,
            multiplier,
            cap,
            *scales,
            **how,
            FORM=cap_form,
            LINES=reading.block // lanes,
            LANES=lanes,
        )
    return nats, lses
