"""Designs: how a set of interventions becomes cells to run and comparisons to read."""

from collections.abc import Callable
from dataclasses import dataclass, field

from ablab.core.errors import UserError
from ablab.core.language.parse import near
from ablab.core.recipe.intervention import Intervention, Treatment, dependents


@dataclass(frozen=True)
class Cell:
    """One arm: a treatment, and the cell that it is measured against."""

    name: str
    treatment: dict[str, Intervention] = field(default_factory=dict)
    reference: str | None = None
    replica: int = 0  # >0: the same recipe on its own seeds, for A/A arms


def leave_one_out(treatment: Treatment) -> list[Cell]:
    """full, base, and full without each ingredient (and without what cannot stand without it)."""
    if not treatment:
        raise UserError(
            "design leave_one_out has nothing to leave out; "
            "list interventions under `with`, or choose design: add_one or replicate"
        )
    cells = [Cell("full", dict(treatment)), Cell("base", {}, "full")]
    for name in treatment:
        gone = dependents(name, treatment)
        rest = {kept: dose for kept, dose in treatment.items() if kept not in gone}
        cells.append(Cell(_named("-", gone, "and"), rest, "full"))
    return cells


def add_one(treatment: Treatment) -> list[Cell]:
    """base, and base with each ingredient.

    One that builds on another is measured against the arm with that other alone.
    """
    cells = [Cell("base")]
    for name in _requirements_first(treatment):
        needs = _needs(name, treatment)
        alone = [cell.name for cell in cells if set(cell.treatment) == set(needs)]
        reference = alone[0] if alone else "base"
        chosen = {one: treatment[one] for one in (*needs, name)}
        cells.append(Cell(_named("+", [name, *needs], "on"), chosen, reference))
    return cells


def replicate(treatment: Treatment) -> list[Cell]:
    """A and B: the same recipe twice on disjoint seeds.  Any verdict but 'inconclusive' is a false alarm."""
    return [Cell("A", dict(treatment)), Cell("B", dict(treatment), "A", replica=1)]


def single(treatment: Treatment) -> list[Cell]:
    """The recipe alone, with nothing to compare it with: to train it, not to judge it."""
    return [Cell("full", dict(treatment))]


DESIGNS: dict[str, Callable[[Treatment], list[Cell]]] = {
    "leave_one_out": leave_one_out,
    "add_one": add_one,
    "replicate": replicate,
    "single": single,
}


def cells_of(design: str, treatment: Treatment) -> list[Cell]:
    if design not in DESIGNS:
        raise UserError(
            f"unknown design {design!r}. {near(design, DESIGNS)}Known: {', '.join(DESIGNS)}"
        )
    return DESIGNS[design](treatment)


def _named(sign: str, names: list[str], word: str) -> str:
    """- muon (and normuon);  + normuon (on muon)."""
    first, *others = names
    if not others:
        return f"{sign} {first}"
    return f"{sign} {first} ({word} {', '.join(others)})"


def _needs(name: str, treatment: Treatment) -> list[str]:
    """Everything that `name` builds on, transitively, in the order of the treatment."""
    wanted = [name]
    for one in wanted:
        wanted += [
            need
            for need in treatment[one].about.requires
            if need in treatment and need not in wanted
        ]
    return [one for one in treatment if one in wanted[1:]]


def _requirements_first(treatment: Treatment) -> list[str]:
    return sorted(treatment, key=lambda name: len(_needs(name, treatment)))
