"""Inside a run: a panel a quantity, a line a layer from light to dark, against training tokens."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from ablab.analysis.pictures.dynamics import short
from ablab.analysis.pictures.style import INK, NEUTRAL, canvas
from ablab.core.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PREFIX = "layer/"
Look = dict[str, Any]  # of a line
BESIDE: Look = {"color": NEUTRAL, "linestyle": "--", "linewidth": 1.3}  # what is no layer
COLUMNS = 3
SHADES = (0.25, 1.0)  # of the colour map, first layer and last
NAMED = 4  # layers in the legend
UPRIGHT = 30.0  # a range so many times its lowest value is drawn on a logarithmic axis


def quantities(looked: pd.DataFrame) -> list[str]:
    """What was seen of layers: kurtosis, hidden.weight, attention.gating.factor, ...  looked: of `frame.looks`."""
    names = []
    for column in _of_layers(looked):
        _, name, place = column.split("/")
        if place.isdigit():
            names.append(name)
    return list(dict.fromkeys(names))


def _of_layers(table: pd.DataFrame) -> list[str]:
    """layer/kurtosis/00, layer/kurtosis/end, ..."""
    return [column for column in map(str, table) if column.startswith(PREFIX)]


def _place(column: str) -> str:
    return column.rpartition("/")[2]


def layers(looked: pd.DataFrame, cell: str, shown: Sequence[str]) -> "Figure":
    """Means over the seeds of a cell.

    Raises UserError for a cell or a quantity that was not looked at.
    """
    rows = looked[looked.cell == cell] if len(looked) else looked
    if not len(rows):
        cells = ", ".join(map(repr, dict.fromkeys(looked.cell))) or "none"
        raise UserError(
            f"nobody looked into the layers of {cell!r}; looked at: {cells}; "
            "to look, train with runtime.dynamics=50"
        )
    known = quantities(rows)
    for name in shown:
        if name not in known:
            raise UserError(f"no layer has {name!r}; seen are: {', '.join(known)}")
    columns = min(COLUMNS, len(shown))
    lines = -(-len(shown) // columns)
    figure, panels = canvas(3.1 * columns + 0.9, 2.2 * lines + 0.6, lines, columns)
    means = rows.groupby("step").mean(numeric_only=True)
    shades = _shades(means)
    for axes, name in zip(panels, shown, strict=False):
        _panel(axes, means, name, shades)
    for empty in panels[len(shown) :]:
        empty.set_visible(False)
    figure.supxlabel(f"training tokens\n{cell}: mean over seeds", fontsize=9)
    _legend(figure, panels[0])
    return figure


def _shades(means: pd.DataFrame) -> dict[str, Look]:
    """Layer -> how its lines are drawn, in every panel."""
    from matplotlib import colormaps

    places = set(map(_place, _of_layers(means)))
    inside = sorted(place for place in places if place.isdigit())
    colours = colormaps["viridis_r"](np.linspace(*SHADES, len(inside)))
    return {
        place: {"color": colour, "linewidth": 1.3}
        for place, colour in zip(inside, colours, strict=True)
    }


def _panel(axes: "Axes", means: pd.DataFrame, name: str, shades: dict[str, Look]) -> None:
    own = [column for column in sorted(_of_layers(means)) if column.split("/")[1] == name]
    marker = "o" if len(means) == 1 else ""
    for column in own:
        place = _place(column)
        look = shades.get(place, BESIDE)
        label = f"layer {int(place)}" if place in shades else place
        axes.plot(means.tokens, means[column], marker=marker, label=label, **look)
    seen = means[own].to_numpy()
    seen = seen[np.isfinite(seen)]
    if len(seen) and seen.min() > 0 and seen.max() > UPRIGHT * seen.min():
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
    axes.set_title(name, color=INK)
    axes.xaxis.set_major_formatter(lambda value, _: short(value))
    axes.locator_params(axis="x", nbins=5)


def _legend(figure: "Figure", axes: "Axes") -> None:
    """A few layers from the first to the last, and what stands beside them."""
    lines, names = axes.get_legend_handles_labels()
    inside = [i for i, name in enumerate(names) if name.startswith("layer ")]
    count = min(NAMED, len(inside))
    kept = [inside[round(i)] for i in np.linspace(0, len(inside) - 1, count)]
    kept += [i for i in range(len(names)) if i not in inside]
    figure.legend(
        [lines[i] for i in kept],
        [names[i] for i in kept],
        loc="outside right upper",
        frameon=False,
    )
