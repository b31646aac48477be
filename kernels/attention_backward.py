"""The backward half of kernels/attention.py, without atomics: one kernel for queries, then one for keys and values.

With P = softmax(scores), dP = dy v^T and g the gate (1 without one), row by row
    share = sum_j P_ij dP_ij        the gate's gradient: right at g = 0 too, where y / g would not be
    ds_ij = g P_ij (dP_ij - share)  g share = sum(dy * y) over the channels, known before the loop, y being gated
    dq = scale ds k,   dk = scale ds^T q,   dv = (g P)^T dy
then each passes back through its rotation and its norm.  Both kernels read the turned keys and mixed values that
the forward pass kept (to make a block of them again in `_keys` took 249 registers a thread for 160, and no less time).
`_queries` leaves `_keys` its scaled and turned queries [B,H,T,D], and share and the gate as fp32 [B,H,T].
"""

import torch
import triton
import triton.language as tl

from ablab.kernels.attention_forward import (
    LOG2E,
    at,
    inverse_rms,
    launch,
    load_halves,
    load_tile,
    precision,
    split,
    store_tile,
    strides,
    turned_tile,
)


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
):
    """Gradient of a turned tile -> d of the raw one, written to dx; this program's part of the gain's, to sums [programs, D]."""
    a_turned, b_turned = tl.split(tl.permute(tl.reshape(grad, (ROWS, 2, HALF)), (0, 2, 1)))
    c = load_tile(cos, start, HALF, T, ROWS, HALF)
    s = load_tile(sin, start, HALF, T, ROWS, HALF)
    da = a_turned * c + b_turned * s
    db = b_turned * c - a_turned * s
    if NORM:
        channel = tl.arange(0, HALF)
        a, b = load_halves(x, start, x_t, T, ROWS, HALF)
        r = inverse_rms(a, b, start, T, eps, ROWS, HALF)
        a = a * r[:, None]
        b = b * r[:, None]
        sums += tl.program_id(0) * 2 * HALF + channel
        tl.store(sums, tl.sum(da * a, 0))
        tl.store(sums + HALF, tl.sum(db * b, 0))
        da = da * tl.load(gain + channel)[None, :]
        db = db * tl.load(gain + HALF + channel)[None, :]
        mean = (tl.sum(da * a, 1) + tl.sum(db * b, 1)) / (2 * HALF)
        da = r[:, None] * (da - a * mean[:, None])
        db = r[:, None] * (db - b * mean[:, None])
    store_tile(dx, da, start, dx_t, T, ROWS, HALF)
    store_tile(dx + HALF, db, start, dx_t, T, ROWS, HALF)


@triton.jit
def _sweep_keys(
    dq,
    share,
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
    k_t,
    v_t,
    T,
    DIAGONAL: tl.constexpr,
    GATED: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Keys low..high-1 against one block of queries: dq without its scale, and share."""
    rows, keys = first_row + tl.arange(0, M), tl.arange(0, N)
    for start in tl.range(low, high, N):
        key = load_tile(k, start, k_t, T, N, D, DIAGONAL)
        p = tl.exp2(tl.dot(query, tl.trans(key), input_precision=PRECISION) - bits[:, None])
        if DIAGONAL:
            p = tl.where(rows[:, None] >= start + keys[None, :], p, 0.0)
        dp = tl.dot(
            dy, tl.trans(load_tile(v, start, v_t, T, N, D, DIAGONAL)), input_precision=PRECISION
        )
        if GATED:
            share += tl.sum(p * dp, 1)
            dp = dp * strength[:, None]
        ds = p * (dp - delta[:, None])
        dq = tl.dot(ds.to(key.dtype), key, dq, input_precision=PRECISION)
    return dq, share


@triton.jit
def _queries(
    q,
    k,
    v,
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
    GROUP: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One block of M queries of one head: dq, its part of the gain's gradient, the turned queries, share."""
    blocks = tl.cdiv(T, M)
    first_row = (blocks - 1 - tl.program_id(0) % blocks) * M
    b, h = tl.program_id(0) // blocks // H, tl.program_id(0) // blocks % H
    rows = first_row + tl.arange(0, M)
    q = at(q, b, 0, q_b, q_t) + h * D
    query = turned_tile(
        q, q_gain, cos, sin, first_row, q_t, T, log2_scale, eps, NORM, M, D // 2
    )
    store_tile(at(turned, b, h, H * T * D, T * D), query, first_row, D, T, M, D)
    dy_tile = load_tile(at(dy, b, 0, dy_b, dy_t) + h * D, first_row, dy_t, T, M, D)
    y_tile = load_tile(at(y, b, 0, T * H * D, H * D) + h * D, first_row, H * D, T, M, D)
    delta = tl.sum(dy_tile.to(tl.float32) * y_tile.to(tl.float32), 1)
    top = tl.load(at(bits, b, h, H * T, T) + rows, mask=rows < T, other=0.0)
    strength = delta
    if GATED:
        address = at(gate, b, first_row, gate_b, gate_t) + h * gate_h + tl.arange(0, M) * gate_t
        strength = tl.load(address, mask=rows < T, other=0.0).to(tl.float32)
        tl.store(at(strengths, b, h, H * T, T) + rows, strength, mask=rows < T)
    k, v = at(k, b, 0, k_b, k_t) + h // GROUP * D, at(v, b, 0, v_b, v_t) + h // GROUP * D
    grad = tl.zeros([M, D], tl.float32)
    share = tl.zeros([M], tl.float32)
    whole, last = first_row // N * N, tl.minimum(first_row + M, T)
    grad, share = _sweep_keys(
        grad,
        share,
        query,
        dy_tile,
        strength,
        delta,
        top,
        k,
        v,
        first_row,
        0,
        whole,
        k_t,
        v_t,
        T,
        False,
        GATED,
        M,
        N,
        D,
        PRECISION,
    )
    grad, share = _sweep_keys(
        grad,
        share,
        query,
        dy_tile,
        strength,
        delta,
        top,
        k,
        v,
        first_row,
        whole,
        last,
        k_t,
        v_t,
        T,
        True,
        GATED,
        M,
        N,
        D,
        PRECISION,
    )
    if not GATED:
        share = delta
    tl.store(at(shares, b, h, H * T, T) + rows, share, mask=rows < T)
    dq = at(dq, b, 0, dq_b, dq_t) + h * D
    store_raw_gradient(
        grad * scale,
        q,
        dq,
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
    )


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
    dy_t,
    T,
    DIAGONAL: tl.constexpr,
    GATED: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Queries low..high-1 of one head against one block of keys; tiles [N keys, M queries].  From row T on all is 0."""
    keys, rows = first_key + tl.arange(0, N), tl.arange(0, M)
    for start in tl.range(low, high, M):
        seen = start + rows < T
        query = load_tile(q, start, D, T, M, D)
        top = tl.load(bits + start + rows, mask=seen, other=0.0)
        p = tl.exp2(tl.dot(key, tl.trans(query), input_precision=PRECISION) - top[None, :])
        if DIAGONAL:
            p = tl.where(start + rows[None, :] >= keys[:, None], p, 0.0)
        out = load_tile(dy, start, dy_t, T, M, D)
        dp = tl.dot(value, tl.trans(out), input_precision=PRECISION)
        if GATED:
            p = p * tl.load(strengths + start + rows, mask=seen, other=0.0)[None, :]
        dv = tl.dot(p.to(out.dtype), out, dv, input_precision=PRECISION)
        share = tl.load(shares + start + rows, mask=seen, other=0.0)
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
    GROUP: tl.constexpr,
    M: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One block of N keys of one kv head, over the queries of its GROUP heads: dk, dv, d first, parts of dk_gain and d weights."""
    blocks = tl.cdiv(T, N)
    program = tl.program_id(0)
    first_key, b, h = (
        program % blocks * N,
        program // blocks // KV,
        program // blocks % KV,
    )  # the longest columns first
    key = load_tile(at(k, b, 0, k_b, k_t) + h * D, first_key, k_t, T, N, D)
    value = load_tile(at(v, b, 0, v_b, v_t) + h * D, first_key, v_t, T, N, D)
    k_grad, v_grad = tl.zeros([N, D], tl.float32), tl.zeros([N, D], tl.float32)
    whole = first_key + tl.cdiv(N, M) * M  # queries from here on see every key
    for member in tl.range(0, GROUP):
        head = h * GROUP + member
        queries, out = at(q, b, head, H * T * D, T * D), at(dy, b, 0, dy_b, dy_t) + head * D
        top, share = at(bits, b, head, H * T, T), at(shares, b, head, H * T, T)
        strength = share
        if GATED:
            strength = at(strengths, b, head, H * T, T)
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
            first_key,
            tl.minimum(whole, T),
            dy_t,
            T,
            True,
            GATED,
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
            dy_t,
            T,
            False,
            GATED,
            M,
            N,
            D,
            PRECISION,
        )
    if MIX:
        own = load_tile(at(v_raw, b, 0, raw_b, raw_t) + h * D, first_key, raw_t, T, N, D).to(
            tl.float32
        )
        old = load_tile(
            at(first, b, 0, first_b, first_t) + h * first_h, first_key, first_t, T, N, D
        ).to(tl.float32)
        tl.store(weight_sums + program * 2, tl.sum(tl.sum(v_grad * own, 1), 0))
        tl.store(weight_sums + program * 2 + 1, tl.sum(tl.sum(v_grad * old, 1), 0))
        store_tile(
            at(dfirst, b, 0, T * KV * D, KV * D) + h * D,
            v_grad * tl.load(weights + 1),
            first_key,
            KV * D,
            T,
            N,
            D,
        )
        v_grad = v_grad * tl.load(weights)
    store_tile(at(dv, b, 0, dk_b, dk_t) + h * D, v_grad, first_key, dk_t, T, N, D)
    k_raw, dk = at(k_raw, b, 0, raw_b, raw_t) + h * D, at(dk, b, 0, dk_b, dk_t) + h * D
    store_raw_gradient(
        k_grad * scale,
        k_raw,
        dk,
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
    )


def parts(qkv, heads, kv_heads, q_gain, first, gate, tiles) -> tuple:
    """Unset results of `backward` but the first: what each program adds to sums, still apart, so that who sums may fuse it."""
    b, t, width = qkv.shape
    d, numbers = width // (heads + 2 * kv_heads), {"dtype": torch.float32}
    of_queries, of_keys = (
        triton.cdiv(t, tiles[8]) * b * heads,
        triton.cdiv(t, tiles[13]) * b * kv_heads,
    )
    gains = (
        (None, None)
        if q_gain is None
        else (qkv.new_empty(of_queries, d, **numbers), qkv.new_empty(of_keys, d, **numbers))
    )
    mixed = (
        (None, None)
        if first is None
        else (first.new_empty(first.shape), qkv.new_empty(of_keys, 2, **numbers))
    )
    return *gains, *mixed, qkv.new_empty(b, heads, t, **numbers)


def backward(
    dy,
    qkv,
    y,
    bits,
    ready,
    heads,
    kv_heads,
    cos,
    sin,
    q_gain,
    k_gain,
    eps,
    first,
    weights,
    gate,
    tiles,
):
    """d of qkv; parts [programs, D] of the gains' gradients, of q and of k; d of first; parts [programs, 2] of d weights;
    d gate as fp32 [B,H,T], of no meaning without a gate.  None for what is absent.
    """
    (q, k, v), grads = split(qkv, heads, kv_heads), qkv.new_empty(qkv.shape)
    dq, dk, dv = split(grads, heads, kv_heads)
    (b, t, _, d), norm, mix = q.shape, q_gain is not None, first is not None
    q_sums, k_sums, dfirst, weight_sums, shares = parts(
        qkv, heads, kv_heads, q_gain, first, gate, tiles
    )
    keys, values = ready[:, :, :kv_heads], ready[:, :, kv_heads:] if mix else v
    common = dict(
        NORM=norm,
        GATED=gate is not None,
        GROUP=heads // kv_heads,
        D=d,
        PRECISION=precision(qkv.dtype),
    )

    m, n, *how = tiles[8:13]
    turned, strengths = (
        qkv.new_empty(b, heads, t, d),
        bits.new_empty(bits.shape) if gate is not None else None,
    )
    _queries[(triton.cdiv(t, m) * b * heads,)](
        q,
        keys,
        values,
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
        q_sums,
        *strides(q, 2),
        *strides(keys, 2),
        *strides(values, 2),
        *strides(dy, 2),
        *strides(gate, 3),
        *strides(dq, 2),
        t,
        heads,
        d**-0.5,
        d**-0.5 * LOG2E,
        eps,
        M=m,
        N=n,
        **launch(*how),
        **common,
    )

    n, m, *how = tiles[13:18]
    _keys[(triton.cdiv(t, n) * b * kv_heads,)](
        turned,
        keys,
        k,
        values,
        v,
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
        k_sums,
        weight_sums,
        *strides(keys, 2),
        *strides(values, 2),
        *strides(k, 2),
        *strides(first, 3),
        *strides(dy, 2),
        *strides(dk, 2),
        t,
        heads,
        kv_heads,
        1 / LOG2E,
        eps,
        MIX=mix,
        M=m,
        N=n,
        **launch(*how),
        **common,
    )
    return grads, q_sums, k_sums, dfirst, weight_sums, shares
