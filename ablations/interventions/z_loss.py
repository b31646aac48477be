"""z-loss: keep the softmax normaliser near 1.

    loss = cross-entropy + weight * mean(logsumexp(logits)^2)

Reported losses stay plain cross-entropy.  Redundant with a soft cap.
"""

from ablab.core.language.declare import Stage, Where
from ablab.core.language.numbers import NonNegative
from ablab.core.language.offers import SquaredNormaliser, only
from ablab.core.language.part import Part
from ablab.core.recipe.edit import append, edit
from ablab.core.recipe.intervention import register


@register(
    "z_loss",
    order=20,
    neutral_at_init=True,
    slots=("objective",),
    off="cross-entropy alone",
    source="PaLM, arXiv:2204.02311, section 5; weight 1e-4",
)
class ZLoss(Part):
    """Penalise the squared log-normaliser of the logits."""

    weight: NonNegative = 1e-4

    def apply(self, recipe):
        return edit(recipe, "objective", append(self))

    def build(self, where: Where) -> Stage:
        offer = SquaredNormaliser(only("weight"))
        return Stage(squared_normaliser, offer=offer, weight=self.weight)


def squared_normaliser(features, logits, targets, read, *, weight):
    """logits: [B,T,V] -> nats, 0-D fp32."""
    lse = logits.float().logsumexp(-1)
    return (weight * lse.square()).sum()
