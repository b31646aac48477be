"""Squared ReLU feed-forward: down(relu(up x)^2), 4x wide, as many parameters as SwiGLU at 8/3."""

from ablab.core.language.declare import Stage, Where, linear
from ablab.core.language.numbers import Positive, Whole
from ablab.core.language.part import Part
from ablab.core.parts.feedforward import hidden_width
from ablab.core.recipe.edit import edit, put
from ablab.core.recipe.intervention import register


@register(
    "relu2",
    order=10,
    slots=("model.ffn",),
    off="SwiGLU with the same number of parameters",
    source="So et al., arXiv:2109.08668 (Primer); nanochat and modded-nanogpt",
)
class ReLU2(Part):
    """Replace SwiGLU by a squared-ReLU feed-forward."""

    expansion: Positive = 4.0
    multiple: Whole = 64

    def apply(self, recipe):
        return edit(recipe, "model.ffn", put(self))

    def build(self, where: Where) -> Stage:
        hidden = hidden_width(where.width, self.expansion, self.multiple)
        return Stage(
            squared_relu, up=linear(where.width, hidden), down=linear(hidden, where.width)
        )


def squared_relu(x, *, up, down):
    """x: [B,T,W] -> [B,T,W]."""
    return down(up(x).relu().square())
