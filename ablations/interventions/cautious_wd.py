"""Cautious weight decay: decay only the coordinates that the update already moves towards zero.

    x <- x - lr (u + rate * 1[u x >= 0] * x),   u the final direction after momentum, orthogonalisation and scaling

The control is the very Decay that stands in the chain, with the same rate and schedule; about half of the coordinates
decay, so compare with half the rate too.  Mid-run losses are worse until the cooldown: never stop this arm early.
"""

from dataclasses import replace
from typing import Literal

from ablab.core.errors import UserError
from ablab.core.language.offers import Decays, offers
from ablab.core.language.part import part
from ablab.core.parts.transforms import Decay
from ablab.core.recipe.edit import edit, put
from ablab.core.recipe.intervention import register


@part("cautious_decay")
class CautiousDecay(Decay):
    """Decay under a sign mask.

    ties: coordinates whose update or weight is exactly 0 decay too (paper), or not (modded Adam).
    """

    ties: bool = True

    @property
    def mask(self) -> Literal["cautious", "strictly cautious"]:
        return "cautious" if self.ties else "strictly cautious"

    @offers(lambda decay: Decays(decay.mask, decay.strength))
    def update(self, update, weight, state, bank, now):
        agreement = update * weight
        mask = agreement >= 0 if self.ties else agreement > 0
        return update + self.strength(bank, now) * (weight * mask), {}


@register(
    "cautious_wd",
    order=50,
    neutral_at_init=True,
    slots=("optim.chains",),
    crosses_late=True,
    off="ordinary decoupled decay with the same rate and schedule",
    source="Chen et al., arXiv:2510.12402, algorithm 1; mask before the step, base learning rate, as Dion",
)
class CautiousWD:
    """Mask every weight decay by the sign of the update."""

    ties: bool = True

    def apply(self, recipe):
        chains = recipe.optim.chains
        steps = [step for chain in chains.values() for step in chain.steps]
        if not any(isinstance(step, Decay) for step in steps):
            raise UserError(
                "cautious_wd needs a weight decay to act on; "
                "give a chain a decay step, or drop cautious_wd"
            )
        masked = {role: self._masked(chain) for role, chain in chains.items()}
        return edit(recipe, "optim.chains", put(masked))

    def _masked(self, chain):
        steps = [
            CautiousDecay(step.rate, step.schedule, self.ties)
            if isinstance(step, Decay)
            else step
            for step in chain.steps
        ]
        return replace(chain, steps=tuple(steps))
