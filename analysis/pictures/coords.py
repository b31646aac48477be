"""The coordinate check as a table and a picture, from plain data:

    {flat, lr, steps, widths, seeds, judged: [tensor], reported: [tensor],
     arms: [{name, control: bool, failing: [tensor], slopes: {tensor: slope or null}, rows: [{width, seed, step, tensor, change or null}]}]}

which `ablab check coords --out FOLDER` leaves in FOLDER/coords.json.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ablab.analysis.effects.effects import BETTER, WORSE
from ablab.analysis.pictures.plots import FAINT, INK, NEUTRAL, STYLE, VERDICT_COLOUR
from ablab.core.store.files import writing

PASS, FAIL = (
    VERDICT_COLOUR[BETTER],
    VERDICT_COLOUR[WORSE],
)  # blue and orange: told apart without red-green vision
BAND, LIGHTEST = "#e2e2e2", 0.22
PANEL = 1.75, 1.75  # inches, width and height


def table(check: dict[str, Any]) -> list[dict[str, str]]:
    """A line per tensor, a column per arm, the verdicts last; a slope that is not flat is marked."""
    arms, judged = check["arms"], check["judged"]

    def cell(arm: dict[str, Any], tensor: str) -> str:
        slope = arm["slopes"][tensor]
        return said(slope) + (" x" if tensor in judged and not flat(slope, check) else "")

    lines = [
        {"slope of": tensor} | {arm["name"]: cell(arm, tensor) for arm in arms}
        for tensor in [*judged, *check["reported"]]
    ]
    return [*lines, {"slope of": ""} | {arm["name"]: verdict(arm) for arm in arms}]


def flat(slope: float | None, check: dict[str, Any]) -> bool:
    return slope is not None and abs(slope) <= check["flat"]


def verdict(arm: dict[str, Any]) -> str:
    if arm["control"]:
        return "FAIL, as it must" if arm["failing"] else "PASS, but must not"
    return "FAIL" if arm["failing"] else "PASS"


def said(slope: float | None) -> str:
    return "none" if slope is None else f"{slope:+.2f}".replace("-", "\N{MINUS SIGN}")


def draw(check: dict[str, Any], path: Path) -> Path:
    """A row of panels per arm, a panel per tensor: change against width, a line per step, light to dark.  Writes a PNG."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    tensors, arms = [*check["judged"], *check["reported"]], check["arms"]
    with rc_context(
        STYLE | {"axes.titlesize": 9, "axes.titleweight": "normal", "axes.titlepad": 5}
    ):
        figure = Figure(
            figsize=(PANEL[0] * len(tensors), PANEL[1] * len(arms) + 0.9), layout="constrained"
        )
        FigureCanvasAgg(figure)
        grid = figure.subplots(
            len(arms), len(tensors), sharex=True, sharey="col", squeeze=False
        )
        for line, arm in zip(grid, arms, strict=True):
            rows = pd.DataFrame(arm["rows"]).astype({"change": float})
            for axes, tensor in zip(line, tensors, strict=True):
                colour = (
                    NEUTRAL
                    if tensor in check["reported"]
                    else PASS
                    if flat(arm["slopes"][tensor], check)
                    else FAIL
                )
                _panel(
                    axes,
                    rows[rows.tensor == tensor],
                    colour,
                    check["flat"] if tensor in check["judged"] else 0.0,
                )
                axes.set_title(
                    f"\n\n{tensor}\n", color=INK
                )  # room for the arm's name above and the slope below
                axes.annotate(
                    said(arm["slopes"][tensor]),
                    (0, 1),
                    (0, 5),
                    "axes fraction",
                    "offset points",
                    color=colour,
                    weight="bold",
                )
            _name(line[0], arm)
        _axes(grid, check)
        figure.supxlabel(_key(check), x=0.01, ha="left", fontsize=8, color=NEUTRAL)
        figure.get_layout_engine().set(hspace=0.05, wspace=0.03)
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(path, bbox_inches="tight", pad_inches=0.15)
    return path


def _panel(axes, rows: pd.DataFrame, colour: str, slack: float) -> None:
    """rows: one tensor of one arm.  Behind the lines, what a slope of up to +-slack would look like after the last step."""
    from matplotlib.colors import to_rgb

    rows = rows[np.isfinite(rows.change) & (rows.change > 0)]
    if rows.empty:
        axes.text(
            0.5,
            0.5,
            "zero",
            ha="center",
            va="center",
            color=NEUTRAL,
            style="italic",
            transform=axes.transAxes,
        )
        return
    steps = sorted(rows.step.unique())
    for step, depth in zip(
        steps, np.linspace(LIGHTEST if len(steps) > 1 else 1, 1, len(steps)), strict=True
    ):
        means = rows[rows.step == step].groupby("width").change.mean()
        axes.plot(
            means.index,
            means,
            color=1 - depth * (1 - np.array(to_rgb(colour))),
            linewidth=1.3,
            zorder=2,
        )
    last = rows[rows.step == steps[-1]]
    axes.plot(
        last.width, last.change, "o", markersize=2.2, color=colour, markeredgewidth=0, zorder=3
    )
    if slack:
        fan, level = means.index.to_numpy() / means.index[0], means.iloc[0]
        axes.fill_between(
            means.index,
            level * fan**-slack,
            level * fan**slack,
            color=BAND,
            linewidth=0,
            zorder=0,
        )


def _name(axes, arm: dict[str, Any]) -> None:
    """The arm and its verdict, above the arm's first panel."""
    place = {
        "annotation_clip": False,
        "in_layout": False,
        "weight": "bold",
        "fontsize": 11,
        "va": "bottom",
    }
    name = axes.annotate(
        arm["name"], (0, 1), (0, 33), "axes fraction", "offset points", color=INK, **place
    )
    axes.annotate(
        f"  {verdict(arm)}",
        (1, 0),
        xycoords=name,
        color=FAIL if arm["failing"] else PASS,
        **place,
    )


def _axes(grid, check: dict[str, Any]) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    widths = check["widths"]
    for axes in grid.flat:
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(widths, [f"{width}" for width in widths], fontsize=7.5)
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.tick_params(axis="y", labelsize=7.5, color=FAINT)
        axes.tick_params(axis="x", color=FAINT)
        low, high = axes.get_ylim()
        if high / low < 20:  # less than a decade or so needs ticks between the powers of ten
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_locator(NullLocator())


def _key(check: dict[str, Any]) -> str:
    slack = f"\N{PLUS-MINUS SIGN}{check['flat']:g}"
    return (
        f"against model width; lines: after optimizer step 1 (light) to {check['steps']} (dark) at lr {check['lr']:g}, "
        f"mean over {len(check['seeds'])} seeds; dots: the seeds after the last step\n"
        f"coloured: rms change since init, and its slope in log-log; grey fan: slopes within {slack} pass; grey lines: own size, not judged"
    )
