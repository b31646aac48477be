"""Tied head: one matrix is embedding and readout.

It starts and moves as an embedding does.  Under muP the logits are multiplied by base_width / width.
"""

from ablab.core.recipe.edit import edit, put
from ablab.core.recipe.intervention import register
from ablab.core.recipe.recipe import Recipe


@register(
    "tied_head",
    order=5,
    slots=("model.tied",),
    off="embedding and readout are two matrices",
    source="Press & Wolf, arXiv:1608.05859; IMU-1's settings tie them, and its released forward reads two "
    "(github.com/thepowerfuldeez/sample_efficient_gpt at d92a350, transformer/transformer.py)",
)
class TiedHead:
    """Read out with the embedding's own matrix."""

    def apply(self, recipe: Recipe) -> Recipe:
        return edit(recipe, "model.tied", put(True))
