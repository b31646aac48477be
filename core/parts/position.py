"""Rotary positions.  Functions are pure."""

from ablab.core.language.declare import Stage, Table, Where
from ablab.core.language.numbers import Positive
from ablab.core.language.offers import Turn, only
from ablab.core.language.part import Part, part


@part("rope")
class Rope(Part):
    """Rotary positions, split-half layout: channel i turns with channel i + D/2.  Su et al., arXiv:2104.09864."""

    base: Positive = 10_000.0

    def build(self, where: Where) -> Stage:
        return Stage(
            rotate,
            offer=Turn(only("cos", "sin")),
            cos=Table(lambda: angles(where.context, where.head_dim, self.base).cos()),
            sin=Table(lambda: angles(where.context, where.head_dim, self.base).sin()),
        )


def angles(context: int, channels: int, base: float):
    """[context, C/2] angles position * base^(-2i/C), computed in fp64 (fp32 loses 1e-4 rad at position 1e3)."""
    import torch

    channel = torch.arange(channels // 2, dtype=torch.float64)
    position = torch.arange(context, dtype=torch.float64)
    return position[:, None] * base ** (-2 * channel / channels)


def rotate(q, k, start, *, cos, sin):
    """q: [B,T,H,D], k: [B,T,KV,D] at positions start..start+T-1.  Same shapes out."""
    span = slice(start, start + q.shape[1])
    cos = cos[span, None].to(q.dtype)
    sin = sin[span, None].to(q.dtype)
    return _turn(q, cos, sin), _turn(k, cos, sin)


def _turn(x, cos, sin):
    from torch import cat

    a, b = x.chunk(2, dim=-1)
    return cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
