"""With replacement: each window of tokens begins anywhere in the text, drawn anew.

The control visits every window once an epoch, from a random phase.  Of n windows drawn so, 1/e are never read while
as many tokens as the text has go by.
"""

from ablab.core.recipe.edit import edit, put
from ablab.core.recipe.intervention import register
from ablab.core.recipe.recipe import Recipe


@register(
    "with_replacement",
    order=5,
    neutral_at_init=True,
    slots=("data.replacement",),
    off="every window is read once an epoch, in random order",
    source="github.com/thepowerfuldeez/sample_efficient_gpt at d92a350, training/data.py, torch.randint",
)
class WithReplacement:
    """Draw every window of tokens anew."""

    def apply(self, recipe: Recipe) -> Recipe:
        return edit(recipe, "data.replacement", put(True))
