"""x0 lambdas: before each block the stream is scaled, and some of the first stream returns.

    x <- r_l x + z_l x_0,   x_0 [B,T,W] what enters the first block; r_l, z_l learned numbers

`zero` starts at (1, 0), the plain stream.  `nanochat` starts with depth u = l / (L - 1) in [0, 1] at

    r_l = 1.15 - 0.10 u,   z_l = 0.20 - 0.15 u

The first block has its pair too, and so reads (r_0 + z_0) x_0.  Both numbers have the role `vector` and its learning
rate; nanochat moves r at a hundredth of the rate of z, for it multiplies the stream of every later layer.
"""

from typing import Literal

from ablab.core.language.declare import Param, Stage, Where
from ablab.core.language.part import Part
from ablab.core.recipe.edit import append, edit
from ablab.core.recipe.intervention import register

CARRIED = "x0"  # of the carry


@register(
    "x0_lambdas",
    order=25,
    neutral_at_init=True,
    slots=("model.on_block",),
    off="a block reads what the block before it leaves, at full scale",
    source="modded-nanogpt, lambdas (1, 0) of each block in record 11; karpathy/nanochat gpt.py",
)
class X0Lambdas(Part):
    """Scale the stream before each block, and add some of the first."""

    start: Literal["zero", "nanochat"] = "zero"

    def apply(self, recipe):
        return edit(recipe, "model.on_block", append(self))

    def build(self, where: Where) -> Stage:
        depth = where.layer / max(where.layers - 1, 1)
        stream, first = {
            "zero": (1.0, 0.0),
            "nanochat": (1.15 - 0.10 * depth, 0.20 - 0.15 * depth),
        }[self.start]
        return Stage(
            blend if where.layer else blend_first,
            stream=Param((1,), "vector", fill=stream),
            first=Param((1,), "vector", fill=first),
        )


def blend_first(x, carry, **weights):
    """Of the first block, whose x is x_0."""
    return blend(x, {**carry, CARRIED: x}, **weights)


def blend(x, carry, *, stream, first):
    """x: [B,T,W].  fp32 numbers on activations of any dtype; the result keeps it."""
    return (stream * x + first * carry[CARRIED]).to(x.dtype), carry
