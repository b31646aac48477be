"""A study's loss against the learning rate, and the same by width.

Colours: black for the first arm, then one each; widths go from light to dark.
"""

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ablab.analysis.effects.frame import unit
from ablab.analysis.pictures.style import (
    FAINT,
    NEUTRAL,
    Colours,
    canvas,
    drawn,
    legible,
    light_grid,
    rows_of_names,
)
from ablab.analysis.pictures.trial_panel import TrialPanel, colours_of
from ablab.analysis.tuning.winners import EDGE, FLAT, TIE, Line, Winner, axis, winner
from ablab.core.errors import UserError
from ablab.core.store.planned import command
from ablab.core.store.study_record import COMPLETE, WIDTH, StudyRecord, Trial

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANELS = 4  # side by side


class Judged(NamedTuple):
    """A winner, and the line of trials that it was judged along."""

    won: Winner
    line: Line


def draw_rates(study: StudyRecord, path: Path) -> Path:
    """`rates` as a PNG."""
    return drawn(rates, study, path=path)


def rates(study: StudyRecord) -> "Figure":
    """Each arm's loss against the learning rate, beside its winner; below, where the fitted curves put the optima."""
    along = _along(study)
    wins = {
        cell: judged
        for cell, trials in study.cells.items()
        if (judged := _judged(trials, study, along))
    }
    if not wins:
        again = command(study.name, "study", study.sheet, study.asked)
        raise UserError(
            f"study {study.name!r} has no finished trial of {along}; continue it with: {again}"
        )
    colours = colours_of(study)
    lines = [line.trials for _, line in wins.values()]
    rows = 0.24 * len(wins)  # inches, of the optima
    ratios = [3.3, 0.3 + rows]
    figure, (top, strip) = canvas(6.8, 4.1 + rows, 2, sharex=True, height_ratios=ratios)
    panel = TrialPanel(top, study.better)
    apart = {cell: _apart(study.cells[cell], line) for cell, (_, line) in wins.items()}
    panel.limits([*lines, *apart.values()])
    for cell, (won, line) in wins.items():
        panel.beside(apart[cell], along, colours[cell])
        panel.line(won, line, colours[cell])
    lines += apart.values()
    shared, own = _elsewhere(wins)
    top.set_title(shared, pad=panel.room_above)
    top.set_ylabel(f"{study.metric} ({unit(study.metric)})")
    _optima(strip, wins, {cell: legible(colour) for cell, colour in colours.items()})
    strip.set_yticklabels([cell + own[cell] for cell in wins])
    _rate_axis(strip, along, lines)
    faint = "\nfaint: trials that differ elsewhere too" if any(apart.values()) else ""
    strip.set_xlabel(
        f"{along}\nlarge dot: the arm's best, hollow: not to be read\n"
        f"dashed: the curve fitted around it; diamond: its optimum{faint}{panel.key(lines)}"
    )
    return figure


def _apart(trials: list[Trial], line: Line) -> list[Trial]:
    """The finished trials that stand on no line with the winner: they differ from it elsewhere too."""
    return [
        trial
        for trial in trials
        if trial.state == COMPLETE and line.path in trial.params and trial not in line.trials
    ]


def draw_widths(study: StudyRecord, path: Path) -> Path:
    """`widths` as a PNG."""
    return drawn(widths, study, path=path)


def widths(study: StudyRecord) -> "Figure":
    """The learning rate at every width, a panel per arm; minima ringed and joined.

    The minima stay in a column where the rate transfers.
    """
    along = _along(study)
    cells = {
        cell: by_width
        for cell, trials in study.cells.items()
        if (by_width := _by_width(trials, study, along))
    }
    if not cells:
        raise UserError(
            f"study {study.name!r} searches {', '.join(study.space)}; "
            f"the picture by width needs {WIDTH} in study.space"
        )
    shades = _shades(sorted({width for by_width in cells.values() for width in by_width}))
    lines = [line.trials for by_width in cells.values() for _, line in by_width.values()]
    rows = -(-len(cells) // PANELS)
    columns = -(-len(cells) // rows)
    size = (1.6 + 2.2 * columns, 0.6 + 2.8 * rows)
    figure, axes = canvas(*size, rows, columns, sharex=True, sharey=True)
    panels = [TrialPanel(one, study.better) for one in axes]
    panels[0].limits(lines)
    for panel, by_width in zip(panels, cells.values(), strict=False):
        for width, (won, line) in by_width.items():
            panel.line(won, line, shades[width], quadratic=False)
        minima = np.array([(line.at(won.best), won.value) for won, line in by_width.values()])
        dashes = (0, (2, 2))
        panel.axes.plot(*minima.T, color=FAINT, linewidth=1, linestyle=dashes, zorder=2)
        _rate_axis(panel.axes, along, lines)
    pad = max(panel.room_above for panel in panels)
    for panel, cell in zip(panels, cells, strict=False):
        panel.axes.set_title(cell, pad=pad)
    _hide_the_rest(axes, len(cells), columns)
    for first in axes[::columns]:
        first.set_ylabel(f"{study.metric} ({unit(study.metric)})")
    figure.supxlabel(
        f"{along}\nlarge dot: the width's best, hollow: not to be read\n"
        f"dashed: how it moves with width{panels[0].key(lines)}",
        fontsize=9,
    )
    figure.legend(
        [axes[0].plot([], [], "o-", color=shade, markersize=4)[0] for shade in shades.values()],
        [f"{width:g}" for width in shades],
        title=WIDTH,
        loc="outside right upper",
        frameon=False,
    )
    return figure


def _hide_the_rest(axes: "list[Axes]", used: int, columns: int) -> None:
    """Panels of the last row without an arm; those above them carry the tick labels."""
    for above, empty in zip(axes[used - columns :], axes[used:], strict=False):
        empty.set_visible(False)
        above.tick_params(labelbottom=True)


def _judged(trials: list[Trial], study: StudyRecord, along: str) -> Judged | None:
    """The best trial on its line, if one has finished and `along` was searched."""
    if not any(trial.state == COMPLETE and along in trial.params for trial in trials):
        return None
    won = winner(trials, study.space, study.hard, study.better)
    return Judged(won, won.line) if won.line else None


def _by_width(trials: list[Trial], study: StudyRecord, along: str) -> dict[int, Judged]:
    widths = sorted({trial.params[WIDTH] for trial in trials if WIDTH in trial.params})
    found = {}
    for width in widths:
        own = [trial for trial in trials if trial.params[WIDTH] == width]
        if judged := _judged(own, study, along):
            found[width] = judged
    return found


def _along(study: StudyRecord) -> str:
    along = axis(study.space)
    if along is None:
        raise UserError(
            f"study {study.name!r} searches {', '.join(study.space)}; "
            "a curve needs optim.lr or a log-scaled path in study.space"
        )
    return along


def _elsewhere(wins: dict[str, Judged]) -> tuple[str, dict[str, str]]:
    """The parameters that are not drawn: in words for the title where all winners agree, else by arm."""
    words = {cell: _other_params(won, line.path) for cell, (won, line) in wins.items()}
    if len(set(words.values())) == 1:
        return next(iter(words.values())), dict.fromkeys(wins, "")
    return "", {cell: f" ({text})" for cell, text in words.items()}


def _other_params(won: Winner, drawn: str) -> str:
    told = []
    for path, value in won.params.items():
        if path != drawn:
            name = path.rpartition(".")[2]
            told.append(f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}")
    return ", ".join(told)


def _optima(axes: "Axes", wins: dict[str, Judged], colours: Colours) -> None:
    """A row per arm: the optimum of its fitted curve with its 95 % interval, or why there is none."""
    for y, (cell, (won, _)) in enumerate(wins.items()):
        _optimum(axes, y, won, colours[cell])
    axes.text(
        1.02,
        1.0,
        "optimum, 95 % interval",
        fontsize=8,
        color=NEUTRAL,
        va="bottom",
        transform=axes.transAxes,
    )
    rows_of_names(axes, list(wins))
    for tick, cell in zip(axes.get_yticklabels(), wins, strict=True):
        tick.set_color(colours[cell])
    light_grid(axes)


def _optimum(axes: "Axes", y: int, won: Winner, colour: str) -> None:
    if won.low is not None and won.high is not None:
        ends = [won.low, won.high]
        axes.plot(ends, [y, y], color=colour, linewidth=2, solid_capstyle="round")
    if won.optimum is not None:
        fill = colour if won.admissible else "white"
        axes.plot(won.optimum, y, "D", markersize=5, color=colour, markerfacecolor=fill)
    axes.text(
        1.02,
        y,
        _optimum_in_words(won),
        fontsize=8,
        va="center_baseline",
        color=colour,
        transform=axes.get_yaxis_transform(),
    )


def _optimum_in_words(won: Winner) -> str:
    if not won.admissible:
        return {EDGE: "at an edge", FLAT: "flat", TIE: "a tie"}[won.standing]
    if won.fit is None:
        return "no optimum"
    if won.fit.low is None:
        return f"{won.fit.optimum:.3g}, no interval"
    return f"{won.fit.optimum:.3g} [{won.fit.low:.3g}, {won.fit.high:.3g}]"


def _rate_axis(axes: "Axes", along: str, lines: list[list[Trial]]) -> None:
    """A log axis over what was tried, with plain numbers; an interval may leave it."""
    from matplotlib.ticker import LogLocator, NullLocator

    tried = [trial.params[along] for line in lines for trial in line]
    wide = max(tried) > 8 * min(tried)
    axes.set(xscale="log", xlim=(min(tried) / 1.3, max(tried) * 1.3))
    ticks = (1, 3) if wide else (1, 2, 3, 5)
    axes.xaxis.set_major_locator(LogLocator(subs=ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")


def _shades(widths: list[int]) -> dict[int, str]:
    """Light to dark."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    depths = np.linspace(0.4, 1.0, len(widths))
    return {
        width: to_hex(colormaps["YlGnBu"](depth))
        for width, depth in zip(widths, depths, strict=True)
    }
