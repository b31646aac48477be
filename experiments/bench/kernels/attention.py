"""Attention beside its peers: each form reads the packed qkv and does QK-norm, rotary positions and the gate of each head too.

Shapes: B rows, T tokens, H heads, KV key-value heads, D channels a head.  Useful work: 2 products of the scores forward, 4 backward.
"""

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from ablab.ablations.interventions.qk_norm import normalise
from ablab.core.parts.position import rotate
from ablab.experiments.bench.kernels.cases import (
    Case,
    Form,
    activations,
    compiled,
    needs_gpu,
    ours,
    served,
)


def attention(device: torch.device, folder: Path) -> Iterable[Case]:
    """Packed qkv [B,T,(H+2KV)*D], gains, gate [B,T,H] -> [B,T,H*D]."""
    shapes = (
        [(96, 12, 12, 384, 64), (48, 18, 6, 768, 64), (16, 12, 12, 2048, 64)]
        if device.type == "cuda"
        else [(2, 4, 2, 32, 32)]
    )
    dtype = activations(device)
    for shape in shapes:
        b, h, kv, t, d = shape
        random = partial(torch.randn, device=device)
        qkv, gate = (
            random(b, t, (h + 2 * kv) * d, dtype=dtype),
            2 * random(b, t, h, dtype=dtype).sigmoid(),
        )
        angles = torch.arange(t, device=device)[:, None] * 10_000.0 ** (
            -torch.arange(d // 2, device=device) / (d / 2)
        )
        learned = [
            x.requires_grad_() for x in (qkv, 1 + 0.1 * random(d), 1 + 0.1 * random(d), gate)
        ]
        size = (
            4 * qkv.numel() + 3 * b * t * h * d
        ) * qkv.element_size()  # qkv read twice, d qkv written; y written and read, dy read
        forms = {
            "torch, cuDNN SDPA": partial(_sdpa_form, shape, SDPBackend.CUDNN_ATTENTION, device),
            "torch, flash SDPA": partial(_sdpa_form, shape, SDPBackend.FLASH_ATTENTION, device),
            "torch, SDPA as it chooses": partial(_sdpa_form, shape, None, device),
            **(
                {
                    "torch, cuDNN SDPA, KV repeated": partial(
                        _sdpa_form, shape, SDPBackend.CUDNN_ATTENTION, device, True
                    )
                }
                if h != kv
                else {}
            ),
            "torch, FlexAttention": partial(_flex_form, shape, device),
            "ablab": partial(_own_attention, shape, dtype, device),
        }
        reference = _attention(shape, partial(_with, [SDPBackend.MATH], _sdpa(shape)))
        name = f"B {b}, H {h}, KV {kv}, T {t}, D {d}"
        yield Case(
            "attention",
            name,
            (*learned, angles.cos(), angles.sin()),
            forms,
            reference,
            6 * b * h * t * t * d,
            size,
        )


def _attention(shape: tuple[int, ...], mix: Callable) -> Callable[..., Tensor]:
    _, heads, kv_heads, _, dim = shape

    def form(qkv, q_gain, k_gain, gate, cos, sin):
        q, k, v = qkv.unflatten(-1, (heads + 2 * kv_heads, dim)).split(
            (heads, kv_heads, kv_heads), dim=2
        )
        q, k = rotate(
            *normalise(q, k, q_gain=q_gain, k_gain=k_gain, scale=1.0, eps=1e-6),
            0,
            cos=cos,
            sin=sin,
        )
        y = mix(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)
        return (y * gate[..., None]).flatten(2)

    return form


def _sdpa(shape: tuple[int, ...], repeated: bool = False) -> Callable[..., Tensor]:
    """repeated: keys and values are copied to every query head, for a backend that knows no groups."""
    if repeated:
        many = partial(torch.repeat_interleave, repeats=shape[1] // shape[2], dim=1)
        return lambda q, k, v: F.scaled_dot_product_attention(
            q, many(k), many(v), is_causal=True
        )
    return partial(
        F.scaled_dot_product_attention, is_causal=True, enable_gqa=shape[1] != shape[2]
    )


def _with(backends: list[SDPBackend] | None, call: Callable, *given: Any) -> Any:
    with sdpa_kernel(backends) if backends else nullcontext():
        return call(*given)


def _sdpa_form(
    shape: tuple[int, ...],
    backend: SDPBackend | None,
    device: torch.device,
    repeated: bool = False,
) -> Form:
    if backend:
        needs_gpu(device)
    return Form(
        partial(
            _with,
            [backend] if backend else None,
            compiled(_attention(shape, _sdpa(shape, repeated)), device),
        )
    )


def _flex_form(shape: tuple[int, ...], device: torch.device) -> Form:
    needs_gpu(device)
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    _, heads, kv_heads, length, _ = shape
    mask = create_block_mask(
        lambda b, h, q, k: q >= k, None, None, length, length, device=device
    )
    return Form(
        compiled(
            _attention(
                shape, partial(flex_attention, block_mask=mask, enable_gqa=heads != kv_heads)
            ),
            device,
        )
    )


def _own_attention(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Form:
    fused = ours(device, "attention", "attention")
    _, heads, kv_heads, _, dim = shape
    served(ours(device, "attention", "serves")(dim, dtype, heads, kv_heads))
    return Form(
        lambda qkv, q_gain, k_gain, gate, cos, sin: fused(
            qkv, heads, kv_heads, cos, sin, q_gain, k_gain, gate=gate
        )
    )
