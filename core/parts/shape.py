"""Batch shapes: how many rows of how many tokens an optimizer step takes, as training goes on.  No torch here."""

from dataclasses import dataclass

from ablab.core.language.part import Part, part


@dataclass(frozen=True)
class Phase:
    """Consecutive steps of one shape.

    until: share of the budget's tokens, in (0, 1]; a step that begins there or later is of the next phase.
    rows, context: of a step; a window of data.context tokens is split into rows of equal length.
    """

    until: float
    rows: int
    context: int


@part("fixed")
class Fixed(Part):
    """data.batch rows of data.context tokens, in every step."""

    def phases(self, batch: int, context: int) -> tuple[Phase, ...]:
        return (Phase(1.0, batch, context),)
