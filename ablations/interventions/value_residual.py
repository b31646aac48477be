"""Value residual: later layers mix in the first layer's raw values.

    normalised  V_l <- s (a V_l + b V_1) / sqrt(a^2 + b^2)   s, a, b learned, start (1, 1, 0): a no-op (IMU-1, eq. 4)
    learnable   V_l <- a V_l + b V_1                         a, b learned, start (0.5, 0.5)
    identity    the same, fixed at (0.5, 0.5)
    constant    the same, fixed at (1, 2)
    sparse      the same, fixed at (1, 5), in the last third of the layers alone, rounded up: 6 to 8 of 8, as the source

Layer 1 keeps its own values, untouched by any weight of the mix.  Mixed per key-value head, before the attention.
With first_layer `mixed` (normalised form alone) layer 1 mixes its values with themselves, by weights of its own, and
what it attends with is what later layers get: V_1 <- s (a + b) V_1 / sqrt(a^2 + b^2), as IMU-1's released code does.
"""

import math
from typing import Literal

from ablab.core.errors import UserError
from ablab.core.language.declare import Param, Stage, Where
from ablab.core.language.offers import Mixed, Remembered, only
from ablab.core.language.part import Part, silent
from ablab.core.recipe.edit import append, edit
from ablab.core.recipe.intervention import register

CARRIED = "first_values"  # of the carry
START = {
    "normalised": (1.0, 0.0),
    "learnable": (0.5, 0.5),
    "identity": (0.5, 0.5),
    "constant": (1.0, 2.0),
    "sparse": (1.0, 5.0),
}


@register(
    "value_residual",
    order=20,
    neutral_at_init=True,
    slots=("model.attention.on_values",),
    off="each layer attends with its own values only",
    source="Zhou et al., arXiv:2410.17897 (github.com/Zcchill/Value-Residual-Learning); "
    "normalised form of IMU-1, arXiv:2602.02522 eq. 4",
)
class ValueResidual(Part):
    """Mix the first layer's values into every later layer's."""

    form: Literal["normalised", "learnable", "identity", "constant", "sparse"] = "normalised"
    own: float | None = None  # start of a; null: as the form says
    first: float | None = None  # start of b
    first_layer: Literal["plain", "mixed"] = silent("plain")

    def apply(self, recipe):
        return edit(recipe, "model.attention.on_values", append(self))

    def build(self, where: Where) -> Stage | None:
        if self.first_layer == "mixed" and self.form != "normalised":
            raise UserError(
                f"value_residual.first_layer=mixed has no weights to mix by in the form {self.form}; "
                "use the form normalised"
            )
        if where.layer == 0 and self.first_layer == "plain":
            return Stage(remember, offer=Remembered(CARRIED))
        if self.form == "sparse" and where.layer < where.layers - math.ceil(where.layers / 3):
            return None
        own, first = START[self.form]
        own = own if self.own is None else self.own
        first = first if self.first is None else self.first
        plain = Mixed(CARRIED, only("own", "first"))
        if self.form in ("identity", "constant", "sparse"):
            return Stage(mix, offer=plain, own=own, first=first)
        learned = {"own": _number(own), "first": _number(first)}
        if self.form == "learnable":
            return Stage(mix, offer=plain, **learned)
        if where.layer == 0:
            own_start, first_start = _number(own), _number(first)
            return Stage(mix_and_remember, scale=_number(1.0), own=own_start, first=first_start)
        unit = Mixed(CARRIED, unit_weights)
        return Stage(mix_normalised, offer=unit, scale=_number(1.0), **learned)


def _number(start: float) -> Param:
    return Param((1,), "vector", fill=start)


def remember(v, carry):
    """v: [B,T,KV,D] of the first layer."""
    return v, {**carry, CARRIED: v}


def mix(v, carry, *, own, first):
    """fp32 weights on values of any dtype; the result keeps it (a [1] fp32 tensor would promote bf16)."""
    return (own * v + first * carry[CARRIED]).to(v.dtype), carry


def mix_normalised(v, carry, **bound):
    own, first = unit_weights(**bound)
    return mix(v, carry, own=own, first=first)


def mix_and_remember(v, carry, **bound):
    own, first = unit_weights(**bound)
    mixed = ((own + first) * v).to(v.dtype)
    return mixed, {**carry, CARRIED: mixed}


def unit_weights(*, scale, own, first):
    unit = scale * (own.square() + first.square()).rsqrt()
    return unit * own, unit * first
