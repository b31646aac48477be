"""QK-norm: queries and keys are scaled to unit RMS per head before they meet.

    q <- rms(q) * g_q * scale,   k <- rms(k) * g_k,   over the D channels of a head, before the positions are applied

gain `channel` (Qwen3: a vector each for q and k, shared by the heads), `scalar` (one learned number on q) or `none`
(modded-nanogpt, nanochat).  The last two commute with rotary positions, the first does not.  `scale` multiplies the
logits on top of 1/sqrt(D): nanochat 1.44, modded-nanogpt 1.358 at D = 128.
"""

from typing import Literal

from ablab.core.language.declare import Param, Stage, Where
from ablab.core.language.numbers import Positive
from ablab.core.language.offers import QKGains
from ablab.core.language.part import Part
from ablab.core.recipe.edit import append, edit
from ablab.core.recipe.intervention import register


@register(
    "qk_norm",
    order=10,
    slots=("model.attention.on_qk",),
    off="queries and keys meet as projected, logits scaled by 1/sqrt(head_dim)",
    source="Henry et al., arXiv:2010.04245; "
    "per-channel form of Qwen3 (github.com/qiuzh20/gated_attention, modeling_qwen3.py)",
)
class QKNorm(Part):
    """Normalise queries and keys per head, with a learned gain."""

    gain: Literal["channel", "scalar", "none"] = "channel"
    scale: Positive = 1.0
    eps: Positive = 1e-6

    def apply(self, recipe):
        return edit(recipe, "model.attention.on_qk", append(self))

    def build(self, where: Where) -> Stage:
        number = Param((1,), "vector", fill=1.0)
        vector = Param((where.head_dim,), "vector", fill=1.0)
        starts = {"channel": (vector, vector), "scalar": (number, 1.0), "none": (1.0, 1.0)}
        q_gain, k_gain = starts[self.gain]
        return Stage(
            normalise,
            offer=QKGains(gains),
            q_gain=q_gain,
            k_gain=k_gain,
            scale=self.scale,
            eps=self.eps,
        )


def normalise(q, k, **bound):
    """q: [B,T,H,D], k: [B,T,KV,D]; gains: [D], [1] or a number.  fp32 inside."""
    q_gain, k_gain, eps = gains(**bound)
    return _unit(q, eps, q_gain), _unit(k, eps, k_gain)


def gains(*, q_gain, k_gain, scale, eps):
    return q_gain * scale, k_gain, eps


def _unit(x, eps, gain):
    wide = x.float()
    mean_square = wide.square().mean(-1, keepdim=True)
    return (wide * (mean_square + eps).rsqrt() * gain).to(x.dtype)
