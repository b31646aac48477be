"""The pictures of a study: loss against learning rate, the same by width, what mattered, and how the search went.

Colours are those of plots.py: black for the first arm, then a colour each; widths go from light to dark.
"""

from collections import Counter
from pathlib import Path

import numpy as np

from ablab.analysis.effects.frame import unit
from ablab.analysis.pictures.plots import (
    BACKGROUND,
    DISTINCT,
    FAINT,
    INK,
    NEUTRAL,
    STYLE,
    label_ends,
    save,
)
from ablab.analysis.tuning.winners import Winner, axis, winner
from ablab.core.errors import UserError
from ablab.core.store.record import DIVERGED, PRUNED, command
from ablab.core.store.study_record import COMPLETE, WIDTH, StudyRecord

ABOVE = 3.0  # losses beyond this many times (median - best) above the best stand on the edge as triangles
PANELS = 4  # side by side
LOST = {
    DIVERGED: ("x", "\N{MULTIPLICATION SIGN}"),
    PRUNED: ("|", "|"),
}  # state -> marker above the top edge, and in words


def curves(study: StudyRecord, path: Path) -> Path:
    """Each arm's loss against the learning rate, beside its winner; below, where the quadratics put the optima.  Writes a PNG."""
    from matplotlib import rc_context

    along, colour = _along(study), colours(study)
    wins = {
        cell: won
        for cell, trials in study.cells.items()
        if (won := _winner(trials, study, along))
    }
    if not wins:
        raise UserError(
            f"study {study.name!r} has no finished trial of {along}; continue it with: {command(study.name, 'study')}"
        )
    with rc_context(STYLE):
        figure, (top, strip) = _canvas(
            6.8,
            4.1 + 0.24 * len(wins),
            2,
            1,
            sharex=True,
            height_ratios=[3.3, 0.3 + 0.24 * len(wins)],
        )
        lines, heights = [won.line for won in wins.values()], Counter()
        _limits(top, lines, study.better)
        for cell, won in wins.items():
            _line(top, won, colour[cell], heights, study.better)
        shared, own = _elsewhere(wins)
        top.set_title(shared, pad=_above(heights))
        top.set(ylabel=f"{study.metric} ({unit(study.metric)})")
        _optima(
            strip,
            wins,
            {cell: NEUTRAL if shade == BACKGROUND else shade for cell, shade in colour.items()},
        )
        strip.set_yticklabels([cell + own[cell] for cell in wins])
        _rate_axis(strip, along, lines)
        key = "large dot: the arm's best, hollow: not to be read\ndashed: quadratic around it; diamond: its optimum"
        strip.set_xlabel(f"{along}\n{key}{_edge_key(top, lines)}")
        return save(figure, path)


def widths(study: StudyRecord, path: Path) -> Path:
    """The learning rate at every width, a panel per arm; minima ringed and joined.  They stay in a column where the rate transfers."""
    from matplotlib import rc_context

    along = _along(study)
    cells = {
        cell: by
        for cell, trials in study.cells.items()
        if (by := _by_width(trials, study, along))
    }
    if not cells:
        raise UserError(
            f"study {study.name!r} searches {', '.join(study.space)}; the picture by width needs {WIDTH} in study.space"
        )
    shades, rows = (
        _shades(sorted({width for by in cells.values() for width in by})),
        -(-len(cells) // PANELS),
    )
    columns = -(-len(cells) // rows)
    with rc_context(STYLE):
        figure, panels = _canvas(
            1.6 + 2.2 * columns, 0.6 + 2.8 * rows, rows, columns, sharex=True, sharey=True
        )
        lines = [won.line for by in cells.values() for won in by.values()]
        _limits(panels[0], lines, study.better)
        heights = [Counter() for _ in cells]
        for panel, piles, by in zip(panels, heights, cells.values(), strict=False):
            for width, won in by.items():
                _line(panel, won, shades[width], piles, study.better, fit=False)
            minima = np.array([(won.lr, won.value) for won in by.values()])
            panel.plot(*minima.T, color=FAINT, linewidth=1, linestyle=(0, (2, 2)), zorder=2)
            _rate_axis(panel, along, lines)
        for panel, cell in zip(panels, cells, strict=False):
            panel.set_title(cell, pad=max(map(_above, heights)))
        for above, panel in zip(
            panels[len(cells) - columns :], panels[len(cells) :], strict=False
        ):
            panel.set_visible(False)
            above.tick_params(labelbottom=True)
        for panel in panels[::columns]:
            panel.set_ylabel(f"{study.metric} ({unit(study.metric)})")
        key = f"large dot: the width's best, hollow: not to be read\ndashed: how it moves with width{_edge_key(panels[0], lines)}"
        figure.supxlabel(f"{along}\n{key}", fontsize=9)
        handles = [
            panels[0].plot([], [], "o-", color=shade, markersize=4)[0]
            for shade in shades.values()
        ]
        figure.legend(
            handles,
            [f"{width:g}" for width in shades],
            title=WIDTH,
            loc="outside right upper",
            frameon=False,
        )
        return save(figure, path)


def importance(study: StudyRecord, path: Path) -> Path:
    """What share of the spread between an arm's trials each searched parameter explains: a row per arm, a panel per parameter."""
    from matplotlib import rc_context

    known = {cell: shares for cell, shares in study.importance.items() if shares}
    if not known:
        raise UserError(
            f"study {study.name!r} has no importances; they need finished trials that differ in more than one parameter"
        )
    paths = sorted(
        {path for shares in known.values() for path in shares},
        key=lambda name: -sum(shares.get(name, 0.0) for shares in known.values()),
    )
    colour = colours(study)
    with rc_context(STYLE):
        figure, panels = _canvas(
            1.2 + 2.4 * len(paths),
            0.8 + 0.26 * len(known),
            1,
            len(paths),
            sharex=True,
            sharey=True,
        )
        for panel, name in zip(panels, paths, strict=True):
            for y, (cell, shares) in enumerate(known.items()):
                if name not in shares:
                    continue
                share = shares[name]
                panel.barh(y, share, height=0.62, color=colour.get(cell, NEUTRAL))
                panel.text(
                    share + 0.02, y, f"{share:.2f}", va="center_baseline", fontsize=8, color=INK
                )
            panel.set(
                title=name, xlim=(0, 1.15), xticks=[0, 0.5, 1], ylim=(len(known) - 0.4, -0.6)
            )
            panel.set_yticks(range(len(known)), list(known))
            panel.tick_params(axis="y", length=0)
            panel.spines["left"].set_visible(False)
        figure.supxlabel("importance: share of the spread between trials", fontsize=9)
        return save(figure, path)


def history(study: StudyRecord, path: Path) -> Path:
    """The best value so far against the number of trials, per arm: what stopping the search earlier would have cost."""
    from matplotlib import rc_context

    colour, better = colours(study), np.minimum if study.better == "lower" else np.maximum
    with rc_context(STYLE):
        figure, (axes,) = _canvas(6.8, 3.6, 1, 1)
        _limits(axes, list(study.cells.values()), study.better)
        ends, longest, heights = {}, 1, Counter()
        for cell, trials in study.cells.items():
            ordered = sorted(trials, key=lambda trial: trial.number)
            values = np.array(
                [trial.value if trial.state == COMPLETE else np.nan for trial in ordered], float
            )
            best, number = (
                better.accumulate(
                    np.where(
                        np.isnan(values), np.inf if study.better == "lower" else -np.inf, values
                    )
                ),
                np.arange(len(values)) + 1,
            )
            known, longest = np.isfinite(best), max(longest, len(values))
            if known.any():
                axes.step(
                    number[known],
                    best[known],
                    where="post",
                    color=colour[cell],
                    linewidth=1.6,
                    zorder=3,
                )
                axes.plot(
                    number,
                    values,
                    "o",
                    color=colour[cell],
                    markersize=3,
                    alpha=0.35,
                    markeredgewidth=0,
                    zorder=2,
                )
                _off_scale(axes, np.stack([number, values], 1), colour[cell], study.better)
                ends[cell] = float(best[-1])
            _crosses(
                axes,
                [(n, trial.state) for n, trial in zip(number, ordered, strict=True)],
                colour[cell],
                heights,
            )
        label_ends(
            axes, ends, colour | {cell: NEUTRAL for cell in ends if colour[cell] == BACKGROUND}
        )
        key = f"line: best so far; dots: trials{_edge_key(axes, list(study.cells.values()))}"
        axes.set(
            xlabel=f"trials of the arm\n{key}",
            ylabel=f"{study.metric} ({unit(study.metric)})",
            xlim=(0.5, longest + 0.5),
        )
        axes.xaxis.get_major_locator().set_params(integer=True)
        return save(figure, path)


def colours(study: StudyRecord) -> dict[str, str]:
    """Black for the first arm, a colour each for the next nine, grey for the rest."""
    first, *others = study.cells
    return (
        dict.fromkeys(others, BACKGROUND)
        | {first: INK}
        | dict(zip(others, DISTINCT, strict=False))
    )


def _winner(trials: list, study: StudyRecord, along: str) -> Winner | None:
    """The best trial, if one has finished and `along` was searched."""
    if not any(trial.state == COMPLETE and along in trial.params for trial in trials):
        return None
    return winner(trials, study.space, study.hard, study.better)


def _by_width(trials: list, study: StudyRecord, along: str) -> dict[int, Winner]:
    widths = sorted({trial.params[WIDTH] for trial in trials if WIDTH in trial.params})
    wins = {
        width: _winner(
            [trial for trial in trials if trial.params[WIDTH] == width], study, along
        )
        for width in widths
    }
    return {width: won for width, won in wins.items() if won}


def _along(study: StudyRecord) -> str:
    along = axis(study.space)
    if along is None:
        raise UserError(
            f"study {study.name!r} searches {', '.join(study.space)}; a curve needs optim.lr or a log-scaled path in study.space"
        )
    return along


def _limits(axes, lines: list[list], better: str) -> None:
    """The value axis: from the best, as far as the trials go or ABOVE says: one trial near divergence would flatten all the rest."""
    sign = 1 if better == "lower" else -1
    done = [
        values
        for line in lines
        if (values := [sign * trial.value for trial in line if trial.state == COMPLETE])
    ]
    values, bests = np.concatenate(done), [min(values) for values in done]
    cut = min(bests) + ABOVE * (np.median(values) - min(bests))
    worst = max(min(values.max(), cut), *bests)
    low, high = sorted((sign * min(bests), sign * worst))
    room = high - low or abs(low) * 0.01 or 1.0
    axes.set_ylim(low - 0.06 * room, high + 0.04 * room)


def _line(
    axes, won: Winner, colour: str, heights: Counter, better: str, fit: bool = True
) -> None:
    """The trials beside one winner, joined; the winner ringed; the quadratic dashed; lost trials on the top edge."""
    points = np.array(
        sorted(
            (trial.params[won.path], trial.value)
            for trial in won.line
            if trial.state == COMPLETE
        )
    )
    back = colour == BACKGROUND
    axes.plot(
        *points.T,
        color=colour,
        linewidth=1.1 if fit else 1.6,
        alpha=0.55 if fit else 1,
        zorder=1 if back else 3,
    )
    axes.plot(
        *points.T, "o", color=colour, markersize=3.5, markeredgewidth=0, zorder=1 if back else 4
    )
    _off_scale(axes, points, colour, better)
    if fit and won.fit:
        x = np.geomspace(*won.fit.span, 100)
        axes.plot(
            x,
            won.fit.at(x),
            color=colour,
            linewidth=1.4,
            linestyle=(0, (4, 2)),
            zorder=2 if back else 5,
        )
    ring = {
        "markeredgewidth": 1.6,
        "markerfacecolor": "white" if not won.admissible else colour,
        "zorder": 6,
    }
    axes.plot(won.lr, won.value, "o", color=colour, markersize=7, **ring)
    _crosses(
        axes, [(trial.params[won.path], trial.state) for trial in won.line], colour, heights
    )


def _off_scale(axes, points: np.ndarray, colour: str, better: str) -> None:
    """A triangle on the edge for each of the points [N, 2] that the value axis leaves out."""
    low, high = axes.get_ylim()
    beyond = points[(points[:, 1] > high) | (points[:, 1] < low), 0]
    height = np.full(len(beyond), 0.985 if better == "lower" else 0.015)
    axes.plot(
        beyond,
        height,
        "^",
        color=colour,
        markersize=5,
        transform=axes.get_xaxis_transform(),
        zorder=5,
    )


def _crosses(axes, states: list[tuple[float, str]], colour: str, heights: Counter) -> None:
    """A mark above the top edge for each diverged or pruned trial; those at one place are stacked."""
    for x, state in states:
        if state in LOST:
            over = {
                "marker": LOST[state][0],
                "transform": axes.get_xaxis_transform(),
                "clip_on": False,
            }
            axes.plot(
                x,
                1.025 + 0.03 * heights[x],
                color=colour,
                markersize=4.5,
                markeredgewidth=1.3,
                **over,
            )
            heights[x] += 1


def _above(heights: Counter) -> float:
    """Room for the marks above the top edge, in points."""
    return 6 + 6 * max(heights.values(), default=0)


def _edge_key(axes, lines: list[list]) -> str:
    """A line that names the marks at the top edge; empty without any."""
    trials, (low, high) = [trial for line in lines for trial in line], axes.get_ylim()
    states = {trial.state for trial in trials}
    keys = [f"{LOST[state][1]} {state}" for state in LOST if state in states]
    if any(trial.state == COMPLETE and not low <= trial.value <= high for trial in trials):
        keys.append("\N{BLACK UP-POINTING TRIANGLE} off the scale")
    return f"\nat the edge: {',  '.join(keys)}" if keys else ""


def _elsewhere(wins: dict[str, Winner]) -> tuple[str, dict[str, str]]:
    """The parameters that are not drawn: in words for the title where all winners agree, else by arm."""
    words = {
        cell: ", ".join(
            f"{path.rpartition('.')[2]}={value:g}"
            if isinstance(value, float)
            else f"{path.rpartition('.')[2]}={value}"
            for path, value in won.params.items()
            if path != won.path
        )
        for cell, won in wins.items()
    }
    if len(set(words.values())) == 1:
        return next(iter(words.values())), dict.fromkeys(wins, "")
    return "", {cell: f" ({text})" for cell, text in words.items()}


def _optima(axes, wins: dict[str, Winner], colour: dict[str, str]) -> None:
    """A row per arm: the optimum of its quadratic with its 95 % interval, or why there is none."""
    for y, (cell, won) in enumerate(wins.items()):
        if won.low is not None:
            axes.plot(
                [won.low, won.high],
                [y, y],
                color=colour[cell],
                linewidth=2,
                solid_capstyle="round",
            )
        if won.optimum is not None:
            axes.plot(
                won.optimum,
                y,
                "D",
                markersize=5,
                color=colour[cell],
                markerfacecolor=colour[cell] if won.admissible else "white",
            )
        text = (
            "no optimum"
            if won.fit is None
            else f"{won.optimum:.3g} [{won.low:.3g}, {won.high:.3g}]"
            if won.low
            else f"{won.optimum:.3g}, no interval"
        )
        text = text if won.admissible else "at an edge" if None in won.neighbours else "a tie"
        axes.text(
            1.02,
            y,
            text,
            fontsize=8,
            va="center_baseline",
            color=colour[cell],
            transform=axes.get_yaxis_transform(),
        )
    axes.text(
        1.02,
        1.0,
        "optimum, 95 % interval",
        fontsize=8,
        color=NEUTRAL,
        va="bottom",
        transform=axes.transAxes,
    )
    axes.set(ylim=(len(wins) - 0.4, -0.6), yticks=range(len(wins)))
    axes.set_yticklabels(list(wins))
    for tick, cell in zip(axes.get_yticklabels(), wins, strict=True):
        tick.set_color(colour[cell])
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(axis="x", color="#e8e8e8", linewidth=0.7)
    axes.set_axisbelow(True)


def _rate_axis(axes, along: str, lines: list[list]) -> None:
    """A log axis over what was tried, with plain numbers; an interval may leave it."""
    from matplotlib.ticker import LogLocator, NullLocator

    tried = [trial.params[along] for line in lines for trial in line]
    axes.set(xscale="log", xlim=(min(tried) / 1.3, max(tried) * 1.3))
    axes.xaxis.set_major_locator(
        LogLocator(subs=(1, 3) if max(tried) > 8 * min(tried) else (1, 2, 3, 5))
    )
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")


def _shades(widths: list[int]) -> dict[int, str]:
    """Light to dark."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    return {
        width: to_hex(colormaps["YlGnBu"](shade))
        for width, shade in zip(widths, np.linspace(0.4, 1.0, len(widths)), strict=True)
    }


def _canvas(width: float, height: float, rows: int, columns: int, **layout):
    """A figure of width x height inches with rows x columns axes, as a flat list."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(rows, columns, squeeze=False, **layout).ravel())
