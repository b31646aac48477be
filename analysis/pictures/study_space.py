"""All trials of a study that searches several axes: a slice along each, and a map of the first two.

A line along one axis needs trials that agree on all others; a sampler that moves on every axis at once leaves none.
Here each finished trial is drawn, and marks stand for what was lost.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ablab.analysis.effects.frame import unit
from ablab.analysis.pictures.style import FAINT, INK, canvas, drawn, legible
from ablab.analysis.pictures.trial_panel import MARKERS, TrialPanel, colours_of
from ablab.analysis.tuning.winners import sign
from ablab.core.errors import UserError
from ablab.core.store.study_record import COMPLETE, StudyRecord, Trial

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANELS = 3  # side by side
FEWEST_FOR_A_SURFACE = 6  # trials, below which a map shows its dots alone
LEVELS = 12  # colours of a surface
GRID = 200  # points of a surface along each axis


def axes_of(study: StudyRecord) -> list[str]:
    """The searched paths whose values are numbers that differ between trials, in the order of the space."""
    return [path for path in study.space if len(set(_numbers(study.trials, path))) > 1]


def _numbers(trials: Sequence[Trial], path: str) -> list[float]:
    values = [trial.params.get(path) for trial in trials]
    return [
        float(value)
        for value in values
        if isinstance(value, int | float) and not isinstance(value, bool)
    ]


def _is_log(study: StudyRecord, path: str) -> bool:
    """Searched on a log scale, or over choices that span more than an octave."""
    if "choices" not in study.space[path]:
        return "log" in study.space[path]
    values = _numbers(study.trials, path)
    return min(values) > 0 and max(values) > 2 * min(values)


# -- slices ------------------------------------------------------------------------------------------------------------


def draw_slices(study: StudyRecord, path: Path) -> Path:
    """`slices` as a PNG."""
    return drawn(slices, study, path=path)


def slices(study: StudyRecord) -> "Figure":
    """Each finished trial against its value on each axis, a panel an axis; the arm's best is large.

    UserError where no axis has two values.
    """
    paths = axes_of(study)
    if not paths:
        raise UserError(f"study {study.name!r} has no axis with two values; add trials")
    colours = colours_of(study)
    columns = min(PANELS, len(paths))
    rows = -(-len(paths) // columns)
    size = (1.4 + 2.9 * columns, 0.9 + 2.6 * rows)
    figure, every = canvas(*size, rows, columns, sharey=True)
    groups = list(study.cells.values())
    every[0].set_ylabel(f"{study.metric} ({unit(study.metric)})")
    panels = [TrialPanel(axes, study.better) for axes in every]
    panels[0].limits(groups)
    for panel, path in zip(panels, paths, strict=False):
        for cell, trials in study.cells.items():
            _slice(panel, trials, path, colours[cell])
        _scale(panel.axes, study, path, "x")
    for empty in every[len(paths) :]:
        empty.set_visible(False)
    names = [
        every[0].plot([], [], "o", color=legible(colour), markersize=4)[0]
        for colour in colours.values()
    ]
    if len(colours) > 1:
        figure.legend(names, list(colours), loc="outside right upper", frameon=False)
    figure.supxlabel(
        f"dots: all finished trials, whatever their other values; large: the arm's best{panels[0].key(groups)}",
        fontsize=8,
    )
    return figure


def _slice(panel: TrialPanel, trials: Sequence[Trial], path: str, colour: str) -> None:
    here = [trial for trial in trials if path in trial.params]
    done = [trial for trial in here if trial.state == COMPLETE]
    panel.lost([(trial.params[path], trial.state) for trial in here], colour)
    if not done:
        return
    points = np.array([(trial.params[path], trial.final) for trial in done], float)
    dots: dict[str, Any] = {"markersize": 4.5, "markeredgewidth": 0, "alpha": 0.6}
    panel.axes.plot(*points.T, "o", color=colour, zorder=3, **dots)
    panel.off_scale(points, colour)
    best = _best(done, panel.better)
    panel.axes.plot(best.params[path], best.final, "o", color=colour, markersize=8, zorder=5)


def _best(done: Sequence[Trial], better: str) -> Trial:
    return min(done, key=lambda trial: sign(better) * trial.final)


def _scale(axes: "Axes", study: StudyRecord, path: str, which: str) -> None:
    """A log axis where the search was on one, with plain numbers; its label."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

    along = axes.xaxis if which == "x" else axes.yaxis
    axes.set(**{f"{which}label": path})
    if not _is_log(study, path):
        along.set_major_locator(MaxNLocator(4))
        return
    axes.set(**{f"{which}scale": "log"})
    values = _numbers(study.trials, path)
    decades = np.log10(max(values) / min(values))
    ticks = (1,) if decades > 2 else (1, 3) if decades > 1 else (1, 2, 5)
    along.set_major_locator(LogLocator(subs=ticks))
    along.set_minor_locator(NullLocator())
    along.set_major_formatter(lambda value, _: f"{value:g}")


# -- a map -------------------------------------------------------------------------------------------------------------


def draw_heat(study: StudyRecord, path: Path) -> Path:
    """`heat` as a PNG."""
    return drawn(heat, study, path=path)


def heat(study: StudyRecord) -> "Figure":
    """The metric over the first two axes, a panel an arm: interpolated between finished trials, the best ringed.

    UserError where fewer than two axes have two values.
    """
    paths = axes_of(study)
    if len(paths) < 2:
        searched = ", ".join(study.space)
        raise UserError(
            f"study {study.name!r} searches {searched}; a map needs two axes with two values each"
        )
    across, up = paths[:2]
    cells = {cell: _done(trials, across, up) for cell, trials in study.cells.items()}
    cells = {cell: done for cell, done in cells.items() if done}
    columns = min(PANELS, len(cells))
    rows = -(-len(cells) // columns)
    size = (1.8 + 2.7 * columns, 0.9 + 2.6 * rows)
    figure, every = canvas(*size, rows, columns, sharex=True, sharey=True)
    low, high = _levels(study, [trial for done in cells.values() for trial in done])
    for axes, (cell, done) in zip(every, cells.items(), strict=False):
        _scale(axes, study, across, "x")
        _scale(axes, study, up, "y")
        shade = _surface(axes, study, done, (across, up), (low, high))
        _marks(axes, study.cells[cell], across, up)
        axes.set_title(cell)
        axes.label_outer()
    for empty in every[len(cells) :]:
        empty.set_visible(False)
    bar = figure.colorbar(shade, ax=every, extend="max" if study.better == "lower" else "min")
    bar.set_label(f"{study.metric} ({unit(study.metric)})")
    bar.outline.set_visible(False)
    figure.supxlabel(
        "dots: finished trials, ring: the arm's best; between them interpolated; x diverged, | pruned",
        fontsize=8,
    )
    return figure


def _done(trials: Sequence[Trial], *paths: str) -> list[Trial]:
    """The finished trials that have a number on each of the paths."""
    return [
        trial
        for trial in trials
        if trial.state == COMPLETE and all(_numbers([trial], path) for path in paths)
    ]


def _levels(study: StudyRecord, done: Sequence[Trial]) -> tuple[float, float]:
    """The range of colours: from the best to as far beyond the median; what is worse has the last colour."""
    values = np.array([trial.final for trial in done])
    up = sign(study.better)
    best = (up * values).min()
    worst = min((up * values).max(), best + 3 * (np.median(up * values) - best))
    low, high = sorted((up * best, up * worst))
    return low, high if high > low else low + (abs(low) * 0.01 or 1.0)


def _surface(
    axes: "Axes",
    study: StudyRecord,
    done: Sequence[Trial],
    paths: tuple[str, str],
    levels: tuple[float, float],
) -> Any:
    """The surface, where there are trials enough, and its dots; what has the colours."""
    x, y = (np.array([trial.params[path] for trial in done], float) for path in paths)
    values = np.array([trial.final for trial in done])
    colours = "viridis" if study.better == "lower" else "viridis_r"
    shared: dict[str, Any] = {"cmap": colours, "vmin": levels[0], "vmax": levels[1]}
    if (surface := _interpolated(study, paths, x, y, values)) is not None:
        steps = np.linspace(*levels, LEVELS)
        across, up, between = surface
        axes.contourf(across, up, between.clip(*levels), steps, extend="both", **shared)
    dots = axes.scatter(
        x, y, c=values, s=22, edgecolors="white", linewidths=0.7, zorder=3, **shared
    )
    best = _best(done, study.better)
    at = [best.params[path] for path in paths]
    axes.plot(*at, "o", markersize=10, markerfacecolor="none", markeredgecolor=INK, zorder=4)
    return dots


def _interpolated(
    study: StudyRecord,
    paths: tuple[str, str],
    x: np.ndarray,
    y: np.ndarray,
    values: np.ndarray,
) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """A grid of the two axes and the values on it, linear between the trials on the scales that are drawn.

    None where the trials are too few or on one line; masked where none is on the far side.
    """
    from matplotlib.tri import LinearTriInterpolator, Triangulation

    if len(values) < FEWEST_FOR_A_SURFACE:
        return None
    scales = [_is_log(study, path) for path in paths]
    seen = [np.log(at) if log else at for at, log in zip((x, y), scales, strict=True)]
    spans = [np.ptp(at) for at in seen]
    if not all(spans):
        return None
    units = [(at - at.min()) / span for at, span in zip(seen, spans, strict=True)]
    try:
        between = LinearTriInterpolator(Triangulation(*units), values)
    except (RuntimeError, ValueError):  # all on one line
        return None
    line = np.linspace(0, 1, GRID)
    ends = [at.min() + span * line for at, span in zip(seen, spans, strict=True)]
    across, up = (np.exp(at) if log else at for at, log in zip(ends, scales, strict=True))
    return across, up, between(*np.meshgrid(line, line))


def _marks(axes: "Axes", trials: Sequence[Trial], across: str, up: str) -> None:
    """What was lost, where it was tried."""
    for trial in trials:
        if trial.state in MARKERS and _numbers([trial], across) and _numbers([trial], up):
            at = (trial.params[across], trial.params[up])
            axes.plot(*at, MARKERS[trial.state], color=FAINT, markersize=6, zorder=3)
