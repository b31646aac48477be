"""Which cells of a design can be built: the others are listed with the reason, and the grid goes on without them."""

from collections.abc import Callable

from ablab.ablations.design import Cell, Layout
from ablab.ablations.designs.crossed import factors_of
from ablab.core.errors import UserError
from ablab.core.store.planned import Factors


def buildable(build: Callable[[Cell], object], layout: Layout) -> Layout:
    """The cells that can be built, and for each other one why not.

    build: raises UserError for a cell that cannot be.

    What nothing can be compared without stays, whether or not it can be built: the cell without a reference, and all
    arms where none of them can be built.  Who asks for its recipe is then told why.
    """
    infeasible: dict[str, str] = {}
    arms = [cell for cell in layout.cells if cell.reference]
    for arm in arms:  # a reference stands before its arms
        if arm.reference in infeasible:
            infeasible[arm.name] = f"it is measured against {arm.reference}, which cannot be"
        elif flaw := _flaw(build, arm):
            infeasible[arm.name] = flaw
    if not infeasible or len(infeasible) == len(arms):
        return layout
    cells = [cell for cell in layout.cells if cell.name not in infeasible]
    factors = layout.factors and _restricted(layout.factors, cells)
    return Layout(cells, factors, layout.infeasible | infeasible)


def _flaw(build: Callable[[Cell], object], cell: Cell) -> str:
    """Why it cannot be built; empty where it can."""
    try:
        build(cell)
    except UserError as flaw:
        return str(flaw)
    return ""


def _restricted(factors: Factors, cells: list[Cell]) -> Factors:
    """What these cells alone can tell."""
    levels = {cell.name: factors.levels[cell.name] for cell in cells}
    return factors_of(factors.names, levels, factors.generators, factors.resolution)
