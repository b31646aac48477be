"""How training went: a panel a metric, the mean over seeds of each cell and a band of one standard deviation."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from ablab.analysis.effects.frame import unit
from ablab.analysis.pictures.bands import bands
from ablab.analysis.pictures.style import BACKGROUND, DISTINCT, INK, canvas, legible
from ablab.core.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMNS = 2
LATE = 0.1  # of the way: the scale is that of what comes after
AXES = {
    "tokens": "training tokens",
    "flops": "training FLOPs",
    "seconds": "seconds of training",
}


def dynamics(logged: pd.DataFrame, metrics: Sequence[str], over: str = "tokens") -> "Figure":
    """logged: of `frame.curves`, or a part.  UserError for an axis that is none, and where nothing was logged."""
    if over not in AXES:
        raise UserError(f"over={over!r} is no axis; choose one of {', '.join(AXES)}")
    known = [metric for metric in metrics if logged[metric].notna().any()]
    if not known:
        raise UserError(
            "none of these metrics was logged by a finished run; see the columns of curves()"
        )
    shown = bands(logged, known)
    if shown.empty or shown[over].isna().all():
        raise UserError(
            f"no finished run has recorded its {AXES[over].removeprefix('training ')}"
        )
    rows = -(-len(known) // COLUMNS)
    columns = min(COLUMNS, len(known))
    figure, panels = canvas(3.6 * columns + 0.6, 2.3 * rows + 0.5, rows, columns)
    colours = _colours(logged)
    for axes, metric in zip(panels, known, strict=False):
        _panel(axes, shown[shown.metric == metric], over, colours)
        named = unit(metric)
        axes.set_title(metric if named == metric else f"{metric} ({named})")
    for empty in panels[len(known) :]:
        empty.set_visible(False)
    figure.supxlabel(f"{AXES[over]}\nline: mean over seeds, band: one sd", fontsize=9)
    lines = [panels[0].plot([], [], color=legible(colour))[0] for colour in colours.values()]
    if len(colours) > 1:
        figure.legend(lines, list(colours), loc="outside right upper", frameon=False)
    return figure


def _colours(logged: pd.DataFrame) -> dict[str, str]:
    """Black for what is measured against nothing, a colour each for the next nine, grey for the rest."""
    first = logged.drop_duplicates("cell")
    roots = [str(cell) for cell in first[first.reference.isna()].cell]
    others = [str(cell) for cell in first.cell if cell not in roots]
    colours = dict.fromkeys(roots, INK) | dict.fromkeys(others, BACKGROUND)
    return colours | dict(zip(others, DISTINCT, strict=False))


def _panel(axes: "Axes", rows: pd.DataFrame, over: str, colours: dict[str, str]) -> None:
    late = []
    for cell, line in rows.groupby("cell", sort=False):
        colour = colours[str(cell)]
        x, mean = line[over].to_numpy(), line["mean"].to_numpy()
        spread = line.sd.fillna(0).to_numpy()
        mark = "o" if len(x) == 1 else ""
        axes.plot(x, mean, color=colour, linewidth=1.4, marker=mark)
        axes.fill_between(
            x, mean - spread, mean + spread, color=colour, alpha=0.15, linewidth=0
        )
        after = line.tokens.to_numpy() >= LATE * line.tokens.max()
        late += [(mean - spread)[after], (mean + spread)[after]]
    seen = np.concatenate(late)
    low, high = np.nanmin(seen), np.nanmax(seen)
    room = 0.06 * (high - low or abs(high) or 1)
    axes.set_ylim(low - room, high + room)
    axes.xaxis.set_major_formatter(lambda value, _: short(value))
    axes.locator_params(nbins=5)


def short(value: float) -> str:
    """In thousands, millions, billions: 1.5M."""
    for size, letter in (
        (1e18, "E"),
        (1e15, "P"),
        (1e12, "T"),
        (1e9, "G"),
        (1e6, "M"),
        (1e3, "k"),
    ):
        if abs(value) >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"
