"""Overrides: dotted paths and values given beside an experiment file, each handed to what its first word names."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ablab.core.errors import UserError
from ablab.core.language.parse import near
from ablab.core.recipe.doses import Menu, as_typed, edits_of, with_edits
from ablab.core.recipe.intervention import Treatment
from ablab.core.recipe.load import assign
from ablab.experiments.plan.sheets import (
    Metric,
    Sheet,
    StageSheet,
    listed,
    renamed_items,
    with_direction,
)

OF_THE_SHEET = (
    "runtime",
    "seeds",
    "design",
    "study",
    "equivalence",
    "scale",
    "init",
    "trunk",
    "metric",
    "evaluate",
    "question",
    "name",
)
STAGES = "stages"
ARMS = "arms"
WITH = "with"
# How and how often a recipe runs and what is made of it, not what it computes.
RENAMES_NOTHING = ("runtime", "seeds", "equivalence", "evaluate")
LONGEST_NAME = 150  # bytes; with an ending, a file's name may have 255


@dataclass(frozen=True)
class Overrides:
    """What is asked to differ from the file.

    with, arms           the interventions and the arms, as in the file
    with.NAME.DOSE       a dose of an intervention, or a list of doses
    stages.NAME.PATH     a leaf of the recipe, or a dose, in one stage
    arms.NAME.PATH       likewise, in one of the arms that the sheet writes out
    runtime.X, study.X, metric.X, evaluate.X, seeds, design, equivalence, scale, init, trunk, question, name
                         a key of the sheet
    any other path       a leaf of the recipe
    """

    given: Mapping[str, Any]  # dotted path -> value

    @property
    def of_sheet(self) -> dict[str, Any]:
        return {
            path: value
            for path, value in self.given.items()
            if _owner(path) in OF_THE_SHEET or path in (WITH, ARMS)
        }

    @property
    def of_doses(self) -> dict[str, Any]:
        return {path: value for path, value in self.given.items() if path.startswith("with.")}

    @property
    def of_stages(self) -> dict[str, Any]:
        return {path: value for path, value in self.given.items() if _owner(path) == STAGES}

    @property
    def of_recipe(self) -> dict[str, Any]:
        arms = {path for path in self.given if _owner(path) == ARMS}
        others = {*self.of_sheet, *self.of_doses, *self.of_stages, *arms}
        return {path: value for path, value in self.given.items() if path not in others}

    def on_sheet(self, sheet: Sheet) -> Sheet:
        """Raises UserError for an unknown key or a wrong value."""
        for path, value in self.of_sheet.items():
            if path == WITH:
                sheet = replace(sheet, treatment=listed(value, WITH))
            elif path == ARMS:
                sheet = assign(sheet, path, renamed_items(value, ARMS))
            else:
                sheet = assign(sheet, path, value)
        if "metric.name" in self.given and "metric.better" not in self.given:
            # The file's direction is that of the metric that it names.
            usual = with_direction({"name": sheet.metric.name})
            sheet = replace(sheet, metric=Metric(**usual))
        return sheet

    def on_menu(self, menu: Menu) -> Menu:
        """Raises UserError for a dose that no intervention of the experiment has."""
        return with_edits(menu, self.of_doses)

    def recipe_edits(self, sheet: Sheet) -> dict[str, Any]:
        """What follows the base configs: `set` in the file, then these overrides.  Raises UserError for a seed."""
        written = sheet.set | self.of_recipe
        if "seed" in written:
            raise UserError(
                f"seed={written['seed']} would be overwritten: each run has its own; "
                "write seeds: [3], or give --seeds 3"
            )
        if any(_owner(path) == "init" for path in written):
            raise UserError(
                "what a run begins with is a key of the sheet: write init: RUN there"
            )
        return with_open_digest(sheet.set) | with_open_digest(self.of_recipe)

    def of_stage(self, stage: StageSheet) -> dict[str, Any]:
        """What one stage sets, in the file and here."""
        own = f"{STAGES}.{stage.name}."
        asked = {
            path.removeprefix(own): value
            for path, value in self.of_stages.items()
            if path.startswith(own)
        }
        if "seed" in stage.set | asked:
            raise UserError(
                f"stages.{stage.name}.seed would be overwritten: each run has its own, in all stages; "
                "write seeds: [3], or give --seeds 3"
            )
        return stage.set | asked

    def check_stages(self, stages: Sequence[StageSheet]) -> None:
        """Raises UserError for a stage that is not there, and for a path that a stage sets for itself."""
        names = [stage.name for stage in stages]
        for path in self.of_stages:
            _, name, *below = [*path.split("."), ""]
            if name not in names or not any(below):
                known = [f"{STAGES}.{one}.<path>" for one in names]
                raise UserError(
                    f"unknown path {path!r}. {near(path, known)}"
                    f"This experiment has: {', '.join(known) or 'no stages'}"
                )
        for path in self.of_recipe | self.of_doses:
            if own := [stage.name for stage in stages if path in stage.set]:
                raise UserError(
                    f"{path} is set by {'each of ' if len(own) > 1 else ''}stage {', '.join(own)} for itself; "
                    f"write {STAGES}.{own[0]}.{path}=..."
                )

    def of_arms(self, names: Sequence[str]) -> dict[str, dict[str, Any]]:
        """Arm -> what is set for it here.  names: of the arms.  Raises UserError for another."""
        found: dict[str, dict[str, Any]] = {}
        for path, value in self.given.items():
            if _owner(path) != ARMS or path == ARMS:
                continue
            rest = path.removeprefix(f"{ARMS}.")
            name = next((one for one in names if rest.startswith(f"{one}.")), None)
            if name is None:
                known = [f"{ARMS}.{one}.<path>" for one in names]
                raise UserError(
                    f"unknown path {path!r}. {near(path, known)}"
                    f"This experiment has: {', '.join(known) or 'no arms of its own'}"
                )
            found.setdefault(name, {})[rest.removeprefix(f"{name}.")] = value
        return found

    @property
    def words(self) -> list[str]:
        """Those that make another experiment of it, as they may be typed."""
        return [
            f"{path}={as_typed(value)}"
            for path, value in sorted(self.given.items())
            if _owner(path) not in RENAMES_NOTHING
        ]

    def title(self, stem: str) -> str:
        """quickstart@optim.lr=0.01; where that would be too long for a file's name, its digest.

        Overridden recipes are another experiment, so no result is overwritten.  A name that is given stands alone.
        """
        if "name" in self.given:
            return stem
        told = "".join(f"@{word}" for word in self.words)
        told = told.replace("/", "_")
        if told.isprintable() and len((stem + told).encode()) < LONGEST_NAME:
            return stem + told
        return f"{stem}@{hashlib.sha256(told.encode()).hexdigest()[:12]}"


def _owner(path: str) -> str:
    return path.split(".")[0]


def dosed(treatment: Treatment, doses: Mapping[str, Any]) -> Treatment:
    """doses: with.NAME.DOSE -> value.  Raises UserError for one that no intervention has."""
    changed = dict(treatment)
    for name, dose, value in edits_of(treatment, doses):
        changed[name] = assign(changed[name], dose, value)
    return changed


def of_recipe(edits: Mapping[str, Any]) -> dict[str, Any]:
    """Those that are no doses."""
    return {path: value for path, value in edits.items() if not path.startswith("with.")}


def with_open_digest(edits: Mapping[str, Any]) -> dict[str, Any]:
    """The digest in a config is of the data named there: another name, or other sources, leave it open."""
    open_digest = {"data.digest": None} if {"data.name", "data.mix"} & edits.keys() else {}
    return open_digest | dict(edits)
