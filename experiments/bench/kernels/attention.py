"""Attention beside its peers: each form reads the packed qkv and does QK-norm, rotary positions and head gates too.

Useful work: 2 products of the scores forward, 4 backward.
"""

from collections.abc import Callable, Iterable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from ablab.ablations.interventions.qk_norm import normalise
from ablab.core.parts.position import rotate
from ablab.experiments.bench.kernels.case import (
    OURS,
    Case,
    Form,
    activations,
    compiled,
    needs_gpu,
    ours,
    served,
)


class Shape(NamedTuple):
    """B rows, H heads, KV key-value heads, T tokens, D channels a head."""

    rows: int
    heads: int
    kv_heads: int
    tokens: int
    dim: int

    @property
    def grouped(self) -> bool:
        return self.heads != self.kv_heads


SHAPES = {
    "cuda": [
        Shape(96, 12, 12, 384, 64),
        Shape(48, 18, 6, 768, 64),
        Shape(16, 12, 12, 2048, 64),
    ],
    "cpu": [Shape(2, 4, 2, 32, 32)],
}
BASE = 10_000.0  # of the rotary angles

Mix = Callable[[Tensor, Tensor, Tensor], Tensor]  # q [B,H,T,D], k, v [B,KV,T,D] -> y [B,H,T,D]


def attention(device: torch.device, folder: Path) -> Iterable[Case]:
    """Packed qkv [B,T,(H+2KV)*D], gains, gate [B,T,H] -> [B,T,H*D].

    Least bytes: qkv read twice, its gradient written; y written and read, dy read.
    """
    for shape in SHAPES[device.type]:
        b, h, kv, t, d = shape
        inputs = _inputs(shape, device)
        qkv = inputs[0]
        numbers = 4 * qkv.numel() + 3 * b * t * h * d
        yield Case(
            kernel="attention",
            name=f"B {b}, H {h}, KV {kv}, T {t}, D {d}",
            inputs=inputs,
            forms=_forms(shape, device),
            reference=By(SDPBackend.MATH, Formula(shape, Sdpa(shape))),
            flops=6 * b * h * t * t * d,
            bytes=numbers * qkv.element_size(),
        )


def _inputs(shape: Shape, device: torch.device) -> tuple[Tensor, ...]:
    """qkv, gains of queries and keys, gate, cosines and sines [T,D/2]."""
    b, h, kv, t, d = shape
    dtype = activations(device)
    random = partial(torch.randn, device=device)
    qkv = random(b, t, (h + 2 * kv) * d, dtype=dtype)
    gate = 2 * random(b, t, h, dtype=dtype).sigmoid()
    gains = [1 + 0.1 * random(d) for _ in range(2)]
    channels = torch.arange(d // 2, device=device) / (d / 2)
    angles = torch.arange(t, device=device)[:, None] * BASE**-channels
    learned = [value.requires_grad_() for value in (qkv, *gains, gate)]
    return *learned, angles.cos(), angles.sin()


def _forms(shape: Shape, device: torch.device) -> dict[str, Callable[[], Form]]:
    cudnn = SDPBackend.CUDNN_ATTENTION
    sdpa = partial(_sdpa, shape, device)
    forms: dict[str, Callable[[], Form]] = {
        "torch, cuDNN SDPA": partial(sdpa, cudnn),
        "torch, flash SDPA": partial(sdpa, SDPBackend.FLASH_ATTENTION),
        "torch, SDPA as it chooses": partial(sdpa, None),
    }
    if shape.grouped:
        forms["torch, cuDNN SDPA, KV repeated"] = partial(sdpa, cudnn, repeated=True)
    forms["torch, FlexAttention"] = partial(_flex, shape, device)
    forms[OURS] = partial(_own, shape, device)
    return forms


class Formula:
    """QK-norm, rotary positions, `mix`, gate."""

    def __init__(self, shape: Shape, mix: Mix) -> None:
        self.shape = shape
        self.mix = mix

    def __call__(
        self,
        qkv: Tensor,
        q_gain: Tensor,
        k_gain: Tensor,
        gate: Tensor,
        cos: Tensor,
        sin: Tensor,
    ) -> Tensor:
        _, h, kv, _, d = self.shape
        packed = qkv.unflatten(-1, (h + 2 * kv, d))
        q, k, v = packed.split((h, kv, kv), dim=2)
        q, k = normalise(q, k, q_gain=q_gain, k_gain=k_gain, scale=1.0, eps=1e-6)
        q, k = rotate(q, k, 0, cos=cos, sin=sin)
        by_head = [x.transpose(1, 2) for x in (q, k, v)]
        y = self.mix(*by_head).transpose(1, 2)
        return (y * gate[..., None]).flatten(2)


class Sdpa:
    """torch's attention.

    repeated: keys and values are copied to every query head, for a backend that knows no groups.
    """

    def __init__(self, shape: Shape, repeated: bool = False) -> None:
        self.shape = shape
        self.repeated = repeated

    def __call__(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if self.repeated:
            group = self.shape.heads // self.shape.kv_heads
            k = k.repeat_interleave(group, dim=1)
            v = v.repeat_interleave(group, dim=1)
        grouped = self.shape.grouped and not self.repeated
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)


class By:
    """A call in which torch attends by one backend; None: as it chooses."""

    def __init__(self, backend: SDPBackend | None, call: Callable[..., Tensor]) -> None:
        self.backend = backend
        self.call = call

    def __call__(self, *given: Tensor) -> Tensor:
        with sdpa_kernel([self.backend]) if self.backend else nullcontext():
            return self.call(*given)


def _sdpa(
    shape: Shape,
    device: torch.device,
    backend: SDPBackend | None,
    repeated: bool = False,
) -> Form:
    if backend:
        needs_gpu(device)
    formula = Formula(shape, Sdpa(shape, repeated))
    # A graph keeps the backend under which it was traced, and is found again whatever is asked for now.
    torch.compiler.reset()
    return Form(By(backend, compiled(formula, device)))


def _flex(shape: Shape, device: torch.device) -> Form:
    needs_gpu(device)
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    t = shape.tokens
    mask = create_block_mask(_causal, None, None, t, t, device=device)
    mix = partial(flex_attention, block_mask=mask, enable_gqa=shape.grouped)
    return Form(compiled(Formula(shape, mix), device))


def _causal(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return query >= key


def _own(shape: Shape, device: torch.device) -> Form:
    fused = ours(device, "attention", "attention")
    serves = ours(device, "attention", "serves")
    _, h, kv, _, d = shape
    served(serves(d, activations(device), h, kv))

    def call(
        qkv: Tensor,
        q_gain: Tensor,
        k_gain: Tensor,
        gate: Tensor,
        cos: Tensor,
        sin: Tensor,
    ) -> Tensor:
        return fused(qkv, h, kv, cos, sin, q_gain, k_gain, gate=gate)

    return Form(call)
