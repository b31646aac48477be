"""Learning-rate schedules: pure functions of the optimizer step.  Step t runs from 1 to `steps`; result in [0, 1].

A rise counts the step itself, a fall the steps before it:

    warm-up  t / warmup                   the first step is at 1 / warmup
    fall     u = (t - 1 - start) / length the last step is one step above the end of the curve

so no step has a learning rate of 0, whatever the floor, and every step of a run changes the weights.  As nanochat
(scripts/base_train.py, get_lr_multiplier, iteration from 0: (it + 1) / warmup, (iterations - it) / warmdown) and
modded-nanogpt (train_gpt.py, get_lr, step from 0: (step - start) / length).
"""

import math

from ablab.core.language.numbers import Steps, Unit
from ablab.core.language.part import Part, part


def warm(t: int, warmup_steps: int) -> float:
    """Linear rise: t / warmup, then 1."""
    return min(t / warmup_steps, 1.0) if warmup_steps else 1.0


def fallen(t: int, steps: int, length: float) -> float:
    """The share of a fall over the last `length` steps that lies before step t: 0 at its first step, 1 past the run."""
    if t > steps:
        return 1.0
    ahead = min(steps - t + 1, length)
    return 1 - ahead / length if length else 0.0


@part("constant")
class Constant(Part):
    warmup_steps: Steps = 0

    def multiplier(self, t: int, steps: int) -> float:
        return warm(t, self.warmup_steps)


@part("cosine")
class Cosine(Part):
    """Half a cosine from 1 after the warm-up to `floor`, which the step behind the last would have.

    Loshchilov & Hutter, arXiv:1608.03983.
    """

    warmup_steps: Steps = 100
    floor: Unit = 0.1

    def multiplier(self, t: int, steps: int) -> float:
        angle = math.pi * fallen(t, steps, steps - self.warmup_steps)
        height = (1 + math.cos(angle)) / 2
        return warm(t, self.warmup_steps) * (self.floor + (1 - self.floor) * height)
