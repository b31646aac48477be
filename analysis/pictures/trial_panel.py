"""Axes on which the trials of a study are drawn: their value axis, their lines, and marks for what was lost."""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ablab.analysis.pictures.style import BACKGROUND, DISTINCT, INK
from ablab.analysis.tuning.winners import Line, Winner, sign
from ablab.core.store.result import DIVERGED, PRUNED
from ablab.core.store.study_record import COMPLETE, StudyRecord, Trial

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ABOVE = 3.0  # losses beyond this many times (median - best) above the best stand on the edge as triangles
MARKERS = {DIVERGED: "x", PRUNED: "|"}  # of lost trials, above the top edge
MARKS_IN_WORDS = {DIVERGED: "\N{MULTIPLICATION SIGN}", PRUNED: "|"}
TRIANGLE = "\N{BLACK UP-POINTING TRIANGLE}"


def colours_of(study: StudyRecord) -> dict[str, str]:
    """Black for the first arm, a colour each for the next nine, grey for the rest."""
    first, *others = study.cells
    colours = dict.fromkeys(others, BACKGROUND)
    colours |= dict(zip(others, DISTINCT, strict=False))
    return {first: INK} | colours


class TrialPanel:
    """Axes, the metric's direction, and how many marks stand above the top edge at each place."""

    def __init__(self, axes: "Axes", better: str):
        self.axes = axes
        self.better = better
        self.piles: Counter[float] = Counter()

    def limits(self, lines: Sequence[Sequence[Trial]]) -> None:
        """The value axis: from the best, as far as the trials go or ABOVE says.

        One trial near divergence would flatten all the rest.
        """
        up = sign(self.better)
        losses = [
            [up * trial.final for trial in line if trial.state == COMPLETE] for line in lines
        ]
        losses = [values for values in losses if values]
        every = np.concatenate(losses)
        bests = [min(values) for values in losses]
        best = min(bests)
        cut = best + ABOVE * (np.median(every) - best)
        worst = max(min(every.max(), cut), *bests)
        low, high = sorted((up * best, up * worst))
        room = high - low or abs(low) * 0.01 or 1.0
        self.axes.set_ylim(low - 0.06 * room, high + 0.04 * room)

    def line(self, won: Winner, line: Line, colour: str, quadratic: bool = True) -> None:
        """The trials beside one winner, joined; the winner large; the quadratic dashed; lost trials on the top edge."""
        back = colour == BACKGROUND
        points = np.array(sorted(line.points))
        self.axes.plot(
            *points.T,
            color=colour,
            linewidth=1.1 if quadratic else 1.6,
            alpha=0.55 if quadratic else 1,
            zorder=1 if back else 3,
        )
        dots: dict[str, Any] = {"markersize": 3.5, "markeredgewidth": 0}
        self.axes.plot(*points.T, "o", color=colour, zorder=1 if back else 4, **dots)
        self.off_scale(points, colour)
        if quadratic and won.fit:
            x = np.geomspace(*won.fit.span, 100)
            self.axes.plot(
                x,
                won.fit.at(x),
                color=colour,
                linewidth=1.4,
                linestyle=(0, (4, 2)),
                zorder=2 if back else 5,
            )
        self.axes.plot(
            line.at(won.best),
            won.value,
            "o",
            color=colour,
            markersize=7,
            markeredgewidth=1.6,
            markerfacecolor=colour if won.admissible else "white",
            zorder=6,
        )
        self.lost([(line.at(trial), trial.state) for trial in line.trials], colour)

    def beside(self, trials: Sequence[Trial], along: str, colour: str) -> None:
        """Faint dots: finished trials that are on no line."""
        points = np.array([(trial.params[along], trial.final) for trial in trials])
        if len(points):
            faint: dict[str, Any] = {"markersize": 4, "markeredgewidth": 0, "alpha": 0.35}
            self.axes.plot(*points.T, "o", color=colour, zorder=1, **faint)
            self.off_scale(points, colour)

    def off_scale(self, points: np.ndarray, colour: str) -> None:
        """A triangle on the edge for each of the points [N, 2] that the value axis leaves out."""
        low, high = self.axes.get_ylim()
        x, y = points.T
        beyond = x[(y > high) | (y < low)]
        height = np.full(len(beyond), 0.985 if self.better == "lower" else 0.015)
        edge = self.axes.get_xaxis_transform()
        self.axes.plot(
            beyond, height, "^", color=colour, markersize=5, transform=edge, zorder=5
        )

    def lost(self, states: Iterable[tuple[float, str]], colour: str) -> None:
        """A mark above the top edge for each diverged or pruned trial; those at one place are stacked."""
        for x, state in states:
            if state not in MARKERS:
                continue
            self.axes.plot(
                x,
                1.025 + 0.03 * self.piles[x],
                marker=MARKERS[state],
                color=colour,
                markersize=4.5,
                markeredgewidth=1.3,
                transform=self.axes.get_xaxis_transform(),
                clip_on=False,
            )
            self.piles[x] += 1

    @property
    def room_above(self) -> float:
        """What the marks above the top edge take, in points."""
        return 6 + 6 * max(self.piles.values(), default=0)

    def key(self, lines: Sequence[Sequence[Trial]]) -> str:
        """A line that names the marks at the top edge; empty without any."""
        trials = [trial for line in lines for trial in line]
        low, high = self.axes.get_ylim()
        states = {trial.state for trial in trials}
        keys = [f"{mark} {state}" for state, mark in MARKS_IN_WORDS.items() if state in states]
        values = [trial.final for trial in trials if trial.state == COMPLETE]
        if any(not low <= value <= high for value in values):
            keys.append(f"{TRIANGLE} off the scale")
        return f"\nat the edge: {',  '.join(keys)}" if keys else ""
