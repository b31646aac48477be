"""The forward half of kernels/attention.py: what a tile of queries or keys goes through, and two kernels.

`_prepare` writes the keys once, normed and turned (and the values mixed), so that `_forward` is left with the loop of
FlashAttention-2 (Dao, arXiv:2307.08691): its loads of K and V go straight to shared memory while products run, with no
arithmetic in between.  The backward pass needs the same, so they are kept.  Queries are needed once, so they are normed
and turned in `_forward` and never stored.

Tried at 96 rows of 384 tokens, 12 heads of 64, on an H100, where the two kernels take 0.233 ms: one program for a whole
head, its keys made inside, 0.24 (kept in shared memory) or 0.29 (read back); both kernels in one launch, where programs
wait on a counter for the keys of their head, made 8 to 128 heads ahead and still in the cache, 0.225 to 0.242 (0.387
to 0.414 for 0.392 at 16 rows of 2048 tokens), and 0.229 to 0.240 for 0.235 where all else may leave the cache first
(0.398 to 0.402 for 0.388 to 0.398 at 32 rows of 1152 tokens, 18 heads on 6).  That is 2 %, and not worth a wait.

Offsets: a tensor's base moves by int64 (row of the batch, then token); inside a tile they are int32.  Heads lie D
apart.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

LOG2E = 1.4426950408889634
KERNELS = ("prepare", "forward", "queries", "keys")


class Tile(NamedTuple):
    """How a kernel is cut and launched; numbers of rows are powers of two >= 16."""

    rows: int  # its own: tokens, queries or keys
    met: int  # keys or queries that those meet at a time; 0: none
    warps: int
    stages: int  # of the pipeline of loads
    registers: int = 0  # most a thread may have; 0: as many as the compiler likes
    described: bool = (
        False  # what is met is copied by tensor descriptors, where `matrix` finds that they can
    )

    def options(self) -> dict[str, int]:
        """Triton's launch options."""
        limit = {"maxnreg": self.registers} if self.registers else {}
        return {"num_warps": self.warps, "num_stages": self.stages} | limit


class Inputs(NamedTuple):
    """The arguments of `attention`; tiles: those of KERNELS in a row, number by number."""

    qkv: Tensor
    heads: int
    kv_heads: int
    cos: Tensor
    sin: Tensor
    q_gain: Tensor | None
    k_gain: Tensor | None
    eps: float
    first: Tensor | None
    weights: Tensor | None
    gate: Tensor | None
    tiles: list[int]

    @property
    def head_dim(self) -> int:
        return self.qkv.shape[-1] // (self.heads + 2 * self.kv_heads)

    def tile(self, kernel: str) -> Tile:
        fields = len(Tile._fields)
        place = KERNELS.index(kernel) * fields
        return Tile._make(self.tiles[place : place + fields])

    def split(self, packed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Views of rows packed as qkv is: q [B,T,H,D], k and v [B,T,KV,D]."""
        return split(packed, self.heads, self.kv_heads)

    def ready_shape(self) -> tuple[int, ...]:
        """Of turned keys and, when mixing, mixed values: [B,T,KV or 2 KV,D]."""
        b, t, _ = self.qkv.shape
        heads = self.kv_heads if self.first is None else 2 * self.kv_heads
        return b, t, heads, self.head_dim

    def met(self, ready: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values as they are multiplied, [B,T,KV,D] each."""
        _, _, values = self.split(self.qkv)
        if self.first is not None:
            values = ready[:, :, self.kv_heads :]
        return ready[:, :, : self.kv_heads], values

    def constants(self) -> dict[str, int | bool | str]:
        """What every kernel but `_prepare` is compiled for."""
        return {
            "NORM": self.q_gain is not None,
            "GATED": self.gate is not None,
            "GROUP": self.heads // self.kv_heads,
            "D": self.head_dim,
            "PRECISION": precision(self.qkv.dtype),
        }


@triton.jit
def at(base, b, token, stride_b, stride_t):
    """The address of one token of one row of the batch."""
    return base + tl.cast(b, tl.int64) * stride_b + tl.cast(token, tl.int64) * stride_t


@triton.jit
def head_of(base, b, h, stride_b, D: tl.constexpr):
    """The first token of head h of row b: heads lie D apart in a token."""
    return base + tl.cast(b, tl.int64) * stride_b + h * D


@triton.jit
def vector_of(base, b, h, H, T):
    """The numbers of head h of row b in [B,H,T]."""
    return base + (tl.cast(b, tl.int64) * H + h) * T


@triton.jit
def load_tile(
    base, start, stride_t, T, ROWS: tl.constexpr, D: tl.constexpr, RAGGED: tl.constexpr = True
):
    """Tokens start.. of one head, [ROWS, D]; zeros from token T on.  base: the head's first token.

    Not RAGGED: all of them come before T.
    """
    rows = tl.arange(0, ROWS)
    address = (
        base
        + tl.cast(start, tl.int64) * stride_t
        + rows[:, None] * stride_t
        + tl.arange(0, D)[None, :]
    )
    if RAGGED:
        seen = start + rows < T
        tile = tl.load(address, mask=seen[:, None], other=0.0)
    else:
        tile = tl.load(address)
    return tile


@triton.jit
def load_met(
    base,
    row,
    column,
    start,
    stride_t,
    T,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    RAGGED: tl.constexpr,
    DESCRIBED: tl.constexpr,
):
    """As `load_tile`; DESCRIBED: base is a descriptor of a matrix, the head's first token at [row, column]."""
    if DESCRIBED:
        tile = base.load([row + start, column])
    else:
        tile = load_tile(base, start, stride_t, T, ROWS, D, RAGGED)
    return tile


@triton.jit
def load_halves(
    base, start, stride_t, T, ROWS: tl.constexpr, HALF: tl.constexpr, RAGGED: tl.constexpr
):
    """As `load_tile`, but two fp32 tiles [ROWS, D/2]: channels i and i + D/2 turn together."""
    a = load_tile(base, start, stride_t, T, ROWS, HALF, RAGGED)
    b = load_tile(base + HALF, start, stride_t, T, ROWS, HALF, RAGGED)
    return a.to(tl.float32), b.to(tl.float32)


@triton.jit
def inverse_rms(a, b, start, T, eps, ROWS: tl.constexpr, HALF: tl.constexpr):
    """1 / rms of each row, [ROWS]; 0 from token T on, where eps = 0 would give inf * 0."""
    squares = tl.sum(a * a + b * b, 1)
    r = tl.rsqrt(squares / (2 * HALF) + eps)
    return tl.where(start + tl.arange(0, ROWS) < T, r, 0.0)


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
    RAGGED: tl.constexpr = True,
):
    """Raw queries or keys -> normed, gained, turned to their positions, times scale; [ROWS, D] in their dtype."""
    a, b = load_halves(base, start, stride_t, T, ROWS, HALF, RAGGED)
    if NORM:
        channel = tl.arange(0, HALF)
        r = inverse_rms(a, b, start, T, eps, ROWS, HALF)
        a_gain = tl.load(gain + channel)
        b_gain = tl.load(gain + HALF + channel)
        a = a * r[:, None] * a_gain[None, :]
        b = b * r[:, None] * b_gain[None, :]
    c = load_tile(cos, start, HALF, T, ROWS, HALF, RAGGED)
    s = load_tile(sin, start, HALF, T, ROWS, HALF, RAGGED)
    # Rounded before they are joined: half as many bytes change threads.
    low = ((a * c - b * s) * scale).to(base.dtype.element_ty)
    high = ((b * c + a * s) * scale).to(base.dtype.element_ty)
    pair = tl.join(low, high)  # [ROWS, D/2, 2]
    pair = tl.permute(pair, (0, 2, 1))
    return tl.reshape(pair, (ROWS, 2 * HALF))


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
    seen = start + rows < T
    tl.store(address, tile.to(base.dtype.element_ty), mask=seen[:, None])


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
    start = tl.program_id(0) % blocks * ROWS
    b = tl.program_id(0) // blocks // KV
    h = tl.program_id(0) // blocks % KV
    tile = turned_tile(
        head_of(k, b, h, in_b, D),
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
    k_out = head_of(k_out, b, h, out_b, D)
    store_tile(k_out, tile, start, out_t, T, ROWS, D)
    if MIX:
        first = at(first, b, 0, first_b, first_t) + h * first_h
        own = load_tile(head_of(v, b, h, in_b, D), start, in_t, T, ROWS, D)
        old = load_tile(first, start, first_t, T, ROWS, D)
        own_part = tl.load(weights) * own.to(tl.float32)
        old_part = tl.load(weights + 1) * old.to(tl.float32)
        v_out = head_of(v_out, b, h, out_b, D)
        store_tile(v_out, own_part + old_part, start, out_t, T, ROWS, D)


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
    row,
    column,
    k_t,
    v_t,
    T,
    DIAGONAL: tl.constexpr,
    DESCRIBED: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Keys low..high-1 against one block of queries: the running output, sum and maximum of each row."""
    rows = first_row + tl.arange(0, M)
    for start in tl.range(low, high, N):
        key = load_met(k, row, column, start, k_t, T, N, D, DIAGONAL, DESCRIBED)
        score = tl.dot(q, tl.trans(key), input_precision=PRECISION)
        if DIAGONAL:  # also hides keys from T on: they come after every query
            keys = start + tl.arange(0, N)
            seen = rows[:, None] >= keys[None, :]
            score = tl.where(seen, score, float("-inf"))
        # Finite: every row sees key 0, which is in the first tile.
        higher = tl.maximum(top, tl.max(score, 1))
        p = tl.exp2(score - higher[:, None])
        shrink = tl.exp2(top - higher)
        total = total * shrink + tl.sum(p, 1)
        values = load_met(v, row, column, start, v_t, T, N, D, DIAGONAL, DESCRIBED)
        p = p.to(values.dtype)
        y = tl.dot(p, values, y * shrink[:, None], input_precision=PRECISION)
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
    DESCRIBED: tl.constexpr,
    GROUP: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One block of M queries of one head -> y, and log2 of the sum of 2^score.

    scale: of the scores, with log2(e) in it.  DESCRIBED: k and v are descriptors.
    """
    blocks = tl.cdiv(T, M)
    first_row = (blocks - 1 - tl.program_id(0) % blocks) * M  # the longest rows first
    b = tl.program_id(0) // blocks // H
    h = tl.program_id(0) // blocks % H
    query = turned_tile(
        head_of(q, b, h, q_b, D),
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
    column = h // GROUP * D
    if not DESCRIBED:
        k = head_of(k, b, h // GROUP, k_b, D)
        v = head_of(v, b, h // GROUP, v_b, D)
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
        b * T,
        column,
        k_t,
        v_t,
        T,
        False,
        DESCRIBED,
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
        b * T,
        column,
        k_t,
        v_t,
        T,
        True,
        DESCRIBED,
        M,
        N,
        D,
        PRECISION,
    )
    out = out / total[:, None]
    rows = first_row + tl.arange(0, M)
    if GATED:
        gate = at(gate, b, first_row, gate_b, gate_t) + h * gate_h
        strength = tl.load(gate + tl.arange(0, M) * gate_t, mask=rows < T, other=0.0)
        out = out * strength.to(tl.float32)[:, None]
    store_tile(head_of(y, b, h, T * H * D, D), out, first_row, H * D, T, M, D)
    top += tl.log2(total)
    tl.store(vector_of(bits, b, h, H, T) + rows, top, mask=rows < T)


def split(qkv: Tensor, heads: int, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Views of the packed rows: q [B,T,H,D], k and v [B,T,KV,D]."""
    return qkv.unflatten(-1, (heads + 2 * kv_heads, -1)).split(
        (heads, kv_heads, kv_heads), dim=2
    )


def strides(x: Tensor | None, count: int) -> tuple[int, ...]:
    return x.stride()[:count] if x is not None else (0,) * count


def precision(dtype: torch.dtype) -> str:
    return "ieee" if dtype == torch.float32 else "tf32"  # says nothing to 16-bit inputs


def matrix(x: Tensor, tile: Tile) -> TensorDescriptor | None:
    """x [B,T,heads,D] as the matrix [B T, heads D], copied `tile.met` tokens of a head at a time; None: it cannot be.

    It can where no tile runs over into the next row of the batch and all lies on 16 bytes, as the copy engine asks.
    """
    b, t, heads, d = x.shape
    row_b, row_t, row_h, channel = x.stride()
    bytes_of = x.element_size()
    tiled = t % tile.met == 0 and row_b == t * row_t and (row_h, channel) == (d, 1)
    aligned = x.data_ptr() % 16 == 0 and row_t * bytes_of % 16 == 0
    if not (tile.described and tiled and aligned):
        return None
    flat = x.as_strided((b * t, heads * d), (row_t, 1))
    return TensorDescriptor.from_tensor(flat, [tile.met, d])


def in_a_row(x: Tensor | None, tile: Tile) -> TensorDescriptor | None:
    """All numbers of x, contiguous and on 16 bytes, copied `tile.met` at a time."""
    return None if x is None else TensorDescriptor.from_tensor(x.view(-1), [tile.met])


def described(tile: Tile, *each: Tensor) -> tuple[bool, list]:
    """Whether each can be described, and then the descriptors; else the tensors themselves."""
    found = [matrix(x, tile) for x in each]
    return (False, [*each]) if None in found else (True, found)


def forward(given: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """y [B,T,H*D]; log2 of the sum of 2^score, fp32 [B,H,T]; turned keys and mixed values, as `ready_shape` says."""
    q, k, v = given.split(given.qkv)
    b, t, heads, d = q.shape
    y = given.qkv.new_empty(b, t, heads * d)
    bits = given.qkv.new_empty(b, heads, t, dtype=torch.float32)
    ready = given.qkv.new_empty(given.ready_shape())
    keys, values = given.met(ready)
    tile = given.tile("prepare")
    _prepare[(triton.cdiv(t, tile.rows) * b * given.kv_heads,)](
        k,
        v,
        given.first,
        keys,
        values,
        given.k_gain,
        given.weights,
        given.cos,
        given.sin,
        *strides(k, 2),
        *strides(given.first, 3),
        *strides(keys, 2),
        t,
        given.kv_heads,
        given.eps,
        NORM=given.k_gain is not None,
        MIX=given.first is not None,
        ROWS=tile.rows,
        D=d,
        **tile.options(),
    )
    tile = given.tile("forward")
    is_described, met = described(tile, keys, values)
    _forward[(triton.cdiv(t, tile.rows) * b * heads,)](
        q,
        *met,
        given.gate,
        given.q_gain,
        given.cos,
        given.sin,
        y,
        bits,
        *strides(q, 2),
        *strides(keys, 2),
        *strides(values, 2),
        *strides(given.gate, 3),
        t,
        heads,
        d**-0.5 * LOG2E,
        given.eps,
        DESCRIBED=is_described,
        M=tile.rows,
        N=tile.met,
        **tile.options(),
        **given.constants(),
    )
    return y, bits, ready
