"""The backward half of kernels/attention.py, without atomics: one kernel for queries, then one for keys and values.

With P = softmax(scores), dP = dy v^T and g the gate (1 without one), row by row
    share = sum_j P_ij dP_ij        the gate's gradient
    ds_ij = g P_ij (dP_ij - share)  g share = sum(dy y) over the channels, known before the loop, y being gated
    dq = scale ds k,   dk = scale ds^T q,   dv = (g P)^T dy
then each passes back through its rotation and its norm.  share is that sum over g; where a gate is shut (|g| < SHUT)
the quotient says little or nothing, so that a block which holds such a row adds up P dP itself.  Both kernels read the
turned keys and mixed values that the forward pass kept.  `_queries` leaves `_keys` its scaled and turned queries
[B,H,T,D], and share and the gate as fp32 [B,H,T].

They multiply seven times where five would do.  One program for a whole head, with dk and dv in registers and dq in
memory that it alone writes, took 1.10 ms for their 0.52 (96 rows of 384 tokens, 12 heads of 64, H100) and about twice
their time at every other shape: eight warps a multiprocessor do not hide its chain of loads, products and stores.  ds
left in memory by `_keys`, one product for `_queries`, was not built: 198 MB written and read again there, 0.13 ms at
3 TB/s, against 0.04 ms for two products at 600 TFLOP/s; the ratio is the same at any length.

Their 0.49 ms there are 0.21 and 0.28; with the loops cut out 0.24 remain, near what memory allows, so that loops and
what lies around them hardly overlap.  Tried, ms of both kernels:
    `_keys` turns keys and mixes values anew, from the raw ones              0.565 to 0.574 for 0.509 (registers)
    `_keys` takes all queries in one masked loop                             0.502 for 0.501
    `_keys` reads bits, share and gate of a query side by side               0.498 to 0.516 for 0.501 to 0.508
    `_queries` multiplies the gate into dy                                   0.506 to 0.518 for 0.501 to 0.508
    (a) inputs of the end asked into the second-level cache at the start     0.509 to 0.512 for 0.485 to 0.487
    (a), and all of them loaded at once after the loops                      0.530 to 0.639 for 0.509 to 0.512 (spills)
    (a), and one program for a block's queries and keys, waiting on others   0.543 to 0.609 for 0.509 to 0.512
    one launch, keys 4 to 128 heads behind queries, these still in the cache 0.512 to 0.530 for 0.492 to 0.494
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ablab.kernels.attention_forward import (
    LOG2E,
    Inputs,
    Tile,
    at,
    described,
    head_of,
    in_a_row,
    inverse_rms,
    load_halves,
    load_met,
    load_tile,
    store_tile,
    strides,
    turned_tile,
    vector_of,
)

SHUT = tl.constexpr(
    2.0**-8
)  # of a gate: below it fp16 outputs lose digits, and 0 loses them all


@triton.jit
def store_raw_gradient(
    grad,
    x,
    dx,
    gain,
    sums,
    cos,
    sin,
    start,
    x_t,
    dx_t,
    T,
    eps,
    NORM: tl.constexpr,
    ROWS: tl.constexpr,
    HALF: tl.constexpr,
    RAGGED: tl.constexpr,
):
    """Gradient of a turned tile -> d of the raw one, written to dx.

    This program's part of the gain's gradient goes to sums [programs, D].
    """
    pair = tl.reshape(grad, (ROWS, 2, HALF))
    a_turned, b_turned = tl.split(tl.permute(pair, (0, 2, 1)))
    c = load_tile(cos, start, HALF, T, ROWS, HALF, RAGGED)
    s = load_tile(sin, start, HALF, T, ROWS, HALF, RAGGED)
    da = a_turned * c + b_turned * s
    db = b_turned * c - a_turned * s
    if NORM:
        channel = tl.arange(0, HALF)
        a, b = load_halves(x, start, x_t, T, ROWS, HALF, RAGGED)
        r = inverse_rms(a, b, start, T, eps, ROWS, HALF)
        a = a * r[:, None]
        b = b * r[:, None]
        sums += tl.program_id(0) * 2 * HALF + channel
        tl.store(sums, tl.sum(da * a, 0))
        tl.store(sums + HALF, tl.sum(db * b, 0))
        da = da * tl.load(gain + channel)[None, :]
        db = db * tl.load(gain + HALF + channel)[None, :]
        mean = tl.sum(da * a + db * b, 1) / (2 * HALF)
        da = r[:, None] * (da - a * mean[:, None])
        db = r[:, None] * (db - b * mean[:, None])
    store_tile(dx, da, start, dx_t, T, ROWS, HALF)
    store_tile(dx + HALF, db, start, dx_t, T, ROWS, HALF)


@triton.jit
def _added_share(
    query,
    dy,
    bits,
    k,
    v,
    first_row,
    k_t,
    v_t,
    T,
    M: tl.constexpr,
    D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """sum_j P_ij dP_ij of one block of queries by its own products, 16 keys at a time: rare, so it may be slow."""
    rows = first_row + tl.arange(0, M)
    share = tl.zeros([M], tl.float32)
    for start in tl.range(0, first_row + M, 16, num_stages=1):
        keys = start + tl.arange(0, 16)
        key = load_tile(k, start, k_t, T, 16, D)
        value = load_tile(v, start, v_t, T, 16, D)
        score = tl.dot(query, tl.trans(key), input_precision=PRECISION)
        p = tl.exp2(score - bits[:, None])
        p = tl.where(rows[:, None] >= keys[None, :], p, 0.0)
        dp = tl.dot(dy, tl.trans(value), input_precision=PRECISION)
        share += tl.sum(p * dp, 1)
    return share


@triton.jit
def _sweep_keys(
    dq,
    query,
    dy,
    strength,
    delta,
    bits,
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
    GATED: tl.constexpr,
    RAGGED: tl.constexpr,
    DESCRIBED: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Keys low..high-1 against one block of queries: dq without its scale."""
    rows = first_row + tl.arange(0, M)
    for start in tl.range(low, high, N):
        cut: tl.constexpr = DIAGONAL and RAGGED
        key = load_met(k, row, column, start, k_t, T, N, D, cut, DESCRIBED)
        value = load_met(v, row, column, start, v_t, T, N, D, cut, DESCRIBED)
        # Both before either is used: the second product runs while the first becomes p.
        score = tl.dot(query, tl.trans(key), input_precision=PRECISION)
        dp = tl.dot(dy, tl.trans(value), input_precision=PRECISION)
        p = tl.exp2(score - bits[:, None])
        if DIAGONAL:
            keys = start + tl.arange(0, N)
            p = tl.where(rows[:, None] >= keys[None, :], p, 0.0)
        if GATED:
            dp = dp * strength[:, None]
        ds = p * (dp - delta[:, None])
        dq = tl.dot(ds.to(key.dtype), key, dq, input_precision=PRECISION)
    return dq


@triton.jit
def _queries(
    q,
    k,
    v,
    k_met,
    v_met,
    y,
    dy,
    gate,
    q_gain,
    cos,
    sin,
    bits,
    dq,
    turned,
    shares,
    strengths,
    sums,
    q_b,
    q_t,
    k_b,
    k_t,
    v_b,
    v_t,
    dy_b,
    dy_t,
    gate_b,
    gate_t,
    gate_h,
    dq_b,
    dq_t,
    T,
    H,
    scale,
    log2_scale,
    eps,
    NORM: tl.constexpr,
    GATED: tl.constexpr,
    RAGGED: tl.constexpr,
    DESCRIBED: tl.constexpr,
    GROUP: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One block of M queries of one head: dq, its part of the gain's gradient, the turned queries, share.

    k_met, v_met: k and v, or descriptors of them.
    """
    blocks = tl.cdiv(T, M)
    first_row = (blocks - 1 - tl.program_id(0) % blocks) * M
    b = tl.program_id(0) // blocks // H
    h = tl.program_id(0) // blocks % H
    rows = first_row + tl.arange(0, M)
    q = head_of(q, b, h, q_b, D)
    dy = head_of(dy, b, h, dy_b, D)
    y = head_of(y, b, h, T * H * D, D)
    # Asked for before the queries are turned: all wait at once.
    dy_tile = load_tile(dy, first_row, dy_t, T, M, D, RAGGED)
    y_tile = load_tile(y, first_row, H * D, T, M, D, RAGGED).to(tl.float32)
    top = tl.load(vector_of(bits, b, h, H, T) + rows, mask=rows < T, other=0.0)
    query = turned_tile(
        q,
        q_gain,
        cos,
        sin,
        first_row,
        q_t,
        T,
        log2_scale,
        eps,
        NORM,
        M,
        D // 2,
        RAGGED,
    )
    store_tile(vector_of(turned, b, h, H, T * D), query, first_row, D, T, M, D)
    delta = tl.sum(dy_tile.to(tl.float32) * y_tile, 1)
    column = h // GROUP * D
    k = head_of(k, b, h // GROUP, k_b, D)
    v = head_of(v, b, h // GROUP, v_b, D)
    strength = delta
    share = delta
    if GATED:
        gate = at(gate, b, first_row, gate_b, gate_t) + h * gate_h
        strength = tl.load(gate + tl.arange(0, M) * gate_t, mask=rows < T, other=1.0)
        strength = strength.to(tl.float32)
        tl.store(vector_of(strengths, b, h, H, T) + rows, strength, mask=rows < T)
        shut = tl.abs(strength) < SHUT
        share = delta / tl.where(shut, 1.0, strength)
        if tl.max(shut.to(tl.int32), 0) > 0:
            added = _added_share(
                query, dy_tile, top, k, v, first_row, k_t, v_t, T, M, D, PRECISION
            )
            share = tl.where(shut, added, share)
    tl.store(vector_of(shares, b, h, H, T) + rows, share, mask=rows < T)
    if not DESCRIBED:
        k_met = k
        v_met = v
    grad = tl.zeros([M, D], tl.float32)
    whole = first_row // N * N  # keys before it are seen by every row
    grad = _sweep_keys(
        grad,
        query,
        dy_tile,
        strength,
        delta,
        top,
        k_met,
        v_met,
        first_row,
        0,
        whole,
        b * T,
        column,
        k_t,
        v_t,
        T,
        False,
        GATED,
        RAGGED,
        DESCRIBED,
        M,
        N,
        D,
        PRECISION,
    )
    grad = _sweep_keys(
        grad,
        query,
        dy_tile,
        strength,
        delta,
        top,
        k_met,
        v_met,
        first_row,
        whole,
        tl.minimum(first_row + M, T),
        b * T,
        column,
        k_t,
        v_t,
        T,
        True,
        GATED,
        RAGGED,
        DESCRIBED,
        M,
        N,
        D,
        PRECISION,
    )
    store_raw_gradient(
        grad * scale,
        q,
        head_of(dq, b, h, dq_b, D),
        q_gain,
        sums,
        cos,
        sin,
        first_row,
        q_t,
        dq_t,
        T,
        eps,
        NORM,
        M,
        D // 2,
        RAGGED,
    )


@triton.jit
def load_row(
    base,
    place,
    start,
    T,
    ROWS: tl.constexpr,
    RAGGED: tl.constexpr,
    DESCRIBED: tl.constexpr,
):
    """Numbers start.. of a vector; zeros from T on.

    DESCRIBED: base is a descriptor of a longer one, in which this one begins at place.
    """
    places = start + tl.arange(0, ROWS)
    if DESCRIBED:
        numbers = base.load([place + start])
    elif RAGGED:
        numbers = tl.load(base + places, mask=places < T, other=0.0)
    else:
        numbers = tl.load(base + places)
    return numbers


@triton.jit
def _sweep_queries(
    dk,
    dv,
    key,
    value,
    q,
    dy,
    strengths,
    bits,
    shares,
    first_key,
    low,
    high,
    q_row,
    dy_row,
    dy_column,
    dy_t,
    T,
    DIAGONAL: tl.constexpr,
    GATED: tl.constexpr,
    RAGGED: tl.constexpr,
    DESCRIBED: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Queries low..high-1 of one head against one block of keys; tiles [N keys, M queries].  From row T on all is 0."""
    keys = first_key + tl.arange(0, N)
    for start in tl.range(low, high, M):
        query = load_met(q, q_row, 0, start, D, T, M, D, RAGGED, DESCRIBED)
        out = load_met(dy, dy_row, dy_column, start, dy_t, T, M, D, RAGGED, DESCRIBED)
        top = load_row(bits, q_row, start, T, M, RAGGED, DESCRIBED)
        share = load_row(shares, q_row, start, T, M, RAGGED, DESCRIBED)
        score = tl.dot(key, tl.trans(query), input_precision=PRECISION)
        dp = tl.dot(value, tl.trans(out), input_precision=PRECISION)
        p = tl.exp2(score - top[None, :])
        if DIAGONAL:
            rows = start + tl.arange(0, M)
            p = tl.where(rows[None, :] >= keys[:, None], p, 0.0)
        if GATED:
            strength = load_row(strengths, q_row, start, T, M, RAGGED, DESCRIBED)
            p = p * strength[None, :]
        dv = tl.dot(p.to(out.dtype), out, dv, input_precision=PRECISION)
        ds = p * (dp - share[None, :])
        dk = tl.dot(ds.to(query.dtype), query, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit
def _keys(
    q,
    k,
    k_raw,
    v,
    v_raw,
    first,
    dy,
    strengths,
    k_gain,
    weights,
    cos,
    sin,
    bits,
    shares,
    dk,
    dv,
    dfirst,
    gain_sums,
    weight_sums,
    k_b,
    k_t,
    v_b,
    v_t,
    raw_b,
    raw_t,
    first_b,
    first_t,
    first_h,
    dy_b,
    dy_t,
    dk_b,
    dk_t,
    T,
    H,
    KV,
    scale,
    eps,
    NORM: tl.constexpr,
    MIX: tl.constexpr,
    GATED: tl.constexpr,
    RAGGED: tl.constexpr,
    DESCRIBED: tl.constexpr,
    GROUP: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One block of N keys of one kv head, over the queries of its GROUP heads: dk, dv, d first.

    Its parts of dk_gain and d weights go to gain_sums and weight_sums.  DESCRIBED: q and dy are descriptors, and so are
    bits, shares and strengths, of B H T numbers: as pointers they cost a warp 24 copies of 4 bytes for 64 queries, and
    30 registers.
    """
    blocks = tl.cdiv(T, N)
    program = tl.program_id(0)
    first_key = program % blocks * N  # the longest columns first
    b = program // blocks // KV
    h = program // blocks % KV
    key = load_tile(head_of(k, b, h, k_b, D), first_key, k_t, T, N, D, RAGGED)
    value = load_tile(head_of(v, b, h, v_b, D), first_key, v_t, T, N, D, RAGGED)
    k_grad = tl.zeros([N, D], tl.float32)
    v_grad = tl.zeros([N, D], tl.float32)
    first_row = first_key // M * M
    whole = tl.minimum(tl.cdiv(first_key + N, M) * M, T)  # queries from here on see every key
    for member in tl.range(0, GROUP):
        head = h * GROUP + member
        if DESCRIBED:
            queries = q
            out = dy
            top = bits
            share = shares
            strength = strengths
        else:
            queries = vector_of(q, b, head, H, T * D)
            out = head_of(dy, b, head, dy_b, D)
            top = vector_of(bits, b, head, H, T)
            share = vector_of(shares, b, head, H, T)
            strength = share
            if GATED:
                strength = vector_of(strengths, b, head, H, T)
        k_grad, v_grad = _sweep_queries(
            k_grad,
            v_grad,
            key,
            value,
            queries,
            out,
            strength,
            top,
            share,
            first_key,
            first_row,
            whole,
            (b * H + head) * T,
            b * T,
            head * D,
            dy_t,
            T,
            True,
            GATED,
            RAGGED,
            DESCRIBED,
            M,
            N,
            D,
            PRECISION,
        )
        k_grad, v_grad = _sweep_queries(
            k_grad,
            v_grad,
            key,
            value,
            queries,
            out,
            strength,
            top,
            share,
            first_key,
            whole,
            T,
            (b * H + head) * T,
            b * T,
            head * D,
            dy_t,
            T,
            False,
            GATED,
            RAGGED,
            DESCRIBED,
            M,
            N,
            D,
            PRECISION,
        )
    if MIX:
        v_raw = head_of(v_raw, b, h, raw_b, D)
        first = at(first, b, 0, first_b, first_t) + h * first_h
        dfirst = head_of(dfirst, b, h, T * KV * D, D)
        own = load_tile(v_raw, first_key, raw_t, T, N, D, RAGGED)
        old = load_tile(first, first_key, first_t, T, N, D, RAGGED)
        tl.store(weight_sums + program * 2, tl.sum(v_grad * own.to(tl.float32)))
        tl.store(weight_sums + program * 2 + 1, tl.sum(v_grad * old.to(tl.float32)))
        old_grad = v_grad * tl.load(weights + 1)
        store_tile(dfirst, old_grad, first_key, KV * D, T, N, D)
        v_grad = v_grad * tl.load(weights)
    store_tile(head_of(dv, b, h, dk_b, D), v_grad, first_key, dk_t, T, N, D)
    store_raw_gradient(
        k_grad * scale,
        head_of(k_raw, b, h, raw_b, D),
        head_of(dk, b, h, dk_b, D),
        k_gain,
        gain_sums,
        cos,
        sin,
        first_key,
        raw_t,
        dk_t,
        T,
        eps,
        NORM,
        N,
        D // 2,
        RAGGED,
    )


class Gradients(NamedTuple):
    """None for what is absent; sums are what each program adds, still apart, so that who sums may fuse it."""

    packed: Tensor  # of qkv
    q_gain_sums: Tensor | None  # [programs, D]
    k_gain_sums: Tensor | None
    first: Tensor | None
    weight_sums: Tensor | None  # [programs, 2]
    shares: Tensor  # of the gate, fp32 [B,H,T]; of no meaning without one


def unset(given: Inputs) -> Gradients:
    b, t, _ = given.qkv.shape
    d = given.head_dim
    of_queries = triton.cdiv(t, given.tile("queries").rows) * b * given.heads
    of_keys = triton.cdiv(t, given.tile("keys").rows) * b * given.kv_heads
    gained = given.q_gain is not None
    mixed = given.first is not None

    def numbers(*shape: int) -> Tensor:
        return given.qkv.new_empty(*shape, dtype=torch.float32)

    return Gradients(
        packed=given.qkv.new_empty(given.qkv.shape),
        q_gain_sums=numbers(of_queries, d) if gained else None,
        k_gain_sums=numbers(of_keys, d) if gained else None,
        first=given.first.new_empty(given.first.shape) if given.first is not None else None,
        weight_sums=numbers(of_keys, 2) if mixed else None,
        shares=numbers(b, given.heads, t),
    )


def backward(dy: Tensor, y: Tensor, bits: Tensor, ready: Tensor, given: Inputs) -> Gradients:
    """dy: as y, channels contiguous.  y, bits, ready: what `forward` gave."""
    grads = unset(given)
    q, k, v = given.split(given.qkv)
    dq, dk, dv = given.split(grads.packed)
    b, t, heads, d = q.shape
    keys, values = given.met(ready)
    turned = given.qkv.new_empty(b, heads, t, d)
    strengths = bits.new_empty(bits.shape) if given.gate is not None else None

    tile = given.tile("queries")
    is_described, met = described(tile, keys, values)
    _queries[(triton.cdiv(t, tile.rows) * b * heads,)](
        q,
        keys,
        values,
        *met,
        y,
        dy,
        given.gate,
        given.q_gain,
        given.cos,
        given.sin,
        bits,
        dq,
        turned,
        grads.shares,
        strengths,
        grads.q_gain_sums,
        *strides(q, 2),
        *strides(keys, 2),
        *strides(values, 2),
        *strides(dy, 2),
        *strides(given.gate, 3),
        *strides(dq, 2),
        t,
        heads,
        d**-0.5,
        d**-0.5 * LOG2E,
        given.eps,
        RAGGED=is_ragged(t, tile),
        DESCRIBED=is_described,
        M=tile.rows,
        N=tile.met,
        **tile.options(),
        **given.constants(),
    )

    tile = given.tile("keys")
    # [B H T, D]: a head of a row of the batch is a row here, with one head in it.
    alone = turned.view(b * heads, t, 1, d)
    is_described, met = described(tile, alone, dy.unflatten(-1, (heads, d)))
    queries, out = met if is_described else (turned, dy)
    numbers: list = [strengths, bits, grads.shares]  # of each row
    if is_described:
        numbers = [in_a_row(x, tile) for x in numbers]
    _keys[(triton.cdiv(t, tile.rows) * b * given.kv_heads,)](
        queries,
        keys,
        k,
        values,
        v,
        given.first,
        out,
        numbers[0],
        given.k_gain,
        given.weights,
        given.cos,
        given.sin,
        *numbers[1:],
        dk,
        dv,
        grads.first,
        grads.k_gain_sums,
        grads.weight_sums,
        *strides(keys, 2),
        *strides(values, 2),
        *strides(k, 2),
        *strides(given.first, 3),
        *strides(dy, 2),
        *strides(dk, 2),
        t,
        heads,
        given.kv_heads,
        1 / LOG2E,
        given.eps,
        MIX=given.first is not None,
        RAGGED=is_ragged(t, tile),
        DESCRIBED=is_described,
        M=tile.met,
        N=tile.rows,
        **tile.options(),
        **given.constants(),
    )
    return grads


def is_ragged(tokens: int, tile: Tile) -> bool:
    """Whether a block of either kind runs past the last token."""
    return tokens % max(tile.rows, tile.met) != 0
