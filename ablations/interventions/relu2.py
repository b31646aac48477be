"""Squared ReLU feed-forward: down(relu(up x)^2), 4x wide, as many parameters as SwiGLU at 8/3."""

from typing import Annotated

from msgspec import Meta

from ablab.core.blocks import hidden_width
from ablab.core.declare import Stage, Where, linear
from ablab.core.edit import edit, put
from ablab.core.intervention import register
from ablab.core.part import Part

Positive = Annotated[float, Meta(gt=0)]
Whole = Annotated[int, Meta(ge=1)]


@register(
    "relu2", order=10, slots=("model.ffn",),
    off="SwiGLU with the same number of parameters",
    source="So et al., arXiv:2109.08668 (Primer); nanochat and modded-nanogpt",
)  # fmt: skip
class ReLU2(Part):
    """Replace SwiGLU by a squared-ReLU feed-forward."""

    expansion: Positive = 4.0
    multiple: Whole = 64

    def apply(self, recipe):
        return edit(recipe, "model.ffn", put(self))

    def build(self, where: Where) -> Stage:
        hidden = hidden_width(where.width, self.expansion, self.multiple)
        return Stage(squared_relu, up=linear(where.width, hidden), down=linear(hidden, where.width))


def squared_relu(x, *, up, down):
    """x: [B,T,W] -> [B,T,W]."""
    return down(up(x).relu().square())
