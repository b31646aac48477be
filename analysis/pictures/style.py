"""What all pictures share: colours, type, a canvas without global state, names at the ends of lines.

matplotlib is imported when a picture is drawn, without pyplot: no global state, no display.  Colours are from Okabe and
Ito's set and Tol's "muted" set, without their pale ones: legible as text on white, and without red-green vision.
"""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ablab.analysis.effects.effect import HELPS, HURTS
from ablab.core.store.files import writing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.typing import RcKeyType

    Picture = Callable[..., Figure]

INK = "#222222"
FAINT = "#9a9a9a"
NEUTRAL = "#6e6e6e"
BACKGROUND = "#c8c8c8"
GRID = "#e8e8e8"
VERDICT_COLOUR = {HELPS: "#0072B2", HURTS: "#D55E00"}  # all others: NEUTRAL
DISTINCT = (
    "#332288",
    "#D55E00",
    "#117733",
    "#AA4499",
    "#0072B2",
    "#999933",
    "#882255",
    "#44AA99",
    "#CC6677",
)
STYLE: "dict[RcKeyType, Any]" = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "savefig.dpi": 200,
    "text.parse_math": False,
}
Colours = dict[str, str]  # of each cell
LABEL_GAP = 0.065  # of the axes' height, between names at line ends


def styled(changes: "Mapping[RcKeyType, Any]" = {}) -> AbstractContextManager[None]:
    """Draw inside this: the house's style, with these settings changed."""
    from matplotlib import rc_context

    return rc_context({**STYLE, **changes})


def canvas(
    width: float, height: float, rows: int = 1, columns: int = 1, **layout: Any
) -> "tuple[Figure, list[Axes]]":
    """A figure of width x height inches with rows x columns axes, as a flat list.  layout: of figure.subplots."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(rows, columns, squeeze=False, **layout).ravel())


def drawn(picture: "Picture", *given: Any, path: Path) -> Path:
    """A picture as a PNG."""
    with styled():
        return save(picture(*given), path)


def shown(picture: "Picture", *given: Any) -> "Figure":
    """A picture to look at where it was asked for: drawn once here, so that all of it has the house's style."""
    with styled():
        figure = picture(*given)
        figure.draw_without_rendering()
        return figure


def save(figure: "Figure", path: Path) -> Path:
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, bbox_inches="tight", pad_inches=0.15)
    return path


def legible(colour: str) -> str:
    """The colour for text: what stays in the background is named in a darker grey."""
    return NEUTRAL if colour == BACKGROUND else colour


def rows_of_names(axes: "Axes", names: list[str]) -> None:
    """A row per name, the first on top, on a light grid: no line on the left."""
    axes.set(ylim=(len(names) - 0.4, -0.6))
    axes.set_yticks(range(len(names)), names)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)


def light_grid(axes: "Axes") -> None:
    axes.grid(axis="x", color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)


def label_ends(axes: "Axes", ends: dict[str, float], colours: Colours) -> None:
    """Names at the right end of their lines, pushed apart until none overlaps."""
    names = sorted(ends, key=lambda name: ends[name])
    gap = LABEL_GAP * np.ptp(axes.get_ylim())
    y = np.array([ends[name] for name in names])
    for _ in range(100):
        for i in range(len(y) - 1):
            push = max(0.0, gap - (y[i + 1] - y[i])) / 2
            y[i] -= push
            y[i + 1] += push
    for name, height in zip(names, y, strict=True):
        axes.annotate(
            name,
            (1.015, height),
            xycoords=("axes fraction", "data"),
            va="center",
            fontsize=8,
            color=colours[name],
        )
