"""Causal attention that reads packed q, k, v where they lie, with the stages around it inside.

    q_h <- turn(q_h r(q_h) q_gain),  k_g <- turn(k_g r(k_g) k_gain),  r(x) = (mean(x^2) + eps)^-1/2   if there are gains
    v_g <- own v_g + first_weight first_g                                                             if there is a mix
    y_h <- gate_h softmax(q_h k_g^T / sqrt(D), causal) v_g,  g = h // (H / KV)                        gate 1 without one

over heads of D channels, where turn() rotates channel i with i + D/2 (Su et al., arXiv:2104.09864) after the RMSNorm
of each head (Henry et al., arXiv:2010.04245).  The softmax is FlashAttention-2's (Dao, arXiv:2307.08691), written in
Triton: kernels/attention_forward.py and kernels/attention_backward.py.  Saved for the backward pass: qkv, y, the keys
as they are multiplied (and the values, when mixing), and one fp32 number per row; y is saved as it leaves, gated,
because the next projection keeps that tensor anyway.  Memory held only while an op runs: one Q backward.

Tolerance: q, k, v and P are rounded to the dtype of qkv once each, just before a product; everything else, the norm,
the rotation and the gate too, is fp32.  A torch path rounds after each stage, so the error against fp64 is held to at
most 1.1 times its error, and to 5e-3 for y and 1e-2 for gradients in bf16 (relative Frobenius norm).
Nothing is summed by atomics: the same inputs give the same bits.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from ablab.kernels import attention_backward, attention_forward
from ablab.kernels.attention_forward import KERNELS, Inputs, Tile

HEAD_DIMS = (32, 64, 128)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Head dim -> longest T -> how each kernel is cut.  Of 64 and 128 channels: the best of about 110 and 65 candidates
# timed on one H100 (PyTorch 2.11, Triton 3.6), everything on.  `queries` + `keys`, ms, and in brackets the best
# while `keys` read the numbers of its rows without descriptors:
#   B, H, KV, T, D   96, 12, 12, 384, 64   48, 18, 6, 768, 64   16, 12, 12, 2048, 64   48, 6, 6, 384, 128
#                    0.501 (0.519)         0.826 (0.869)        0.977 (1.053)          0.288 (0.294)
# In `forward` at 64 channels descriptors cost up to 5 %.  Tiles of 128 rows and eight warps lost everywhere.  Of 32
# channels: by registers, spills.
Tiles = dict[str, Tile]
Returned = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]  # by an op: no None
NARROW = Tile(64, 32, 4, 3, registers=128, described=True)
TILES: dict[int, dict[int, Tiles]] = {
    32: {
        2**31: {
            "prepare": Tile(128, 0, 4, 1),
            "forward": Tile(128, 64, 4, 3),
            "queries": Tile(128, 64, 8, 3),
            "keys": Tile(128, 64, 8, 3),
        },
    },
    64: {
        512: {
            "prepare": Tile(32, 0, 4, 1),
            "forward": Tile(64, 64, 4, 3, registers=128),
            "queries": NARROW,
            "keys": NARROW,
        },
        1024: {
            "prepare": Tile(32, 0, 4, 1),
            "forward": Tile(64, 64, 4, 3, registers=128),
            "queries": NARROW,
            "keys": Tile(64, 64, 4, 2, described=True),
        },
        2**31: {
            "prepare": Tile(32, 0, 4, 1),
            "forward": Tile(64, 64, 4, 3, registers=128),
            "queries": Tile(64, 64, 4, 3, described=True),
            "keys": NARROW,
        },
    },
    128: {
        2**31: {
            "prepare": Tile(32, 0, 4, 1),
            "forward": Tile(64, 64, 4, 3, described=True),
            "queries": Tile(64, 32, 4, 3, described=True),
            "keys": Tile(64, 32, 4, 2, described=True),
        },
    },
}
WIDE = Tile(16, 16, 4, 1)
WIDE_TILES: Tiles = {  # fp32
    "prepare": Tile(32, 0, 4, 1),
    "forward": WIDE,
    "queries": WIDE,
    "keys": WIDE,
}


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
    tiles: Tiles | None = None,
) -> Tensor:
    """Attend causally.  Returns y [B,T,H*D] in the dtype of qkv; differentiable in qkv, gains, first, weights and gate.

    qkv: [B,T,(H+2KV)*D], q heads, then k heads, then v heads; channels contiguous, any other strides.
    cos, sin: fp32 [context >= T, D/2].  q_gain, k_gain: fp32 [D], both or neither.
    first: [B,T,KV,D] values of the first layer, channels contiguous, with weights: fp32 [2] (own, first), both or
    neither.
    gate: [B,T,H] factors.  tiles: entries that replace those of TILES.
    Raises ValueError naming the shape that breaks a rule.
    """
    given = Inputs(
        qkv, heads, kv_heads, cos, sin, q_gain, k_gain, eps, first, weights, gate, tiles=[]
    )
    _check(given)
    numbers = flat_tiles(given.head_dim, qkv.dtype, qkv.shape[1], tiles)
    return _attention(*given._replace(tiles=numbers))[0]


def flat_tiles(
    head_dim: int, dtype: torch.dtype, tokens: int, tiles: Tiles | None = None
) -> list[int]:
    """The numbers of TILES that hold here, in a row: what an op may take."""
    chosen = WIDE_TILES
    if dtype.itemsize == 2:
        by_length = TILES[head_dim]
        chosen = by_length[min(longest for longest in by_length if tokens <= longest)]
    chosen = chosen | (tiles or {})
    return [int(number) for kernel in KERNELS for number in chosen[kernel]]


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
    """Useful FLOPs (forward, backward): 2 and 4 products of B H T^2/2 scores by D channels, as MFU counts."""
    product = B * H * T * T * D  # 2 FLOPs for each of T^2 / 2 pairs
    return 2 * product, 4 * product


def _check(given: Inputs) -> None:
    qkv = given.qkv
    b, t, _ = qkv.shape
    head_dim = given.head_dim
    if refusal := serves(head_dim, qkv.dtype, given.heads, given.kv_heads):
        raise ValueError(refusal)
    for one, other, names in (
        (given.q_gain, given.k_gain, "q_gain and k_gain"),
        (given.first, given.weights, "first and weights"),
    ):
        if (one is None) != (other is None):
            raise ValueError(f"{names} go together; one of them is missing")
    width = (given.heads + 2 * given.kv_heads) * head_dim
    rules: dict[str, tuple[Tensor | None, tuple[int, ...], torch.dtype | None]] = {
        "qkv": (qkv, (b, t, width), qkv.dtype),
        "first": (given.first, (b, t, given.kv_heads, head_dim), qkv.dtype),
        "q_gain": (given.q_gain, (head_dim,), torch.float32),
        "k_gain": (given.k_gain, (head_dim,), torch.float32),
        "weights": (given.weights, (2,), torch.float32),
        "gate": (given.gate, (b, t, given.heads), None),
    }
    for name, (x, shape, dtype) in rules.items():
        if x is not None:
            _check_one(name, x, shape, dtype)
    for name, table in (("cos", given.cos), ("sin", given.sin)):
        served = table.dtype == torch.float32 and table.is_contiguous()
        if not served or table.shape[0] < t or table.shape[1] != head_dim // 2:
            raise ValueError(
                f"{name} is {table.dtype} {list(table.shape)}; the attention kernel takes "
                f"contiguous float32 [{t} or more, {head_dim // 2}]"
            )


def _check_one(name: str, x: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None) -> None:
    if x.shape != shape or x.dtype != (dtype or x.dtype):
        raise ValueError(
            f"{name} is {x.dtype} {list(x.shape)}; "
            f"the attention kernel takes {dtype or 'any dtype'} {list(shape)}"
        )
    if name != "gate" and x.stride(-1) != 1:
        raise ValueError(
            f"{name} has channels {x.stride(-1)} apart; "
            "the attention kernel takes them contiguous"
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
        Inputs(qkv, heads, kv_heads, cos, sin, q_gain, k_gain, eps, first, weights, gate, tiles)
    )


@_attention.register_fake
def _(*named):
    given = Inputs(*named)
    b, t, _ = given.qkv.shape
    y = given.qkv.new_empty(b, t, given.heads * given.head_dim)
    bits = given.qkv.new_empty(b, given.heads, t, dtype=torch.float32)
    return y, bits, given.qkv.new_empty(given.ready_shape())


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
    given = Inputs(
        qkv, heads, kv_heads, cos, sin, q_gain, k_gain, eps, first, weights, gate, tiles
    )
    return _without_none(attention_backward.backward(dy, y, bits, ready, given))


def _without_none(grads: attention_backward.Gradients) -> Returned:
    # Each absent one an empty tensor of its own: no two results of an op may be one.
    packed, q_gain, k_gain, first, weights, shares = (
        grads.packed.new_empty(0) if x is None else x for x in grads
    )
    return packed, q_gain, k_gain, first, weights, shares


@_attention_backward.register_fake
def _(dy, qkv, y, bits, ready, *rest):
    return _without_none(attention_backward.unset(Inputs(qkv, *rest)))


def _save(ctx, inputs, output):
    given = Inputs(*inputs)
    learned = (given.q_gain, given.k_gain, given.first, given.weights, given.gate)
    ctx.save_for_backward(given.qkv, *output, given.cos, given.sin, *learned)
    ctx.heads = given.heads
    ctx.kv_heads = given.kv_heads
    ctx.eps = given.eps
    ctx.tiles = given.tiles
    ctx.set_materialize_grads(False)


def _differentiate(ctx, dy, *_):
    if dy is None:
        return (None,) * len(Inputs._fields)
    qkv, y, bits, ready, cos, sin, q_gain, k_gain, first, weights, gate = ctx.saved_tensors
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
    dqkv, q_gain_sums, k_gain_sums, dfirst, weight_sums, shares = grads
    wanted: dict[str, Tensor | None] = dict.fromkeys(Inputs._fields)
    wanted["qkv"] = dqkv
    if q_gain is not None:
        wanted["q_gain"] = q_gain_sums.sum(0)
        wanted["k_gain"] = k_gain_sums.sum(0)
    if first is not None:
        wanted["first"] = dfirst
        wanted["weights"] = weight_sums.sum(0)
    if gate is not None:
        wanted["gate"] = shares.mT.to(gate.dtype)
    return tuple(wanted.values())


_attention.register_autograd(_differentiate, setup_context=_save)
