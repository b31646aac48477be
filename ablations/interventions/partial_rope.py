"""Partial rotary positions: a share of a head's D channels turns, the rest carries no position.

    leading         the first R = fraction D channels turn, i with i + R/2, by the angles t base^(-2i/R): RoPE's whole
                    range of speeds, on fewer channels (GPT-J, R = 64 of 256; GPT-NeoX, a quarter)
    half_truncate   i turns with i + D/2 over the whole head, by RoPE's own angles t base^(-2i/D) for i < R/2, and by
                    0 beyond: the slow ones are cut off (modded-nanogpt, a half)

modded-nanogpt keeps speeds of 1024^(-i / (D/4 - 1)), which at base 1024^2 are these but for the -1.  At fraction 1
both are RoPE bit for bit.  `half_truncate` differs in its tables alone, so that a kernel which turns still serves.
"""

from dataclasses import replace
from typing import Literal

from ablab.core.errors import UserError
from ablab.core.language.declare import Stage, Table, Where
from ablab.core.language.numbers import Positive, Share
from ablab.core.language.offers import Turn, TurnLeading, only
from ablab.core.language.part import Part
from ablab.core.parts.position import Rope, angles, rotate
from ablab.core.recipe.edit import edit, put
from ablab.core.recipe.intervention import register


@register(
    "partial_rope",
    order=20,
    slots=("model.attention.position",),
    off="every channel of a head turns with its position",
    source="GPT-J (github.com/kingoflolz/mesh-transformer-jax); GPT-NeoX, arXiv:2204.06745; "
    "half_truncate after modded-nanogpt (github.com/KellerJordan/modded-nanogpt, train_gpt.py)",
)
class PartialRope(Part):
    """Turn only some channels of each head."""

    fraction: Share = 0.5  # of a head's channels
    form: Literal["leading", "half_truncate"] = "leading"
    base: Positive | None = None  # null: that of the positions it replaces

    def apply(self, recipe):
        replaced = recipe.model.attention.position
        inherited = self.base or getattr(replaced, "base", Rope.base)
        return edit(recipe, "model.attention.position", put(replace(self, base=inherited)))

    def build(self, where: Where) -> Stage:
        pairs = self._pairs(where.head_dim)
        channels = 2 * pairs if self.form == "leading" else where.head_dim
        size = (where.context, channels, self.base or Rope.base, pairs)
        cos = Table(lambda: moving_angles(*size).cos())
        sin = Table(lambda: moving_angles(*size).sin())
        if channels == where.head_dim:
            return Stage(rotate, offer=Turn(only("cos", "sin")), cos=cos, sin=sin)
        return Stage(rotate_leading, offer=TurnLeading(only("cos", "sin")), cos=cos, sin=sin)

    def _pairs(self, head_dim: int) -> int:
        """Pairs of channels that turn."""
        asked = self.fraction * head_dim / 2
        pairs = round(asked)
        if pairs < 1 or abs(pairs - asked) > 1e-3:
            nearest = 2 * max(pairs, 1) / head_dim
            raise UserError(
                f"partial_rope.fraction={self.fraction:g} is {2 * asked:g} channels of {head_dim}, "
                f"and they turn in pairs; nearest: {nearest:g}"
            )
        return pairs


def moving_angles(context: int, channels: int, base: float, pairs: int):
    """RoPE's angles [context, C/2], of which only the first `pairs` move."""
    made = angles(context, channels, base)
    made[:, pairs:] = 0
    return made


def rotate_leading(q, k, start, *, cos, sin):
    """q: [B,T,H,D], k: [B,T,KV,D] at positions start..start+T-1; cos, sin: [context, R/2].  Same shapes out."""
    from torch import cat

    turned = 2 * cos.shape[-1]
    q_turned, k_turned = rotate(q[..., :turned], k[..., :turned], start, cos=cos, sin=sin)
    q = cat((q_turned, q[..., turned:]), dim=-1)
    k = cat((k_turned, k[..., turned:]), dim=-1)
    return q, k
