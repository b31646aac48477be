"""How a study's search went: which parameters mattered, and what more trials bought."""

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ablab.analysis.effects.frame import unit
from ablab.analysis.pictures.style import (
    INK,
    NEUTRAL,
    canvas,
    drawn,
    label_ends,
    legible,
    rows_of_names,
)
from ablab.analysis.pictures.trial_panel import TrialPanel, colours_of
from ablab.core.errors import UserError
from ablab.core.store.study_record import COMPLETE, StudyRecord, Trial

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Finished trials that a share needs.  Sd of the share of the stronger of two parameters over 40 random searches of one
# quadratic (PED-ANOVA): .24 at 15 trials, .21 at 30, .12 at 60.
TELLING = 60


def draw_importance(study: StudyRecord, path: Path) -> Path:
    """`importance` as a PNG."""
    return drawn(importance, study, path=path)


def importance(study: StudyRecord) -> "Figure":
    """What share of the spread between an arm's trials each searched parameter explains.

    A row per arm, a panel per parameter, the most important one first.
    """
    known = {cell: shares for cell, shares in study.importance.items() if shares}
    if not known:
        raise UserError(
            f"study {study.name!r} has no importances; "
            "they need finished trials that differ in more than one parameter"
        )
    totals: dict[str, float] = {}
    for name in sorted({name for shares in known.values() for name in shares}):
        totals[name] = sum(shares.get(name, 0.0) for shares in known.values())
    names = sorted(totals, key=lambda name: -totals[name])
    size = (1.2 + 2.4 * len(names), 0.8 + 0.26 * len(known))
    figure, panels = canvas(*size, 1, len(names), sharex=True, sharey=True)
    for axes, name in zip(panels, names, strict=True):
        _bars(axes, {cell: shares.get(name) for cell, shares in known.items()}, study)
        axes.set(title=name, xlim=(0, 1.15), xticks=[0, 0.5, 1])
    figure.supxlabel(_trust(study, list(known)), fontsize=9)
    return figure


def _trust(study: StudyRecord, cells: list[str]) -> str:
    """What the shares are, and from how many trials: few make them a guess."""
    finished = [
        sum(trial.state == COMPLETE for trial in study.cells.get(cell, [])) for cell in cells
    ]
    fewest, most = min(finished), max(finished)
    counted = f"{fewest}" if fewest == most else f"{fewest} to {most}"
    line = f"importance: share of the spread between {counted} finished trials an arm"
    if fewest < TELLING:
        line += f"\nso few (under {TELLING}) give a guess, not a ranking"
    return line


def _bars(axes: "Axes", shares: dict[str, float | None], study: StudyRecord) -> None:
    """A bar per arm that has the parameter, its share beside it."""
    colours = colours_of(study)
    for y, (cell, share) in enumerate(shares.items()):
        if share is not None:
            axes.barh(y, share, height=0.62, color=colours.get(cell, NEUTRAL))
            said = f"{share:.2f}"
            axes.text(share + 0.02, y, said, va="center_baseline", fontsize=8, color=INK)
    rows_of_names(axes, list(shares))


def draw_history(study: StudyRecord, path: Path) -> Path:
    """`history` as a PNG."""
    return drawn(history, study, path=path)


def history(study: StudyRecord) -> "Figure":
    """The best value so far against the number of trials, per arm: what stopping the search earlier would have cost."""
    colours = colours_of(study)
    lines = list(study.cells.values())
    figure, (axes,) = canvas(6.8, 3.6)
    panel = TrialPanel(axes, study.better)
    panel.limits(lines)
    ends = {}
    for cell, trials in study.cells.items():
        ordered = sorted(trials, key=lambda trial: trial.number)
        end = _history(panel, ordered, colours[cell])
        if end is not None:
            ends[cell] = end
    label_ends(axes, ends, {cell: legible(colour) for cell, colour in colours.items()})
    longest = max(map(len, lines), default=1)
    axes.set_xlabel(f"trials of the arm\nline: best so far; dots: trials{panel.key(lines)}")
    axes.set_ylabel(f"{study.metric} ({unit(study.metric)})")
    axes.set_xlim(0.5, longest + 0.5)
    axes.locator_params(axis="x", integer=True)
    return figure


def _history(panel: TrialPanel, trials: list[Trial], colour: str) -> float | None:
    """One arm's trials and its best so far; the best of all, or None where none has finished."""
    number = np.arange(len(trials)) + 1
    values = np.array(
        [trial.final if trial.state == COMPLETE else np.nan for trial in trials], float
    )
    best_so_far = np.fmin if panel.better == "lower" else np.fmax  # both pass over NaN
    best = best_so_far.accumulate(values)
    known = np.isfinite(best)
    if known.any():
        panel.axes.step(
            number[known], best[known], where="post", color=colour, linewidth=1.6, zorder=3
        )
        panel.axes.plot(
            number,
            values,
            "o",
            color=colour,
            markersize=3,
            alpha=0.35,
            markeredgewidth=0,
            zorder=2,
        )
        panel.off_scale(np.stack([number, values], 1), colour)
    states = [(float(n), trial.state) for n, trial in zip(number, trials, strict=True)]
    panel.lost(states, colour)
    return float(best[-1]) if known.any() else None
