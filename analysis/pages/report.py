"""An experiment's report: verdicts, numbers, two pictures, and what a reader must know before believing them.

    ablab report NAME          write():    OUT/report.md, OUT/forest.png, OUT/curves.png; OUT/report.html is html.py's
                               table():    the same numbers as rows of text, for the terminal
    ablab report NAME --json   as_json():  the same as plain data

An experiment without a finished run has no report: UserError.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from ablab.analysis.effects import frame
from ablab.analysis.effects.effects import (
    ENDED_BADLY,
    INERT,
    REFERENCE,
    Effect,
    finished,
    ingredient,
    measure,
)
from ablab.analysis.effects.service import in_words
from ablab.analysis.pages.text import NONE, bullets, markdown_table, number
from ablab.analysis.pictures.curves import draw_curves
from ablab.analysis.pictures.forest import draw_forest
from ablab.core.errors import UserError
from ablab.core.store.files import write_atomically
from ablab.core.store.planned import GridPlan, command, notes_on_design
from ablab.core.store.result import FINISHED, said
from ablab.core.store.store import Store

FEWEST_PAIRS = 3  # below, an interval is a formality: t(0.975) is 12.7 at one degree of freedom
MIXED = {"code": "code fingerprints", "tokens": "token counts"}
SERVED_OTHERWISE = "†"  # beside throughputs that compare kernels as well as ideas
FOOTNOTE = (
    f"{SERVED_OTHERWISE} arm and reference were served by different kernels (named above): "
    "this throughput compares the kernels too."
)

METHOD = """\
A delta is the mean of arm minus reference over the pairs (same seed, same batches) that both finished.  Its interval
is a 95 % t interval: paired with at least 6 pairs and a positive estimated correlation, otherwise Welch's, which does
not lean on pairing.  In simulated A/A experiments it covers the truth in 93.4 % or more, unless arm and reference are
negatively correlated.  {methods}

What the intervals do not cover.  *Same hyper-parameters, not tuned*: the learning rate was not re-tuned per arm, so
an arm that wants another one is judged too harshly.  *No multiplicity correction*: among {arms} comparisons at 95 %,
expect about {false:.1f} false "better" or "worse" if nothing had an effect.  One size, one dataset, one token budget:
nothing here says that a delta survives scale.  All runs share one held-out set, so its own sampling error is not in
the interval."""


@dataclass(frozen=True)
class Report:
    """What was planned, what came of it, and what must be said about it."""

    plan: GridPlan
    runs: pd.DataFrame  # frame.load
    effects: list[Effect]
    warnings: list[str]


def read(store: Store, experiment: str) -> Report:
    """Measure an experiment.  UserError when no run has finished yet."""
    plan = store.read_plan(experiment)
    runs = frame.load(store, experiment)
    statuses = Counter(runs.status if len(runs) else ())
    if not statuses[FINISHED]:
        counts = said(statuses) or "none planned"
        raise UserError(
            f"experiment {experiment!r} has no finished run ({counts}); "
            f"start or continue it with: {command(experiment, sheet=plan.sheet)}"
        )
    effects = measure(runs, plan.metric, plan.better)
    return Report(plan, runs, effects, list(_warnings(plan, runs, effects)))


def write(store: Store, experiment: str, out: str | Path) -> Path:
    """Write report.md and its pictures into the folder `out`; the path of report.md."""
    return write_markdown(read(store, experiment), frame.curves(store, experiment), Path(out))


def write_markdown(report: Report, logged: pd.DataFrame, folder: Path) -> Path:
    """As `write`, of what has been read.  logged: of `frame.curves`."""
    plan = report.plan
    pictures = []
    if any(effect.verdict != REFERENCE for effect in report.effects):
        pictures.append(
            draw_forest(report.effects, folder / "forest.png", plan.metric, plan.better)
        )
    metric = plan.metric if plan.metric in logged else "val/loss"
    if metric in logged and logged[metric].notna().any():
        pictures.append(draw_curves(logged, folder / "curves.png", metric))
    page = _markdown(report, [path.name for path in pictures])
    write_atomically(folder / "report.md", page.encode())
    return folder / "report.md"


def table(effects: list[Effect]) -> list[dict[str, str]]:
    """A row of text per cell, for a terminal or a page; the keys are the headings."""
    otherwise = _served_otherwise(effects)
    return [_row(effect, SERVED_OTHERWISE * (effect.cell in otherwise)) for effect in effects]


def _row(effect: Effect, mark: str) -> dict[str, str]:
    """mark: behind each measured throughput; a reference has no ratio."""
    interval = NONE
    if effect.interval:
        interval = f"{effect.interval.low:+.4f} to {effect.interval.high:+.4f}"
    return {
        "arm": effect.cell,
        "pairs": str(effect.n),
        "mean": number(effect.mean, ".4f"),
        "sd": number(effect.sd, ".4f"),
        "delta": number(effect.delta, "+.4f"),
        "95 % interval": interval,
        "method": effect.method or NONE,
        "verdict": effect.verdict,
        "tokens/s": number(effect.tokens_per_second, ",.0f", mark),
        "x reference": number(
            effect.tokens_per_second_ratio, ".2f", mark * bool(effect.service)
        ),
        "runs": effect.counts,
    }


def _served_otherwise(effects: list[Effect]) -> set[str]:
    """The cells whose throughput is compared with one of other kernels: such arms, and their references."""
    arms = [effect for effect in effects if effect.service]
    return {arm.cell for arm in arms} | {arm.reference for arm in arms if arm.reference}


def as_json(report: Report) -> dict[str, Any]:
    """The report as plain data: numbers, strings, lists and None."""
    plan = report.plan
    told = ["cell", "pair", "seed", "run", "status", plan.metric]
    told += ["tokens", "tokens_per_second", "code"]
    runs = report.runs.reindex(columns=told).astype(object)
    return {
        "experiment": plan.name,
        "question": plan.question,
        "metric": {"name": plan.metric, "unit": frame.unit(plan.metric), "better": plan.better},
        "design": plan.design,
        "tuning": "same hyper-parameters, not tuned",
        "effects": [asdict(effect) | {"off": off(plan, effect)} for effect in report.effects],
        "warnings": report.warnings,
        "runs": runs.where(runs.notna(), None).to_dict("records"),
    }


# -- what must be said first -------------------------------------------------------------------------------------------


def _warnings(plan: GridPlan, runs: pd.DataFrame, effects: list[Effect]) -> Iterator[str]:
    """Sentences for the top of the page, the gravest kind first."""
    yield from _mixtures(finished(runs))
    yield from _other_services(effects)
    yield from _damages(runs)
    yield from _losses(runs)
    yield from _absences(plan, runs)
    yield from _few_seeds(effects)
    yield from notes_on_design(plan.factors, plan.infeasible)


def _mixtures(done: pd.DataFrame) -> Iterator[str]:
    """Finished runs that differ in code, length or machine."""
    settings = [str(name) for name in done if str(name).startswith("runtime/")]
    for column in ("code", "tokens", *settings):
        given = done[column].astype(object)
        values = Counter(given.where(given.notna(), "").map(str))
        if len(values) > 1:
            counts = ", ".join(
                f"{value or 'not recorded'} ({count} runs)" for value, count in values.items()
            )
            yield (
                f"the runs mix {MIXED.get(column, column)}: {counts}; "
                "a difference between arms may be one between these"
            )


def _other_services(effects: list[Effect]) -> Iterator[str]:
    for effect in effects:
        if effect.service:
            yield (
                f"`{effect.cell}` and `{effect.reference}` were served differently: "
                f"{in_words(effect.service)}; their tokens/s ({SERVED_OTHERWISE}) compare the kernels too; "
                "for one service run both with runtime.kernels=same"
            )


def _damages(runs: pd.DataFrame) -> Iterator[str]:
    """Results that cannot be read, and logs that are not what their runs left."""
    for run in runs[runs.status == frame.DAMAGED].itertuples():
        yield f"`{run.cell}`, seed {run.seed}: {run.error}; it is left out"
    for run in runs[runs.hole != ""].itertuples():
        yield f"`{run.cell}`, seed {run.seed}: {run.hole}; its curve is left out, its final numbers stand"


def _losses(runs: pd.DataFrame) -> Iterator[str]:
    """Runs that ended badly, cell by cell."""
    ended_badly = runs[runs.status.isin(ENDED_BADLY)]
    for cell, lost in ended_badly.groupby("cell", sort=False):
        first = lost.iloc[0]
        planned = (runs.cell == cell).sum()
        why = f": {first.error}" if first.error else ""
        counts = said(Counter(lost.status))
        yield f"`{cell}`: {counts} of {planned} runs; {first.run} at step {first.step}{why}"


def _absences(plan: GridPlan, runs: pd.DataFrame) -> Iterator[str]:
    """Runs without a result."""
    states = (frame.MISSING, frame.INTERRUPTED)
    absent = Counter(status for status in runs.status if status in states)
    if absent:
        why = " (interrupted: killed, or still running)" if absent[frame.INTERRUPTED] else ""
        again = command(plan.name, sheet=plan.sheet)
        yield f"{said(absent)} of {len(runs)} runs{why}; continue with: {again}"


def _few_seeds(effects: list[Effect]) -> Iterator[str]:
    few = [
        f"`{effect.cell}` ({effect.n})"
        for effect in effects
        if effect.n < FEWEST_PAIRS and effect.verdict != INERT
    ]
    if few:
        yield (
            f"fewer than {FEWEST_PAIRS} finished seeds: {', '.join(few)}; "
            "no verdict to rely on, add seeds"
        )


# -- the page ----------------------------------------------------------------------------------------------------------


def _markdown(report: Report, pictures: list[str]) -> str:
    arms = [effect for effect in report.effects if effect.verdict != REFERENCE]
    parts = [
        f"# {report.plan.name}",
        report.plan.question,
        _summary(report, arms),
        "## Read first\n\n" + bullets(report.warnings) if report.warnings else "",
        "## Verdicts\n\n" + markdown_table([_verdict(report.plan, arm) for arm in arms]),
        *(f"![{name.removesuffix('.png')}]({name})" for name in pictures),
        "## Numbers\n\n" + markdown_table(table(report.effects)),
        FOOTNOTE if _served_otherwise(report.effects) else "",
        bullets(
            [f"`{effect.cell}`: {effect.note}" for effect in report.effects if effect.note]
        ),
        "## How to read the intervals\n\n" + _method(arms),
        "## Runs\n\n" + markdown_table(_listed(report.runs, report.plan.metric)),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _summary(report: Report, arms: list[Effect]) -> str:
    plan = report.plan
    references = ", ".join(f"`{name}`" for name in dict.fromkeys(arm.reference for arm in arms))
    return (
        f"Metric: `{plan.metric}` in {frame.unit(plan.metric)}, {plan.better} is better.  "
        f"Design: {plan.design}, {len(arms)} arms against {references or NONE}.  "
        f"Runs: {said(Counter(report.runs.status))}."
    )


def _verdict(plan: GridPlan, arm: Effect) -> dict[str, str]:
    return {
        "arm": arm.cell,
        "what it says": arm.sentence,
        "OFF means": off(plan, arm) or NONE,
    }


def off(plan: GridPlan, effect: Effect) -> str:
    """What stands where the toggles that tell cell and reference apart are off: the sentences from the plan."""
    ours = plan.treatments.get(effect.cell)
    theirs = plan.treatments.get(effect.reference or "")
    if ours is None or theirs is None:
        changed = [ingredient(effect.cell)[1]]
    else:
        changed = sorted(ours.keys() ^ theirs.keys())
    said_of = {name: plan.off[name] for name in changed if name in plan.off}
    if len(changed) == 1:
        return "".join(said_of.values())
    return "; ".join(f"{name}: {control}" for name, control in said_of.items())


def _method(arms: list[Effect]) -> str:
    methods = Counter(arm.method for arm in arms if arm.method)
    here = f"Arms here: {said(methods)}." if methods else ""
    expected = 0.05 * len(arms)
    return METHOD.format(methods=here, arms=len(arms), false=expected)


def _listed(runs: pd.DataFrame, metric: str) -> list[dict[str, Any]]:
    told = runs[["cell", "pair", "seed", "run", "status", metric, "code"]]
    told = told.assign(**{metric: [number(value, ".4f") for value in told[metric]]})
    columns = [str(name) for name in told]
    rows = told.itertuples(index=False, name=None)
    return [dict(zip(columns, row, strict=True)) for row in rows]
