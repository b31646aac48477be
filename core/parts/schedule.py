"""Learning-rate schedules: pure functions of the optimizer step.  Step t runs from 1 to `steps`; result in [0, 1]."""

import math

from ablab.core.language.numbers import Natural, Unit
from ablab.core.language.part import Part, part


def warm(t: int, warmup_steps: int) -> float:
    """Linear rise: t / warmup, then 1."""
    return min(t / warmup_steps, 1.0) if warmup_steps else 1.0


@part("constant")
class Constant(Part):
    warmup_steps: Natural = 0

    def multiplier(self, t: int, steps: int) -> float:
        return warm(t, self.warmup_steps)


@part("cosine")
class Cosine(Part):
    """Half a cosine from 1 at the end of the warm-up to `floor` at the last step.

    Loshchilov & Hutter, arXiv:1608.03983.
    """

    warmup_steps: Natural = 100
    floor: Unit = 0.1

    def multiplier(self, t: int, steps: int) -> float:
        falling = max(steps - self.warmup_steps, 1)
        done = min(max(t - self.warmup_steps, 0) / falling, 1.0)
        height = (1 + math.cos(math.pi * done)) / 2
        return warm(t, self.warmup_steps) * (self.floor + (1 - self.floor) * height)
