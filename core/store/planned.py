"""What an experiment wants: its cells, the runs that answer them, and what to type to go on."""

import shlex
from dataclasses import dataclass, field
from typing import Any

STUDY_PARTS = ("study", "tuned")  # what a study appends to the name of its experiment


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


def command(experiment: str, verb: str = "run") -> str:
    """What to type to go on with an experiment; its name ends in its overrides, or in what a study made of it."""
    name, *parts = experiment.split("@")
    if set(STUDY_PARTS) & set(parts):
        verb = "study"
    overrides = [part for part in parts if part not in STUDY_PARTS]
    # A digest stands where the overrides are too long for a name.
    typed = [part if "=" in part else "..." for part in overrides]
    return f"ablab {verb} {shlex.join([name, *typed])}"
