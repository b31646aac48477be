"""The built-in parts of a block: rotary positions and the SwiGLU feed-forward.  Functions are pure."""

from typing import Annotated

from msgspec import Meta

from ablab.core.declare import Stage, Table, Where, fusable, linear
from ablab.core.part import Part, part

Positive = Annotated[float, Meta(gt=0)]
Whole = Annotated[int, Meta(ge=1)]


def rms_norm(x, *, gain, eps):
    """x / rms(x) * gain over the last axis, in fp32 inside.  x: [..., C]; gain: [C]; eps added to the mean square."""
    from torch.nn.functional import rms_norm

    return rms_norm(x, gain.shape, gain.to(x.dtype), eps)


@fusable("multiply")
def multiply(x, *, factor):
    return x * factor


@part("rope")
class Rope(Part):
    """Rotary positions, split-half layout: channel i turns with channel i + D/2.  Su et al., arXiv:2104.09864."""

    base: Positive = 10_000.0

    def build(self, where: Where) -> Stage:
        return Stage(
            rotate,
            cos=Table(lambda: _angles(where, self.base).cos()),
            sin=Table(lambda: _angles(where, self.base).sin()),
        )


def _angles(where: Where, base: float):
    """[context, D/2] angles position * base^(-2i/D), computed in fp64 (fp32 loses 1e-4 rad at position 1e3)."""
    import torch

    half = torch.arange(where.head_dim // 2, dtype=torch.float64)
    return torch.arange(where.context, dtype=torch.float64)[:, None] * base ** (-2 * half / where.head_dim)


@fusable("rope")
def rotate(q, k, start, *, cos, sin):
    """q: [B,T,H,D], k: [B,T,KV,D] at positions start..start+T-1.  Same shapes out."""
    span = slice(start, start + q.shape[1])
    cos, sin = cos[span, None].to(q.dtype), sin[span, None].to(q.dtype)
    return _turn(q, cos, sin), _turn(k, cos, sin)


def _turn(x, cos, sin):
    a, b = x.chunk(2, dim=-1)
    return _join(a * cos - b * sin, b * cos + a * sin)


def _join(a, b):
    import torch

    return torch.cat((a, b), dim=-1)


def hidden_width(width: int, expansion: float, multiple: int) -> int:
    """Feed-forward width: width * expansion to the nearest multiple (768 * 2.667 -> 2048)."""
    return max(round(width * expansion / multiple), 1) * multiple


@part("swiglu")
class SwiGLU(Part):
    """down(silu(gate x) * (up x)).  Shazeer, arXiv:2002.05202.  2.6667 keeps the parameters of a 4x ReLU block."""

    expansion: Positive = 2.6667
    multiple: Whole = 64

    def build(self, where: Where) -> Stage:
        hidden = hidden_width(where.width, self.expansion, self.multiple)
        return Stage(
            swiglu,
            gate_up=linear(where.width, 2 * hidden, blocks=(hidden, hidden)),
            down=linear(hidden, where.width),
        )


@fusable("swiglu")
def swiglu(x, *, gate_up, down):
    """x: [B,T,W] -> [B,T,W]."""
    from torch.nn.functional import silu

    gate, up = gate_up(x).chunk(2, dim=-1)
    return down(silu(gate) * up)
