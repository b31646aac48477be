"""Arms that a sheet writes out, beside those of its design.

    arms:
      - {name: wide, set: {model.width: 1024}}
      - {name: lion, with: [lion], without: [muon, normuon]}
      - {name: wider, set: {model.width: 2048}, reference: wide}

An arm is its reference with what it says changed: `with` adds interventions or gives them another dose, `without` drops
some, `set` sets recipe paths, doses (with.NAME.DOSE) and paths of one stage (stages.NAME.PATH), as overrides do for all
arms.  The reference is a cell of the design or an arm that stands before; unless it is named, the cell that the others
of the design are measured against.  A sheet with arms and no design has one such cell, `base`, with all of `with`.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ablab.ablations.design import Cell, Layout
from ablab.core.errors import UserError
from ablab.core.language.parse import near
from ablab.core.recipe.intervention import Treatment, treatment_of
from ablab.experiments.plan.overrides import OF_THE_SHEET, Overrides, dosed
from ablab.experiments.plan.sheets import ArmSheet
from ablab.experiments.plan.stages import Stage, recipes_of

LONGEST = 80  # characters of a name
BARRED = frozenset(
    "/\\@*?[]!`|"
)  # in a name: they mean something in paths, in --only and in tables


@dataclass(frozen=True)
class Arms:
    """What the arms of a sheet add to its design."""

    layout: Layout
    # By arm, of those that set something: its own stages.
    stages: dict[str, list[Stage]]


@dataclass(frozen=True)
class ArmReader:
    """Reads the arms of a sheet.

    asked: what the command line overrides.  shared: the stages of an arm that sets nothing.
    stages_of: the stages under these overrides.
    """

    asked: Overrides
    shared: list[Stage]
    stages_of: Callable[[Overrides], list[Stage]]

    def beside(self, layout: Layout, written: Sequence[ArmSheet]) -> Arms:
        """The design's cells, then these.  Raises UserError for an arm that cannot be built."""
        asked = self.asked.of_arms([arm.name for arm in written])
        if written and layout.factors:
            raise UserError(
                "arms stand beside a design that compares each arm with its reference, and this one reads its effects "
                "over all of its cells; drop arms, or choose design: leave_one_out or add_one"
            )
        cells = {cell.name: cell for cell in layout.cells}
        stages: dict[str, list[Stage]] = {}
        for arm in written:
            _check_name(arm.name, cells)
            cell = _cell(replace(arm, set={**arm.set, **asked.get(arm.name, {})}), cells)
            own = self._own_stages(cell)
            _build(cell, own)
            cells[cell.name] = cell
            if cell.settings:
                stages[cell.name] = own
        return Arms(replace(layout, cells=list(cells.values())), stages)

    def _own_stages(self, cell: Cell) -> list[Stage]:
        if not cell.settings:
            return self.shared
        with_arm = replace(self.asked, given={**self.asked.given, **cell.settings})
        try:
            return self.stages_of(with_arm)
        except UserError as flaw:
            raise UserError(f"arm {cell.name!r}: {flaw}") from flaw


def _check_name(name: str, taken: Collection[str]) -> None:
    if name in taken:
        raise UserError(f"arms: {name!r} names two cells; rename one")
    plain = name.isprintable() and name == name.strip() and BARRED.isdisjoint(name)
    if not plain or not 1 <= len(name) <= LONGEST:
        raise UserError(
            f"arms: {name!r:.100} cannot name an arm; use letters, digits, spaces and _ - + . = , "
            f"at most {LONGEST} characters"
        )


def _cell(arm: ArmSheet, cells: Mapping[str, Cell]) -> Cell:
    """The arm as a cell.  cells: those that it may be measured against."""
    reference = _reference(arm, cells)
    where = f"arms.{arm.name}"
    treatment = dict(reference.treatment)
    for name in arm.without:
        if name not in treatment:
            raise UserError(
                f"{where}.without names {name!r}, which {reference.name} does not have. {near(name, treatment)}"
                f"It has: {', '.join(treatment) or 'nothing'}"
            )
        del treatment[name]
    treatment |= treatment_of(arm.treatment, f"{where}.with")
    doses, settings = _split(arm)
    try:
        treatment = dict(dosed(treatment, doses))
    except UserError as flaw:
        raise UserError(f"arm {arm.name!r}: {flaw}") from flaw
    return Cell(
        arm.name, treatment, reference.name, settings={**reference.settings, **settings}
    )


def _reference(arm: ArmSheet, cells: Mapping[str, Cell]) -> Cell:
    if arm.reference is None:
        return next(cell for cell in cells.values() if cell.reference is None)
    if arm.reference not in cells:
        raise UserError(
            f"arms.{arm.name}.reference={arm.reference!r} is no cell of the design and no arm before it. "
            f"{near(arm.reference, cells)}Cells: {', '.join(cells)}"
        )
    return cells[arm.reference]


def _split(arm: ArmSheet) -> tuple[dict[str, Any], dict[str, Any]]:
    """Of what it sets: doses, and paths of the recipe.  Raises UserError for what is not its own to set."""
    for path in arm.set:
        owner = path.split(".")[0]
        if owner in OF_THE_SHEET or owner == "arms":
            raise UserError(
                f"arms.{arm.name}.set: {path} is a key of the sheet, the same for all arms; set it there"
            )
    doses = {path: value for path, value in arm.set.items() if path.startswith("with.")}
    return doses, {path: value for path, value in arm.set.items() if path not in doses}


def _build(cell: Cell, stages: Sequence[Stage]) -> None:
    """Raises UserError where it cannot be: an arm that somebody wrote out is not left out in silence."""
    treatment: Treatment = cell.treatment
    try:
        recipes_of(stages, treatment)
    except UserError as flaw:
        raise UserError(f"arm {cell.name!r} cannot be built: {flaw}") from flaw
