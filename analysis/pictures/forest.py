"""The forest of a report: each arm's delta with its interval, beside the verdict on its ingredient."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ablab.analysis.effects.effect import INERT, REFERENCE, Effect
from ablab.analysis.effects.frame import unit
from ablab.analysis.pictures.style import (
    INK,
    NEUTRAL,
    VERDICT_COLOUR,
    canvas,
    drawn,
    light_grid,
    rows_of_names,
)
from ablab.analysis.tuning.winners import sign

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DELTA = 1.03  # columns of the margin, in widths of the axes
SEEDS = 1.42
VERDICT = 1.46
MOST_ARMS = 60  # rows of a picture that a page can hold


def draw_forest(
    effects: list[Effect], path: Path, metric: str = "val/loss", better: str = "lower"
) -> Path:
    """`forest` as a PNG."""
    return drawn(forest, effects, metric, better, path=path)


def forest(
    effects: Sequence[Effect], metric: str = "val/loss", better: str = "lower"
) -> "Figure":
    """Each arm's delta with its 95 % interval, worst arm on top; arms without a delta stand below.

    Of more than MOST_ARMS, those that lie farthest from zero.
    """
    every = [effect for effect in effects if effect.verdict != REFERENCE]
    arms = _farthest(every)
    known = [(arm.delta, arm) for arm in arms if arm.delta is not None]
    known.sort(key=lambda pair: -sign(better) * pair[0])
    rows = [arm for _, arm in known] + [arm for arm in arms if arm.delta is None]
    figure, (axes,) = canvas(5.2, 0.9 + 0.3 * len(rows))
    axes.axvline(0, color=INK, linewidth=0.9, zorder=1)
    for y, (delta, arm) in enumerate(known):
        _dot(axes, y, delta, arm)
    axes.margins(x=0.06)
    for y, arm in enumerate(rows):
        _numbers(axes, y, arm)
    rows_of_names(axes, [arm.cell for arm in rows])
    light_grid(axes)
    axes.locator_params(axis="x", nbins=5)
    _heads(axes, better)
    references = {arm.reference for arm in arms}
    reference = references.pop() if len(references) == 1 else "its reference"
    left_out = ""
    if len(arms) < len(every):
        left_out = f"\nthe {len(arms)} of {len(every)} arms that lie farthest from zero"
    axes.set_xlabel(
        f"{metric} minus {reference}, same seeds\n{unit(metric)}, mean and 95 % interval of each alone{left_out}"
    )
    return figure


def _farthest(arms: Sequence[Effect]) -> list[Effect]:
    """MOST_ARMS of them, in their order; those without a delta are the last to stay."""
    if len(arms) <= MOST_ARMS:
        return list(arms)
    distance = [-1.0 if arm.delta is None else abs(arm.delta) for arm in arms]
    least = sorted(distance)[-MOST_ARMS]
    return [arm for arm, far in zip(arms, distance, strict=True) if far >= least][:MOST_ARMS]


def _dot(axes: "Axes", y: int, delta: float, arm: Effect) -> None:
    """A dot and its interval; hollow without one."""
    colour = VERDICT_COLOUR.get(arm.verdict, NEUTRAL)
    if arm.interval:
        axes.plot(
            [arm.interval.low, arm.interval.high],
            [y, y],
            color=colour,
            linewidth=2,
            solid_capstyle="round",
            zorder=2,
        )
    axes.plot(
        delta,
        y,
        "o",
        markersize=6,
        color=colour,
        markerfacecolor=colour if arm.interval else "white",
        markeredgewidth=1.4,
        zorder=3,
    )


def _numbers(axes: "Axes", y: int, arm: Effect) -> None:
    """Right of the axes; for an arm without a delta, what became of its runs, beside the zero line."""
    text: dict[str, Any] = {"va": "center_baseline", "fontsize": 8}
    margin = text | {"color": INK, "transform": axes.get_yaxis_transform()}
    planned = sum(arm.statuses.values())
    seeds = f"{arm.n}" if arm.n == planned else f"{arm.n} of {planned}"
    axes.text(SEEDS, y, seeds, ha="right", **margin)
    if arm.delta is None:
        left, right = axes.get_xlim()
        more_room_right = right >= -left
        said = f"  {arm.counts}" if more_room_right else f"{arm.counts}  "
        ha = "left" if more_room_right else "right"
        axes.text(0, y, said, ha=ha, style="italic", color=NEUTRAL, **text)
        return
    delta = f"{arm.delta:+.4f}".replace("-", "\N{MINUS SIGN}")
    axes.text(DELTA, y, "inert" if arm.verdict == INERT else delta, **margin)
    axes.text(VERDICT, y, arm.word, **margin)


def _heads(axes: "Axes", better: str) -> None:
    """What the sides of zero and the columns mean."""
    text: dict[str, Any] = {"va": "bottom", "fontsize": 8, "color": NEUTRAL}
    sides = text | {"transform": axes.get_xaxis_transform()}
    columns = text | {"transform": axes.transAxes}
    y = 1.015
    left, right = "arm better", "arm worse"
    if better == "higher":
        left, right = right, left
    axes.text(0, y, f"\N{LEFTWARDS ARROW} {left}  ", ha="right", **sides)
    axes.text(0, y, f"  {right} \N{RIGHTWARDS ARROW}", ha="left", **sides)
    axes.text(DELTA, y, "delta", **columns)
    axes.text(VERDICT, y, "ingredient", **columns)
    axes.text(SEEDS, y, "seeds", ha="right", **columns)
