"""Weight averaging: the model is evaluated with an average of its weights; training itself does not change.

    online   after every step, A <- A + (W - A) / min(horizon, steps since start); read out (1 - mix) W + mix A
    posthoc  over `checkpoints` snapshots W_1..W_K, evenly spaced over the last `span` of the run:
             A = beta^(K-1) W_1 + sum_j>1 (1-beta) beta^(K-j) W_j        (IMU-1: K = 10, beta = 0.8)
             bias_corrected: weights (1-beta) beta^(K-j) / (1 - beta^K)

Held-out metrics are those of the average; those of the raw weights are recorded as raw/val/*.  Substitutes for decay of
the learning rate: compare both.
"""

from typing import Literal

from ablab.core.language.numbers import Memory, SomeSteps, Unit, Whole
from ablab.core.language.part import Part
from ablab.core.recipe.edit import append, edit
from ablab.core.recipe.intervention import register


@register(
    "ema",
    order=40,
    neutral_at_init=True,
    slots=("after_step",),
    crosses_late=True,
    off="evaluation with the weights as trained",
    source="IMU-1, arXiv:2602.02522 (post-hoc); modded-nanogpt track 3 record 45 (online, mix 0.6, horizon 150)",
)
class EMA(Part):
    """Evaluate with an exponential average of the weights."""

    mode: Literal["online", "posthoc"] = "online"
    horizon: SomeSteps = 150  # optimizer steps
    start: Memory = 0.0  # fraction of the run before which the average just follows
    mix: Unit = 1.0
    checkpoints: Whole = 10
    beta: Memory = 0.8
    span: Unit = 0.2
    bias_corrected: bool = False

    def apply(self, recipe):
        return edit(recipe, "after_step", append(self))

    def begin(self, weights) -> dict:
        return {f"average{i}": weight.clone() for i, weight in enumerate(weights)}

    def advance(self, state, weights, t: int, steps: int) -> None:
        """Take the weights after optimizer step t (from 1) of `steps` into the average, in fp32."""
        rate = self.rate(t, steps)
        if rate > 0:
            for average, weight in zip(state.values(), weights, strict=True):
                average.lerp_(weight, rate)

    def rate(self, t: int, steps: int) -> float:
        """How far the average moves towards the weights at step t; 0: not at all, 1: it becomes them."""
        if self.mode == "online":
            since_start = max(t - round(self.start * steps), 1)
            return max(1 / self.horizon, 1 / since_start)
        snapshots = self.snapshots(steps)
        if t <= snapshots[0]:
            return 1.0
        if t not in snapshots:
            return 0.0
        taken = snapshots.index(t) + 1
        return (1 - self.beta) / (1 - self.beta**taken if self.bias_corrected else 1)

    def snapshots(self, steps: int) -> list[int]:
        spacing = self.span * steps / self.checkpoints
        planned = [round(steps - spacing * back) for back in range(self.checkpoints)]
        return sorted({max(step, 1) for step in planned})

    def readout(self, state, weights) -> list:
        pairs = zip(weights, state.values(), strict=True)
        return [weight.lerp(average, self.mix) for weight, average in pairs]
