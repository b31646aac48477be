"""Cells, and what a design makes of a treatment."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

from ablab.core.recipe.doses import Doses
from ablab.core.recipe.intervention import Intervention, Treatment
from ablab.core.store.planned import Factors

FULL = "full"
BASE = "base"


@dataclass(frozen=True)
class Cell:
    """One arm: a treatment, and the cell that it is measured against."""

    name: str
    treatment: dict[str, Intervention] = field(default_factory=dict)
    reference: str | None = None
    replica: int = 0  # >0: the same recipe on its own seeds, for A/A arms
    # Recipe paths that this arm alone sets (experiments/plan/arms.py).
    settings: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Layout:
    """The cells of a design.

    factors: where effects are contrasts over all cells, and not single differences.  infeasible: cell of the design ->
    why it is none of the cells.
    """

    cells: list[Cell]
    factors: Factors | None = None
    infeasible: dict[str, str] = field(default_factory=dict)


class Design(Protocol):
    """How a set of interventions becomes cells to run and comparisons to read; its fields are its options."""

    def layout(self, treatment: Treatment) -> Layout:
        """Cells from the treatment alone; whether each can be built is asked of the recipe later.

        Raises UserError where the design has nothing to work on, or an option does not fit the treatment.
        """
        ...


@runtime_checkable
class TakesDoses(Protocol):
    """A design that can mean several doses of one ingredient."""

    def layout_of_doses(self, treatment: Treatment, several: Mapping[str, Doses]) -> Layout:
        """treatment: every ingredient with its first dose.  several: those that have more, with all of them."""
        ...


def named(sign: str, names: list[str], word: str) -> str:
    """- muon (and normuon);  + normuon (on muon)."""
    first, *others = names
    if not others:
        return f"{sign} {first}"
    return f"{sign} {first} ({word} {', '.join(others)})"
