"""Which cells of a grid `--only` chooses."""

import re
from collections.abc import Iterable
from fnmatch import fnmatchcase

from ablab.core.errors import UserError
from ablab.core.language.parse import near
from ablab.experiments.plan.experiment import PlannedRun


def chosen(runs: Iterable[PlannedRun], patterns: Iterable[str]) -> list[PlannedRun]:
    """Runs whose cell matches a pattern (`*gating*`) and none of the `!` patterns.

    Raises UserError for a pattern that fits nothing, and where nothing is left.
    """
    runs = list(runs)
    patterns = list(patterns)
    cells = list(dict.fromkeys(run.cell for run in runs))
    for pattern in patterns:
        if not any(_fits(pattern.removeprefix("!"), cell) for cell in cells):
            raise UserError(
                f"--only {pattern!r} fits no cell. {near(pattern, cells)}Cells: {', '.join(cells)}"
            )
    wanted = [pattern for pattern in patterns if not pattern.startswith("!")] or ["*"]
    barred = [pattern[1:] for pattern in patterns if pattern.startswith("!")]
    kept = [
        run
        for run in runs
        if _fits_one_of(wanted, run.cell) and not _fits_one_of(barred, run.cell)
    ]
    if runs and not kept:
        raise UserError(
            f"--only {' --only '.join(map(repr, patterns))} leaves no cell to run; "
            f"drop one of them. Cells: {', '.join(cells)}"
        )
    return kept


def _fits_one_of(patterns: Iterable[str], cell: str) -> bool:
    return any(_fits(pattern, cell) for pattern in patterns)


def _fits(pattern: str, cell: str) -> bool:
    """A shell pattern, or a bare word that stands in the cell's name."""
    if fnmatchcase(cell, pattern):
        return True
    words = re.split(r"[(), ]+", cell)
    return pattern.isidentifier() and pattern in words
