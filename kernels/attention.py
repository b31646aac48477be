"""Causal attention that reads packed q, k, v where they lie, with the stages around it inside.

    q_h <- turn(q_h r(q_h) q_gain),  k_g <- turn(k_g r(k_g) k_gain),   r(x) = (mean(x^2) + eps)^-1/2       if there are gains
    v_g <- own v_g + first_weight first_g                                                                  if there is a mix
    y_h <- gate_h softmax(q_h k_g^T / sqrt(D), causal) v_g,   g = h // (H / KV)                            gate 1 if there is none

over heads of D channels, where turn() rotates channel i with i + D/2 (Su et al., arXiv:2104.09864) after the RMSNorm
of each head (Henry et al., arXiv:2010.04245).  The softmax is FlashAttention-2's (Dao, arXiv:2307.08691), written in
Triton: kernels/attention_forward.py and kernels/attention_backward.py.  Saved for the backward pass: qkv, y, the keys as
they are multiplied (and the values, when mixing), and one fp32 number per row; y is saved as it leaves, gated, because
the next projection keeps that tensor anyway.  Memory held only while an op runs: one Q backward.

Tolerance: q, k, v and P are rounded to the dtype of qkv once each, just before a product; everything else, the norm,
the rotation and the gate too, is fp32.  A torch path rounds after each stage, so the error against fp64 is held to at
most 1.1 times its error, and to 5e-3 for y and 1e-2 for gradients in bf16 (relative Frobenius norm).
Nothing is summed by atomics: the same inputs give the same bits.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from ablab.kernels import attention_backward, attention_forward

HEAD_DIMS = (32, 64, 128)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Powers of two >= 16, then warps, pipeline stages, and the most registers a thread may have (0: no limit).  prepare:
# tokens; forward, queries: rows of queries, keys per step; keys: keys, rows of queries per step.  Those of 64 channels are
# the best of some sixty timed on an H100 at T 384 and 768; those of 32 and 128 were chosen by registers and spills alone.
TILES = {
    32: {
        "prepare": (128, 4, 1),
        "forward": (128, 64, 4, 3, 0),
        "queries": (128, 64, 8, 3, 0),
        "keys": (128, 64, 8, 3, 0),
    },
    64: {
        "prepare": (32, 4, 1),
        "forward": (64, 64, 4, 3, 128),
        "queries": (64, 32, 4, 3, 128),
        "keys": (64, 32, 4, 3, 0),
    },
    128: {
        "prepare": (32, 4, 1),
        "forward": (128, 64, 8, 2, 0),
        "queries": (128, 64, 8, 2, 0),
        "keys": (128, 32, 8, 2, 0),
    },
}
WIDE_TILES = {
    "prepare": (32, 4, 1),
    "forward": (16, 16, 4, 1, 0),
    "queries": (16, 16, 4, 1, 0),
    "keys": (16, 16, 4, 1, 0),
}  # fp32


def reference(
    qkv,
    heads,
    kv_heads,
    cos,
    sin,
    q_gain=None,
    k_gain=None,
    eps=1e-6,
    first=None,
    weights=None,
    gate=None,
):
    """`attention` in plain torch: in fp64 the formula, in a 16-bit dtype the path that rounds after every stage."""
    q, k, v = attention_forward.split(qkv, heads, kv_heads)
    if q_gain is not None:
        q, k = _unit(q, q_gain, eps), _unit(k, k_gain, eps)
    q, k = _turn(q, cos, sin), _turn(k, cos, sin)
    if first is not None:
        v = (weights[0] * v + weights[1] * first).to(v.dtype)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    grouped = heads != kv_heads
    y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    y = y.transpose(1, 2)
    return (y if gate is None else y * gate[..., None].to(y.dtype)).flatten(2)


def _unit(x, gain, eps):
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return (wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt() * gain).to(x.dtype)


def _turn(x, cos, sin):
    a, b = x.chunk(2, dim=-1)
    c, s = (table[: x.shape[1], None].to(x.dtype) for table in (cos, sin))
    return torch.cat((a * c - b * s, b * c + a * s), dim=-1)


def attention(
    qkv: Tensor,
    heads: int,
    kv_heads: int,
    cos: Tensor,
    sin: Tensor,
    q_gain: Tensor | None = None,
    k_gain: Tensor | None = None,
    eps: float = 1e-6,
    first: Tensor | None = None,
    weights: Tensor | None = None,
    gate: Tensor | None = None,
    tiles: dict | None = None,
) -> Tensor:
    """Attend causally.  Returns y [B,T,H*D] in the dtype of qkv; differentiable in qkv, gains, first, weights and gate.

    qkv: [B,T,(H+2KV)*D], q heads, then k heads, then v heads; channels contiguous, any other strides.
    cos, sin: fp32 [context >= T, D/2].  q_gain, k_gain: fp32 [D], both or neither.
    first: [B,T,KV,D] values of the first layer, channels contiguous, with weights: fp32 [2] (own, first), both or neither.
    gate: [B,T,H] factors.  tiles: entries that replace those of TILES.
    Raises ValueError naming the shape that breaks a rule.
    """
    head_dim = qkv.shape[-1] // (heads + 2 * kv_heads)
    _check(qkv, heads, kv_heads, head_dim, cos, sin, q_gain, k_gain, first, weights, gate)
    flat = flat_tiles(head_dim, qkv.dtype, tiles)
    return _attention(
        qkv, heads, kv_heads, cos, sin, q_gain, k_gain, eps, first, weights, gate, flat
    )[0]


def flat_tiles(head_dim: int, dtype: torch.dtype, tiles: dict | None = None) -> list[int]:
    """The numbers of TILES that hold here, in a row: what an op may take."""
    chosen = (TILES[head_dim] if dtype.itemsize == 2 else WIDE_TILES) | (tiles or {})
    return [
        number for name in ("prepare", "forward", "queries", "keys") for number in chosen[name]
    ]


def serves(head_dim: int, dtype: torch.dtype, heads: int = 1, kv_heads: int = 1) -> str:
    """Empty if `attention` takes these shapes, else a line that says which it does not take, and what it would."""
    if head_dim not in HEAD_DIMS:
        return (
            f"head_dim={head_dim}: the attention kernel serves {', '.join(map(str, HEAD_DIMS))}"
        )
    if dtype not in DTYPES:
        return f"dtype={dtype}: the attention kernel serves {', '.join(map(str, DTYPES))}"
    if kv_heads < 1 or heads % kv_heads:
        return f"kv_heads={kv_heads}: the attention kernel serves divisors of heads={heads}"
    return ""


def flops(B: int, T: int, H: int, D: int) -> tuple[int, int]:
    """Useful FLOPs (forward, backward): 2 and 4 products of B H T^2/2 scores by D channels, as MFU counts; none recomputed."""
    product = B * H * T * T * D  # 2 FLOPs for each of T^2 / 2 pairs
    return 2 * product, 4 * product


def _check(qkv, heads, kv_heads, head_dim, cos, sin, q_gain, k_gain, first, weights, gate):
    b, t, width = qkv.shape
    if refusal := serves(head_dim, qkv.dtype, heads, kv_heads):
        raise ValueError(refusal)
    for one, other, names in (
        (q_gain, k_gain, "q_gain and k_gain"),
        (first, weights, "first and weights"),
    ):
        if (one is None) != (other is None):
            raise ValueError(f"{names} go together; one of them is missing")
    rules = {
        "qkv": (qkv, (b, t, (heads + 2 * kv_heads) * head_dim), qkv.dtype),
        "first": (first, (b, t, kv_heads, head_dim), qkv.dtype),
        "q_gain": (q_gain, (head_dim,), torch.float32),
        "k_gain": (k_gain, (head_dim,), torch.float32),
        "weights": (weights, (2,), torch.float32),
        "gate": (gate, (b, t, heads), None),
    }
    for name, (x, shape, dtype) in rules.items():
        if x is not None and (x.shape != shape or x.dtype != (dtype or x.dtype)):
            raise ValueError(
                f"{name} is {x.dtype} {list(x.shape)}; the attention kernel takes {dtype or 'any dtype'} {list(shape)}"
            )
        if x is not None and name != "gate" and x.stride(-1) != 1:
            raise ValueError(
                f"{name} has channels {x.stride(-1)} apart; the attention kernel takes them contiguous"
            )
    for name, x in (("cos", cos), ("sin", sin)):
        if (
            x.dtype != torch.float32
            or x.shape[0] < t
            or x.shape[1] != head_dim // 2
            or not x.is_contiguous()
        ):
            raise ValueError(
                f"{name} is {x.dtype} {list(x.shape)}; the attention kernel takes contiguous float32 [{t} or more, {head_dim // 2}]"
            )


@torch.library.custom_op("ablab::attention", mutates_args=())
def _attention(
    qkv: Tensor,
    heads: int,
    kv_heads: int,
    cos: Tensor,
    sin: Tensor,
    q_gain: Tensor | None,
    k_gain: Tensor | None,
    eps: float,
    first: Tensor | None,
    weights: Tensor | None,
    gate: Tensor | None,
    tiles: list[int],
) -> tuple[Tensor, Tensor, Tensor]:
    return attention_forward.forward(
        qkv, heads, kv_heads, cos, sin, q_gain, k_gain, eps, first, weights, gate, tiles
    )


@_attention.register_fake
def _(qkv, heads, kv_heads, cos, sin, q_gain, k_gain, eps, first, weights, gate, tiles):
    b, t, width = qkv.shape
    y, bits = (
        qkv.new_empty(b, t, width // (heads + 2 * kv_heads) * heads),
        qkv.new_empty(b, heads, t, dtype=torch.float32),
    )
    return y, bits, qkv.new_empty(attention_forward.ready_shape(qkv, heads, kv_heads, first))


@torch.library.custom_op("ablab::attention_backward", mutates_args=())
def _attention_backward(
    dy: Tensor,
    qkv: Tensor,
    y: Tensor,
    bits: Tensor,
    ready: Tensor,
    heads: int,
    kv_heads: int,
    cos: Tensor,
    sin: Tensor,
    q_gain: Tensor | None,
    k_gain: Tensor | None,
    eps: float,
    first: Tensor | None,
    weights: Tensor | None,
    gate: Tensor | None,
    tiles: list[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """As `attention_backward.backward`; an empty tensor for what is absent: an op returns no None."""
    dy = dy if dy.stride(-1) == 1 else dy.contiguous()
    grads = attention_backward.backward(
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
    )
    dqkv, dq_gain, dk_gain, dfirst, dweights, dgate = (
        qkv.new_empty(0) if x is None else x for x in grads
    )
    return dqkv, dq_gain, dk_gain, dfirst, dweights, dgate


@_attention_backward.register_fake
def _(
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
    parts = attention_backward.parts(qkv, heads, kv_heads, q_gain, first, gate, tiles)
    return tuple(
        qkv.new_empty(0) if x is None else x for x in (qkv.new_empty(qkv.shape), *parts)
    )


def _save(ctx, inputs, output):
    (
        qkv,
        ctx.heads,
        ctx.kv_heads,
        cos,
        sin,
        q_gain,
        k_gain,
        ctx.eps,
        first,
        weights,
        gate,
        ctx.tiles,
    ) = inputs
    ctx.save_for_backward(qkv, *output, cos, sin, q_gain, k_gain, first, weights, gate)
    ctx.set_materialize_grads(False)


def _differentiate(ctx, dy, *_):
    qkv, y, bits, ready, cos, sin, q_gain, k_gain, first, weights, gate = ctx.saved_tensors
    if dy is None:
        return (None,) * 12
    grads = _attention_backward(
        dy,
        qkv,
        y,
        bits,
        ready,
        ctx.heads,
        ctx.kv_heads,
        cos,
        sin,
        q_gain,
        k_gain,
        ctx.eps,
        first,
        weights,
        gate,
        ctx.tiles,
    )
    dqkv, q_sums, k_sums, dfirst, weight_sums, shares = grads
    gains = (None, None) if q_gain is None else (q_sums.sum(0), k_sums.sum(0))
    mixed = (None, None) if first is None else (dfirst, weight_sums.sum(0))
    return (
        dqkv,
        None,
        None,
        None,
        None,
        *gains,
        None,
        *mixed,
        None if gate is None else shares.mT.to(gate.dtype),
        None,
    )


_attention.register_autograd(_differentiate, setup_context=_save)
