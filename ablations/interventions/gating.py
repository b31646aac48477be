"""Attention output gate: each head's output is scaled by a function of the block's normed input.

    y_h <- f * sigmoid(W_g x)_h * y_h,   f = 2 (`2sigmoid`) or 1 (`sigmoid`)

per `head` (one number a head), `elementwise` (one a channel) or `first_channels` (one a head, read from the first
`channels` channels of x; 0 means head_dim, 12 is modded-nanogpt's sparse gate).  With W_g = 0 and 2 sigmoid the gate
is exactly 1 at the start.  W_g has the role `gate`: AdamW without decay, never Muon, whose row rule would
normalise a [heads, width] gate per input channel.
"""

from typing import Literal

from ablab.core.errors import UserError
from ablab.core.language.declare import Stage, Where, linear
from ablab.core.language.numbers import Natural
from ablab.core.language.offers import HeadFactors
from ablab.core.language.part import Part, silent
from ablab.core.recipe.edit import append, edit
from ablab.core.recipe.intervention import register


@register(
    "gating",
    order=20,
    neutral_at_init=True,
    slots=("model.attention.on_heads",),
    off="head outputs go to the output projection unscaled",
    source="Qiu et al., arXiv:2505.06708, position G1; "
    "2 sigmoid and zero init as IMU-1 (arXiv:2602.02522, eq. 3) and modded-nanogpt",
)
class Gating(Part):
    """Scale each head's output by a sigmoid of the block's input."""

    per: Literal["head", "elementwise", "first_channels"] = "head"
    activation: Literal["sigmoid", "2sigmoid"] = "2sigmoid"
    init: Literal["zero", "normal"] = "zero"
    channels: Natural = 0
    # `hidden`: moved as the hidden matrices are, which IMU-1's released code does
    role: Literal["gate", "hidden"] = silent("gate")

    def apply(self, recipe):
        return edit(recipe, "model.attention.on_heads", append(self))

    def build(self, where: Where) -> Stage:
        read = where.width
        if self.per == "first_channels":
            read = self.channels or where.head_dim
        if read > where.width:
            raise UserError(
                f"gating.channels={read} exceeds the width of {where.width}; "
                f"use at most {where.width}"
            )
        gates = where.heads * (where.head_dim if self.per == "elementwise" else 1)
        start = 0.0 if self.init == "zero" else None
        return Stage(
            gate,
            offer=HeadFactors(strengths, gates),
            project=linear(read, gates, role=self.role, fill=start),
            factor={"sigmoid": 1.0, "2sigmoid": 2.0}[self.activation],
            channels=read,
        )


def gate(y, x, **bound):
    """y: [B,T,H,D], x: [B,T,W] -> [B,T,H,D]."""
    return y * strengths(x, **bound).unflatten(-1, (y.shape[2], -1))


def strengths(x, *, project, factor, channels):
    """x: [B,T,W] -> what each head, or each channel of the heads, is multiplied by [B,T,gates]."""
    return project(x[..., :channels]).sigmoid() * factor
