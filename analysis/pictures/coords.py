"""The coordinate check as a table and a picture, from plain data:

    {flat, lr, steps, widths, seeds, judged: [tensor], reported: [tensor],
     arms: [{name, control: bool, failing: [tensor], slopes: {tensor: slope or null},
             rows: [{width, seed, step, tensor, change or null}]}]}

which `ablab check coords --out FOLDER` leaves in FOLDER/coords.json.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from ablab.analysis.effects.effect import HELPS, HURTS
from ablab.analysis.pictures.style import (
    FAINT,
    INK,
    NEUTRAL,
    VERDICT_COLOUR,
    canvas,
    save,
    styled,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PASS = VERDICT_COLOUR[HELPS]  # blue and orange: told apart without red-green vision
FAIL = VERDICT_COLOUR[HURTS]
BAND = "#e2e2e2"
LIGHTEST = 0.22  # depth of the first step's line; the last has 1
PANEL_WIDTH = 1.75  # inches
PANEL_HEIGHT = 1.75


def table(check: dict[str, Any]) -> list[dict[str, str]]:
    """A line per tensor, a column per arm, the verdicts last; a slope that is not flat is marked."""
    arms = check["arms"]
    lines = []
    for tensor in [*check["judged"], *check["reported"]]:
        slopes = {arm["name"]: _slope(arm, tensor, check) for arm in arms}
        lines.append({"slope of": tensor} | slopes)
    lines.append({"slope of": ""} | {arm["name"]: verdict(arm) for arm in arms})
    return lines


def _slope(arm: dict[str, Any], tensor: str, check: dict[str, Any]) -> str:
    slope = arm["slopes"][tensor]
    wrong = tensor in check["judged"] and not flat(slope, check)
    return f"{said(slope)} x" if wrong else said(slope)


def flat(slope: float | None, check: dict[str, Any]) -> bool:
    return slope is not None and abs(slope) <= check["flat"]


def verdict(arm: dict[str, Any]) -> str:
    if arm["control"]:
        return "FAIL, as it must" if arm["failing"] else "PASS, but must not"
    return "FAIL" if arm["failing"] else "PASS"


def said(slope: float | None) -> str:
    return "none" if slope is None else f"{slope:+.2f}".replace("-", "\N{MINUS SIGN}")


def draw(check: dict[str, Any], path: Path) -> Path:
    """A row of panels per arm, a panel per tensor: change against width, a line per step.  Writes a PNG."""
    tensors = [*check["judged"], *check["reported"]]
    arms = check["arms"]
    columns = len(tensors)
    with styled({"axes.titlesize": 9, "axes.titleweight": "normal", "axes.titlepad": 5}):
        size = (PANEL_WIDTH * columns, PANEL_HEIGHT * len(arms) + 0.9)
        figure, panels = canvas(*size, len(arms), columns, sharex=True, sharey="col")
        for number, arm in enumerate(arms):
            row = panels[number * columns : (number + 1) * columns]
            for axes, tensor in zip(row, tensors, strict=True):
                _panel(axes, arm, tensor, check)
            _name(row[0], arm)
        for axes in panels:
            _scales(axes, check["widths"])
        figure.supxlabel(_key(check), x=0.01, ha="left", fontsize=8, color=NEUTRAL)
        figure.set_layout_engine("constrained", hspace=0.05, wspace=0.03)
        return save(figure, path)


def _panel(axes: "Axes", arm: dict[str, Any], tensor: str, check: dict[str, Any]) -> None:
    """One tensor of one arm, its slope above: blue where it is flat, orange where not, grey where it is not judged."""
    slope = arm["slopes"][tensor]
    judged = tensor in check["judged"]
    if judged:
        colour = PASS if flat(slope, check) else FAIL
    else:
        colour = NEUTRAL
    rows = pd.DataFrame(arm["rows"]).astype({"change": float})
    known = np.isfinite(rows.change) & (rows.change > 0)
    _changes(
        axes, rows[(rows.tensor == tensor) & known], colour, check["flat"] if judged else 0
    )
    # Room for the arm's name above, the slope below.
    axes.set_title(f"\n\n{tensor}\n", color=INK)
    axes.annotate(
        said(slope),
        (0, 1),
        (0, 5),
        "axes fraction",
        "offset points",
        color=colour,
        weight="bold",
    )


def _changes(axes: "Axes", rows: pd.DataFrame, colour: str, slack: float) -> None:
    """The lines; behind them, what a slope of up to +-slack would look like after the last step."""
    from matplotlib.colors import to_rgb

    if rows.empty:
        middle: dict[str, Any] = {"ha": "center", "va": "center", "transform": axes.transAxes}
        axes.text(0.5, 0.5, "zero", color=NEUTRAL, style="italic", **middle)
        return
    steps = sorted(rows.step.unique())
    depths = np.linspace(LIGHTEST if len(steps) > 1 else 1, 1, len(steps))
    for step, depth in zip(steps, depths, strict=True):
        means = rows[rows.step == step].groupby("width").change.mean()
        shade = 1 - depth * (1 - np.array(to_rgb(colour)))
        axes.plot(means.index, means, color=tuple(shade), linewidth=1.3, zorder=2)
    last = rows[rows.step == steps[-1]]
    dots: dict[str, Any] = {"markersize": 2.2, "markeredgewidth": 0, "zorder": 3}
    axes.plot(last.width, last.change, "o", color=colour, **dots)
    if slack:
        widths = means.index.to_numpy()
        fan = widths / widths[0]
        level = means.iloc[0]
        low = level * fan**-slack
        high = level * fan**slack
        axes.fill_between(widths, low, high, color=BAND, linewidth=0, zorder=0)


def _name(axes: "Axes", arm: dict[str, Any]) -> None:
    """The arm and its verdict, above the arm's first panel."""
    place: dict[str, Any] = {
        "annotation_clip": False,
        "in_layout": False,
        "weight": "bold",
        "fontsize": 11,
        "va": "bottom",
    }
    above = ((0, 1), (0, 33), "axes fraction", "offset points")
    name = axes.annotate(arm["name"], *above, color=INK, **place)
    colour = FAIL if arm["failing"] else PASS
    axes.annotate(f"  {verdict(arm)}", (1, 0), xycoords=name, color=colour, **place)


def _scales(axes: "Axes", widths: list[int]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(widths, [f"{width}" for width in widths], fontsize=7.5)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.tick_params(axis="y", labelsize=7.5, color=FAINT)
    axes.tick_params(axis="x", color=FAINT)
    low, high = axes.get_ylim()
    if high / low < 20:  # little more than a decade needs ticks between the powers of ten
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_minor_locator(NullLocator())


def _key(check: dict[str, Any]) -> str:
    slack = f"\N{PLUS-MINUS SIGN}{check['flat']:g}"
    return (
        "against model width; "
        f"lines: after optimizer step 1 (light) to {check['steps']} (dark) at lr {check['lr']:g}, "
        f"mean over {len(check['seeds'])} seeds; dots: the seeds after the last step\n"
        "coloured: rms change since init, and its slope in log-log; "
        f"grey fan: slopes within {slack} pass; grey lines: own size, not judged"
    )
