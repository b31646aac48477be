"""The curves of a report: held-out loss against tokens, and each arm minus its reference on the same seeds."""

from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd

from ablab.analysis.effects.frame import unit
from ablab.analysis.pictures.style import (
    BACKGROUND,
    DISTINCT,
    INK,
    NEUTRAL,
    Colours,
    canvas,
    drawn,
    label_ends,
    legible,
)
from ablab.core.store.result import FINISHED

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MANY_CELLS = 10  # above, colours would repeat
HIGHLIGHTED = 3  # arms that keep a colour then
DOT: dict[str, Any] = {"marker": "o", "markersize": 4, "clip_on": False}


class Points(NamedTuple):
    """One run: the metric against tokens, [P] each."""

    tokens: np.ndarray
    values: np.ndarray


class Seeds(NamedTuple):
    """Several runs on one token axis: tokens [P], values [S, P]."""

    tokens: np.ndarray
    values: np.ndarray

    @property
    def start(self) -> float:
        """The mean over seeds at the first point."""
        return float(self.values[:, 0].mean())

    @property
    def end(self) -> float:
        """The mean over seeds at the last point."""
        return float(self.values[:, -1].mean())

    def late(self) -> np.ndarray:
        """The values from a tenth of the tokens on."""
        return self.values[:, self.tokens >= self.tokens[-1] / 10]


class Curve:
    """The runs of one cell.  `finished`: pair -> its points; `lost`: (status, points) of the rest."""

    def __init__(self, reference: str | None):
        self.reference = reference
        self.finished: dict[int, Points] = {}
        self.lost: list[tuple[str, Points]] = []

    def add(self, pair: int, status: str, points: Points) -> None:
        """A run, after those of smaller pairs."""
        if status == FINISHED:
            self.finished[pair] = points
        else:
            self.lost.append((status, points))

    def seeds(self, pairs: Iterable[int] | None = None) -> Seeds:
        """The finished runs, or those of some pairs, on the token axis of the first."""
        runs = [self.finished[pair] for pair in pairs or self.finished]
        axis = runs[0].tokens
        return Seeds(axis, np.stack([np.interp(axis, *run) for run in runs]))

    def minus(self, reference: "Curve") -> Seeds | None:
        """The differences over the pairs and tokens that both reached; None without any."""
        pairs = sorted(self.finished.keys() & reference.finished.keys())
        if not pairs:
            return None
        axis, values = self.seeds(pairs)
        theirs = [reference.finished[pair] for pair in pairs]
        first = max(run.tokens[0] for run in theirs)
        last = min(run.tokens[-1] for run in theirs)
        shared = (axis >= first) & (axis <= last)
        if not shared.any():
            return None
        differences = values - np.stack([np.interp(axis, *run) for run in theirs])
        return Seeds(axis[shared], differences[:, shared])


def draw_curves(logged: pd.DataFrame, path: Path, metric: str = "val/loss") -> Path:
    """`curves` as a PNG."""
    return drawn(curves, logged, metric, path=path)


def curves(logged: pd.DataFrame, metric: str = "val/loss") -> "Figure":
    """Held-out loss against tokens (top) and each arm minus its reference on the same seeds (bottom).

    logged: from `frame.curves`.  Line: mean over the finished seeds; band: lowest to highest seed.  A run that did not
    finish is dashed and ends in a cross.  Above ten cells only the reference and the three arms that end farthest from
    it have a colour.
    """
    cells = curves_of(logged, metric)
    deltas = _deltas(cells)
    colours = _colours(cells, deltas)
    panels = 2 if deltas else 1
    figure, axes = canvas(6.8, 6.6 if deltas else 3.8, rows=panels, sharex=True)
    _losses(axes[0], cells, colours)
    axes[0].set(ylabel=f"{metric} ({unit(metric)})", title="On held-out text")
    if deltas:
        references = {str(cells[cell].reference) for cell in deltas}
        reference = references.pop() if len(references) == 1 else "its reference"
        _differences(axes[1], deltas, colours, reference)
        axes[1].set_ylabel(f"difference ({unit(metric)})")
        axes[1].set_title(f"Minus {reference}, same seeds")
    key = _key(deltas, colours)
    axes[-1].set_xlim(0, logged.tokens.max() or 1)
    axes[-1].set_xlabel(f"training tokens\n{key}")
    axes[-1].xaxis.set_major_formatter(lambda tokens, _: _count(tokens))
    return figure


def curves_of(logged: pd.DataFrame, metric: str) -> dict[str, Curve]:
    """Cell -> its runs, as far as they have logged the metric."""
    known = logged.dropna(subset=[metric])
    first = known.drop_duplicates("cell")
    cells = {
        cell: Curve(reference)
        for cell, reference in zip(first.cell, first.reference, strict=True)
    }
    rows = known.sort_values(["pair", "cell"])  # the lines of a run stay in their order
    tokens = rows.tokens.to_numpy(float)
    values = rows[metric].to_numpy(float)
    starts = np.flatnonzero(~rows.duplicated(["pair", "cell"]))
    runs = rows.iloc[starts]
    bounds = pairwise([*starts, len(rows)])
    told = zip(runs.cell, runs.pair, runs.status, bounds, strict=True)
    for cell, pair, status, (start, end) in told:
        cells[cell].add(pair, status, Points(tokens[start:end], values[start:end]))
    return cells


def _deltas(cells: dict[str, Curve]) -> dict[str, Seeds]:
    """Cell -> its curve minus its reference's, where both have one."""
    deltas = {}
    for cell, curve in cells.items():
        if curve.reference in cells and (delta := curve.minus(cells[curve.reference])):
            deltas[cell] = delta
    return deltas


def _colours(cells: dict[str, Curve], deltas: dict[str, Seeds]) -> Colours:
    """A colour per cell: black for what is measured against nothing, grey for the many that stay in the background."""
    roots = [cell for cell, curve in cells.items() if pd.isna(curve.reference)]
    shown = list(deltas)[: len(DISTINCT)]
    if len(cells) > MANY_CELLS:
        shown = sorted(deltas, key=lambda cell: -abs(deltas[cell].end))[:HIGHLIGHTED]
    colours = dict.fromkeys(cells, BACKGROUND)
    colours |= dict.fromkeys(roots, INK)
    return colours | dict(zip(shown, DISTINCT, strict=False))


def _key(deltas: dict[str, Seeds], colours: Colours) -> str:
    key = "line: mean over seeds, band: lowest to highest seed"
    if any(colours[cell] == BACKGROUND for cell in deltas):
        key += ", grey: the other arms"
    if deltas:
        key += "\nthe differences are on the scale of their second half"
    return key


def _losses(axes: "Axes", cells: dict[str, Curve], colours: Colours) -> None:
    """The curves themselves, from a tenth of the tokens on: the drop from ln(vocabulary) would flatten all the rest."""
    drawn = {cell: curve.seeds() for cell, curve in cells.items() if curve.finished}
    _bands(axes, drawn, colours)
    late = [seeds.late() for seeds in drawn.values()]
    low = min((values.min() for values in late), default=0.0)
    high = max((values.max() for values in late), default=1.0)
    room = (
        high - low or 0.01 * abs(high) or 1.0
    )  # one evaluation of one seed has no range of its own
    axes.set_ylim(low - 0.05 * room, low + room)
    for cell, curve in cells.items():
        for _, points in curve.lost:
            _lost_run(axes, points, legible(colours[cell]), (low, high))
    lost = Counter((cell, status) for cell, curve in cells.items() for status, _ in curve.lost)
    if lost:
        drops = [seeds.start - seeds.end for seeds in drawn.values()]
        _lost_key(axes, lost, falls=bool(np.mean(drops or [1]) > 0))


def _lost_run(axes: "Axes", points: Points, colour: str, scale: tuple[float, float]) -> None:
    """Dashed, to a cross at its last value, or at the edge of the scale."""
    tokens, values = points
    dashes = (0, (3, 2))
    axes.plot(tokens, values, color=colour, linewidth=0.9, linestyle=dashes, zorder=4)
    end = (tokens[-1], np.clip(values[-1], *scale))
    axes.plot(*end, "x", color=colour, markersize=6, clip_on=False)


def _lost_key(axes: "Axes", lost: Counter[tuple[str, str]], falls: bool) -> None:
    """What the dashed lines are, in the corner that the curves leave empty: the top one if they fall."""
    lines = [
        f"{cell}  {count} {status.replace('_', ' ')}" for (cell, status), count in lost.items()
    ]
    axes.text(
        0.99,
        0.98 if falls else 0.02,
        "\n".join(["dashed, to a cross:", *lines]),
        ha="right",
        va="top" if falls else "bottom",
        fontsize=8,
        color=NEUTRAL,
        transform=axes.transAxes,
    )


def _differences(
    axes: "Axes", deltas: dict[str, Seeds], colours: Colours, reference: str
) -> None:
    """Arm minus reference; the scale is that of the second half, where the differences that count are."""
    axes.axhline(0, color=INK, linewidth=1.2)
    late = [0.0]
    ends = {reference: 0.0}
    _bands(axes, deltas, colours)
    for cell, delta in deltas.items():
        seen = delta.values
        if colours[cell] == BACKGROUND:
            seen = seen.mean(0, keepdims=True)
        else:
            ends[cell] = delta.end
        half = seen[:, len(delta.tokens) // 2 :]
        late += [half.min(), half.max()]
    pad = 0.06 * (max(late) - min(late) or 1)
    axes.set_ylim(min(late) - pad, max(late) + pad)
    label_ends(axes, ends, colours | {reference: INK})


def _bands(axes: "Axes", cells: dict[str, Seeds], colours: Colours) -> None:
    """The mean and the range of the seeds of each cell; one point alone is a dot."""
    _background(axes, [cells[cell] for cell in cells if colours[cell] == BACKGROUND])
    for cell, seeds in cells.items():
        if (colour := colours[cell]) != BACKGROUND:
            _band(axes, seeds, colour)


def _background(axes: "Axes", cells: list[Seeds]) -> None:
    """Without bands: many are a fog.  All lines are one object, for 2,000 of them take a second to make."""
    from matplotlib.collections import LineCollection

    means = [np.column_stack([seeds.tokens, seeds.values.mean(0)]) for seeds in cells]
    lines = [mean for mean in means if len(mean) > 1]
    dots = [mean for mean in means if len(mean) == 1]
    style: dict[str, Any] = {"color": BACKGROUND, "zorder": 1}
    if lines:
        ends: dict[str, Any] = {"capstyle": "projecting", "joinstyle": "round"}
        axes.add_collection(LineCollection(lines, linewidths=1, **ends, **style))
    if dots:
        axes.plot(*np.concatenate(dots).T, linestyle="none", **DOT, **style)


def _band(axes: "Axes", seeds: Seeds, colour: str) -> None:
    tokens, values = seeds
    dot = DOT if len(tokens) == 1 else {}
    axes.plot(tokens, values.mean(0), color=colour, linewidth=1.6, zorder=3, **dot)
    if len(values) > 1:
        low = values.min(0)
        high = values.max(0)
        axes.fill_between(tokens, low, high, color=colour, alpha=0.15, linewidth=0, zorder=2)


def _count(tokens: float) -> str:
    """In thousands, millions, billions: 1.5M."""
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if tokens >= size:
            return f"{tokens / size:g}{letter}"
    return f"{tokens:g}"
