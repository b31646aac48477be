"""The forward half of kernels/attention.py: what a tile of queries or keys goes through, and two kernels.

`_prepare` writes the keys once, normed and turned (and the values mixed), so that `_forward` is left with the loop of
FlashAttention-2 (Dao, arXiv:2307.08691): its loads of K and V go straight to shared memory while products run, with no
arithmetic in between.  The backward pass needs the same, so they are kept.  Queries are needed once, so they are normed
and turned in `_forward` and never stored.

Offsets: a tensor's base moves by int64 (row of the batch, then token); inside a tile they are int32.  Heads lie D apart.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = 1.4426950408889634


@triton.jit
def at(base, b, token, stride_b, stride_t):
    """The address of one token of one row of the batch."""
    return base + tl.cast(b, tl.int64) * stride_b + tl.cast(token, tl.int64) * stride_t


@triton.jit
def load_tile(
    base, start, stride_t, T, ROWS: tl.constexpr, D: tl.constexpr, RAGGED: tl.constexpr = True
):
    """Tokens start.. of one head, [ROWS, D]; zeros from token T on.  base: the head's first token.  Not RAGGED: T is far."""
    rows = tl.arange(0, ROWS)
    address = (
        base
        + tl.cast(start, tl.int64) * stride_t
        + rows[:, None] * stride_t
        + tl.arange(0, D)[None, :]
    )
    if RAGGED:
        tile = tl.load(address, mask=(start + rows < T)[:, None], other=0.0)
    else:
        tile = tl.load(address)
    return tile


@triton.jit
def load_halves(base, start, stride_t, T, ROWS: tl.constexpr, HALF: tl.constexpr):
    """The same as two fp32 tiles [ROWS, D/2]: channels i and i + D/2 turn together."""
    a = load_tile(base, start, stride_t, T, ROWS, HALF)
    b = load_tile(base + HALF, start, stride_t, T, ROWS, HALF)
    return a.to(tl.float32), b.to(tl.float32)


@triton.jit
def inverse_rms(a, b, start, T, eps, ROWS: tl.constexpr, HALF: tl.constexpr):
    """1 / rms of each row, [ROWS]; 0 from token T on, where eps = 0 would give inf * 0."""
    square = (tl.sum(a * a, 1) + tl.sum(b * b, 1)) / (2 * HALF)
    return tl.where(start + tl.arange(0, ROWS) < T, tl.rsqrt(square + eps), 0.0)


@triton.jit
def turned_tile(
    base,
    gain,
    cos,
    sin,
    start,
    stride_t,
    T,
    scale,
    eps,
    NORM: tl.constexpr,
    ROWS: tl.constexpr,
    HALF: tl.constexpr,
):
    """Raw queries or keys -> normed, gained, turned to their positions, times scale; [ROWS, D] in their dtype."""
    a, b = load_halves(base, start, stride_t, T, ROWS, HALF)
    if NORM:
        channel = tl.arange(0, HALF)
        r = inverse_rms(a, b, start, T, eps, ROWS, HALF)
        a = a * r[:, None] * tl.load(gain + channel)[None, :]
        b = b * r[:, None] * tl.load(gain + HALF + channel)[None, :]
    c = load_tile(cos, start, HALF, T, ROWS, HALF)
    s = load_tile(sin, start, HALF, T, ROWS, HALF)
    # Rounded before they are joined: half as many bytes change threads.
    dtype = base.dtype.element_ty
    pair = tl.join(
        ((a * c - b * s) * scale).to(dtype), ((b * c + a * s) * scale).to(dtype)
    )  # [ROWS, D/2, 2]
    return tl.reshape(tl.permute(pair, (0, 2, 1)), (ROWS, 2 * HALF))


@triton.jit
def store_tile(base, tile, start, stride_t, T, ROWS: tl.constexpr, D: tl.constexpr):
    """Undo `load_tile`: cast and write, nothing from token T on."""
    rows = tl.arange(0, ROWS)
    address = (
        base
        + tl.cast(start, tl.int64) * stride_t
        + rows[:, None] * stride_t
        + tl.arange(0, D)[None, :]
    )
    tl.store(address, tile.to(base.dtype.element_ty), mask=(start + rows < T)[:, None])


@triton.jit
def _prepare(
    k,
    v,
    first,
    k_out,
    v_out,
    k_gain,
    weights,
    cos,
    sin,
    in_b,
    in_t,
    first_b,
    first_t,
    first_h,
    out_b,
    out_t,
    T,
    KV,
    eps,
    NORM: tl.constexpr,
    MIX: tl.constexpr,
    ROWS: tl.constexpr,
    D: tl.constexpr,
):
    """One block of tokens of one kv head: k -> normed and turned, v -> own v + first_weight first."""
    blocks = tl.cdiv(T, ROWS)
    start, b, h = (
        tl.program_id(0) % blocks * ROWS,
        tl.program_id(0) // blocks // KV,
        tl.program_id(0) // blocks % KV,
    )
    tile = turned_tile(
        at(k, b, 0, in_b, in_t) + h * D,
        k_gain,
        cos,
        sin,
        start,
        in_t,
        T,
        1.0,
        eps,
        NORM,
        ROWS,
        D // 2,
    )
    store_tile(at(k_out, b, 0, out_b, out_t) + h * D, tile, start, out_t, T, ROWS, D)
    if MIX:
        own = load_tile(at(v, b, 0, in_b, in_t) + h * D, start, in_t, T, ROWS, D).to(tl.float32)
        old = load_tile(
            at(first, b, 0, first_b, first_t) + h * first_h, start, first_t, T, ROWS, D
        ).to(tl.float32)
        mixed = tl.load(weights) * own + tl.load(weights + 1) * old
        store_tile(at(v_out, b, 0, out_b, out_t) + h * D, mixed, start, out_t, T, ROWS, D)


@triton.jit
def _sweep(
    y,
    total,
    top,
    q,
    k,
    v,
    first_row,
    low,
    high,
    k_t,
    v_t,
    T,
    DIAGONAL: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Keys low..high-1 against one block of queries: the running output, sum and maximum of each row."""
    rows, keys = first_row + tl.arange(0, M), tl.arange(0, N)
    for start in tl.range(low, high, N):
        score = tl.dot(
            q, tl.trans(load_tile(k, start, k_t, T, N, D, DIAGONAL)), input_precision=PRECISION
        )
        if DIAGONAL:  # also hides keys from T on: they come after every query
            score = tl.where(rows[:, None] >= start + keys[None, :], score, float("-inf"))
        higher = tl.maximum(
            top, tl.max(score, 1)
        )  # finite: every row sees key 0, which is in the first tile
        p = tl.exp2(score - higher[:, None])
        shrink = tl.exp2(top - higher)
        total = total * shrink + tl.sum(p, 1)
        values = load_tile(v, start, v_t, T, N, D, DIAGONAL)
        y = tl.dot(p.to(values.dtype), values, y * shrink[:, None], input_precision=PRECISION)
        top = higher
    return y, total, top


@triton.jit
def _forward(
    q,
    k,
    v,
    gate,
    q_gain,
    cos,
    sin,
    y,
    bits,
    q_b,
    q_t,
    k_b,
    k_t,
    v_b,
    v_t,
    gate_b,
    gate_t,
    gate_h,
    T,
    H,
    scale,
    eps,
    NORM: tl.constexpr,
    GATED: tl.constexpr,
    GROUP: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One block of M queries of one head -> y, and log2 of the sum of 2^score.  scale: of the scores, with log2(e) in it."""
    blocks = tl.cdiv(T, M)
    first_row = (blocks - 1 - tl.program_id(0) % blocks) * M  # the longest rows first
    b, h = tl.program_id(0) // blocks // H, tl.program_id(0) // blocks % H
    query = turned_tile(
        at(q, b, 0, q_b, q_t) + h * D,
        q_gain,
        cos,
        sin,
        first_row,
        q_t,
        T,
        scale,
        eps,
        NORM,
        M,
        D // 2,
    )
    k, v = at(k, b, 0, k_b, k_t) + h // GROUP * D, at(v, b, 0, v_b, v_t) + h // GROUP * D
    out = tl.zeros([M, D], tl.float32)
    total = tl.zeros([M], tl.float32)
    top = tl.full([M], float("-inf"), tl.float32)
    whole = first_row // N * N  # keys before it are seen by every row
    out, total, top = _sweep(
        out,
        total,
        top,
        query,
        k,
        v,
        first_row,
        0,
        whole,
        k_t,
        v_t,
        T,
        False,
        M,
        N,
        D,
        PRECISION,
    )
    last = tl.minimum(first_row + M, T)
    out, total, top = _sweep(
        out,
        total,
        top,
        query,
        k,
        v,
        first_row,
        whole,
        last,
        k_t,
        v_t,
        T,
        True,
        M,
        N,
        D,
        PRECISION,
    )
    out = out / total[:, None]
    rows = first_row + tl.arange(0, M)
    if GATED:
        strength = tl.load(
            at(gate, b, first_row, gate_b, gate_t) + h * gate_h + tl.arange(0, M) * gate_t,
            mask=rows < T,
            other=0.0,
        )
        out = out * strength.to(tl.float32)[:, None]
    store_tile(at(y, b, 0, T * H * D, H * D) + h * D, out, first_row, H * D, T, M, D)
    tl.store(at(bits, b, h, H * T, T) + rows, top + tl.log2(total), mask=rows < T)


def split(qkv: Tensor, heads: int, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Views of the packed rows: q [B,T,H,D], k and v [B,T,KV,D]."""
    return qkv.unflatten(-1, (heads + 2 * kv_heads, -1)).split(
        (heads, kv_heads, kv_heads), dim=2
    )


def strides(x: Tensor | None, count: int) -> tuple[int, ...]:
    return x.stride()[:count] if x is not None else (0,) * count


def precision(dtype: torch.dtype) -> str:
    return "ieee" if dtype == torch.float32 else "tf32"  # says nothing to 16-bit inputs


def launch(warps: int, stages: int, registers: int = 0) -> dict:
    """Triton's launch options.  registers: most a thread may have; 0: as many as the compiler likes."""
    return {"num_warps": warps, "num_stages": stages} | (
        {"maxnreg": registers} if registers else {}
    )


def forward(
    qkv, heads, kv_heads, cos, sin, q_gain, k_gain, eps, first, weights, gate, tiles
) -> tuple[Tensor, Tensor, Tensor]:
    """y [B,T,H*D]; log2 of the sum of 2^score, fp32 [B,H,T]; `ready`.  tiles: TILES of kernels/attention.py, flat."""
    q, k, v = split(qkv, heads, kv_heads)
    (b, t, _, d), mix = q.shape, first is not None
    y, bits = qkv.new_empty(b, t, heads * d), qkv.new_empty(b, heads, t, dtype=torch.float32)
    made = qkv.new_empty(ready_shape(qkv, heads, kv_heads, first))
    keys, values = made[:, :, :kv_heads], made[:, :, kv_heads:] if mix else v
    norm, (rows, warps, depth), (m, n, *how) = q_gain is not None, tiles[:3], tiles[3:8]
    _prepare[(triton.cdiv(t, rows) * b * kv_heads,)](
        k,
        v,
        first,
        keys,
        values,
        k_gain,
        weights,
        cos,
        sin,
        *strides(k, 2),
        *strides(first, 3),
        *strides(keys, 2),
        t,
        kv_heads,
        eps,
        NORM=norm,
        MIX=mix,
        ROWS=rows,
        D=d,
        **launch(warps, depth),
    )
    _forward[(triton.cdiv(t, m) * b * heads,)](
        q,
        keys,
        values,
        gate,
        q_gain,
        cos,
        sin,
        y,
        bits,
        *strides(q, 2),
        *strides(keys, 2),
        *strides(values, 2),
        *strides(gate, 3),
        t,
        heads,
        d**-0.5 * LOG2E,
        eps,
        NORM=norm,
        GATED=gate is not None,
        GROUP=heads // kv_heads,
        M=m,
        N=n,
        D=d,
        PRECISION=precision(qkv.dtype),
        **launch(*how),
    )
    return y, bits, made


def ready_shape(
    qkv: Tensor, heads: int, kv_heads: int, first: Tensor | None
) -> tuple[int, ...]:
    """Of turned keys and, when mixing, mixed values: [B,T,KV or 2 KV,D]."""
    b, t, width = qkv.shape
    return b, t, kv_heads * (1 + (first is not None)), width // (heads + 2 * kv_heads)
