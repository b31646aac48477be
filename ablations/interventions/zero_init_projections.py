"""Zero-init projections: every block starts as the identity.

    attention `out` [W, H D] and feed-forward `down` [W, F] start at 0; with `readout` so does the readout [V, W]

At step 0 the residual stream is the embedding, and of a block only the two projections get a gradient; what stands
before them moves from step 1 on.  Learning rates, decay and multipliers are those of the parametrization that it finds,
the standard one or muP: it holds that one as its `base`.  With `readout` the first loss is ln(vocab).
"""

from dataclasses import replace

from ablab.core.errors import UserError
from ablab.core.language.declare import Param
from ablab.core.language.part import Part
from ablab.core.parts.parametrize import Multipliers, Scales, Sizes, Standard
from ablab.core.recipe.asks import Parametrizes
from ablab.core.recipe.edit import edit, put
from ablab.core.recipe.intervention import register
from ablab.core.recipe.recipe import Recipe

PROJECTIONS = (".attention.out.weight", ".ffn.inner.down.weight")  # ends of dotted names


@register(
    "zero_init_projections",
    order=60,
    slots=("parametrization",),
    off="the projections start as the parametrization draws every hidden matrix, std 1 / sqrt(fan_in)",
    source="modded-nanogpt record 5; Zhang et al., arXiv:1901.09321 (Fixup); "
    "zero readout after Yang et al., arXiv:2203.03466, appendix D.2",
)
class ZeroInitProjections(Part):
    """Start the output projections of both branches at zero."""

    readout: bool = False
    base: Parametrizes | None = None  # all but the zeros; null: the recipe's own

    def apply(self, recipe: Recipe) -> Recipe:
        if self.readout and recipe.model.tied:
            raise UserError(
                "zero_init_projections.readout=true has no readout to act on: the head is tied; "
                "drop it, or set model.tied=false"
            )
        based = replace(self, base=self.base or recipe.parametrization)
        return edit(recipe, "parametrization", put(based))

    def scales(self, name: str, param: Param, model: Sizes, rule: str) -> Scales:
        found = self._base.scales(name, param, model, rule)
        return replace(found, std=0.0) if self._starts_at_zero(name, param) else found

    def _starts_at_zero(self, name: str, param: Param) -> bool:
        return name.endswith(PROJECTIONS) or (self.readout and param.role == "readout")

    @property
    def _base(self) -> Parametrizes:
        return self.base or Standard()

    def multipliers(self, model: Sizes) -> Multipliers:
        return self._base.multipliers(model)
