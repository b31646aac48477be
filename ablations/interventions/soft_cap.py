"""Soft cap: logits are squashed into (-cap, cap).

tanh: cap * tanh(z / cap)      rational: cap * z / sqrt(z^2 + cap^2)
"""

from typing import Literal

from ablab.core.language.declare import Stage, Where
from ablab.core.language.numbers import Positive
from ablab.core.language.offers import LogitCap, only
from ablab.core.language.part import Part
from ablab.core.recipe.edit import append, edit
from ablab.core.recipe.intervention import register


@register(
    "soft_cap",
    order=20,
    slots=("model.on_logits",),
    off="unbounded logits",
    source="Gemma 2, arXiv:2408.00118; cap 15 as modded-nanogpt (30, then 15), rational form from modded-nanogpt",
)
class SoftCap(Part):
    """Bound the logits smoothly."""

    cap: Positive = 15.0
    form: Literal["tanh", "rational"] = "tanh"

    def apply(self, recipe):
        return edit(recipe, "model.on_logits", append(self))

    def build(self, where: Where) -> Stage:
        squash = {"tanh": tanh, "rational": rational}[self.form]
        return Stage(squash, offer=LogitCap(self.form, only("cap")), cap=self.cap)


def tanh(logits, *, cap):
    return cap * (logits / cap).tanh()


def rational(logits, *, cap):
    return cap * logits * (logits.square() + cap * cap).rsqrt()
