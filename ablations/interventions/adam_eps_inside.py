"""Adam with its epsilon inside the bias correction, as torch had it before 1.3 and IMU-1's released code has it.

    m / (1 - b1^t) / ((sqrt(v) + eps) / sqrt(1 - b2^t))        the control adds eps to sqrt(v / (1 - b2^t))

The same for t -> infinity; at step 1 eps counts as 1 / sqrt(1 - b2) times itself: 10 times at b2 = 0.99.
"""

from dataclasses import replace

from ablab.core.errors import UserError
from ablab.core.language.part import part
from ablab.core.parts.transforms import Adam
from ablab.core.recipe.edit import edit, put
from ablab.core.recipe.intervention import register
from ablab.core.recipe.recipe import Chain, Recipe


@part("adam_inside")
class AdamInside(Adam):
    """Adam, eps added to the root of the uncorrected second moment."""

    def update(self, update, weight, state, bank, now):
        mean = state["mean"].lerp(update, 1 - self.beta1)
        square = state["square"].lerp(update.square(), 1 - self.beta2)
        root = (square.sqrt() + self.eps) / (1 - self.beta2**now.step).sqrt()
        return mean / root / (1 - self.beta1**now.step), {"mean": mean, "square": square}


@register(
    "adam_eps_inside",
    order=50,
    neutral_at_init=True,
    slots=("optim.chains",),
    off="epsilon is added after the bias correction of the second moment",
    source="github.com/thepowerfuldeez/sample_efficient_gpt at d92a350, training/optimizer.py:AdamW",
)
class AdamEpsInside:
    """Add Adam's epsilon before the bias correction."""

    def apply(self, recipe: Recipe) -> Recipe:
        chains = recipe.optim.chains
        steps = [step for chain in chains.values() for step in chain.steps]
        if not any(type(step) is Adam for step in steps):
            raise UserError(
                "adam_eps_inside needs an adam step to act on; "
                "give a chain one, or drop adam_eps_inside"
            )
        return edit(
            recipe, "optim.chains", put({role: _moved(chains[role]) for role in chains})
        )


def _moved(chain: Chain) -> Chain:
    steps = [
        AdamInside(step.beta1, step.beta2, step.eps) if type(step) is Adam else step
        for step in chain.steps
    ]
    return replace(chain, steps=tuple(steps))
