"""Warm-up, stable, decay: a constant learning rate with a cooldown at the end.

    u = (t - 1 - (T - D)) / D in [0, 1) over the last D = decay_fraction * T steps
    1-sqrt: 1 - sqrt(u)   linear: 1 - u   cosine: (1 + cos(pi u)) / 2   power: (1 - u)^power (PowerCool: 1.2)

The last step is one above `floor`: u counts the steps before t, as public trainers do (core/parts/schedule.py).
With `idle_steps` nothing moves at first but the averages of the optimizer, as in IMU-1's first stage.
IMU-1's schedule ablation finds 20 % and 1-sqrt best.  The warm-up is that of the schedule it replaces.
"""

import math
from dataclasses import replace
from typing import Literal

from ablab.core.language.numbers import Positive, Steps, Unit
from ablab.core.language.part import Part, silent
from ablab.core.parts.schedule import fallen, warm
from ablab.core.recipe.edit import edit, put
from ablab.core.recipe.intervention import register


@register(
    "wsd",
    order=40,
    neutral_at_init=True,
    slots=("schedule",),
    crosses_late=True,
    off="the base recipe's schedule (cosine), with the same warm-up",
    source="Hu et al., arXiv:2404.06395; 1-sqrt after Haegele et al., arXiv:2405.18392; "
    "PowerCool from modded-nanogpt track 3",
)
class WSD(Part):
    """Hold the learning rate, then cool down."""

    decay_fraction: Unit = 0.2  # 0: no cooldown
    shape: Literal["1-sqrt", "linear", "cosine", "power"] = "1-sqrt"
    power: Positive = 1.2
    floor: Unit = 0.0
    warmup_steps: Steps | None = None  # null: that of the schedule it replaces
    idle_steps: Steps = silent(0)  # at a learning rate of 0, before the warm-up

    def apply(self, recipe):
        if self.warmup_steps is not None:
            return edit(recipe, "schedule", put(self))
        inherited = replace(self, warmup_steps=recipe.schedule.warmup_steps)
        return edit(recipe, "schedule", put(inherited))

    def multiplier(self, t: int, steps: int) -> float:
        return self.rise(t) * self.height(t, steps)

    def height(self, t: int, steps: int) -> float:
        """In [floor, 1]: without the rise."""
        left = self._fall(fallen(t, steps, self.decay_fraction * steps))
        return self.floor + (1 - self.floor) * left

    def rise(self, t: int) -> float:
        since = t - self.idle_steps
        return warm(since, self.warmup_steps or 0) if since > 0 else 0.0

    def _fall(self, u: float) -> float:
        shapes = {
            "1-sqrt": 1 - u**0.5,
            "linear": 1 - u,
            "cosine": (1 + math.cos(math.pi * u)) / 2,
            "power": (1 - u) ** self.power,
        }
        return shapes[self.shape]
