"""Designs: how a set of interventions becomes cells to run and comparisons to read."""

from collections.abc import Callable, Mapping
from typing import Any

from ablab.ablations.designs.alone import Arms, Replicate, Single
from ablab.ablations.designs.cell import Cell, Design, Layout, TakesDoses
from ablab.ablations.designs.crossed import Factorial, Fractional, Pairs
from ablab.ablations.designs.one_at_a_time import AddOne, Cumulative, LeaveOneOut
from ablab.ablations.designs.own import Cells, made_from
from ablab.ablations.designs.twice import Twice
from ablab.core.errors import UserError
from ablab.core.language.parse import near, parse
from ablab.core.language.part import refuse_namesake
from ablab.core.recipe.doses import Menu, firsts, several
from ablab.core.recipe.intervention import Treatment

Written = str | Mapping[str, Any]  # leave_one_out, or {fractional: {resolution: 4}}
DESIGNS: dict[str, type[Design]] = {
    "leave_one_out": LeaveOneOut,
    "add_one": AddOne,
    "cumulative": Cumulative,
    "factorial": Factorial,
    "fractional": Fractional,
    "pairs": Pairs,
    "twice": Twice,
    "replicate": Replicate,
    "single": Single,
    "arms": Arms,
}


def register_design(name: str) -> Callable[[Cells], Cells]:
    """Make a function treatment -> cells a design (ablations/designs/own.py).  Raises UserError for a taken name."""

    def decorate(function: Cells) -> Cells:
        made = made_from(name, function)
        refuse_namesake("designs", name, DESIGNS.get(name), made)
        DESIGNS[name] = made
        return function

    return decorate


def summary_of(name: str) -> str:
    """The first line of what a design says of itself."""
    return (DESIGNS[name].__doc__ or "no description").splitlines()[0]


def name_of(written: Written) -> str:
    """Raises UserError where it is not one name."""
    if isinstance(written, str):
        return written
    if len(written) != 1:
        raise UserError(
            f"design={dict(written)!r} must be one design, "
            "as leave_one_out or {fractional: {resolution: 4}}"
        )
    return str(next(iter(written)))


def design_of(written: Written) -> Design:
    """Raises UserError for an unknown name or option, and a value of another type."""
    name = name_of(written)
    if name not in DESIGNS:
        raise UserError(
            f"unknown design {name!r}. {near(name, DESIGNS)}Known: {', '.join(DESIGNS)}; "
            "one of your own needs --plugins FOLDER"
        )
    options = {} if isinstance(written, str) else written[name]
    design: Design = parse(DESIGNS[name], options or {}, f"design.{name}")
    return design


def layout_of(written: Written, treatment: Treatment) -> Layout:
    return design_of(written).layout(treatment)


def layout_of_menu(written: Written, menu: Menu) -> Layout:
    """Raises UserError, too, where an ingredient has several doses and the design cannot mean them."""
    design = design_of(written)
    treatment = firsts(menu)
    more = several(menu)
    if not more:
        return design.layout(treatment)
    if not isinstance(design, TakesDoses):
        name, doses = next(iter(more.items()))
        able = [known for known, one in DESIGNS.items() if issubclass(one, TakesDoses)]
        raise UserError(
            f"design {name_of(written)} takes one dose of each ingredient, and with.{name} lists {len(doses.doses)}; "
            f"keep one of them, or choose design: {' or '.join(able)}"
        )
    return design.layout_of_doses(treatment, more)


def cells_of(written: Written, treatment: Treatment) -> list[Cell]:
    return layout_of(written, treatment).cells
