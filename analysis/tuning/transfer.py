"""What width does to the learning rate: does the one tuned at one width serve the others?"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ablab.analysis.tuning.winners import FLAT, Line, Winner, axis, octaves, sign, winner
from ablab.core.errors import UserError
from ablab.core.store.study_record import (
    COMPLETE,
    EVALUATED,
    LR,
    WIDTH,
    StudyRecord,
    Trial,
    counts,
)

ONE_STEP = (
    1.01  # spacings; a hair more than one, for rates that were rounded when they were asked for
)
SEED_SDS = 2.0  # a gap up to so many seed sd is noise


@dataclass(frozen=True)
class AtWidth:
    """One arm at one width, and what the learning rate that won at the base width costs there.

    Losses in the metric's unit.  `how`: the loss at the transferred rate was evaluated, read off the fitted curve,
    or taken from the nearest trial; NaN where that one was lost.
    """

    cell: str
    width: int
    trials: int  # finished ones
    lr: float  # of the best trial
    loss: float
    admissible: bool
    standing: str  # of the winner
    reason: str
    optimum: float | None
    low: float | None  # 95 % interval of the optimum
    high: float | None
    base_width: int
    transferred: float  # the best rate at the base width
    transferred_loss: float
    how: str
    gap: float  # how much worse the transferred rate is than this width's best
    steps: float  # from the transferred rate to this width's best, in spacings of the trials
    within_one_step: bool


def transfer(study: StudyRecord) -> list[AtWidth]:
    """One row per arm and width.  Base width: the experiment's own where it was searched, else the smallest.

    UserError if the study does not search model.width and a log-scaled path.
    """
    if WIDTH not in study.space or axis(study.space) is None:
        raise UserError(
            f"study {study.name!r} searches {', '.join(study.space)}; "
            f"a transfer table needs {WIDTH} and {LR} in study.space"
        )
    return [row for trials in study.cells.values() for row in _transferred(trials, study)]


def _transferred(trials: list[Trial], study: StudyRecord) -> Iterator[AtWidth]:
    """The rows of one arm; none where no trial has finished, or where the arm lacks the dose that is searched."""
    widths = sorted({trial.params[WIDTH] for trial in trials if trial.state == COMPLETE})
    if not widths:
        return
    at = {
        width: [trial for trial in trials if trial.params[WIDTH] == width] for width in widths
    }
    wins = {width: winner(at[width], study.space, study.hard, study.better) for width in widths}
    base_width = study.base[WIDTH] if study.base.get(WIDTH) in widths else widths[0]
    base = wins[base_width].line
    if base is None or base.path != axis(study.space):
        return
    rate = base.at(base.best)
    for width, won in wins.items():
        assert won.line is not None, "all trials of an arm have the same paths"
        lr = won.line.at(won.best)
        loss, how = _loss_at(rate, won, won.line)
        steps = octaves(rate, lr) / won.line.spacing
        yield AtWidth(
            cell=won.best.cell,
            width=width,
            trials=counts(at[width])[COMPLETE],
            lr=lr,
            loss=won.value,
            admissible=won.admissible,
            standing=won.standing,
            reason=won.reason,
            optimum=won.optimum,
            low=won.low,
            high=won.high,
            base_width=base_width,
            transferred=rate,
            transferred_loss=loss,
            how=how,
            gap=sign(study.better) * (loss - won.value),
            steps=steps,
            within_one_step=abs(steps) < ONE_STEP,
        )


def _loss_at(rate: float, won: Winner, line: Line) -> tuple[float, str]:
    """The loss at `rate` beside this winner, NaN where it has none, and how we know."""

    def rank(trial: Trial) -> tuple[float, int]:
        away = round(abs(octaves(rate, line.at(trial))), 6)
        return away, EVALUATED.index(trial.state)

    nearest = min(line.evaluated, key=rank)
    exact = bool(np.isclose(line.at(nearest), rate, rtol=1e-6))
    if not exact and won.fit and won.fit.covers(rate):
        return float(won.fit.at(rate)), won.fit.kind
    how = "evaluated" if exact else f"nearest, {line.at(nearest):.4g}"
    if nearest.state == COMPLETE:
        return nearest.final, how
    return float("nan"), f"{how}: {nearest.state}"


def movements(moved: list[AtWidth], seed_sd: float | None = None) -> dict[str, str]:
    """A sentence per arm: how far the optimum moves with width, and whether the learning rate transfers.

    It transfers if every width's best lies within one step of the base width's and the gap stays within 2 seed sd.
    seed_sd: in the metric's unit, from the search where it had several seeds, else from the experiment's own runs.
    """
    cells: dict[str, list[AtWidth]] = {}
    for row in moved:
        cells.setdefault(row.cell, []).append(row)
    return {
        cell: f"{_moved(rows)}; {_transfers(rows, seed_sd)}" for cell, rows in cells.items()
    }


def _moved(rows: list[AtWidth]) -> str:
    first, last = rows[0], rows[-1]
    if len(rows) == 1:
        return f"only width {first.width} has finished trials"
    if first.optimum is not None and last.optimum is not None:
        what = "the optimum"
        start, end = first.optimum, last.optimum
        interval = _interval_of_the_move(first, last)
    else:
        what = "the best trial"
        start, end = first.lr, last.lr
        interval = ""
    moved = np.log2(end) - np.log2(start)
    factor = f"{last.width / first.width:g}x width"
    ends = f"{start:.3g} at {first.width} to {end:.3g} at {last.width}"
    return f"{what} moves by {moved:+.2f}{interval} octaves over {factor} ({ends})"


def _interval_of_the_move(first: AtWidth, last: AtWidth) -> str:
    """Of a difference of two optima from their own intervals: Zou and Donner 2008, eq. 5.  Empty without both."""
    known = [first.low, first.optimum, first.high, last.low, last.optimum, last.high]
    low0, x0, high0, low1, x1, high1 = np.log2(np.array(known, float))
    down = np.hypot(x1 - low1, high0 - x0)
    up = np.hypot(high1 - x1, x0 - low0)
    if not np.isfinite(down + up):
        return ""
    return f" [{x1 - x0 - down:+.2f}, {x1 - x0 + up:+.2f}]"


def _transfers(rows: list[AtWidth], sd: float | None) -> str:
    if flat := [str(row.width) for row in rows if row.standing == FLAT]:
        return (
            f"not to be read: at width {', '.join(flat)} the curve is flat, its winner is noise"
        )
    if edges := [str(row.width) for row in rows if not row.admissible]:
        return f"not to be read before the winner at width {', '.join(edges)} has neighbours"
    first = rows[0]
    others = [row for row in rows if row.width != row.base_width]
    if not others:
        return "transfer needs a second"
    near = sum(row.within_one_step for row in others)
    lost = [str(row.width) for row in others if np.isnan(row.gap)]
    gaps = [row.gap for row in others if not np.isnan(row.gap)]
    gap = max(gaps, default=0.0)
    if near < len(others) or lost:
        verdict = "does not transfer"
    elif sd is None:
        verdict = "may transfer"
    else:
        verdict = "transfers" if gap <= SEED_SDS * sd else "does not transfer"
    if lost:
        cost = f"no loss at width {', '.join(lost)}"
    elif gap > 0:
        sds = (
            f"{gap / sd:.1f} seed sd" if sd else "seed sd unknown: give the study a second seed"
        )
        cost = f"at most {gap:.4f} worse ({sds})"
    else:
        cost = "at no cost"
    reach = f"{near} of {len(others)} others within one step"
    return f"{first.transferred:.4g} {verdict} from width {first.base_width}: {reach}, {cost}"
