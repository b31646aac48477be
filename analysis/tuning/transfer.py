"""What width does to the learning rate: does the one tuned at one width serve the others?"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pandas as pd

from ablab.analysis.tuning.winners import Winner, axis, spacing, winner
from ablab.core.errors import UserError
from ablab.core.store.study_record import COMPLETE, EVALUATED, LR, WIDTH, StudyRecord, Trial


def transfer(study: StudyRecord) -> pd.DataFrame:
    """One row per arm and width: what the learning rate that won at the base width costs there.

    Base width: the experiment's own where it was searched, else the smallest.  `gap`: how much worse than this width's best,
    in the metric's unit.  `how`: the loss at the transferred rate was evaluated, read off the quadratic, or taken
    from the nearest trial.  UserError if the study does not search model.width and a log-scaled path.
    """
    if WIDTH not in study.space or axis(study.space) is None:
        raise UserError(
            f"study {study.name!r} searches {', '.join(study.space)}; a transfer table needs {WIDTH} and {LR} in study.space"
        )
    return pd.DataFrame(
        [
            row
            for cell, trials in study.cells.items()
            for row in _transferred(cell, trials, study)
        ]
    )


def _transferred(
    cell: str, trials: list[Trial], study: StudyRecord
) -> Iterator[dict[str, Any]]:
    widths = sorted({trial.params[WIDTH] for trial in trials if trial.state == COMPLETE})
    if not widths:
        return
    base = study.base.get(WIDTH) if study.base.get(WIDTH) in widths else widths[0]
    at = {
        width: [trial for trial in trials if trial.params[WIDTH] == width] for width in widths
    }
    won = {width: winner(at[width], study.space, study.hard, study.better) for width in widths}
    if won[base].path != axis(
        study.space
    ):  # the arm lacks the ingredient whose dose is searched
        return
    lr, sign = won[base].lr, 1 if study.better == "lower" else -1
    for width in widths:
        best = won[width]
        loss, how = _loss_at(lr, best)
        steps = float(np.log2(best.lr / lr)) / spacing(best.line, best.path)
        yield {
            "cell": cell,
            "width": width,
            "trials": sum(trial.state == COMPLETE for trial in at[width]),
            "lr": best.lr,
            "loss": best.value,
            "admissible": best.admissible,
            "reason": best.reason,
            "optimum": best.optimum,
            "low": best.low,
            "high": best.high,
            "base_width": base,
            "transferred": lr,
            "transferred_loss": loss,
            "how": how,
            "gap": sign * (loss - best.value),
            "steps": steps,
            "within_one_step": abs(steps) < 1.01,
        }


def _loss_at(lr: float, won: Winner) -> tuple[float, str]:
    """The loss at `lr` beside this winner, NaN where it has none, and how we know."""
    tried = [trial for trial in won.line if trial.state in EVALUATED]
    nearest = min(
        tried,
        key=lambda trial: (
            round(abs(np.log2(trial.params[won.path] / lr)), 6),
            EVALUATED.index(trial.state),
        ),
    )
    exact = bool(np.isclose(nearest.params[won.path], lr, rtol=1e-6))
    if not exact and won.fit and won.fit.span[0] <= lr <= won.fit.span[1]:
        return float(won.fit.at(lr)), "quadratic"
    how = "evaluated" if exact else f"nearest, {nearest.params[won.path]:.4g}"
    return (
        (nearest.value, how)
        if nearest.state == COMPLETE
        else (float("nan"), f"{how}: {nearest.state}")
    )


def movements(moved: pd.DataFrame, seed_sd: float | None = None) -> dict[str, str]:
    """A sentence per arm from `transfer`: how far the optimum moves with width, and whether the learning rate transfers.

    It transfers if every width's best lies within one step of the base width's and the gap stays within 2 seed sd.
    seed_sd: in the metric's unit, from the search where it had several seeds, else from the experiment's own runs.
    """
    return {
        cell: f"{_moved(rows)}; {_transfers(rows, seed_sd)}"
        for cell, rows in moved.groupby("cell", sort=False)
    }


def _moved(rows: pd.DataFrame) -> str:
    """The interval of a difference of two optima from their own intervals: Zou and Donner 2008, eq. 5."""
    first, last = rows.iloc[0], rows.iloc[-1]
    if len(rows) == 1:
        return f"only width {first.width} has finished trials"
    kind = "optimum" if pd.notna([first.optimum, last.optimum]).all() else "lr"
    (x0, l0, h0), (x1, l1, h1) = (
        np.log2(row[[kind, "low", "high"]].astype(float)) for row in (first, last)
    )
    delta, down, up = x1 - x0, np.hypot(x1 - l1, h0 - x0), np.hypot(h1 - x1, x0 - l0)
    interval = (
        f" [{delta - down:+.2f}, {delta + up:+.2f}]"
        if kind == "optimum" and np.isfinite(down + up)
        else ""
    )
    what = "the optimum" if kind == "optimum" else "the best trial"
    ends = f"{first[kind]:.3g} at {first.width} to {last[kind]:.3g} at {last.width}"
    return f"{what} moves by {delta:+.2f}{interval} octaves over {last.width / first.width:g}x width ({ends})"


def _transfers(rows: pd.DataFrame, sd: float | None) -> str:
    others = rows[rows.width != rows.base_width]
    if edges := [str(row.width) for row in rows.itertuples() if not row.admissible]:
        return f"not to be read before the winner at width {', '.join(edges)} has neighbours"
    if others.empty:
        return "transfer needs a second"
    near, gap, lost = (
        int(others.within_one_step.sum()),
        others.gap.max(),
        others.width[others.gap.isna()],
    )
    holds = near == len(others) and lost.empty and (None if sd is None else gap <= 2 * sd)
    verdict = {True: "transfers", False: "does not transfer", None: "may transfer"}[holds]
    scale = (
        f" ({gap / sd:.1f} seed sd)"
        if sd
        else " (seed sd unknown: give the study a second seed)"
    )
    cost = (
        f"no loss at width {', '.join(map(str, lost))}"
        if len(lost)
        else f"at most {gap:.4f} worse{scale}"
        if gap > 0
        else "at no cost"
    )
    first = rows.iloc[0]
    return f"{first.transferred:.4g} {verdict} from width {first.base_width}: {near} of {len(others)} others within one step, {cost}"
