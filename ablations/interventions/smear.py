"""Smear: each token's row of the table takes in a gated share of the row before it.

    x_t <- x_t + lambda sigmoid(W x_t[:channels]) x_{t-1},   the first token unchanged

x [B,T,W] as it leaves the embedding, x_{t-1} before it was smeared itself; lambda one learned number, W [1, channels].
With lambda = 0 nothing is smeared at the start; W moves once lambda has left 0.  W starts `normal`, with the std of its
parametrization (nanochat: uniform in 0..0.02), or at `zero` (modded-nanogpt, 12 channels).  Rows of the table are not
normalised before; in nanochat they are.
"""

from typing import Literal

from ablab.core.errors import UserError
from ablab.core.language.declare import Param, Stage, Where, linear
from ablab.core.language.numbers import Whole
from ablab.core.language.part import Part
from ablab.core.recipe.edit import append, edit
from ablab.core.recipe.intervention import register

BEFORE = "past/smear"  # of the carry: the last x that was seen, [B,1,W]


@register(
    "smear",
    order=20,
    neutral_at_init=True,
    slots=("model.on_embedding",),
    off="a token enters the first block with its own row of the table alone",
    source="modded-nanogpt record 34 (github.com/KellerJordan/modded-nanogpt, train_gpt.py); "
    "24 channels as nanochat (github.com/karpathy/nanochat, gpt.py)",
)
class Smear(Part):
    """Add a gated share of the token before to each token's embedding."""

    channels: Whole = 24  # of x that the gate reads
    start: float = 0.0  # of lambda
    init: Literal["normal", "zero"] = "normal"  # of W

    def apply(self, recipe):
        return edit(recipe, "model.on_embedding", append(self))

    def build(self, where: Where) -> Stage:
        if self.channels > where.width:
            raise UserError(
                f"smear.channels={self.channels} exceeds the width of {where.width}; "
                f"use at most {where.width}"
            )
        fill = 0.0 if self.init == "zero" else None
        return Stage(
            smear,
            strength=Param((1,), "vector", fill=self.start),
            gate=linear(self.channels, 1, role="gate", fill=fill),
            channels=self.channels,
        )


def smear(x, tokens, carry, *, strength, gate, channels):
    """x: [B,T,W] -> [B,T,W]; before the very first token stands 0."""
    from torch import cat, zeros_like

    last = carry.get(BEFORE)
    last = zeros_like(x[:, :1]) if last is None else last
    before = cat((last, x[:, :-1]), dim=1)
    share = strength.to(x.dtype) * gate(x[..., :channels]).sigmoid()
    return x + share * before, {**carry, BEFORE: x[:, -1:]}
