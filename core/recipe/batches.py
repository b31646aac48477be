"""Which windows of tokens each optimizer step takes, settled from a batch shape and a budget.  No torch here.

A window is data.context tokens.  Windows are counted over the whole run, so that each is seen once an epoch whatever
the shape: step t takes those that follow the windows of the steps before it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from ablab.core.errors import UserError
from ablab.core.parts.shape import Phase
from ablab.core.recipe.asks import ShapesBatches


@dataclass(frozen=True)
class Span:
    """Consecutive steps of one shape."""

    first: int  # step, from 0
    steps: int
    windows: int  # that a step takes
    pieces: int  # rows that a window is split into
    before: int  # windows that earlier steps took


@dataclass(frozen=True)
class Batches:
    """Every step of a run."""

    context: int  # tokens of a window
    spans: tuple[Span, ...]

    @property
    def steps(self) -> int:
        return self.spans[-1].first + self.spans[-1].steps

    @property
    def largest_micro_batch(self) -> int:
        """Windows of the largest micro-batch of which every step takes a whole number."""
        return math.gcd(*(span.windows for span in self.spans))

    def at(self, step: int) -> Span:
        """The span of a step (from 0); beyond the end, the last one."""
        later = (span for span in reversed(self.spans) if span.first <= step and span.steps)
        return next(later, self.spans[-1])

    def windows_before(self, step: int) -> int:
        """Windows that all steps before this one took."""
        span = self.at(step)
        return span.before + (step - span.first) * span.windows


@lru_cache(maxsize=256)  # a grid asks for few, and often
def batches_of(shape: ShapesBatches, batch: int, context: int, tokens: int) -> Batches:
    """tokens: the budget; the last step is the last that fits.  Raises UserError for a shape that cannot be cut."""
    spans: list[Span] = []
    step = window = 0
    phases = shape.phases(batch, context)
    _check_order(phases)
    for phase in phases:
        _check_rows(phase, context)
        pieces = context // phase.context
        windows = phase.rows // pieces
        size = windows * context
        left = tokens - window * context
        until = round(phase.until * tokens) - window * context
        begun = left // size if phase is phases[-1] else min(-(-until // size), left // size)
        steps = max(begun, 0)
        spans.append(Span(step, steps, windows, pieces, window))
        step += steps
        window += steps * windows
    return Batches(context, tuple(spans))


def _check_order(phases: Sequence[Phase]) -> None:
    ends = [phase.until for phase in phases]
    if not ends or ends != sorted(ends) or ends[0] <= 0 or ends[-1] != 1:
        shown = ", ".join(f"{end:g}" for end in ends) or "nowhere"
        raise UserError(
            f"the phases of data.shape end at {shown} of the budget; "
            "they must follow each other and end at 1"
        )


def _check_rows(phase: Phase, context: int) -> None:
    if phase.context < 1 or context % phase.context:
        raise UserError(
            f"data.shape asks for rows of {phase.context} tokens, which do not divide a window of "
            f"data.context={context}; use a divisor of it"
        )
    pieces = context // phase.context
    if phase.rows < 1 or phase.rows % pieces:
        more = max(math.ceil(phase.rows / pieces), 1) * pieces
        raise UserError(
            f"data.shape asks for {phase.rows} rows of {phase.context} tokens a step, which is no "
            f"whole number of windows of data.context={context}; use a multiple of {pieces}, as {more}"
        )
