"""The two pictures of a report: a forest of effects, and the loss curves with their differences.

matplotlib is imported when a picture is drawn, without pyplot: no global state, no display.  Colours are from Okabe and
Ito's set and Tol's "muted" set, without their pale ones: legible as text on white, and without red-green vision.
"""

from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd

from ablab.analysis.effects.effects import BETTER, INERT, REFERENCE, WORSE, Effect
from ablab.analysis.effects.frame import unit
from ablab.core.store.files import writing
from ablab.core.store.record import FINISHED

INK, FAINT = "#222222", "#9a9a9a"
VERDICT_COLOUR = {BETTER: "#0072B2", WORSE: "#D55E00"}  # all others: NEUTRAL
NEUTRAL, BACKGROUND = "#6e6e6e", "#c8c8c8"
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
MANY_CELLS, HIGHLIGHTED = 10, 3
DELTA, PAIRS, METHOD = 1.03, 1.42, 1.46  # columns of the forest's margin, in widths of its axes
STYLE = {
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


def forest(
    effects: list[Effect], path: Path, metric: str = "val/loss", better: str = "lower"
) -> Path:
    """Each arm's delta with its 95 % interval, worst arm on top; arms without a delta are named below.  Writes a PNG."""
    from matplotlib import rc_context

    arms = [effect for effect in effects if effect.verdict != REFERENCE]
    worst_first = -1 if better == "lower" else 1
    drawn = sorted(
        (arm for arm in arms if arm.delta is not None), key=lambda arm: worst_first * arm.delta
    )
    lines = drawn + [arm for arm in arms if arm.delta is None]
    references = sorted({arm.reference for arm in arms})
    with rc_context(STYLE):
        figure, (axes,) = _canvas(5.2, 0.9 + 0.3 * len(lines))
        axes.axvline(0, color=INK, linewidth=0.9, zorder=1)
        for y, arm in enumerate(drawn):
            _arm(axes, y, arm)
        axes.margins(x=0.06)
        for y, arm in enumerate(lines):
            _margin(axes, y, arm)
        axes.set(
            ylim=(len(lines) - 0.4, -0.6),
            yticks=range(len(lines)),
            yticklabels=[arm.cell for arm in lines],
        )
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.grid(axis="x", color="#e8e8e8", linewidth=0.7)
        axes.set_axisbelow(True)
        axes.locator_params(axis="x", nbins=5)
        _heads(axes, better)
        reference = references[0] if len(references) == 1 else "its reference"
        axes.set_xlabel(
            f"{metric} minus {reference}, same seeds\n{unit(metric)}, mean and 95 % interval"
        )
        return save(figure, path)


def _arm(axes, y: int, arm: Effect) -> None:
    """A dot and its interval; hollow without one."""
    colour = VERDICT_COLOUR.get(arm.verdict, NEUTRAL)
    if arm.interval:
        axes.plot(
            [arm.low, arm.high],
            [y, y],
            color=colour,
            linewidth=2,
            solid_capstyle="round",
            zorder=2,
        )
    fill = colour if arm.interval else "white"
    axes.plot(
        arm.delta,
        y,
        "o",
        markersize=6,
        color=colour,
        markerfacecolor=fill,
        markeredgewidth=1.4,
        zorder=3,
    )


def _margin(axes, y: int, arm: Effect) -> None:
    """The numbers right of the axes; for an arm without a delta, what became of its runs, beside the zero line."""
    text = {
        "va": "center_baseline",
        "fontsize": 8,
        "color": INK,
        "transform": axes.get_yaxis_transform(),
    }
    planned = sum(arm.statuses.values())
    axes.text(
        PAIRS,
        y,
        f"{arm.n}" if arm.n == planned else f"{arm.n} of {planned}",
        ha="right",
        **text,
    )
    if arm.delta is None:
        left, right = axes.get_xlim()
        side = ("left", "  {}") if right >= -left else ("right", "{}  ")
        text |= {"transform": axes.transData, "style": "italic", "color": NEUTRAL}
        axes.text(0, y, side[1].format(arm.counts), ha=side[0], **text)
        return
    axes.text(
        DELTA,
        y,
        "inert" if arm.verdict == INERT else f"{arm.delta:+.4f}".replace("-", "\N{MINUS SIGN}"),
        **text,
    )
    axes.text(METHOD, y, arm.method or "no interval", **text)


def _heads(axes, better: str) -> None:
    """What the sides of zero and the columns mean."""
    text = {
        "y": 1.015,
        "va": "bottom",
        "fontsize": 8,
        "color": NEUTRAL,
        "transform": axes.get_xaxis_transform(),
    }
    left, right = (BETTER, WORSE) if better == "lower" else (WORSE, BETTER)
    axes.text(0, s=f"\N{LEFTWARDS ARROW} {left}  ", ha="right", **text)
    axes.text(0, s=f"  {right} \N{RIGHTWARDS ARROW}", ha="left", **text)
    text["transform"] = axes.transAxes
    for x, name in ((DELTA, "delta"), (METHOD, "method")):
        axes.text(x, s=name, **text)
    axes.text(PAIRS, s="pairs", ha="right", **text)


def curves(frame: pd.DataFrame, path: Path, metric: str = "val/loss") -> Path:
    """Held-out loss against tokens (top) and each arm minus its reference on the same seeds (bottom).  Writes a PNG.

    `frame`: from `frame.curves`.  Line: mean over the finished seeds; band: lowest to highest seed.  A run that did not
    finish is dashed and ends in a cross.  Above ten cells only the reference and the three arms that end farthest from it
    have a colour.
    """
    from matplotlib import rc_context

    cells = {
        cell: Curve(rows, metric)
        for cell, rows in frame.dropna(subset=[metric]).groupby("cell", sort=False)
    }
    deltas = {
        cell: curve.minus(cells[curve.reference])
        for cell, curve in cells.items()
        if curve.reference in cells
    }
    deltas = {cell: curve for cell, curve in deltas.items() if curve}
    colours = _colours(cells, deltas)
    with rc_context(STYLE):
        figure, axes = _canvas(6.8, 6.6 if deltas else 3.8, rows=2 if deltas else 1)
        _losses(axes[0], cells, colours)
        axes[0].set(ylabel=f"{metric} ({unit(metric)})", title="On held-out text")
        if deltas:
            references = {cells[cell].reference for cell in deltas}
            reference = references.pop() if len(references) == 1 else "its reference"
            _differences(axes[1], deltas, colours, reference)
            axes[1].set(
                ylabel=f"difference ({unit(metric)})", title=f"Minus {reference}, same seeds"
            )
        others = (
            ", grey: the other arms"
            if any(colours[cell] == BACKGROUND for cell in deltas)
            else ""
        )
        scale = "\nthe differences are on the scale of their second half" if deltas else ""
        key = f"line: mean over seeds, band: lowest to highest seed{others}{scale}"
        axes[-1].set(xlim=(0, frame.tokens.max()), xlabel=f"training tokens\n{key}")
        axes[-1].xaxis.set_major_formatter(lambda tokens, _: _count(tokens))
        return save(figure, path)


class Curve:
    """The runs of one cell: metric against tokens.  `finished`: pair -> ([P], [P]); `lost`: (status, [P], [P]) of the rest."""

    def __init__(self, rows: pd.DataFrame, metric: str):
        self.reference, self.finished, self.lost = rows.reference.iloc[0], {}, []
        for pair, run in rows.groupby("pair"):
            points = run.tokens.to_numpy(float), run[metric].to_numpy(float)
            if run.status.iloc[0] == FINISHED:
                self.finished[pair] = points
            else:
                self.lost.append((run.status.iloc[0], *points))

    def seeds(self, pairs=None) -> tuple[np.ndarray, np.ndarray]:
        """Tokens [P] and values [S, P] of the finished runs, on the token axis of the first."""
        runs = [self.finished[pair] for pair in pairs or self.finished]
        grid = runs[0][0]
        return grid, np.stack([np.interp(grid, *run) for run in runs])

    def minus(self, reference: "Curve") -> tuple[np.ndarray, np.ndarray] | None:
        """Tokens [P] and differences [S, P] over the pairs and tokens that both reached; None without any."""
        pairs = sorted(self.finished.keys() & reference.finished.keys())
        if not pairs:
            return None
        grid, values = self.seeds(pairs)
        theirs = [reference.finished[pair] for pair in pairs]
        shared = (grid >= max(run[0][0] for run in theirs)) & (
            grid <= min(run[0][-1] for run in theirs)
        )
        values = values - np.stack([np.interp(grid, *run) for run in theirs])
        return (grid[shared], values[:, shared]) if shared.any() else None


def _colours(cells: dict[str, Curve], deltas: dict) -> dict[str, str]:
    """A colour per cell: black for what is not measured against anything, grey for the many that stay in the background."""
    roots = [cell for cell, curve in cells.items() if pd.isna(curve.reference)]
    shown = list(deltas)[: len(DISTINCT)]
    if len(cells) > MANY_CELLS:
        shown = sorted(deltas, key=lambda cell: -abs(_end(deltas[cell])))[:HIGHLIGHTED]
    return (
        dict.fromkeys(cells, BACKGROUND)
        | dict.fromkeys(roots, INK)
        | dict(zip(shown, DISTINCT, strict=False))
    )


def _losses(axes, cells: dict[str, Curve], colours: dict[str, str]) -> None:
    """The curves themselves, from a tenth of the tokens on: the drop from ln(vocabulary) would flatten all the rest."""
    drawn = {cell: curve.seeds() for cell, curve in cells.items() if curve.finished}
    for cell, curve in drawn.items():
        _band(axes, *curve, colours[cell])
    late = np.concatenate(
        [values[:, grid >= grid[-1] / 10].ravel() for grid, values in drawn.values()]
        or [[0.0, 1.0]]
    )
    low, high = late.min(), late.max()
    axes.set_ylim(low - 0.05 * (high - low), high)
    for cell, curve in cells.items():
        for _, tokens, values in curve.lost:
            colour = NEUTRAL if colours[cell] == BACKGROUND else colours[cell]
            axes.plot(
                tokens, values, color=colour, linewidth=0.9, linestyle=(0, (3, 2)), zorder=4
            )
            axes.plot(
                tokens[-1],
                np.clip(values[-1], low, high),
                "x",
                color=colour,
                markersize=6,
                clip_on=False,
            )
    lost = Counter((cell, run[0]) for cell, curve in cells.items() for run in curve.lost)
    if lost:
        text = "dashed, to a cross:\n" + "\n".join(
            f"{cell}  {count} {status.replace('_', ' ')}"
            for (cell, status), count in lost.items()
        )
        falls = (
            np.mean(
                [values[:, 0].mean() - _end((grid, values)) for grid, values in drawn.values()]
                or [1]
            )
            > 0
        )
        y, va = (0.98, "top") if falls else (0.02, "bottom")  # the empty corner
        axes.text(
            0.99,
            y,
            text,
            ha="right",
            va=va,
            fontsize=8,
            color=NEUTRAL,
            transform=axes.transAxes,
        )


def _differences(axes, deltas: dict, colours: dict[str, str], reference: str) -> None:
    """Arm minus reference; the scale is that of the second half, where the differences that count are."""
    axes.axhline(0, color=INK, linewidth=1.2)
    late, ends = [0.0], {reference: 0.0}
    for cell, (grid, values) in deltas.items():
        _band(axes, grid, values, colours[cell])
        back = colours[cell] == BACKGROUND
        seen = (values.mean(0, keepdims=True) if back else values)[:, len(grid) // 2 :]
        late += [seen.min(), seen.max()]
        if not back:
            ends[cell] = _end((grid, values))
    pad = 0.06 * (max(late) - min(late) or 1)
    axes.set_ylim(min(late) - pad, max(late) + pad)
    label_ends(axes, ends, colours | {reference: INK})


def _band(axes, grid: np.ndarray, values: np.ndarray, colour: str) -> None:
    """values: [S, P]; one point alone is a dot.  The background has no bands: fourteen of them are a fog."""
    back, dot = (
        colour == BACKGROUND,
        {"marker": "o", "markersize": 4, "clip_on": False} if len(grid) == 1 else {},
    )
    axes.plot(
        grid,
        values.mean(0),
        color=colour,
        linewidth=1 if back else 1.6,
        zorder=1 if back else 3,
        **dot,
    )
    if len(values) > 1 and not back:
        axes.fill_between(
            grid, values.min(0), values.max(0), color=colour, alpha=0.15, linewidth=0, zorder=2
        )


def label_ends(axes, ends: dict[str, float], colours: dict[str, str]) -> None:
    """Names at the right end of their lines, pushed apart until none overlaps."""
    names, gap = sorted(ends, key=ends.get), 0.065 * np.ptp(axes.get_ylim())
    y = np.array([ends[name] for name in names])
    for _ in range(100):
        for i in range(len(y) - 1):
            push = max(0.0, gap - (y[i + 1] - y[i])) / 2
            y[i], y[i + 1] = y[i] - push, y[i + 1] + push
    for name, height in zip(names, y, strict=True):
        axes.annotate(
            name,
            (1.015, height),
            xycoords=("axes fraction", "data"),
            va="center",
            fontsize=8,
            color=colours[name],
        )


def _end(curve: tuple[np.ndarray, np.ndarray]) -> float:
    """The mean over seeds at the last point."""
    return float(curve[1][:, -1].mean())


def _count(tokens: float) -> str:
    for size, letter in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if tokens >= size:
            return f"{tokens / size:g}{letter}"
    return f"{tokens:g}"


def _canvas(width: float, height: float, rows: int = 1):
    """A figure of width x height inches with `rows` axes that share their x."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, 1, sharex=True, squeeze=False)[:, 0]


def save(figure, path: Path) -> Path:
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, bbox_inches="tight", pad_inches=0.15)
    return path
