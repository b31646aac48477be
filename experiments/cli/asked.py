"""From words on the command line to what they name: a store, an experiment and its runs, a cell, seeds."""

import re
from pathlib import Path
from typing import TYPE_CHECKING

from ablab.core.errors import UserError
from ablab.core.store.store import Store, store_root

if TYPE_CHECKING:
    from ablab.experiments.plan.experiment import Experiment, PlannedRun


def store_of(flag: Path | None) -> Store:
    return Store(store_root(str(flag) if flag else None).absolute())


def folders_of(plugins: list[Path] | None) -> list[str]:
    """Plugin folders as a worker can find them, wherever it runs."""
    return [str(folder.absolute()) for folder in plugins or ()]


def prepare(
    name: str,
    overrides: list[str] | None,
    plugins: list[Path] | None,
    store: Store,
    seeds: str | None = None,
) -> "tuple[Experiment, list[PlannedRun]]":
    """Load an experiment and its runs.  The data digest is read from the store where the config leaves it open."""
    from ablab.ablations.registry import discover
    from ablab.core.recipe.load import overrides_from
    from ablab.experiments.plan.experiment import load

    discover(plugins or ())
    experiment = load(name, overrides_from(overrides or []), lambda data: _digest(store, data))
    return experiment, experiment.runs(seeds_of(seeds))


def _digest(store: Store, data: str) -> str | None:
    """None while the tokens are not there: a recipe can be shown before its data exists, but not run."""
    from ablab.core.data.corpus import load_meta

    folder = store.root / "data" / data
    return load_meta(folder).digest if folder.exists() else None


def seeds_of(text: str | None) -> list[int] | None:
    """`0-4`, or `0,3,7`, or both."""
    if text is None:
        return None
    seeds: list[int] = []
    for part in text.split(","):
        found = _span(part)
        if not found:
            raise UserError(f"--seeds {text!r} must look like 0-4 or 0,3,7")
        seeds += found
    return seeds


def _span(text: str) -> range:
    """`3` or `0-4`; empty where it is neither, or runs backwards."""
    ends = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", text)
    if ends is None:
        return range(0)
    first, last = ends[1], ends[2] or ends[1]
    return range(int(first), int(last) + 1)


def run_of(runs: "list[PlannedRun]", cell: str) -> "PlannedRun":
    """The first run of a cell."""
    from ablab.core.language.parse import near

    for run in runs:
        if run.cell == cell:
            return run
    cells = list(dict.fromkeys(run.cell for run in runs))
    raise UserError(f"no cell {cell!r}. {near(cell, cells)}Cells: {', '.join(cells)}")
