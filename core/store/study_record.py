"""The stored study: what a search of learning rates, widths or doses tried, and how each trial ended.  No torch here.

    STORE/studies/NAME.json       one `StudyRecord`: the space, the settings of the search, every trial

The search writes it whole each time; the reports read it.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import msgspec

from ablab.core.errors import UserError
from ablab.core.store.files import FLAWS, set_aside, write_atomically
from ablab.core.store.planned import command
from ablab.core.store.result import DIVERGED, PRUNED, said
from ablab.core.store.store import Store

LR = "optim.lr"
WIDTH = "model.width"
State = Literal["complete", "pruned", "failed", "diverged", "out_of_memory", "running"]
COMPLETE = "complete"
RUNNING = "running"
# Tried, with a known answer; the other states say nothing.
EVALUATED = (
    COMPLETE,
    DIVERGED,
    PRUNED,
)


@dataclass(frozen=True)
class Trial:
    """One point of one arm's search.  `value`: mean over seeds of the final metric; `values`: by seed.

    `params` lacks the doses (`with.NAME.DOSE`) of ingredients that the arm does without.
    """

    cell: str
    number: int
    params: dict[str, Any]
    state: State
    value: float | None = None
    values: dict[str, float | None] = field(default_factory=dict)
    runs: list[str] = field(default_factory=list)
    seconds: float = 0.0  # of training, all seeds

    @property
    def final(self) -> float:
        """The value of a complete trial; `read` lets no complete one without a value pass."""
        assert self.value is not None, (
            f"trial {self.number} of {self.cell!r} is {self.state}, without a value"
        )
        return self.value


@dataclass(frozen=True)
class StudyRecord:
    """STORE/studies/NAME.json."""

    name: str
    question: str
    metric: str
    better: Literal["lower", "higher"]
    space: dict[str, dict[str, Any]]  # path -> {"log": [low, high]} or {"choices": [...]}
    hard: dict[str, tuple[float, float]]  # path -> bounds that no widening may pass
    base: dict[str, Any]  # path -> value of the experiment's own recipe
    sampler: str
    pruner: str
    seeds: list[int]
    trials_per_cell: int
    trials: list[Trial]
    # Cell -> path -> share.
    importance: dict[str, dict[str, float]] = field(default_factory=dict)
    sheet: str | None = None  # the file that asked for it, or "catalog"
    # What was typed, as `GridPlan.asked`.
    asked: list[str] = field(default_factory=list)
    tuned: str | None = None  # the plan of the confirmation runs, each arm at its own winner

    @property
    def cells(self) -> dict[str, list[Trial]]:
        """Cell -> its trials, in the order of first appearance."""
        found: dict[str, list[Trial]] = {}
        for trial in self.trials:
            found.setdefault(trial.cell, []).append(trial)
        return found


def study_path(store: Store, name: str) -> Path:
    return store.root / "studies" / f"{name}.json"


def studies(store: Store) -> list[str]:
    """The names of the studies that a store holds."""
    return sorted(path.stem for path in (store.root / "studies").glob("*.json"))


def write(store: Store, record: StudyRecord) -> None:
    """A folder in its place goes aside."""
    path = study_path(store, record.name)
    if path.is_dir():
        set_aside(path)
    encoded = msgspec.json.encode(record)
    write_atomically(path, msgspec.json.format(encoded, indent=1))


def read(store: Store, name: str) -> StudyRecord:
    """UserError when the study is missing or damaged, or when none of its trials has finished."""
    path = study_path(store, name)
    again = command(name, "study")
    try:
        record = msgspec.json.decode(path.read_bytes(), type=StudyRecord)
    except FileNotFoundError:
        raise UserError(
            f"study {name!r} has no trials in {store.root}; start it with: {again}"
        ) from None
    except (IsADirectoryError, *FLAWS) as flaw:
        raise UserError(f"{path} is damaged ({flaw}); write it again with: {again}") from None
    again = command(name, "study", record.sheet, record.asked)
    for trial in record.trials:
        if absent := _absent(trial, record):
            raise UserError(
                f"{path} is damaged (trial {trial.number} of {trial.cell!r} has no {absent}); "
                f"write it again with: {again}"
            )
    finished(record.trials, f"study {name!r}", f"it with: {again}")
    return record


def _absent(trial: Trial, record: StudyRecord) -> str:
    """What a trial must hold and lacks; empty if it is whole.  An arm may lack the dose of an ingredient."""
    for path in record.space:
        if path not in trial.params and not path.startswith("with."):
            return path
    return "value" if trial.state == COMPLETE and trial.value is None else ""


def finished(trials: Sequence[Trial], whose: str, again: str = "the study") -> list[Trial]:
    """The complete trials; UserError without any."""
    done = [trial for trial in trials if trial.state == COMPLETE]
    if not done:
        states = counts(trials)
        cure = f"lower its {LR}" if set(states) == {DIVERGED} else f"continue {again}"
        raise UserError(
            f"{whose} has zero finished trials ({said(states) or 'none started'}); {cure}"
        )
    return done


def counts(trials: Sequence[Trial]) -> Counter[str]:
    """State -> number of trials."""
    return Counter(trial.state for trial in trials)
