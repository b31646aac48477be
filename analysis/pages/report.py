"""An experiment's report: verdicts, numbers, two pictures, and what a reader must know before believing them.

    ablab report NAME          write():    OUT/report.md, OUT/forest.png, OUT/curves.png
                               table():    the same numbers as rows of text, for the terminal
    ablab report NAME --json   as_json():  the same as plain data

An experiment without a finished run has no report: UserError.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import pandas as pd

from ablab.analysis.effects import frame
from ablab.analysis.effects.effects import (
    ENDED_BADLY,
    INERT,
    REFERENCE,
    Effect,
    ingredient,
    measure,
)
from ablab.analysis.pictures import plots
from ablab.core.errors import UserError
from ablab.core.store.files import write_atomically
from ablab.core.store.record import FINISHED, GridPlan, Store, command

FEWEST_PAIRS = 3  # below, an interval is a formality: t(0.975) is 12.7 at one degree of freedom
NONE = "–"
MIXED = {"code": "code fingerprints", "tokens": "token counts"}

METHOD = """\
A delta is the mean of arm minus reference over the pairs (same seed, same batches) that both finished.  Its interval is a
95 % t interval: paired with at least 6 pairs and a positive estimated correlation, otherwise Welch's, which does not lean
on pairing.  In simulated A/A experiments it covers the truth in 93.4 % or more, unless arm and reference are negatively
correlated.  {methods}

What the intervals do not cover.  *Same hyper-parameters, not tuned*: the learning rate was not re-tuned per arm, so an arm
that wants another one is judged too harshly.  *No multiplicity correction*: among {arms} comparisons at 95 %, expect about
{false:.1f} false "better" or "worse" if nothing had an effect.  One size, one dataset, one token budget: nothing here says
that a delta survives scale.  All runs share one held-out set, so its own sampling error is not in the interval."""


@dataclass(frozen=True)
class Report:
    """What was planned, what came of it, and what must be said about it."""

    plan: GridPlan
    runs: pd.DataFrame  # frame.load
    effects: list[Effect]
    warnings: list[str]


def read(store: Store, experiment: str) -> Report:
    """Measure an experiment.  UserError when no run has finished yet."""
    plan, runs = store.read_plan(experiment), frame.load(store, experiment)
    statuses = Counter(runs.status if len(runs) else ())
    if not statuses[FINISHED]:
        counts = _counts(statuses) or "none planned"
        raise UserError(
            f"experiment {experiment!r} has no finished run ({counts}); start or continue it with: {command(experiment)}"
        )
    effects = measure(runs, plan.metric, plan.better)
    return Report(plan, runs, effects, list(_warnings(plan, runs, effects)))


def write(store: Store, experiment: str, out: str | Path) -> Path:
    """Write report.md and its pictures into the folder `out`; the path of report.md."""
    report, logged, out = read(store, experiment), frame.curves(store, experiment), Path(out)
    metric = report.plan.metric if report.plan.metric in logged else "val/loss"
    pictures = []
    if any(effect.verdict != REFERENCE for effect in report.effects):
        pictures.append(
            plots.forest(
                report.effects, out / "forest.png", report.plan.metric, report.plan.better
            )
        )
    if metric in logged and logged[metric].notna().any():
        pictures.append(plots.curves(logged, out / "curves.png", metric))
    write_atomically(
        out / "report.md", _markdown(report, [path.name for path in pictures]).encode()
    )
    return out / "report.md"


def table(effects: list[Effect]) -> list[dict[str, str]]:
    """A row of text per cell, for a terminal or a page; the keys are the headings."""
    return [
        {
            "arm": effect.cell,
            "pairs": str(effect.n),
            "mean": text(effect.mean, ".4f"),
            "sd": text(effect.sd, ".4f"),
            "delta": text(effect.delta, "+.4f"),
            "95 % interval": f"{effect.low:+.4f} to {effect.high:+.4f}"
            if effect.interval
            else NONE,
            "method": effect.method or NONE,
            "verdict": effect.verdict,
            "tokens/s": text(effect.tokens_per_second, ",.0f"),
            "x reference": text(effect.tokens_per_second_ratio, ".2f"),
            "runs": effect.counts,
        }
        for effect in effects
    ]


def as_json(report: Report) -> dict:
    """The report as plain data: numbers, strings, lists and None."""
    plan = report.plan
    columns = [
        "cell",
        "pair",
        "seed",
        "run",
        "status",
        plan.metric,
        "tokens",
        "tokens_per_second",
        "code",
    ]
    runs = report.runs.reindex(columns=columns).astype(object)
    return {
        "experiment": plan.name,
        "question": plan.question,
        "metric": {"name": plan.metric, "unit": frame.unit(plan.metric), "better": plan.better},
        "design": plan.design,
        "tuning": "same hyper-parameters, not tuned",
        "effects": [asdict(effect) | {"off": _off(plan, effect)} for effect in report.effects],
        "warnings": report.warnings,
        "runs": runs.where(runs.notna(), None).to_dict("records"),
    }


def _warnings(plan: GridPlan, runs: pd.DataFrame, effects: list[Effect]) -> Iterator[str]:
    """Sentences for the top of the page, the gravest kind first."""
    finished = runs[runs.status == FINISHED]
    for column in ("code", "tokens", *(name for name in runs if name.startswith("runtime/"))):
        values = Counter(
            finished[column].astype(object).where(finished[column].notna(), "").map(str)
        )
        if len(values) > 1:
            counts = ", ".join(
                f"{value or 'not recorded'} ({count} runs)" for value, count in values.items()
            )
            yield f"the runs mix {MIXED.get(column, column)}: {counts}; a difference between arms may be one between these"
    for cell, lost in runs[runs.status.isin(ENDED_BADLY)].groupby("cell", sort=False):
        first, planned = lost.iloc[0], (runs.cell == cell).sum()
        why = f": {first.error}" if first.error else ""
        yield f"`{cell}`: {_counts(Counter(lost.status))} of {planned} runs; {first.run} at step {first.step}{why}"
    absent = Counter(
        status for status in runs.status if status in (frame.MISSING, frame.INTERRUPTED)
    )
    if absent:
        why = " (interrupted: killed, or still running)" if absent[frame.INTERRUPTED] else ""
        yield f"{_counts(absent)} of {len(runs)} runs{why}; continue with: {command(plan.name)}"
    few = [
        f"`{effect.cell}` ({effect.n})"
        for effect in effects
        if effect.n < FEWEST_PAIRS and effect.verdict != INERT
    ]
    if few:
        yield f"fewer than {FEWEST_PAIRS} finished seeds: {', '.join(few)}; no verdict to rely on, add seeds"


def _off(plan: GridPlan, effect: Effect) -> str:
    """What stands where the toggles that tell cell and reference apart are off: the sentences from the plan."""
    treatments = plan.treatments
    if effect.cell in treatments and effect.reference in treatments:
        changed = sorted(treatments[effect.cell].keys() ^ treatments[effect.reference].keys())
    else:
        changed = [ingredient(effect.cell)[1]]
    return "; ".join(
        f"{name}: {plan.off[name]}" if len(changed) > 1 else plan.off[name]
        for name in changed
        if name in plan.off
    )


def _markdown(report: Report, pictures: list[str]) -> str:
    plan, effects, runs = report.plan, report.effects, report.runs
    arms = [effect for effect in effects if effect.verdict != REFERENCE]
    references = (
        ", ".join(f"`{name}`" for name in dict.fromkeys(arm.reference for arm in arms)) or NONE
    )
    methods = Counter(arm.method for arm in arms if arm.method)
    parts = [
        f"# {plan.name}",
        plan.question,
        f"Metric: `{plan.metric}` in {frame.unit(plan.metric)}, {plan.better} is better.  Design: {plan.design}, "
        f"{len(arms)} arms against {references}.  Runs: {_counts(Counter(runs.status))}.",
        "## Read first\n\n" + bullets(report.warnings) if report.warnings else "",
        "## Verdicts\n\n"
        + markdown_table(
            [
                {
                    "arm": arm.cell,
                    "what it says": arm.sentence,
                    "OFF means": _off(plan, arm) or NONE,
                }
                for arm in arms
            ]
        ),
        *(f"![{name.removesuffix('.png')}]({name})" for name in pictures),
        "## Numbers\n\n" + markdown_table(table(effects)),
        bullets([f"`{effect.cell}`: {effect.note}" for effect in effects if effect.note]),
        "## How to read the intervals\n\n"
        + METHOD.format(
            methods=f"Arms here: {_counts(methods)}." if methods else "",
            arms=len(arms),
            false=len(arms) / 20,
        ),
        "## Runs\n\n" + markdown_table(_listed(runs, plan.metric)),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _listed(runs: pd.DataFrame, metric: str) -> list[dict]:
    rows = runs[["cell", "pair", "seed", "run", "status", metric, "code"]].to_dict("records")
    return [row | {metric: text(row[metric], ".4f")} for row in rows]


def markdown_table(rows: list[dict]) -> str:
    """A Markdown table; the first column is a name and set as code."""
    if not rows:
        return NONE
    body = [[str(value).replace("|", "\\|") for value in row.values()] for row in rows]
    lines = [
        list(rows[0]),
        ["---"] * len(rows[0]),
        *([f"`{name}`", *rest] for name, *rest in body),
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def bullets(sentences: list[str]) -> str:
    return "\n".join(f"- {sentence}" for sentence in sentences)


def _counts(statuses: Counter) -> str:
    return ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in statuses.items())


def text(value: float | None, form: str) -> str:
    return NONE if value is None or pd.isna(value) else format(value, form)
