"""Micro-steps: schedule and momentum count micro-batches, of which `count` make an optimizer step.

    i = count t - 1, the micro-batch (from 0) at which step t (from 1) moves the weights, of N = count T
    rise      0 for i < idle,  (i - idle) / warmup up to 1
    cooldown  u = (i - (N - D)) / D,  D = decay_fraction N,  as wsd's shapes
    momentum  min(i, warmup_steps - behind) / warmup_steps of its rise, with muon.warmup_behind = 1

So a warm-up of 2,500 is over after 1,250 steps.  As IMU-1's released code, where the iteration that all of them read
advances with every micro-batch and the weights move at every second one.
"""

from dataclasses import replace
from typing import Protocol, cast

from ablab.core.errors import UserError
from ablab.core.language.numbers import Whole
from ablab.core.language.part import Part
from ablab.core.parts.transforms import Momentum
from ablab.core.recipe.asks import Schedules
from ablab.core.recipe.edit import edit, put
from ablab.core.recipe.intervention import register
from ablab.core.recipe.recipe import Chain, Recipe


class RisesAndFalls(Protocol):
    """What is asked of the schedule: wsd's two factors."""

    def rise(self, t: int) -> float: ...

    def height(self, t: int, steps: int) -> float: ...


@register(
    "micro_steps",
    order=45,
    neutral_at_init=True,
    slots=("schedule", "optim.chains"),
    requires=("wsd", "muon"),
    off="the schedule and the rise of momentum count optimizer steps",
    source="github.com/thepowerfuldeez/sample_efficient_gpt at d92a350, training/trainer.py: train_step, _set_lr",
)
class MicroSteps(Part):
    """Count micro-batches, not optimizer steps, in the schedule and in the rise of momentum."""

    count: Whole = 2  # micro-batches an optimizer step
    base: Schedules | None = None  # the schedule that counts so; null: the recipe's own

    def apply(self, recipe: Recipe) -> Recipe:
        based = replace(self, base=self.base or recipe.schedule)
        if not hasattr(based.base, "rise"):
            raise UserError("micro_steps.base must be a wsd schedule; leave it null")
        chains = {role: self._counted(chain) for role, chain in recipe.optim.chains.items()}
        return edit(edit(recipe, "schedule", put(based)), "optim.chains", put(chains))

    def _counted(self, chain: Chain) -> Chain:
        steps = [
            replace(step, per_step=self.count) if isinstance(step, Momentum) else step
            for step in chain.steps
        ]
        return replace(chain, steps=tuple(steps))

    def multiplier(self, t: int, steps: int) -> float:
        base = cast(RisesAndFalls, self.base)
        counted = self.count * t
        return base.rise(counted - 1) * base.height(counted, self.count * steps)
