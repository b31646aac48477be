"""What a store holds: every run with its state, its size and who wants it; and how it is removed.  No torch here."""

import os
import shutil
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ablab.core.errors import UserError
from ablab.core.store.claim import take_if_dead
from ablab.core.store.files import writing
from ablab.core.store.record import Record
from ablab.core.store.result import DAMAGED, INTERRUPTED
from ablab.core.store.store import Store
from ablab.core.store.study_record import studies, study_path

START = "init"  # how an experiment wants the run whose weights it begins with
REMOVED = ".removed"  # what the folder of a run is called while it is deleted


@dataclass(frozen=True)
class Held:
    """A run that has a folder in the store."""

    run: str
    status: str
    wanted_by: dict[str, list[str]]  # experiment -> its cells that this run answers
    size: int  # bytes on disk
    started: float  # unix seconds of the first start; 0: not recorded
    step: int = 0
    tokens: int = 0
    seconds: float = 0.0  # of training
    metrics: dict[str, float] = field(default_factory=dict)


# -- what there is -----------------------------------------------------------------------------------------------------
def held_runs(store: Store) -> list[Held]:
    """Every run of the store, the oldest first."""
    wanted = wanted_runs(store)
    found = [_held(store.run(run), wanted) for run in store.run_ids()]
    return sorted(found, key=lambda run: (run.started, run.run))


def wanted_runs(store: Store) -> Mapping[str, dict[str, list[str]]]:
    """Run -> experiment -> the cells that it answers.  Raises UserError for a plan that cannot be read."""
    wanted: dict[str, dict[str, list[str]]] = defaultdict(dict)
    for experiment in store.experiments():
        plan = store.read_plan(experiment)
        for row in plan.all_rows:
            cells = wanted[row.run].setdefault(experiment, [])
            if row.cell not in cells:
                cells.append(row.cell)
        if plan.start:
            wanted[plan.start].setdefault(experiment, []).append(START)
    return wanted


def _held(record: Record, wanted: Mapping[str, dict[str, list[str]]]) -> Held:
    run = record.folder.name
    started = record.about().get("started")
    common: dict[str, Any] = {
        "run": run,
        "wanted_by": wanted.get(run, {}),
        "size": size_of(record.folder),
        "started": started if isinstance(started, int | float) else 0.0,
    }
    try:
        result = record.result()
    except UserError:
        return Held(status=DAMAGED, **common)
    if result is None:
        mark = record.mark()
        return Held(
            status=INTERRUPTED,
            step=mark.step,
            tokens=mark.tokens,
            seconds=mark.seconds,
            **common,
        )
    return Held(
        status=result.status,
        step=result.step,
        tokens=result.tokens,
        seconds=result.seconds,
        metrics=result.metrics,
        **common,
    )


def size_of(folder: Path) -> int:
    """Bytes of the files below a folder; of one that vanishes meanwhile, none."""
    total = 0
    for where, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(where, name)).st_size
            except FileNotFoundError:
                continue
    return total


# -- what goes ---------------------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Removal:
    """What goes if it is agreed to, and what stays although it was named."""

    runs: list[Held]
    experiments: list[str]
    shared: list[Held]  # runs of these experiments that others want too

    @property
    def size(self) -> int:
        return sum(run.size for run in self.runs)


def removal(store: Store, names: Collection[str], unused: bool = False) -> Removal:
    """Experiments with the runs that nobody else wants, and runs that nobody wants.

    unused: every run that no experiment wants, too.
    Raises UserError for a name that is neither, and for a run that an experiment which stays wants.
    """
    held = held_runs(store)
    known = {*store.experiments(), *studies(store)}
    experiments = [name for name in dict.fromkeys(names) if name in known]
    going: dict[str, Held] = {}
    shared = []
    for run in held:
        others = [name for name in run.wanted_by if name not in experiments]
        goes = not others if run.wanted_by else unused
        if goes:
            going[run.run] = run
        elif len(others) < len(run.wanted_by):
            shared.append(run)
    by_id = {run.run: run for run in held}
    for name in names:
        if name not in known:
            run = by_id[
                store.id_of(name, "name an experiment, or a run that `ablab runs` lists")
            ]
            _refuse_wanted(run, experiments)
            going[run.run] = run
    return Removal(list(going.values()), experiments, shared)


def _refuse_wanted(run: Held, going: Collection[str]) -> None:
    for experiment, cells in run.wanted_by.items():
        if experiment not in going:
            raise UserError(
                f"run {run.run} answers {cells[0]!r} of {experiment}; "
                f"remove that experiment with it: ablab rm {experiment} {run.run}"
            )


def remove(store: Store, what: Removal) -> None:
    """Delete it; a kill half-way leaves whole runs and none that is cut.  Raises UserError where one trains now."""
    for experiment in what.experiments:
        for path in (store.plan_path(experiment), study_path(store, experiment)):
            with writing(path):
                path.unlink(missing_ok=True)
        _delete(store.root / "reports" / experiment)
    for run in what.runs:
        _delete_idle(store.run(run.run))


def _delete_idle(record: Record) -> None:
    claim = take_if_dead(record.claim_path)
    if claim is None:
        raise UserError(f"run {record.folder.name} is being trained; stop that command first")
    try:
        _delete(record.folder)
    finally:
        claim.release()


def _delete(folder: Path) -> None:
    going = folder.with_name(f".{folder.name}{REMOVED}")
    with writing(folder):
        shutil.rmtree(going, ignore_errors=True)
        if folder.is_dir():
            folder.rename(going)
            shutil.rmtree(going)
