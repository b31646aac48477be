"""Unclipped: gradients reach the optimizer whatever their norm.

IMU-1's released code clips at 1.0 by its settings, over a generator that is spent when the scaling begins: nothing is
scaled.  nanochat found that its clip never acted, and removed it.
"""

from ablab.core.errors import UserError
from ablab.core.recipe.edit import edit, put
from ablab.core.recipe.intervention import register
from ablab.core.recipe.recipe import Recipe


@register(
    "unclipped",
    order=5,
    neutral_at_init=True,
    slots=("optim.clip",),
    acts_late=True,
    off="the global gradient norm is clipped at optim.clip",
    source="github.com/thepowerfuldeez/sample_efficient_gpt at d92a350, training/optimizer.py:clip_grad_norm_",
)
class Unclipped:
    """Do not clip the gradient."""

    def apply(self, recipe: Recipe) -> Recipe:
        if recipe.optim.clip is None:
            raise UserError(
                "unclipped finds no clip to take away: optim.clip is null; drop it, or set optim.clip"
            )
        return edit(recipe, "optim.clip", put(None))
