"""Truncated init: every drawn weight lies within `sigmas` standard deviations of 0.

    w ~ N(0, std^2) given |w| <= sigmas std

std is that of the parametrization that it finds, which it holds as its `base`; at 3 sigmas the drawn weights have
0.986 of it.  What the control draws within stays, bit for bit; only its tails, 0.27 %, are drawn again.
"""

from dataclasses import replace

from ablab.core.language.declare import Param
from ablab.core.language.numbers import Positive
from ablab.core.language.part import Part
from ablab.core.parts.parametrize import Multipliers, Scales, Sizes, Standard
from ablab.core.recipe.asks import Parametrizes
from ablab.core.recipe.edit import edit, put
from ablab.core.recipe.intervention import register
from ablab.core.recipe.recipe import Recipe


@register(
    "truncated_init",
    order=61,
    slots=("parametrization",),
    off="weights are drawn from the whole normal",
    source="github.com/thepowerfuldeez/sample_efficient_gpt at d92a350, transformer/core.py: 3 sigmas, "
    "std 1 / sqrt(fan_in), 1 / sqrt(width) for the embedding",
)
class TruncatedInit(Part):
    """Draw the first weights from a normal without its tails."""

    sigmas: Positive = 3.0
    base: Parametrizes | None = None  # all but the tails; null: the recipe's own

    def apply(self, recipe: Recipe) -> Recipe:
        based = replace(self, base=self.base or recipe.parametrization)
        return edit(recipe, "parametrization", put(based))

    def scales(self, name: str, param: Param, model: Sizes, rule: str) -> Scales:
        found = self._base.scales(name, param, model, rule)
        return replace(found, cut=self.sigmas) if found.std else found

    @property
    def _base(self) -> Parametrizes:
        return self.base or Standard()

    def multipliers(self, model: Sizes) -> Multipliers:
        return self._base.multipliers(model)
