"""What an experiment wants: its cells, the runs that answer them, and what to type to go on."""

import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CATALOG = "catalog"  # the sheet of a plan whose experiment is shipped
STUDY_PARTS = ("study", "tuned")  # what a study appends to the name of its experiment
LISTED = 4  # cells in a sentence
CHALLENGED = "challenge="  # what a challenge appends, before the name of the arm


@dataclass(frozen=True)
class Planned:
    """One run that an experiment wants."""

    cell: str
    pair: int
    seed: int
    run: str
    reference: str | None = None  # the cell that this one is measured against
    note: str = ""
    tags: dict[str, str] = field(default_factory=dict)  # for trackers
    # What trackers show of it; another experiment may share the run and differ from another base.
    params: dict[str, Any] = field(default_factory=dict)


Levels = dict[str, int]  # factor -> -1 or +1


@dataclass(frozen=True)
class Factors:
    """A design whose effects are contrasts over all of its cells (ablations/designs/crossed.py)."""

    # Factor -> its two levels in words, that of -1 first: gating -> [off, on].
    names: dict[str, list[str]]
    levels: dict[str, Levels]  # by cell
    # Pairs of factors whose interaction the cells can tell from the mean, the factors and each other.
    interactions: list[list[str]]
    # What no data of these cells can tell apart, interactions of three and more aside: "gating = - muon x wsd".
    aliases: list[str] = field(default_factory=list)
    generators: list[str] = field(default_factory=list)  # of a fraction
    resolution: int | None = None  # of a fraction


def notes_on_design(
    factors: Factors | None,
    infeasible: Mapping[str, str],
    runs: Iterable[tuple[str, str]] = (),
) -> Iterator[str]:
    """What a reader of the grid must know of its design, a sentence each.  runs: (cell, run), all that it wants."""
    if factors and factors.generators:
        made = "; ".join(factors.generators)
        yield f"a fraction of resolution {factors.resolution}: {made}"
    if factors and factors.aliases:
        yield f"cannot be told apart: {'; '.join(factors.aliases)}"
    cells_of: dict[str, list[str]] = {}
    for cell, why in infeasible.items():
        cells_of.setdefault(why, []).append(cell)
    for why, cells in cells_of.items():
        yield f"{_left_out(cells)} cannot be built: {why}"
    for cells in _alike(runs):
        yield f"{' and '.join(cells)} are one recipe: the same runs answer them"


def _alike(runs: Iterable[tuple[str, str]]) -> list[list[str]]:
    """The cells whose runs are the same; but base is what is left where the only ingredient is left out."""
    runs_of: dict[str, set[str]] = {}
    for cell, run in runs:
        runs_of.setdefault(cell, set()).add(run)
    cells_of: dict[frozenset[str], list[str]] = {}
    for cell, answered in runs_of.items():
        cells_of.setdefault(frozenset(answered), []).append(cell)
    alike = [cells for cells in cells_of.values() if len(cells) > 1]
    return [cells for cells in alike if not (cells[0] == "base" and cells[1].startswith("- "))]


def _left_out(cells: list[str]) -> str:
    """+ normuon is left out, it;  5 cells (+ normuon; + wsd, normuon; ...) are left out, they"""
    if len(cells) == 1:
        return f"{cells[0]} is left out, it"
    more = "; ..." if len(cells) > LISTED else ""
    return f"{len(cells)} cells ({'; '.join(cells[:LISTED])}{more}) are left out, they"


@dataclass(frozen=True)
class GridPlan:
    """An experiment as it was last asked for: the desired state that the runner works towards."""

    name: str
    question: str
    metric: str
    better: str  # "lower" or "higher"
    design: str
    rows: list[Planned]
    # Cell -> intervention -> dose.
    treatments: dict[str, dict[str, Any]] = field(default_factory=dict)
    # Intervention -> the sentence naming its control.
    off: dict[str, str] = field(default_factory=dict)
    # The file that asked for it, or "catalog": two files of one name are two experiments.
    sheet: str | None = None
    # The looks of a grid that adds seeds until it is decided, in seeds; [] where all seeds were wanted at once.
    looks: list[int] = field(default_factory=list)
    factors: Factors | None = None
    # Cell of the design -> why it cannot be built; such a cell has no rows.
    infeasible: dict[str, str] = field(default_factory=dict)
    # The smallest effect of interest, in the metric's unit; None: nothing is called equivalent.
    equivalence: float | None = None
    # Hash of the ledger's entry that holds what was asked before the last runs; "" where nothing was.
    registered: str = ""
    # Runs of earlier stages, from which those of `rows` go on: each once, whoever shares it.
    trunks: list[Planned] = field(default_factory=list)
    # The run of the store whose weights the first stage begins with; "" where there is none.
    start: str = ""
    # What was typed, where that is not the sheet's name alone: the catalog entry or the stem, then the overrides.
    asked: list[str] = field(default_factory=list)
    # Cell -> recipe path -> value: what an arm that the sheet writes out sets, beside its treatment.
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)

    def doses_apart(self, cell: str, other: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """Each intervention that has another dose in `other`, with the fields that differ, as they are there."""
        ours = self.treatments.get(cell, {})
        theirs = self.treatments.get(other, {})
        for name in ours.keys() & theirs.keys():
            if ours[name] != theirs[name]:
                pairs = theirs[name].items()
                yield (
                    name,
                    {field: value for field, value in pairs if ours[name].get(field) != value},
                )

    def set_apart(self, cell: str, other: str) -> dict[str, Any]:
        """Recipe path -> value that this arm sets and the other does not."""
        theirs = self.settings.get(other, {})
        return {
            path: value
            for path, value in self.settings.get(cell, {}).items()
            if path not in theirs or theirs[path] != value
        }

    @property
    def all_rows(self) -> list[Planned]:
        """What is compared, and what it goes on from."""
        return [*self.rows, *self.trunks]


def command(
    experiment: str,
    verb: str = "run",
    sheet: str | None = None,
    asked: Sequence[str] = (),
) -> str:
    """What to type to go on with an experiment; its name ends in its overrides, or in what a study made of it.

    sheet: the file that asked for it, where it is known: typed as a path from here.  asked: of its plan.
    """
    name, *parts = experiment.split("@")
    if set(STUDY_PARTS) & set(parts):
        verb = "study"
    arm = [part.removeprefix(CHALLENGED) for part in parts if part.startswith(CHALLENGED)]
    if arm:
        verb = "challenge"
    own = [*STUDY_PARTS, *(CHALLENGED + one for one in arm)]
    overrides = [part for part in parts if part not in own]
    # A digest stands where the overrides are too long for a name.
    typed = [part if "=" in part else "..." for part in overrides]
    if asked:
        name, *typed = asked
    return f"ablab {verb} {shlex.join([_from_here(sheet) or name, *arm, *typed])}"


def _from_here(sheet: str | None) -> str | None:
    """The path of a sheet, short where it lies below the current folder; None for one of the catalog."""
    if sheet is None or sheet == CATALOG:
        return None
    path = Path(sheet)
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else sheet
