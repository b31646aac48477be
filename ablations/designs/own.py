"""Designs of the user's own: a function in a plugin file, from a treatment to cells.

    @register_design("ladder")
    def ladder(treatment, rungs: int = 3):
        cells = [Cell("base")]
        chosen = {}
        for name in list(treatment)[:rungs]:
            chosen = chosen | {name: treatment[name]}
            cells.append(Cell(f"up to {name}", chosen, "base"))
        return cells

    design: ladder        or        design: {ladder: {rungs: 2}}

treatment: name -> intervention, as `with` lists them; of several doses each stands there under its own name,
`z_loss weight=1e-05`.  What else the function takes are its options, with a type and a default.  A cell is measured
against the one that it names as its reference; it holds one dose of each intervention.
"""

import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, make_dataclass
from typing import Any, ClassVar, get_type_hints

from ablab.ablations.designs.cell import Cell, Layout
from ablab.core.errors import UserError, place_in, told
from ablab.core.recipe.doses import Doses
from ablab.core.recipe.intervention import Intervention, Treatment

MOST_CELLS = 1000  # each is planned, hashed and trained on every seed

BY_PLACE = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
Cells = Callable[..., Sequence[Cell]]


@dataclass(frozen=True)
class Own:
    """A design that calls a function; a subclass for each, whose fields are the options."""

    name: ClassVar[str]
    function: ClassVar[Cells]

    def layout(self, treatment: Treatment) -> Layout:
        return self.layout_of_doses(treatment, {})

    def layout_of_doses(self, treatment: Treatment, several: Mapping[str, Doses]) -> Layout:
        """Raises UserError where the function breaks, and where it returns no design."""
        flat: dict[str, Intervention] = {}
        for name, first in treatment.items():
            flat |= several[name].labelled if name in several else {name: first}
        try:
            returned = self.function(dict(flat), **vars(self))
        except UserError:
            raise
        except (Exception, SystemExit) as flaw:
            file = inspect.getsourcefile(self.function) or ""
            place = place_in(flaw, {file}) or file
            raise UserError(f"design {self.name} breaks, at {place}: {told(flaw)}") from flaw
        return Layout(checked(self.name, returned, flat))


def made_from(name: str, function: Cells) -> type[Own]:
    """The design of a function.  Raises UserError for one that cannot be called with a treatment alone."""
    parameters = list(inspect.signature(function).parameters.values())
    if not parameters or parameters[0].kind not in BY_PLACE:
        raise UserError(
            f"design {name!r} must be a function of a treatment: def {name}(treatment) -> list of Cell"
        )
    hints = get_type_hints(function, include_extras=True)
    fields = []
    for option in parameters[1:]:
        if option.default is option.empty or option.name not in hints:
            raise UserError(
                f"design {name!r}: give its option {option.name} a type and a default, "
                f"as {option.name}: int = 3"
            )
        fields.append((option.name, hints[option.name], option.default))
    summary = (inspect.getdoc(function) or "no description").splitlines()[0]
    own = {"name": name, "function": staticmethod(function), "__doc__": summary}
    made = make_dataclass(name, fields, bases=(Own,), namespace=own, frozen=True)
    made.__module__ = function.__module__
    return made


def checked(name: str, returned: Any, flat: Treatment) -> list[Cell]:
    """The cells, each with its interventions under their own names.  Raises UserError for what is no design.

    flat: what the function was given.
    """
    where = f"design {name}"
    if not isinstance(returned, Sequence) or isinstance(returned, str):
        raise UserError(f"{where} returned {_kind(returned)}; it must return a list of Cell")
    if not 1 <= len(returned) <= MOST_CELLS:
        raise UserError(
            f"{where} returned {len(returned):,} cells; at least 1 and at most {MOST_CELLS:,} make a grid"
        )
    names: list[str] = []
    cells = []
    for cell in returned:
        if not isinstance(cell, Cell):
            raise UserError(
                f"{where} returned {_kind(cell)} among its cells; each must be a Cell"
            )
        _check_name(where, cell, names)
        _check_reference(where, cell, names)
        cells.append(
            Cell(cell.name, _own_names(where, cell, flat), cell.reference, cell.replica)
        )
        names.append(cell.name)
    return cells


def _check_name(where: str, cell: Cell, taken: Collection[str]) -> None:
    name = cell.name
    if not isinstance(name, str) or not name.isprintable() or not name.strip() or "/" in name:
        raise UserError(f"{where}: {name!r:.80} cannot name a cell; use a word without /")
    if name in taken:
        raise UserError(f"{where} returned two cells called {name!r}; rename one")


def _check_reference(where: str, cell: Cell, before: Collection[str]) -> None:
    if not before and cell.reference is not None:
        raise UserError(
            f"{where}: its first cell {cell.name!r} is measured against {cell.reference!r}; "
            "begin with the cell that the others are measured against, without a reference"
        )
    if cell.reference is not None and cell.reference not in before:
        raise UserError(
            f"{where}: {cell.name!r} is measured against {cell.reference!r}, which is no cell before it; "
            f"before it are: {', '.join(before)}"
        )


def _own_names(where: str, cell: Cell, flat: Treatment) -> dict[str, Intervention]:
    if not isinstance(cell.treatment, Mapping):
        raise UserError(
            f"{where}: the treatment of {cell.name!r} is {_kind(cell.treatment)}; "
            "it must be a dict of name -> intervention"
        )
    treatment: dict[str, Intervention] = {}
    for label, dose in cell.treatment.items():
        if label not in flat:
            raise UserError(
                f"{where}: {cell.name!r} holds {label!r:.80}, which it was not given; it was given: "
                f"{', '.join(flat) or 'nothing'}"
            )
        if type(dose) is not type(flat[label]):
            raise UserError(
                f"{where}: {cell.name!r} holds {_kind(dose)} as {label!r}; take it from the treatment"
            )
        if dose.about.name in treatment:
            raise UserError(
                f"{where}: {cell.name!r} holds two doses of {dose.about.name}; keep one"
            )
        treatment[dose.about.name] = dose
    return treatment


def _kind(value: Any) -> str:
    kind = type(value).__name__
    return "nothing" if value is None else f"a {kind}"
