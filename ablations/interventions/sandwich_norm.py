"""Sandwich norm: what a branch returns is normalised too, before the stream takes it.

    x <- x + norm(attention(x)),   x <- x + norm(ffn(x)),   norm(y) = gain * branch * y / rms(y)       x, y: [B,T,W]

A learned gain [W] a branch, start `gain`; the norms at the entry of the branches stay.  rms(x) grows by at most `gain`
a branch, whatever the weights; a plain pre-norm stream has no bound.

Positive factors inside a branch are divided out, to within the norm's eps: those of layer-norm scaling on values and on
homogeneous feed-forwards such as ReLU^2, and the init scale of output projections.  The parametrization's factor on a
branch, `branch` (muP's depth rule), is applied after the norm instead.
"""

from ablab.core.language.declare import Param, Stage, Where
from ablab.core.language.numbers import NonNegative
from ablab.core.language.part import Part
from ablab.core.parts.norm import rms_norm
from ablab.core.recipe.edit import edit, put
from ablab.core.recipe.intervention import register


@register(
    "sandwich_norm",
    order=20,
    slots=("model.block",),
    off="each branch's output is added to the stream as it is",
    source="Ding et al., CogView (Sandwich-LN), arXiv:2105.13290; "
    "Kim et al., Peri-LN, arXiv:2502.02732",
)
class SandwichNorm(Part):
    """Normalise each branch's output before it is added to the stream."""

    gain: NonNegative = 1.0  # start of the learned gains; 0: an identity that learns

    def apply(self, recipe):
        return edit(recipe, "model.block", put(self))

    def build(self, where: Where) -> Stage:
        gain = Param((where.width,), "vector", fill=self.gain)
        return Stage(
            sandwich,
            after_attention=gain,
            after_ffn=gain,
            branch=where.branch,
            eps=where.eps,
        )


def sandwich(x, carry, attention, ffn, *, after_attention, after_ffn, branch, eps):
    """x: [B,T,W]; attention: (x, carry) -> y [B,T,W], carry; ffn: x -> y [B,T,W].  Returns x, carry."""
    y, carry = attention(x, carry)
    x = x + rms_norm(y, gain=after_attention * branch, eps=eps)
    return x + rms_norm(ffn(x), gain=after_ffn * branch, eps=eps), carry
