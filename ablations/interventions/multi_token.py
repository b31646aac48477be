"""Multi-token prediction: the features of each token predict tokens further ahead as well.

    loss <- loss + weight * (1/ahead) * sum over k = 1..ahead of CE(read(P_k h_t), token t+1+k)

h: [B,T,W], what the readout reads; P_k: [W,W], role hidden; read: the model's own readout, with its factors and caps.
CE sums, as the cross-entropy does, over the positions whose target stands in the row, T - k of T; the step divides by
all its tokens.  `weight` is that of all k together, as in DeepSeek-V3, which trains with 0.3 for most of its tokens and
0.1 at the end.  There each depth is a transformer block that also reads the tokens between; here each k is one matrix
on h, independent of the others, as the linear heads of Gloeckle et al.

Reported losses stay plain next-token cross-entropy; evaluation and decoding never run P_k.  Each k costs one more
readout, in FLOPs and in the memory of its logits [B,T-k,V].
"""

from typing import Any

from ablab.core.errors import UserError
from ablab.core.language.declare import Stage, Where, linear
from ablab.core.language.numbers import NonNegative, Whole
from ablab.core.language.part import Part
from ablab.core.recipe.edit import append, edit
from ablab.core.recipe.intervention import register


@register(
    "multi_token",
    order=20,
    neutral_at_init=True,
    slots=("objective",),
    off="each position predicts the next token alone",
    source="Gloeckle et al., arXiv:2404.19737; "
    "weight, and mean over depths, of DeepSeek-V3, arXiv:2412.19437, section 2.2",
)
class MultiToken(Part):
    """Predict tokens beyond the next one from the same features, in training."""

    ahead: Whole = 1  # tokens beyond the next one
    weight: NonNegative = 0.3  # of them together, beside the next token's 1

    def apply(self, recipe):
        return edit(recipe, "objective", append(self))

    def build(self, where: Where) -> Stage:
        if self.ahead >= where.context:
            raise UserError(
                f"multi_token.ahead={self.ahead} has no target in a row of {where.context} tokens; "
                f"use at most {where.context - 1}"
            )
        width = where.width
        projections: dict[str, Any] = {
            f"project_{k}": linear(width, width) for k in range(1, self.ahead + 1)
        }
        return Stage(further, weight=self.weight / self.ahead, **projections)

    def readouts(self) -> int:
        return self.ahead


def further(features, logits, targets, read, *, weight, **projections):
    """features: [B,T,W], targets: int [B,T]; projections: of k = 1, 2, ... in their order -> nats, 0-D fp32."""
    from ablab.core.model.objective import token_losses

    nats = []
    for k, project in enumerate(projections.values(), 1):
        logits_ahead = read(project(features[:, :-k]))
        nats.append(token_losses(logits_ahead, targets[:, k:]).sum())
    return weight * sum(nats)
