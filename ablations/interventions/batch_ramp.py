"""Batch ramp: steps begin small and grow to the full batch.

    n stages; stage i (from 1) takes stages[i] * data.batch rows a step
    and lasts until i / n * until of the budget's tokens; the last one lasts to the end

Every window of tokens is seen once an epoch, in the order of the control: only where one step ends and the next begins
differs.  The gradient is the mean over the step's own tokens, and the learning rate does not know of the rows: small
steps move the weights as far as full ones.  (modded-nanogpt multiplies it by 1.52 and 1.73 in its stages of 16 and 24;
`optim.lr` is to be tuned for each arm.)  There are more optimizer steps than in the control, over which the schedule
stretches; a micro-batch is at most the greatest common divisor of all stages' rows.
"""

from collections.abc import Iterator
from itertools import pairwise

from ablab.core.errors import UserError
from ablab.core.language.numbers import Share
from ablab.core.language.part import Part
from ablab.core.parts.shape import Phase
from ablab.core.recipe.edit import edit, put
from ablab.core.recipe.intervention import register
from ablab.core.recipe.recipe import Recipe


@register(
    "batch_ramp",
    order=10,
    neutral_at_init=True,
    slots=("data.shape",),
    off="data.batch rows in every step, over the same tokens in the same order",
    source="Smith et al., arXiv:1711.00489; modded-nanogpt record 46, train_gpt.py: "
    "8, 16, 24 times 16,384 tokens over equal thirds of the steps",
)
class BatchRamp(Part):
    """Raise the rows of an optimizer step as training goes on."""

    stages: tuple[Share, ...] = (0.25, 0.5, 1.0)  # of data.batch, rising
    until: Share = 1.0  # of the budget: the stages' ends divide it evenly

    def apply(self, recipe: Recipe) -> Recipe:
        return edit(recipe, "data.shape", put(self))

    def phases(self, batch: int, context: int) -> tuple[Phase, ...]:
        """Raises UserError for stages that do not rise, and for a share that is no whole number of rows."""
        self._check_rise()
        return tuple(
            Phase(end, self._rows(share, batch), context)
            for end, share in zip(self._ends(), self.stages, strict=True)
        )

    def _ends(self) -> Iterator[float]:
        count = len(self.stages)
        for i in range(1, count):
            yield self.until * i / count
        yield 1.0

    def _check_rise(self) -> None:
        rises = all(one < other for one, other in pairwise(self.stages))
        if len(self.stages) < 2 or not rises:
            shown = ", ".join(f"{share:g}" for share in self.stages)
            raise UserError(
                f"batch_ramp.stages=[{shown}] must be two shares of the batch or more, each above "
                "the one before it, as [0.25, 0.5, 1.0]"
            )

    def _rows(self, share: float, batch: int) -> int:
        rows = share * batch
        whole = round(rows)
        # Four digits are enough: 0.3333 of 192 rows is 63.994.
        if whole < 1 or abs(rows - whole) > 1e-4 * batch:
            near = max(whole, 1) / batch
            raise UserError(
                f"batch_ramp.stages={share:g} of data.batch={batch} is {rows:.2f} rows; "
                f"use whole rows, as {near:g}"
            )
        return whole
