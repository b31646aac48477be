"""A study's report: each arm's winner, whether it may be read, what width does to it, what tuning does to the deltas.

    write()      OUT/study.md and its pictures
    table()      a row of text per arm, for the terminal
    compared()   a row per arm of the confirmation: its delta at one setting for all, and at its own
    as_json()    the same as plain data

A study without a finished trial has no report: UserError.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from ablab.analysis.effects import frame
from ablab.analysis.effects.effect import (
    EQUIVALENT,
    HELPS,
    HURTS,
    INADMISSIBLE,
    INCONCLUSIVE,
    REFERENCE,
    Effect,
)
from ablab.analysis.effects.effects import measure
from ablab.analysis.pages.text import NONE, bullets, markdown_table, number
from ablab.analysis.pictures.study_rates import draw_rates, draw_widths
from ablab.analysis.pictures.study_search import draw_history, draw_importance
from ablab.analysis.pictures.study_space import axes_of, draw_heat, draw_slices
from ablab.analysis.tuning.transfer import AtWidth, movements, transfer
from ablab.analysis.tuning.winners import EDGE, Winner, axis, seed_sd, winner
from ablab.core.store import study_record
from ablab.core.store.files import write_atomically
from ablab.core.store.planned import command
from ablab.core.store.result import FINISHED, PRUNED, said
from ablab.core.store.store import Store
from ablab.core.store.study_record import (
    COMPLETE,
    EVALUATED,
    RUNNING,
    WIDTH,
    StudyRecord,
    Trial,
    counts,
)

FEWEST_OF_A_CURVE = 3  # trials
METHOD = """\
The winner is an arm's best finished trial.  It is read only if it beats what was tried on both sides of it by more
than the noise, else the curve is flat; a diverged or pruned neighbour was tried and is worse.  The optimum is that of
a cubic in log2 of the learning rate, within two octaves, where steps are fine, else of a quadratic around the winner;
its 95 % interval holds what the slope does not tell from it (analysis/tuning/fit.py).

What this does not say.  *A winner's value flatters*: it is the lowest of several noisy ones{seeds}.  Compare arms by
the confirmation runs, whose seeds the search has not seen.  *Equal effort*: arms are comparable only if each had the
same number of trials over a range that holds its optimum.  One size, one token budget: a best learning rate moves
with both."""


@dataclass(frozen=True)
class StudyReport:
    """What was searched, what won, and what must be said about it."""

    study: StudyRecord
    winners: dict[str, Winner]  # of the arms with a finished trial
    transfer: list[AtWidth]  # empty unless widths were searched
    moves: dict[str, str]  # a sentence per arm about width
    shared: list[Effect]  # all arms at the experiment's own values
    tuned: list[Effect]  # each arm at its own winner; both empty until both have finished runs
    warnings: list[str]

    @property
    def pairs(self) -> list[tuple[Effect, Effect]]:
        """Each arm's effect at the shared setting, and at its own."""
        tuned = {effect.cell: effect for effect in self.tuned}
        return [(one, tuned[one.cell]) for one in self.shared if one.cell in tuned]

    @property
    def arm_pairs(self) -> list[tuple[Effect, Effect]]:
        return [(one, own) for one, own in self.pairs if one.verdict != REFERENCE]


def read(store: Store, name: str) -> StudyReport:
    """UserError when the study is missing, damaged, or has no finished trial."""
    study = study_record.read(store, name)
    winners = {
        cell: winner(trials, study.space, study.hard, study.better)
        for cell, trials in study.cells.items()
        if any(trial.state == COMPLETE for trial in trials)
    }
    moved = transfer(study) if WIDTH in study.space and axis(study.space) else []
    shared = _effects(store, study.name)
    tuned = _effects(store, study.tuned)
    both = bool(shared and tuned)
    return StudyReport(
        study=study,
        winners=winners,
        transfer=moved,
        moves=movements(moved, _noise(study, shared)),
        shared=shared if both else [],
        tuned=[_if_admissible(effect, winners) for effect in tuned] if both else [],
        warnings=list(_warnings(study, winners, moved)),
    )


def _effects(store: Store, plan: str | None) -> list[Effect]:
    """The effects of a plan; empty while it does not exist or has no finished run."""
    if plan is None or not store.plan_path(plan).is_file():
        return []
    wanted = store.read_plan(plan)
    runs = frame.load(store, plan)
    if runs.empty or not (runs.status == FINISHED).any():
        return []
    return measure(runs, wanted.metric, wanted.better, wanted.equivalence, wanted.looks)


def _if_admissible(effect: Effect, winners: Mapping[str, Winner]) -> Effect:
    """A difference of which one side won at an edge has no verdict: a better setting lies beyond."""
    if effect.reference is None:
        return effect
    sides = [winners[cell] for cell in (effect.cell, effect.reference) if cell in winners]
    if all(won.standing != EDGE for won in sides):
        return effect
    said = f"{effect.subject}: inadmissible, a learning rate behind it won at an edge"
    return replace(effect, verdict=INADMISSIBLE, sentence=said)


def _noise(study: StudyRecord, shared: list[Effect]) -> float | None:
    """The seed sd: of the search where it had several seeds, else of the experiment's own runs; None without either."""
    if sd := seed_sd(study.trials):
        return sd
    sds = [effect.sd for effect in shared if effect.sd]
    return float(np.sqrt(np.mean(np.square(sds)))) if sds else None


def write(store: Store, name: str, out: str | Path) -> Path:
    """Write study.md and its pictures into the folder `out`; the path of study.md."""
    report = read(store, name)
    folder = Path(out)
    page = _markdown(report, _draw(report, folder))
    write_atomically(folder / "study.md", page.encode())
    return folder / "study.md"


def _draw(report: StudyReport, folder: Path) -> dict[str, str]:
    """Name of a picture -> its Markdown; those that the study has the data for."""
    study = report.study
    along = axis(study.space)
    paths = {}
    if along and any(_has_a_curve(won) for won in report.winners.values()):
        paths["curves"] = draw_rates(study, folder / "lr.png")
    searched = axes_of(study)
    if len(searched) > 1:
        paths["slices"] = draw_slices(study, folder / "slices.png")
        paths["map"] = draw_heat(study, folder / "map.png")
    if report.transfer:
        paths["widths"] = draw_widths(study, folder / "lr_width.png")
    if any(study.importance.values()):
        paths["importance"] = draw_importance(study, folder / "importance.png")
    paths["history"] = draw_history(study, folder / "history.png")
    return {name: f"![{name}]({path.name})" for name, path in paths.items()}


def _has_a_curve(won: Winner) -> bool:
    """Whether trials beside the winner differ from it along one axis alone; two dots are no curve."""
    return won.line is not None and len(won.line.complete) >= FEWEST_OF_A_CURVE


def table(store: Store, name: str) -> list[dict[str, str]]:
    """A row of text per arm, for a terminal; the keys are the headings."""
    return _rows(read(store, name))


def compared(store: Store, name: str) -> list[dict[str, str]]:
    """A row of text per arm that was confirmed, for a terminal; none where nothing was."""
    return _compared_rows(read(store, name))


def as_json(store: Store, name: str) -> dict[str, Any]:
    """The report as plain data: numbers, strings, lists and None."""
    report = read(store, name)
    study = report.study
    settings = asdict(study)
    trials = settings.pop("trials")
    found = {
        "study": settings.pop("name"),
        **settings,
        "metric": {
            "name": study.metric,
            "unit": frame.unit(study.metric),
            "better": study.better,
        },
        "arms": [
            {
                "cell": cell,
                "trials": dict(counts(trials_of)),
                "winner": _plain_winner(report.winners.get(cell)),
            }
            for cell, trials_of in study.cells.items()
        ],
        "transfer": [asdict(row) for row in report.transfer],
        "moves": report.moves,
        "deltas": [
            {"cell": one.cell, "shared": asdict(one), "tuned": asdict(own)}
            for one, own in report.pairs
        ],
        "warnings": report.warnings,
        "trials": trials,
    }
    return _strict(found)


def _plain_winner(won: Winner | None) -> dict[str, Any] | None:
    if won is None:
        return None
    return {
        "params": won.params,
        "value": won.value,
        "admissible": won.admissible,
        "standing": won.standing,
        "reason": won.reason,
        "neighbours": [
            side and {"value": side.value, "state": side.state, "params": side.params}
            for side in won.neighbours
        ],
        "optimum": won.optimum,
        "low": won.low,
        "high": won.high,
        "fit": asdict(won.fit) if won.fit else None,
    }


def _strict(value: Any) -> Any:
    """Without numpy's types and NaN, which JSON lacks."""
    if isinstance(value, dict):
        return {str(key): _strict(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(one) for one in value]
    value = value.item() if isinstance(value, np.generic) else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


# -- what must be said first -------------------------------------------------------------------------------------------


def _warnings(
    study: StudyRecord, winners: dict[str, Winner], moved: list[AtWidth]
) -> Iterator[str]:
    """Sentences for the top of the page, the gravest kind first."""
    for cell, trials in study.cells.items():
        if cell not in winners:
            yield f"`{cell}`: no trial finished ({said(counts(trials))})"
        elif not winners[cell].admissible:
            yield f"`{cell}`: {winners[cell].reason}"
    for row in moved:
        if not row.admissible and row.reason != winners[row.cell].reason:
            yield f"`{row.cell}` at width {row.width}: {row.reason}"
    evaluated = {
        cell: sum(trial.state in EVALUATED for trial in trials)
        for cell, trials in study.cells.items()
    }
    if len(set(evaluated.values())) > 1:
        efforts = ", ".join(f"`{cell}` {count}" for cell, count in evaluated.items())
        yield (
            f"the arms have unequal numbers of evaluated trials ({efforts}); "
            "the best of more looks better by luck alone"
        )
    states = counts(study.trials)
    if open_trials := states[RUNNING]:
        again = command(study.name, "study", study.sheet, study.asked)
        yield f"{open_trials} trials have no result yet; continue with: {again}"
    if pruned := states[PRUNED]:
        yield (
            f"{pruned} trials were pruned, before the cooldown could change their rank; "
            "a pruned neighbour is weak evidence"
        )


# -- the page ----------------------------------------------------------------------------------------------------------


def _markdown(report: StudyReport, pictures: dict[str, str]) -> str:
    study = report.study
    read_first = bullets(report.warnings)
    width = _width_section(report, pictures.get("widths", "")) if report.moves else ""
    compared = _compared_section(report) if report.shared else ""
    shown = ("slices", "map", "importance", "history")
    search = [pictures[name] for name in shown if name in pictures]
    several_seeds = any(len(trial.values) > 1 for trial in study.trials)
    method = METHOD.format(seeds="" if several_seeds else ", each of one seed")
    trials = [_listed(study, trial) for trials in study.cells.values() for trial in trials]
    parts = [
        f"# {study.name}",
        study.question,
        _summary(study),
        f"Searched: {'; '.join(f'`{path}` {_range(how)}' for path, how in study.space.items())}.",
        f"## Read first\n\n{read_first}" if read_first else "",
        f"## Winners\n\n{markdown_table(_rows(report))}",
        bullets(
            f"`{cell}`: {won.reason}" for cell, won in report.winners.items() if won.admissible
        ),
        pictures.get("curves", ""),
        f"## Learning rate and width\n\n{width}" if width else "",
        f"## One setting for all, and each arm's own\n\n{compared}" if compared else "",
        "\n\n".join(["## The search", *search]),
        f"## How to read this\n\n{method}",
        f"## Trials\n\n{markdown_table(trials)}",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _summary(study: StudyRecord) -> str:
    return (
        f"Metric: `{study.metric}` in {frame.unit(study.metric)}, {study.better} is better.  "
        f"Sampler: {study.sampler}, pruner: {study.pruner}, "
        f"up to {study.trials_per_cell} trials an arm, seeds {', '.join(map(str, study.seeds))}.  "
        f"Trials: {said(counts(study.trials))}."
    )


def _rows(report: StudyReport) -> list[dict[str, str]]:
    """The winners, a row per arm."""
    return [
        _row(report.study, cell, trials, report.winners.get(cell))
        for cell, trials in report.study.cells.items()
    ]


def _row(
    study: StudyRecord, cell: str, trials: list[Trial], won: Winner | None
) -> dict[str, str]:
    row = {"arm": cell, "trials": said(counts(trials))}
    for path in study.space:
        row[path] = _value(won.params.get(path, NONE)) if won else NONE
    row[study.metric] = number(won.value if won else None, ".4f")
    row["winner"] = _standing(won)
    row["optimum"] = number(won.optimum if won else None, ".3g")
    bounded = won is not None and won.low is not None
    row["95 % interval"] = f"{won.low:.3g} to {won.high:.3g}" if won and bounded else NONE
    return row


def _standing(won: Winner | None) -> str:
    """Whether the winner may be read, in a word."""
    return won.standing if won else "no winner"


def _width_section(report: StudyReport, picture: str) -> str:
    sentences = bullets(f"`{cell}`: {says}" for cell, says in report.moves.items())
    bases = {row.base_width for row in report.transfer}
    rate = f"the lr of width {bases.pop()}" if len(bases) == 1 else "the base width's lr"
    rows = [
        {
            "arm": row.cell,
            "width": str(row.width),
            "best lr": f"{row.lr:.4g}" + ("" if row.admissible else f" ({row.standing})"),
            "best": number(row.loss, ".4f"),
            "optimum [95 %]": _bracketed(row.optimum, row.low, row.high, ".3g"),
            f"at {rate}": number(row.transferred_loss, ".4f"),
            "how": row.how,
            "gap": number(row.gap, ".4f"),
            "steps away": f"{row.steps:+.1f}",
        }
        for row in report.transfer
    ]
    return "\n\n".join([sentences, markdown_table(rows), picture])


def _compared_section(report: StudyReport) -> str:
    """The deltas of the plan at one setting for all arms beside those at each arm's own winner."""
    notes = [
        f"`{effect.cell}`, measured against: {_setting(report.winners.get(effect.cell))}"
        for effect in report.tuned
        if effect.verdict == REFERENCE
    ]
    told = {HELPS, HURTS, EQUIVALENT, INCONCLUSIVE}
    for one, own in report.arm_pairs:
        if one.verdict != own.verdict and {one.verdict, own.verdict} <= told:
            notes.append(
                f"`{one.subject}`: {one.verdict} at the shared setting, {own.verdict} at each arm's own"
            )
    edges = [
        f"`{effect.cell}`"
        for effect in report.tuned
        if effect.cell in report.winners and report.winners[effect.cell].standing == EDGE
    ]
    if edges:
        notes.append(
            f"{', '.join(edges)} won at an edge: its delta is still that of an untuned arm"
        )
    return markdown_table(_compared_rows(report)) + "\n\n" + bullets(notes)


def _compared_rows(report: StudyReport) -> list[dict[str, str]]:
    return [
        {
            "arm": one.cell,
            "delta, shared setting": _delta(one),
            "verdict": one.verdict,
            "own setting": _setting(report.winners.get(one.cell)),
            "delta, own setting": _delta(own),
            "verdict, own setting": own.verdict,
            "tuning moves it by": number(_difference(own.delta, one.delta), "+.4f"),
        }
        for one, own in report.arm_pairs
    ]


def _setting(won: Winner | None) -> str:
    if won is None:
        return NONE
    return ", ".join(f"{path}={_value(value)}" for path, value in won.params.items())


def _listed(study: StudyRecord, trial: Trial) -> dict[str, str]:
    """One line of the list of trials."""
    row = {"arm": trial.cell, "trial": str(trial.number)}
    row |= {path: _value(trial.params.get(path, NONE)) for path in study.space}
    row[study.metric] = number(trial.value, ".4f")
    row["state"] = trial.state.replace("_", " ")
    row["runs"] = ", ".join(f"`{run}`" for run in trial.runs) or NONE
    return row


def _range(how: dict[str, Any]) -> str:
    """`{"log": [a, b], "points": 7}` in words."""
    kind, values = next(
        (kind, one) for kind, one in how.items() if isinstance(one, list | tuple)
    )
    listed = ", ".join(map(_value, values))
    return f"one of {listed}" if kind == "choices" else f"{kind} [{listed}]"


def _value(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _bracketed(value: float | None, low: float | None, high: float | None, form: str) -> str:
    """The value and its interval, as far as they are known."""
    if low is None or high is None or pd.isna(low):
        return number(value, form)
    return f"{number(value, form)} [{low:{form}}, {high:{form}}]"


def _delta(effect: Effect) -> str:
    return _bracketed(effect.delta, effect.low, effect.high, "+.4f")


def _difference(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b
