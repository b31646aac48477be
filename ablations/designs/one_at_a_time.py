"""Designs whose arms differ from their reference by one ingredient, and by what cannot stand without it."""

from collections.abc import Mapping
from dataclasses import dataclass

from ablab.ablations.designs.cell import BASE, FULL, Cell, Layout, named
from ablab.core.errors import UserError
from ablab.core.recipe.doses import Doses
from ablab.core.recipe.intervention import Treatment, dependents


@dataclass(frozen=True)
class LeaveOneOut:
    """full, base, and full without each ingredient (and without what cannot stand without it).

    Of several doses, full has the first; each other one is an arm that has it instead: z_loss weight=0.001.
    """

    def layout(self, treatment: Treatment) -> Layout:
        if not treatment:
            raise UserError(
                "design leave_one_out has nothing to leave out; "
                "list interventions under `with`, or choose design: add_one or replicate"
            )
        arms = [without(name, treatment) for name in treatment]
        return Layout([Cell(FULL, dict(treatment)), Cell(BASE, {}, FULL), *arms])

    def layout_of_doses(self, treatment: Treatment, several: Mapping[str, Doses]) -> Layout:
        cells = self.layout(treatment).cells
        for name, doses in several.items():
            for label, dose in doses.labelled.items():
                if dose != doses.first:
                    cells.append(Cell(label, {**treatment, name: dose}, FULL))
        return Layout(cells)


@dataclass(frozen=True)
class AddOne:
    """base, and base with each ingredient, or with each of its doses.

    One that builds on another is measured against the arm with that other alone, in its first dose.
    """

    def layout(self, treatment: Treatment) -> Layout:
        return self.layout_of_doses(treatment, {})

    def layout_of_doses(self, treatment: Treatment, several: Mapping[str, Doses]) -> Layout:
        labels = {
            name: [*several[name].labelled] if name in several else [name] for name in treatment
        }
        cells = [Cell(BASE)]
        for name in _requirements_first(treatment):
            needs = _needs(name, treatment)
            below = [labels[need][0] for need in needs]
            alone = [cell.name for cell in cells if set(cell.treatment) == set(needs)]
            reference = alone[0] if alone else BASE
            doses = several[name].doses if name in several else (treatment[name],)
            for label, dose in zip(labels[name], doses, strict=True):
                chosen = {need: treatment[need] for need in needs} | {name: dose}
                cells.append(Cell(named("+", [label, *below], "on"), chosen, reference))
        return Layout(cells)


@dataclass(frozen=True)
class Cumulative:
    """base, then one ingredient more in each cell, in the order of the file; each is measured against the one before.

    One that stands before what it builds on waits for that, and comes in with it: + muon (and normuon).
    """

    def layout(self, treatment: Treatment) -> Layout:
        cells = [Cell(BASE)]
        waiting: list[str] = []
        for name in treatment:
            before = cells[-1]
            arrived = before.treatment.keys() | {name}
            if not _stands(name, treatment, arrived):
                waiting.append(name)
                continue
            coming = [name]
            for other in waiting:
                if _stands(other, treatment, arrived | set(coming)):
                    coming.append(other)
            waiting = [other for other in waiting if other not in coming]
            chosen = before.treatment | {one: treatment[one] for one in coming}
            cells.append(Cell(named("+", coming, "and"), chosen, before.name))
        return Layout(cells)


def without(name: str, treatment: Treatment) -> Cell:
    """The full set without one ingredient, against the full set."""
    gone = dependents(name, treatment)
    rest = {kept: dose for kept, dose in treatment.items() if kept not in gone}
    return Cell(named("-", gone, "and"), rest, FULL)


def _stands(name: str, treatment: Treatment, present: set[str]) -> bool:
    """Whether all of the treatment that `name` builds on is there; what the treatment lacks never comes."""
    needs = treatment[name].about.requires
    return all(need in present for need in needs if need in treatment)


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
