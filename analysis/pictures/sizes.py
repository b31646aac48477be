"""Speedups over sizes: a panel a unit, a line an arm, both axes logarithmic."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ablab.analysis.effects.sizes import OverSizes
from ablab.analysis.effects.speedup import Speedup
from ablab.analysis.pictures.style import (
    BACKGROUND,
    DISTINCT,
    INK,
    canvas,
    drawn,
    label_ends,
    legible,
    light_grid,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# What a speedup's axis may be marked with; as many as fit the range are.
COARSE = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20)
FINE = (0.3, 0.4, 0.6, 0.7, 0.8, 0.9, 1, 1.1, 1.2, 1.4, 1.6, 2, 2.5, 3)
WIDE = 0.7  # of log10 factor: beyond, the coarse marks
ASIDE = 0.006  # of log10 parameters, between the bars of two arms
ROOM = 0.08  # of the range, above and below


def draw_sizes(arms: Sequence[OverSizes], path: Path) -> Path:
    """`sizes` as a PNG."""
    return drawn(sizes, arms, path=path)


def sizes(arms: Sequence[OverSizes]) -> "Figure":
    """Each arm's speedup at each size with its 95 % interval over seeds."""
    units = list(dict.fromkeys(arm.unit for arm in arms))
    cells = list(dict.fromkeys(arm.cell for arm in arms))
    colours = dict.fromkeys(cells, BACKGROUND) | dict(zip(cells, DISTINCT, strict=False))
    figure, panels = canvas(1.2 + 2.7 * len(units), 3.6, 1, len(units), sharey=True)
    for axes, unit in zip(panels, units, strict=True):
        own = [arm for arm in arms if arm.unit == unit]
        for i, arm in enumerate(own):
            _line(axes, arm, colours[arm.cell], ASIDE * (i - (len(own) - 1) / 2))
        axes.axhline(0, color=INK, linewidth=0.9, zorder=1)
        axes.set_title(f"in {unit}")
        light_grid(axes)
    _scale(panels, arms)
    ends = {
        arm.cell: np.log10(list(arm.by_size.values())[-1].factor)
        for arm in arms
        if arm.unit == units[-1]
    }
    label_ends(panels[-1], ends, {cell: legible(colours[cell]) for cell in ends})
    panels[0].set_ylabel("speedup over the reference")
    figure.supxlabel(
        "parameters of the reference\nabove the line an arm is cheaper; bars: 95 % over seeds",
        fontsize=9,
    )
    return figure


def _line(axes: "Axes", arm: OverSizes, colour: str, aside: float) -> None:
    """aside: on x, so that the bars of two arms do not hide each other."""
    at = np.log10(np.array(list(arm.by_size), float)) + aside
    found = list(arm.by_size.values())
    heights = np.log10([one.factor for one in found])
    axes.plot(at, heights, color=colour, linewidth=1.4, marker="o", markersize=4)
    for x, one in zip(at, found, strict=True):
        axes.plot([x, x], _reach(one), color=colour, linewidth=1.2, alpha=0.6)


def _reach(one: Speedup) -> np.ndarray:
    """The ends of the interval; the factor itself where there is none."""
    low = one.factor if one.low is None else one.low
    high = one.factor if one.high is None else one.high
    return np.log10([low, high])


def _scale(panels: "Sequence[Axes]", arms: Sequence[OverSizes]) -> None:
    """Marks at the sizes that were trained, and at round factors."""
    trained = sorted({parameters for arm in arms for parameters in arm.by_size})
    for axes in panels:
        axes.set_xticks(np.log10(trained), [_short(parameters) for parameters in trained])
        axes.margins(x=0.12)
    reached = np.concatenate([_reach(one) for arm in arms for one in arm.by_size.values()])
    low, high = min(reached.min(), -0.02), max(reached.max(), 0.02)
    room = ROOM * (high - low)
    panels[0].set_ylim(low - room, high + room)
    marks = _within(COARSE if high - low > WIDE else FINE, low - room, high + room)
    panels[0].set_yticks(np.log10(marks), [f"{mark:g} x" for mark in marks])


def _within(factors: Iterable[float], low: float, high: float) -> list[float]:
    return [factor for factor in factors if low <= np.log10(factor) <= high]


def _short(parameters: int) -> str:
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if parameters >= size:
            return f"{parameters / size:.3g} {letter}"
    return f"{parameters}"
