"""Every arm under two optimizers: whether an ingredient is worth the same under both."""

from dataclasses import dataclass, replace
from typing import Literal

from ablab.ablations.designs.cell import BASE, FULL, Cell, Layout
from ablab.ablations.designs.crossed import factors_of
from ablab.ablations.designs.one_at_a_time import AddOne, LeaveOneOut
from ablab.core.errors import UserError
from ablab.core.language.parse import near
from ablab.core.recipe.intervention import Treatment, dependents
from ablab.core.store.planned import Levels

OPTIMIZER = "optimizer"  # the factor's name


@dataclass(frozen=True)
class Twice:
    """Each arm of `arms` under either optimizer, against the reference under the same one.

    optimizers: two ingredients of `with`, or `base` for the optimizer of the base recipe: [base, muon].  What builds on
    one comes and goes with it.  The second reference is measured against the first.
    """

    optimizers: list[str]
    arms: Literal["leave_one_out", "add_one"] = "leave_one_out"

    def layout(self, treatment: Treatment) -> Layout:
        self._check(treatment)
        parts = {name: self._with_dependents(name, treatment) for name in self.optimizers}
        of_an_optimizer = {one for part in parts.values() for one in part}
        common = {name: dose for name, dose in treatment.items() if name not in of_an_optimizer}
        if not common:
            raise UserError(
                "design twice has no arm besides its optimizers; list more interventions under `with`"
            )
        cells = []
        levels: dict[str, Levels] = {}
        first = ""
        for level, (optimizer, part) in zip((-1, 1), parts.items(), strict=True):
            for arm in self._arms(common):
                cell = _under(optimizer, arm, {one: treatment[one] for one in part})
                if arm.reference is None:
                    cell = replace(cell, reference=first or None)
                    first = cell.name
                cells.append(cell)
                present = {name: 1 if name in arm.treatment else -1 for name in common}
                levels[cell.name] = present | {OPTIMIZER: level}
        names = {name: ["off", "on"] for name in common}
        names[OPTIMIZER] = list(self.optimizers)
        return Layout(cells, factors_of(names, levels))

    def _check(self, treatment: Treatment) -> None:
        if len(set(self.optimizers)) != 2 or len(self.optimizers) != 2:
            raise UserError(
                f"design.twice.optimizers={self.optimizers} must name two, such as [base, muon]"
            )
        for name in self.optimizers:
            if name != BASE and name not in treatment:
                known = [BASE, *treatment]
                raise UserError(
                    f"design.twice.optimizers names {name!r}, which `with` does not list. {near(name, known)}"
                    f"Known: {', '.join(known)}"
                )

    def _with_dependents(self, optimizer: str, treatment: Treatment) -> list[str]:
        return [] if optimizer == BASE else dependents(optimizer, treatment)

    def _arms(self, common: Treatment) -> list[Cell]:
        design = LeaveOneOut() if self.arms == "leave_one_out" else AddOne()
        dropped = BASE if self.arms == "leave_one_out" else FULL
        return [cell for cell in design.layout(common).cells if cell.name != dropped]


def _under(optimizer: str, arm: Cell, part: Treatment) -> Cell:
    """- gating (under muon), against full (under muon)."""
    reference = arm.reference and f"{arm.reference} (under {optimizer})"
    return Cell(f"{arm.name} (under {optimizer})", {**arm.treatment, **part}, reference)
