"""All trials of a study that searches several axes: a slice along each, and a map of the first two.

A line along one axis needs trials that agree on all others; a sampler that moves on every axis at once leaves none.
Here each finished trial is drawn, and marks stand for what was lost.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

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
FAR = 3.0  # times the way from the best trial to the median, beyond which all have the last colour
LEVELS = 12  # colours of a surface
GRID = 200  # points of a surface along each axis


@dataclass(frozen=True)
class SearchedAxis:
    """A searched path whose values are numbers."""

    path: str
    is_log: bool  # searched on a log scale, or over choices that span more than an octave
    low: float
    high: float

    def of(self, trial: Trial) -> float | None:
        """Where a trial stands on it; None where it lacks the path."""
        value = trial.params.get(self.path)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return float(value) if is_number and value is not None else None

    def seen(self, values: np.ndarray) -> np.ndarray:
        """As they stand in the picture, from 0 at `low` to 1 at `high`."""
        if self.is_log:
            return np.log(values / self.low) / np.log(self.high / self.low)
        return (values - self.low) / (self.high - self.low)

    def line(self, points: int) -> np.ndarray:
        """From `low` to `high` in steps that look even."""
        space = np.geomspace if self.is_log else np.linspace
        return space(self.low, self.high, points)

    def dress(self, axes: "Axes", which: str) -> None:
        """A log axis where the search was on one, with plain numbers; its label.  which: x or y."""
        from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

        along = axes.xaxis if which == "x" else axes.yaxis
        axes.set(**{f"{which}label": self.path})
        if not self.is_log:
            along.set_major_locator(MaxNLocator(4))
            return
        axes.set(**{f"{which}scale": "log"})
        along.set_major_locator(LogLocator(subs=self._ticks))
        along.set_minor_locator(NullLocator())
        along.set_major_formatter(lambda value, _: f"{value:g}")

    @property
    def _ticks(self) -> tuple[int, ...]:
        """The digits that have a tick in each decade: few decades need more."""
        decades = np.log10(self.high / self.low)
        if decades > 2:
            return (1,)
        return (1, 3) if decades > 1 else (1, 2, 5)


def axes_of(study: StudyRecord) -> list[SearchedAxis]:
    """The paths on which trials stand at different numbers, in the order of the space."""
    found = []
    for path, how in study.space.items():
        anywhere = SearchedAxis(path, False, 0.0, 1.0)
        values = [value for trial in study.trials if (value := anywhere.of(trial)) is not None]
        low, high = min(values, default=0.0), max(values, default=0.0)
        if low < high:
            wide_choice = "choices" in how and 0 < 2 * low < high
            found.append(SearchedAxis(path, "log" in how or wide_choice, low, high))
    return found


# -- slices ------------------------------------------------------------------------------------------------------------


def draw_slices(study: StudyRecord, path: Path) -> Path:
    """`slices` as a PNG."""
    return drawn(slices, study, path=path)


def slices(study: StudyRecord) -> "Figure":
    """Each finished trial against its value on each axis, a panel an axis; the arm's best is large.

    UserError where no axis has two values.
    """
    along = axes_of(study)
    if not along:
        raise UserError(f"study {study.name!r} has no axis with two values; add trials")
    figure, every = _panels(len(along), sharey=True)
    groups = list(study.cells.values())
    every[0].set_ylabel(f"{study.metric} ({unit(study.metric)})")
    panels = [TrialPanel(axes, study.better) for axes in every]
    panels[0].limits(groups)
    colours = colours_of(study)
    for panel, axis in zip(panels, along, strict=False):
        for cell, trials in study.cells.items():
            _slice(panel, trials, axis, colours[cell])
        axis.dress(panel.axes, "x")
    if len(colours) > 1:
        dot: dict[str, Any] = {"marker": "o", "linestyle": "", "markersize": 4}
        names = [
            every[0].plot([], [], color=legible(colour), **dot)[0]
            for colour in colours.values()
        ]
        figure.legend(names, list(colours), loc="outside right upper", frameon=False)
    said = "dots: all finished trials, whatever their other values; large: the arm's best"
    figure.supxlabel(said + panels[0].key(groups), fontsize=8)
    return figure


def _panels(count: int, **layout: Any) -> "tuple[Figure, list[Axes]]":
    """So many panels, at most PANELS side by side; those that are not needed are hidden."""
    columns = min(PANELS, count)
    rows = -(-count // columns)
    width = 1.6 + 2.8 * columns
    height = 0.9 + 2.6 * rows
    figure, every = canvas(width, height, rows, columns, **layout)
    for empty in every[count:]:
        empty.set_visible(False)
    return figure, every


def _slice(panel: TrialPanel, trials: Sequence[Trial], axis: SearchedAxis, colour: str) -> None:
    places = [(place, trial) for trial in trials if (place := axis.of(trial)) is not None]
    panel.lost([(place, trial.state) for place, trial in places], colour)
    done = [(place, trial.final) for place, trial in places if trial.state == COMPLETE]
    if not done:
        return
    points = np.array(done, float)
    dots: dict[str, Any] = {"markersize": 4.5, "markeredgewidth": 0, "alpha": 0.6}
    panel.axes.plot(*points.T, "o", color=colour, zorder=3, **dots)
    panel.off_scale(points, colour)
    best = min(done, key=lambda point: sign(panel.better) * point[1])
    panel.axes.plot(*best, "o", color=colour, markersize=8, zorder=5)


# -- a map -------------------------------------------------------------------------------------------------------------


class Ground(NamedTuple):
    """The two axes of a map."""

    across: SearchedAxis
    up: SearchedAxis

    def at(self, trial: Trial) -> tuple[float, float] | None:
        """Where a trial stands; None where it lacks one of the two."""
        x = self.across.of(trial)
        y = self.up.of(trial)
        return None if x is None or y is None else (x, y)


class Relief(NamedTuple):
    """The finished trials of an arm on a ground: x, y and the metric, [N] each."""

    ground: Ground
    x: np.ndarray
    y: np.ndarray
    values: np.ndarray

    def between(self) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
        """A grid and the values on it, linear between the trials on the scales that are drawn.

        None where the trials are too few or on one line; masked where none is on the far side.
        """
        from matplotlib.tri import LinearTriInterpolator, Triangulation

        if len(self.values) < FEWEST_FOR_A_SURFACE:
            return None
        seen = [self.ground.across.seen(self.x), self.ground.up.seen(self.y)]
        try:
            surface = LinearTriInterpolator(Triangulation(*seen), self.values)
        except (RuntimeError, ValueError):  # all on one line
            return None
        across = self.ground.across.line(GRID)
        up = self.ground.up.line(GRID)
        even = np.linspace(0, 1, GRID)
        return across, up, surface(*np.meshgrid(even, even))


def draw_heat(study: StudyRecord, path: Path) -> Path:
    """`heat` as a PNG."""
    return drawn(heat, study, path=path)


def heat(study: StudyRecord) -> "Figure":
    """The metric over the first two axes, a panel an arm: interpolated between finished trials, the best ringed.

    UserError where fewer than two axes have two values.
    """
    along = axes_of(study)
    if len(along) < 2:
        searched = ", ".join(study.space)
        raise UserError(
            f"study {study.name!r} searches {searched}; a map needs two axes with two values each"
        )
    ground = Ground(*along[:2])
    reliefs = {cell: _relief(trials, ground) for cell, trials in study.cells.items()}
    known = {cell: relief for cell, relief in reliefs.items() if len(relief.values)}
    figure, every = _panels(len(known), sharex=True, sharey=True)
    colours = _colours(study, np.concatenate([relief.values for relief in known.values()]))
    for axes, (cell, relief) in zip(every, known.items(), strict=False):
        ground.across.dress(axes, "x")
        ground.up.dress(axes, "y")
        shade = _draw_relief(axes, relief, study.better, colours)
        _marks(axes, study.cells[cell], ground)
        axes.set_title(cell)
        axes.label_outer()
    bar = figure.colorbar(shade, ax=every, extend="max" if study.better == "lower" else "min")
    bar.set_label(f"{study.metric} ({unit(study.metric)})")
    bar.outline.set_visible(False)
    said = "dots: finished trials, ring: the arm's best; between them interpolated"
    figure.supxlabel(f"{said}; x diverged, | pruned", fontsize=8)
    return figure


def _relief(trials: Sequence[Trial], ground: Ground) -> Relief:
    points = [
        (*place, trial.final)
        for trial in trials
        if trial.state == COMPLETE and (place := ground.at(trial))
    ]
    x, y, values = np.array(points, float).reshape(-1, 3).T
    return Relief(ground, x, y, values)


def _colours(study: StudyRecord, values: np.ndarray) -> dict[str, Any]:
    """From the best to as far beyond the median; what is worse has the last colour."""
    losses = sign(study.better) * values
    best = losses.min()
    worst = min(losses.max(), best + FAR * (np.median(losses) - best))
    low, high = sorted((sign(study.better) * best, sign(study.better) * worst))
    if low == high:
        high = low + (abs(low) * 0.01 or 1.0)
    name = "viridis" if study.better == "lower" else "viridis_r"
    return {"cmap": name, "vmin": low, "vmax": high}


def _draw_relief(axes: "Axes", relief: Relief, better: str, colours: dict[str, Any]) -> Any:
    """The surface, where there are trials enough, and its dots; what has the colours."""
    surface = relief.between()
    if surface is not None:
        across, up, between = surface
        low, high = colours["vmin"], colours["vmax"]
        steps = np.linspace(low, high, LEVELS)
        axes.contourf(across, up, between.clip(low, high), steps, extend="both", **colours)
    edges: dict[str, Any] = {"s": 22, "edgecolors": "white", "linewidths": 0.7, "zorder": 3}
    dots = axes.scatter(relief.x, relief.y, c=relief.values, **edges, **colours)
    best = int(np.argmin(sign(better) * relief.values))
    ring: dict[str, Any] = {"markerfacecolor": "none", "markeredgecolor": INK, "zorder": 4}
    axes.plot(relief.x[best], relief.y[best], "o", markersize=10, **ring)
    return dots


def _marks(axes: "Axes", trials: Sequence[Trial], ground: Ground) -> None:
    """What was lost, where it was tried."""
    for trial in trials:
        place = ground.at(trial)
        if place and trial.state in MARKERS:
            axes.plot(*place, MARKERS[trial.state], color=FAINT, markersize=6, zorder=3)
