"""LayerNorm scaling: the output of both norms of block l is divided by sqrt(l), blocks counted from 1.

The final norm is not scaled.  Not the same as starting the gain at 1/sqrt(l): that changes the gain's update size.
The authors advise against adding depth-scaled init.  Under QK-norm the scale survives only on values and MLP.
"""

from ablab.core.language.declare import Stage, Table, Where
from ablab.core.language.offers import Factor, only
from ablab.core.language.part import Part
from ablab.core.recipe.edit import append, edit
from ablab.core.recipe.intervention import register


@register(
    "ln_scaling",
    order=10,
    slots=("model.on_norm",),
    off="the norms of every block feed their branch at full scale",
    source="Sun et al., arXiv:2502.05795 (github.com/lmsdss/LayerNorm-Scaling, modeling_llama.py)",
)
class LayerNormScaling(Part):
    """Scale the pre-norms of block l by l^-power."""

    power: float = 0.5

    def apply(self, recipe):
        return edit(recipe, "model.on_norm", append(self))

    def build(self, where: Where) -> Stage | None:
        if where.layer == 0:
            return None
        table = Table(lambda: _factor(where.layer, self.power))
        return Stage(scale, offer=Factor(only("factor")), factor=table)


def scale(x, *, factor):
    """x: [..., C] times factor: fp32 [1], in fp32.

    A tensor, so that blocks which differ in it alone share a compiled graph.
    """
    return (x * factor).to(x.dtype)


def _factor(layer: int, power: float):
    import torch

    return torch.tensor([(layer + 1) ** -power])
