"""A study's report: each arm's winner and whether it may be read, what width does to it, and what tuning does to the deltas.

    write()      OUT/study.md and its pictures
    table()      a row of text per arm, for the terminal
    compared()   a row per arm of the confirmation: its delta at one setting for all, and at its own
    as_json()    the same as plain data

A study without a finished trial has no report: UserError.
"""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ablab.analysis.effects import frame
from ablab.analysis.effects.effects import (
    BETTER,
    INCONCLUSIVE,
    REFERENCE,
    WORSE,
    Effect,
    measure,
)
from ablab.analysis.pages.report import NONE, bullets, markdown_table, text
from ablab.analysis.pictures import study_plots
from ablab.analysis.tuning import winners as tuning
from ablab.analysis.tuning.transfer import movements, transfer
from ablab.analysis.tuning.winners import Winner, axis
from ablab.core.store import study_record
from ablab.core.store.files import write_atomically
from ablab.core.store.record import FINISHED, PRUNED, Store, command
from ablab.core.store.study_record import (
    COMPLETE,
    EVALUATED,
    RUNNING,
    WIDTH,
    StudyRecord,
)

METHOD = """\
The winner is an arm's best finished trial.  It is read only if it beats what was tried on both sides of it; a diverged or
pruned neighbour was tried and is worse.  The optimum is that of a quadratic in log2 of the learning rate around the winner,
with Fieller's 95 % interval; a curve that climbs faster on one side shifts it by 0.1 to 0.2 octaves (analysis/tuning/winners.py).

What this does not say.  *A winner's value flatters*: it is the lowest of several noisy ones{seeds}.  Compare arms by the
confirmation runs, whose seeds the search has not seen.  *Equal effort*: arms are comparable only if each had the same
number of trials over a range that holds its optimum.  One size, one token budget: a best learning rate moves with both."""


@dataclass(frozen=True)
class StudyReport:
    """What was searched, what won, and what must be said about it."""

    study: StudyRecord
    winners: dict[str, Winner]  # of the arms with a finished trial
    transfer: pd.DataFrame  # analysis/tuning/transfer.py; empty unless widths were searched
    moves: dict[str, str]  # a sentence per arm about width
    shared: list[Effect]  # all arms at the experiment's own values
    tuned: list[Effect]  # each arm at its own winner; both empty until both have finished runs
    warnings: list[str]


def read(store: Store, name: str) -> StudyReport:
    """UserError when the study is missing, damaged, or has no finished trial."""
    study = study_record.read(store, name)
    done = {
        cell: trials
        for cell, trials in study.cells.items()
        if any(trial.state == COMPLETE for trial in trials)
    }
    winners = {
        cell: tuning.winner(trials, study.space, study.hard, study.better)
        for cell, trials in done.items()
    }
    moved = transfer(study) if WIDTH in study.space and axis(study.space) else pd.DataFrame()
    shared, tuned = (_effects(store, plan) for plan in (study.name, study.tuned))
    both = (shared, tuned) if shared and tuned else ([], [])
    sds = [effect.sd for effect in shared if effect.sd]
    noise = tuning.seed_sd(study.trials) or (
        float(np.sqrt(np.mean(np.square(sds)))) if sds else None
    )
    return StudyReport(
        study,
        winners,
        moved,
        {} if moved.empty else movements(moved, noise),
        *both,
        list(_warnings(study, winners, moved)),
    )


def write(store: Store, name: str, out: str | Path) -> Path:
    """Write study.md and its pictures into the folder `out`; the path of study.md."""
    report, out = read(store, name), Path(out)
    study, pictures = report.study, {}
    if any(won.path == axis(study.space) is not None for won in report.winners.values()):
        pictures["curves"] = study_plots.curves(study, out / "lr.png").name
    if len(report.transfer):
        pictures["widths"] = study_plots.widths(study, out / "lr_width.png").name
    if any(study.importance.values()):
        pictures["importance"] = study_plots.importance(study, out / "importance.png").name
    pictures["history"] = study_plots.history(study, out / "history.png").name
    write_atomically(out / "study.md", _markdown(report, pictures).encode())
    return out / "study.md"


def table(store: Store, name: str) -> list[dict[str, str]]:
    """A row of text per arm, for a terminal; the keys are the headings."""
    return _rows(read(store, name))


def compared(store: Store, name: str) -> list[dict[str, str]]:
    """A row of text per arm that was confirmed, for a terminal; none where nothing was."""
    return _compared_rows(read(store, name))


def as_json(store: Store, name: str) -> dict[str, Any]:
    """The report as plain data: numbers, strings, lists and None."""
    report = read(store, name)
    study, plain = report.study, asdict(report.study)
    trials = plain.pop("trials")
    metric = {"name": study.metric, "unit": frame.unit(study.metric), "better": study.better}
    winners = {cell: _plain_winner(won) for cell, won in report.winners.items()}
    tuned = {effect.cell: effect for effect in report.tuned}
    deltas = [
        {"cell": one.cell, "shared": asdict(one), "tuned": asdict(tuned[one.cell])}
        for one in report.shared
        if one.cell in tuned
    ]
    arms = [
        {
            "cell": cell,
            "trials": dict(Counter(t.state for t in ts)),
            "winner": winners.get(cell),
        }
        for cell, ts in study.cells.items()
    ]
    moved = report.transfer.to_dict("records")
    found = {
        "metric": metric,
        "arms": arms,
        "transfer": moved,
        "moves": report.moves,
        "deltas": deltas,
        "warnings": report.warnings,
    }
    return _strict({"study": plain.pop("name")} | plain | found | {"trials": trials})


def _effects(store: Store, plan: str | None) -> list[Effect]:
    """The effects of a plan; empty while it does not exist or has no finished run."""
    if plan is None or not store.plan_path(plan).is_file():
        return []
    wanted, runs = store.read_plan(plan), frame.load(store, plan)
    return (
        measure(runs, wanted.metric, wanted.better)
        if len(runs) and (runs.status == FINISHED).any()
        else []
    )


def _warnings(
    study: StudyRecord, winners: dict[str, Winner], moved: pd.DataFrame
) -> Iterator[str]:
    """Sentences for the top of the page, the gravest kind first."""
    for cell, trials in study.cells.items():
        if cell not in winners:
            yield f"`{cell}`: no trial finished ({study_record.said(Counter(trial.state for trial in trials))})"
        elif not winners[cell].admissible:
            yield f"`{cell}`: {winners[cell].reason}"
    for row in moved.itertuples():
        if not row.admissible and row.reason != winners[row.cell].reason:
            yield f"`{row.cell}` at width {row.width}: {row.reason}"
    done = {
        cell: sum(trial.state in EVALUATED for trial in trials)
        for cell, trials in study.cells.items()
    }
    if len(set(done.values())) > 1:
        counts = ", ".join(f"`{cell}` {count}" for cell, count in done.items())
        yield f"the arms have unequal numbers of evaluated trials ({counts}); the best of more looks better by luck alone"
    states = Counter(trial.state for trial in study.trials)
    if states[RUNNING]:
        yield f"{states[RUNNING]} trials have no result yet; continue with: {command(study.name, 'study')}"
    if states[PRUNED]:
        yield f"{states[PRUNED]} trials were pruned, before the cooldown could change their rank; a pruned neighbour is weak evidence"


def _rows(report: StudyReport) -> list[dict[str, str]]:
    return [
        _row(report.study, cell, trials, report.winners.get(cell))
        for cell, trials in report.study.cells.items()
    ]


def _row(study: StudyRecord, cell: str, trials: list, won: Winner | None) -> dict[str, str]:
    searched = {
        path: _number(won.params.get(path, NONE)) if won else NONE for path in study.space
    }
    verdict = (
        "no winner"
        if won is None
        else "interior"
        if won.admissible
        else "edge"
        if None in won.neighbours
        else "tie"
    )
    return {
        "arm": cell,
        "trials": study_record.said(Counter(trial.state for trial in trials)),
        **searched,
        study.metric: text(won and won.value, ".4f"),
        "winner": verdict,
        "optimum": text(won and won.optimum, ".3g"),
        "95 % interval": f"{won.low:.3g} to {won.high:.3g}"
        if won and won.low is not None
        else NONE,
    }


def _markdown(report: StudyReport, pictures: dict[str, str]) -> str:
    study = report.study
    show = {name: f"![{name}]({file})" for name, file in pictures.items()}
    seeds = "" if any(len(trial.values) > 1 for trial in study.trials) else ", each of one seed"
    parts = [
        f"# {study.name}",
        study.question,
        f"Metric: `{study.metric}` in {frame.unit(study.metric)}, {study.better} is better.  Sampler: {study.sampler}, pruner: {study.pruner}, "
        f"up to {study.trials_per_cell} trials an arm, seeds {', '.join(map(str, study.seeds))}.  "
        f"Trials: {study_record.said(Counter(trial.state for trial in study.trials))}.",
        "Searched: "
        + "; ".join(f"`{path}` {_range(how)}" for path, how in study.space.items())
        + ".",
        "## Read first\n\n" + bullets(report.warnings) if report.warnings else "",
        "## Winners\n\n" + markdown_table(_rows(report)),
        bullets(
            [
                f"`{cell}`: {won.reason}"
                for cell, won in report.winners.items()
                if won.admissible
            ]
        ),
        show.get("curves", ""),
        "## Learning rate and width\n\n"
        + bullets([f"`{cell}`: {says}" for cell, says in report.moves.items()])
        if report.moves
        else "",
        markdown_table(_transfer_rows(report.transfer)) + "\n\n" + show["widths"]
        if report.moves
        else "",
        "## One setting for all, and each arm's own\n\n" + _compared(report)
        if report.shared
        else "",
        "## The search\n\n"
        + "\n\n".join(show[name] for name in ("importance", "history") if name in show),
        "## How to read this\n\n" + METHOD.format(seeds=seeds),
        "## Trials\n\n"
        + markdown_table(
            [_listed(study, trial) for trials in study.cells.values() for trial in trials]
        ),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _transfer_rows(moved: pd.DataFrame) -> list[dict[str, str]]:
    return [
        {
            "arm": row.cell,
            "width": str(row.width),
            "best lr": f"{row.lr:.4g}" + ("" if row.admissible else " (edge)"),
            "best": text(row.loss, ".4f"),
            "optimum [95 %]": _interval(row.optimum, row.low, row.high),
            f"at the lr of width {row.base_width}"
            if moved.base_width.nunique() == 1
            else "at the base width's lr": text(row.transferred_loss, ".4f"),
            "how": row.how,
            "gap": text(row.gap, ".4f"),
            "steps away": f"{row.steps:+.1f}",
        }
        for row in moved.itertuples()
    ]


def _pairs(report: StudyReport) -> list[tuple[Effect, Effect]]:
    """Each arm's effect at the shared setting, and at its own."""
    tuned = {effect.cell: effect for effect in report.tuned}
    return [
        (one, tuned[one.cell])
        for one in report.shared
        if one.cell in tuned and one.verdict != REFERENCE
    ]


def _compared_rows(report: StudyReport) -> list[dict[str, str]]:
    return [
        {
            "arm": one.cell,
            "delta, shared setting": _delta(one),
            "verdict": one.verdict,
            "own setting": _setting(report.winners.get(one.cell)),
            "delta, own setting": _delta(own),
            "verdict, own setting": own.verdict,
            "tuning moves it by": text(_difference(own.delta, one.delta), "+.4f"),
        }
        for one, own in _pairs(report)
    ]


def _compared(report: StudyReport) -> str:
    """The deltas of the plan at one setting for all arms beside those at each arm's own winner."""
    references = {
        effect.cell: _setting(report.winners.get(effect.cell))
        for effect in report.tuned
        if effect.verdict == REFERENCE
    }
    notes = [f"`{cell}`, measured against: {setting}" for cell, setting in references.items()]
    notes += [
        f"`{one.cell}` is {one.verdict} at the shared setting, {own.verdict} at its own"
        for one, own in _pairs(report)
        if one.verdict != own.verdict
        and {one.verdict, own.verdict} <= {BETTER, WORSE, INCONCLUSIVE}
    ]
    if wrong := [
        f"`{one.cell}`"
        for one in report.tuned
        if one.cell in report.winners and not report.winners[one.cell].admissible
    ]:
        notes.append(
            f"{', '.join(wrong)} won at an edge: its delta is still that of an untuned arm"
        )
    return markdown_table(_compared_rows(report)) + "\n\n" + bullets(notes)


def _setting(won: Winner | None) -> str:
    return (
        ", ".join(f"{path}={_number(value)}" for path, value in won.params.items())
        if won
        else NONE
    )


def _listed(study: StudyRecord, trial: study_record.Trial) -> dict[str, str]:
    params = {path: _number(trial.params.get(path, NONE)) for path in study.space}
    value, runs = text(trial.value, ".4f"), ", ".join(f"`{run}`" for run in trial.runs)
    return {
        "arm": trial.cell,
        "trial": str(trial.number),
        **params,
        study.metric: value,
        "state": trial.state.replace("_", " "),
        "runs": runs or NONE,
    }


def _plain_winner(won: Winner) -> dict[str, Any]:
    near = [
        side and {"value": side.value, "state": side.state, "params": side.params}
        for side in won.neighbours
    ]
    fitted = {
        "optimum": won.optimum,
        "low": won.low,
        "high": won.high,
        "fit": won.fit and asdict(won.fit),
    }
    return {
        "params": won.params,
        "value": won.value,
        "admissible": won.admissible,
        "reason": won.reason,
        "neighbours": near,
    } | fitted


def _strict(value: Any) -> Any:
    """Without numpy's types and NaN, which JSON lacks."""
    if isinstance(value, dict):
        return {str(key): _strict(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(one) for one in value]
    value = value.item() if isinstance(value, np.generic) else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _range(how: dict[str, Any]) -> str:
    """`{"log": [a, b], "points": 7}` in words."""
    kind, values = next(
        (kind, values) for kind, values in how.items() if isinstance(values, list | tuple)
    )
    listed = ", ".join(map(_number, values))
    return f"one of {listed}" if kind == "choices" else f"{kind} [{listed}]"


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _interval(value: float | None, low: float | None, high: float | None) -> str:
    return text(value, ".3g") + (
        f" [{low:.3g}, {high:.3g}]" if pd.notna(low) and low is not None else ""
    )


def _delta(effect: Effect) -> str:
    return text(effect.delta, "+.4f") + (
        f" [{effect.low:+.4f}, {effect.high:+.4f}]" if effect.interval else ""
    )


def _difference(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b
