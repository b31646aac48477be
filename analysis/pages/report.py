"""An experiment's report: verdicts, numbers, two pictures, and what a reader must know before believing them.

    ablab report NAME          write():    OUT/report.md, OUT/forest.png, OUT/curves.png; OUT/report.html is html.py's
                               table():    the same numbers as rows of text, for the terminal
    ablab report NAME --json   as_json():  the same as plain data

An experiment without a finished run has no report: UserError.  One whose runs differ in code, precision or kernels has
one only when it is asked for (--mixed), and says so before anything else.
"""

import shlex
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from ablab.analysis.effects import frame, promises
from ablab.analysis.effects.aa import false_alarms
from ablab.analysis.effects.best import may_be_best
from ablab.analysis.effects.comparison import UNMEASURED, finished
from ablab.analysis.effects.effect import (
    ENDED_BADLY,
    INADMISSIBLE,
    INERT,
    REFERENCE,
    Effect,
    Interval,
    ingredient,
)
from ablab.analysis.effects.effects import measure, noisy_arms
from ablab.analysis.effects.evaluations import ArmScore, scores
from ablab.analysis.effects.factorial import FactorEffect, factorial_effects
from ablab.analysis.effects.intervals import MODERATED_FROM, PLAIN_FROM
from ablab.analysis.effects.service import COLUMN as KERNELS
from ablab.analysis.effects.service import in_words, server
from ablab.analysis.effects.speedup import FLOPS, SECONDS, TOKENS, Speedup, speedups
from ablab.analysis.effects.strays import strays
from ablab.analysis.effects.tokens import SIZES, TokenEffects
from ablab.analysis.pages.answer import answer
from ablab.analysis.pages.method import how_to_read
from ablab.analysis.pages.text import NONE, bullets, markdown_table, number
from ablab.analysis.pictures.curves import draw_curves
from ablab.analysis.pictures.forest import draw_forest
from ablab.core.errors import UserError
from ablab.core.store.files import write_atomically
from ablab.core.store.planned import GridPlan, command, notes_on_design
from ablab.core.store.result import FINISHED, said
from ablab.core.store.store import Store

MIXED = {  # column -> what it is: runs that differ in one of these compute different things
    "code": "code fingerprints",
    "runtime/device": "runtime/device",
    "runtime/dtype": "runtime/dtype",
    "runtime/kernels": "runtime/kernels",
}
SERVED_OTHERWISE = "†"  # beside throughputs that compare kernels as well as ideas
CROSSED = """\
A main effect is the mean with minus the mean without, over all cells; an interaction half of what one ingredient
changes about the effect of the other.  One model of all finished runs, with a block for each seed."""
IN_COMPUTE = """\
How many times less of it an arm needs than its reference for the worse one's final loss, with a 95 % interval over
seeds; above 1 the arm is cheaper.  Seconds hold what the arm costs in throughput.  Losses before the end are those of
a schedule that still has to decay, higher than a run of that length would end with."""
ASKED = """\
Intervals here say what other items of the same kind would have changed, and nothing about seeds: for that, see their
sd.  Minus its reference an arm is compared on the same items, answer by answer, averaged over seeds."""
FOOTNOTE = (
    f"{SERVED_OTHERWISE} arm and reference were served by different kernels (named above): "
    "this throughput compares the kernels too."
)


@dataclass(frozen=True)
class Report:
    """What was planned, what came of it, and what must be said about it."""

    plan: GridPlan
    runs: pd.DataFrame  # frame.load
    effects: list[Effect]
    warnings: list[str]
    mixed: list[str]  # how runs that stand in one verdict differ; said before the answer
    # Main effects and interactions; empty unless the design crosses factors.
    crossed: list[FactorEffect] = field(default_factory=list)
    # When it was registered, and how often this store calls A/A arms different: a sentence each.
    provenance: list[str] = field(default_factory=list)
    asked: list[ArmScore] = field(default_factory=list)  # what evaluations found

    @property
    def answer(self) -> str:
        return answer(self.effects, self.plan.metric, self.crossed)


def read(store: Store, experiment: str, mixed: bool = False) -> Report:
    """Measure an experiment.

    mixed: also where its runs differ in code, precision or kernels.  UserError: they do, and it is not asked
    for; no run has finished yet.
    """
    plan = store.read_plan(experiment)
    runs = frame.load(store, experiment)
    statuses = Counter(runs.status if len(runs) else ())
    if not statuses[FINISHED]:
        counts = said(statuses) or "none planned"
        raise UserError(
            f"experiment {experiment!r} has no finished run ({counts}); "
            f"start or continue it with: {command(experiment, sheet=plan.sheet, asked=plan.asked)}"
        )
    mixtures_found = list(mixtures(finished(runs)))
    if mixtures_found and not mixed:
        again = shlex.join(["ablab", "report", experiment, "--mixed"])
        raise UserError(
            f"{experiment!r}: {mixtures_found[0]}; to read it all the same: {again}"
        )
    tokens = TokenEffects(store, runs, plan.metric)
    measured = measure(runs, plan.metric, plan.better, plan.equivalence, plan.looks)
    effects = tokens.added(measured)
    crossed = []
    if plan.factors:
        judging = (plan.metric, plan.factors, plan.better, plan.equivalence)
        crossed = factorial_effects(runs, *judging)
    standing = promises.standing_of(store, plan)
    asked = scores(store, runs)
    warnings = [
        *promises.look_of(plan, effects),
        *standing.deviations,
        *_warnings(plan, runs, effects),
        *dict.fromkeys(tokens.damages),
        *dict.fromkeys(f"{damage}; it is left out" for damage in asked.damages),
        *promises.challenges(store, plan),
    ]
    provenance = [promises.registered(standing), str(false_alarms(store))]
    if plan.metric not in SIZES:
        provenance.append(
            f"`{plan.metric}` is no mean over held-out tokens: what another text would change is not known"
        )
    return Report(
        plan, runs, effects, warnings, mixtures_found, crossed, provenance, asked.rows
    )


def write(store: Store, experiment: str, out: str | Path, mixed: bool = False) -> Path:
    """Write report.md and its pictures into the folder `out`; the path of report.md."""
    report = read(store, experiment, mixed)
    return write_markdown(report, frame.curves(store, experiment), Path(out))


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
    page = _markdown(report, logged, [path.name for path in pictures])
    write_atomically(folder / "report.md", page.encode())
    return folder / "report.md"


def table(effects: list[Effect]) -> list[dict[str, str]]:
    """A row of text per cell, for a terminal or a page; the keys are the headings."""
    otherwise = _served_otherwise(effects)
    return [_row(effect, SERVED_OTHERWISE * (effect.cell in otherwise)) for effect in effects]


def _row(effect: Effect, mark: str) -> dict[str, str]:
    """mark: behind each measured throughput; a reference has no ratio."""
    return {
        "arm": effect.cell,
        "seeds": str(effect.n),
        "mean": number(effect.mean, ".4f"),
        "sd": number(effect.sd, ".4f"),
        "delta": number(effect.delta, "+.4f"),
        "95 % interval": _between(effect.interval, "+.4f"),
        "SE seeds": number(effect.seed_error, ".4f"),
        "SE text": number(effect.token_error, ".4f"),
        "p (Holm)": _probability(effect.p_adjusted),
        "ingredient": verdict_in_words(effect),
        "tokens/s": number(effect.tokens_per_second, ",.0f", mark),
        "x reference": number(
            effect.tokens_per_second_ratio, ".2f", mark * bool(effect.service)
        ),
        "x, 95 %": _between(effect.speed, ".2f"),
        "runs": effect.counts,
    }


def _between(interval: Interval | None, form: str) -> str:
    return f"{interval.low:{form}} to {interval.high:{form}}" if interval else NONE


def _probability(p: float | None) -> str:
    if p is None:
        return NONE
    return f"{p:.3f}" if p >= 0.001 else "<0.001"


def verdict_in_words(effect: Effect) -> str:
    """The verdict; with how many seeds are missing where these are too few."""
    more = f" (+{effect.more_seeds})" if effect.more_seeds else ""
    return effect.word + more


def _served_otherwise(effects: list[Effect]) -> set[str]:
    """The cells whose throughput is compared with one of other kernels: such arms, and their references."""
    arms = [effect for effect in effects if effect.service]
    return {arm.cell for arm in arms} | {arm.reference for arm in arms if arm.reference}


def as_json(report: Report, logged: pd.DataFrame | None = None) -> dict[str, Any]:
    """The report as plain data: numbers, strings, lists and None.  logged: of `frame.curves`, for the speedups."""
    plan = report.plan
    in_compute = []
    if logged is not None:
        in_compute = speedups(report.runs, logged, plan.metric, plan.better)
    told = ["cell", "pair", "seed", "run", "status", plan.metric]
    told += ["tokens", "tokens_per_second", "code"]
    runs = report.runs.reindex(columns=list(dict.fromkeys(told))).astype(object)
    return {
        "experiment": plan.name,
        "question": plan.question,
        "metric": {"name": plan.metric, "unit": frame.unit(plan.metric), "better": plan.better},
        "design": plan.design,
        "equivalence": plan.equivalence,
        "answer": report.answer,
        "mixed": report.mixed,
        "tuning": "same hyper-parameters, not tuned",
        "speedups": [asdict(speedup) for speedup in in_compute],
        "crossed": [asdict(effect) for effect in report.crossed],
        "evaluations": [asdict(row) for row in report.asked],
        "effects": [asdict(effect) | {"off": off(plan, effect)} for effect in report.effects],
        "warnings": report.warnings,
        "provenance": report.provenance,
        "runs": runs.where(runs.notna(), None).to_dict("records"),
    }


# -- what must be said first -------------------------------------------------------------------------------------------


def _warnings(plan: GridPlan, runs: pd.DataFrame, effects: list[Effect]) -> Iterator[str]:
    """Sentences for the top of the page, the gravest kind first."""
    yield from _settings(finished(runs))
    yield from _other_services(effects)
    yield from _contended(finished(runs))
    yield from _in_parts(finished(runs))
    yield from _damages(runs)
    yield from _losses(runs)
    yield from _strays(plan, finished(runs))
    yield from _absences(plan, runs)
    yield from _unpaced(runs)
    yield from _unmeasured(plan, effects)
    yield from _few_seeds(effects)
    named = [(row.cell, row.run) for row in plan.rows]
    yield from notes_on_design(plan.factors, plan.infeasible, named)
    yield from _noise(effects)


def mixtures(done: pd.DataFrame) -> Iterator[str]:
    """How finished runs differ in what they computed."""
    for column, name in MIXED.items():
        if differing := _differing(done, column):
            yield f"the runs mix {name}: {differing}; a difference between arms may be one between these"
    for cell, rows in done.groupby("cell", sort=False):
        for column in _kernel_columns(done):
            served = Counter(server(said) for said in rows[column].dropna())
            if len(served) > 1:
                place = column.removeprefix(KERNELS)
                yield f"the runs of `{cell}` mix kernels: {place} by {_counted(served)}"


def _settings(done: pd.DataFrame) -> Iterator[str]:
    """How finished runs differ in their length, or in how the same was computed."""
    settings = [str(name) for name in done if str(name).startswith("runtime/")]
    names = {"tokens": "token counts"} | {name: name for name in settings}
    for column, name in names.items():
        if column not in MIXED and (differing := _differing(done, column)):
            yield f"the runs mix {name}: {differing}; a difference between arms may be one between these"


def _differing(done: pd.DataFrame, column: str) -> str:
    """The values of a column, counted, where there are several; empty where there is one."""
    if column not in done:
        return ""
    given = done[column].astype(object)
    values = Counter(given.where(given.notna(), "").map(str))
    return _counted(values) if len(values) > 1 else ""


def _counted(values: Counter[str]) -> str:
    return ", ".join(
        f"{value or 'not recorded'} ({count} runs)" for value, count in values.items()
    )


def _kernel_columns(done: pd.DataFrame) -> list[str]:
    return [str(name) for name in done if str(name).startswith(KERNELS)]


def _other_services(effects: list[Effect]) -> Iterator[str]:
    for effect in effects:
        if effect.service:
            yield (
                f"`{effect.cell}` and `{effect.reference}` were served differently: "
                f"{in_words(effect.service)}; their tokens/s ({SERVED_OTHERWISE}) compare the kernels too; "
                "for one service run both with runtime.kernels=same"
            )


def _contended(done: pd.DataFrame) -> Iterator[str]:
    shared = done[done.contended != ""]
    if len(shared):
        yield (
            f"{len(shared)} of {len(done)} runs shared their machine ({_counted(Counter(shared.contended))}), so their "
            "tokens/s compare nothing: no ratio and no speedup in seconds is told of them; "
            "for those run with --jobs 1 where nothing else runs"
        )


def _in_parts(done: pd.DataFrame) -> Iterator[str]:
    parts = done[done.segments != ""]
    if len(parts):
        yield (
            f"{len(parts)} of {len(done)} runs went on with another number of GPUs "
            f"({_counted(Counter(parts.segments))}): from there their sums are taken in another order, "
            "and so their last digits are others"
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


def _strays(plan: GridPlan, done: pd.DataFrame) -> Iterator[str]:
    """Runs far from the other seeds of their arm."""
    if plan.metric not in done:
        return
    for stray in strays(done, plan.metric):
        low, high = stray.others
        yield (
            f"`{stray.cell}`, seed {stray.seed}: {plan.metric} {stray.value:.4f} is far from its arm's other seeds "
            f"({low:.4f} to {high:.4f}); look at its curve for a spike; it is in every number here"
        )


def _absences(plan: GridPlan, runs: pd.DataFrame) -> Iterator[str]:
    """Runs without a result."""
    states = (frame.MISSING, frame.INTERRUPTED)
    absent = Counter(status for status in runs.status if status in states)
    if absent:
        why = " (interrupted: killed, or still running)" if absent[frame.INTERRUPTED] else ""
        again = command(plan.name, sheet=plan.sheet, asked=plan.asked)
        yield f"{said(absent)} of {len(runs)} runs{why}; continue with: {again}"


def _unpaced(runs: pd.DataFrame) -> Iterator[str]:
    """Runs whose clock's lines are lost."""
    for run in runs[runs.unpaced != ""].itertuples():
        yield f"`{run.cell}`, seed {run.seed}: {run.unpaced}"


def _unmeasured(plan: GridPlan, effects: list[Effect]) -> Iterator[str]:
    """Runs that finished without a number."""
    for effect in effects:
        if lost := effect.statuses.get(UNMEASURED):
            yield (
                f"`{effect.cell}`: {lost} runs finished without a finite {plan.metric}; "
                "they are left out"
            )


def _few_seeds(effects: list[Effect]) -> Iterator[str]:
    few = [
        f"`{effect.cell}` ({effect.n})"
        for effect in effects
        if effect.n < MODERATED_FROM and effect.verdict not in (INERT, INADMISSIBLE)
    ]
    if few:
        yield (
            f"fewer than {MODERATED_FROM} finished seeds: {', '.join(few)}; no verdict, add seeds"
        )


def _noise(effects: list[Effect]) -> Iterator[str]:
    if arms := noisy_arms(effects):
        noisiest, quietest = arms
        yield (
            f"the arms' noise differs: the differences of `{noisiest.cell}` have an sd of {noisiest.spread:.2g}, "
            f"those of `{quietest.cell}` {quietest.spread:.2g}; from {PLAIN_FROM} seeds on each arm is judged "
            f"by its own noise, so add {PLAIN_FROM - noisiest.n}"
        )


# -- the page ----------------------------------------------------------------------------------------------------------


def _markdown(report: Report, logged: pd.DataFrame, pictures: list[str]) -> str:
    plan = report.plan
    arms = [effect for effect in report.effects if effect.verdict != REFERENCE]
    parts = [
        f"# {plan.name}",
        plan.question,
        "\n\n".join(f"**Mixed runs**: {sentence}." for sentence in report.mixed),
        f"**{report.answer}**",
        _summary(report, arms),
        "## Read first\n\n" + bullets(report.warnings) if report.warnings else "",
        _crossed(report),
        "## Verdicts\n\n" + markdown_table([_verdict(plan, arm) for arm in arms]),
        _best(report),
        *(f"![{name.removesuffix('.png')}]({name})" for name in pictures),
        _in_compute(report, logged),
        "## Numbers\n\n" + markdown_table(table(report.effects)),
        FOOTNOTE if _served_otherwise(report.effects) else "",
        bullets(
            [f"`{effect.cell}`: {effect.note}" for effect in report.effects if effect.note]
        ),
        _asked(report),
        "## How to read the intervals\n\n" + how_to_read(arms, plan.equivalence),
        "## How far to trust it\n\n" + bullets(report.provenance),
        "## Runs\n\n" + markdown_table(_listed(report.runs, plan.metric)),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _best(report: Report) -> str:
    """Which cells may be the best; empty where seeds are too few to say."""
    plan = report.plan
    kept = may_be_best(report.runs, plan.metric, plan.better)
    if not kept:
        return ""
    named = ", ".join(f"`{cell}`" for cell in kept)
    others = report.runs.cell.nunique() - len(kept)
    verb = "is" if others == 1 else "are"
    surely = f"; the other {others} {verb} surely not" if others else ""
    return f"Which cell may be the best, with 95 % confidence (Hsu's MCB): {named}{surely}."


def _in_compute(report: Report, logged: pd.DataFrame) -> str:
    """The section on what an arm saves or costs; empty where no curve tells."""
    by_arm: dict[str, dict[str, Speedup]] = {}
    for one in speedups(report.runs, logged, report.plan.metric, report.plan.better):
        by_arm.setdefault(one.cell, {})[one.unit] = one
    if not by_arm:
        return ""
    rows = [
        {"arm": cell} | {unit: times(told.get(unit)) for unit in (TOKENS, FLOPS, SECONDS)}
        for cell, told in by_arm.items()
    ]
    return f"## Effect in compute\n\n{IN_COMPUTE}\n\n{markdown_table(rows)}"


def times(speedup: Speedup | None) -> str:
    """A factor and its interval; one that was passed before the first evaluation is a bound."""
    if speedup is None:
        return NONE
    interval = ""
    if speedup.low is not None and speedup.high is not None:
        interval = f" [{speedup.low:.2f}, {speedup.high:.2f}]"
    bound = " (or more)" if speedup.at_least and speedup.factor > 1 else ""
    bound = " (or less)" if speedup.at_least and speedup.factor < 1 else bound
    return f"{speedup.factor:.2f} x{interval}{bound}"


def asked_rows(report: Report) -> list[dict[str, str]]:
    """A row of text for each score of each arm; the keys are the headings."""
    rows = []
    for one in report.asked:
        delta = one.delta
        within = f"{delta.low:+.4f} to {delta.high:+.4f}" if delta else NONE
        rows.append(
            {
                "score": one.name,
                "arm": one.cell,
                "mean": number(one.mean, ".4f"),
                "95 % over items": f"{one.low:.4f} to {one.high:.4f}",
                "sd over seeds": number(one.sd, ".4f"),
                "seeds": str(one.seeds),
                "items": f"{one.items:,}",
                "minus reference": number(delta.value if delta else None, "+.4f"),
                "95 % over the same items": within,
            }
        )
    return rows


def _asked(report: Report) -> str:
    """The section of what evaluations found; empty without any."""
    if not report.asked:
        return ""
    bundles: dict[str, str] = {}
    for one in report.asked:
        bundles.setdefault(one.bundle, one.name)
    digests = ", ".join(f"{name} {digest}" for digest, name in bundles.items())
    note = f"{ASKED}  Digests of what was asked: {digests}."
    return f"## Evaluations\n\n{note}\n\n{markdown_table(asked_rows(report))}"


def _crossed(report: Report) -> str:
    """The section of a design that crosses factors."""
    if not report.crossed:
        return ""
    rows = [
        {
            "effect": one.term,
            "what it says": one.sentence,
            "p (Holm)": _probability(one.p_adjusted),
            "cannot be told from": ", ".join(one.aliases) or NONE,
        }
        for one in report.crossed
    ]
    return f"## Main effects and interactions\n\n{CROSSED}\n\n{markdown_table(rows)}"


def _summary(report: Report, arms: list[Effect]) -> str:
    plan = report.plan
    references = ", ".join(f"`{name}`" for name in dict.fromkeys(arm.reference for arm in arms))
    margin = ""
    if plan.equivalence is not None:
        margin = f"  Smallest effect of interest: {plan.equivalence:g}."
    return (
        f"Metric: `{plan.metric}` in {frame.unit(plan.metric)}, {plan.better} is better.{margin}  "
        f"Design: {plan.design}, {len(arms)} arms against {references or NONE}.  "
        f"Runs: {said(Counter(report.runs.status))}."
    )


def _verdict(plan: GridPlan, arm: Effect) -> dict[str, str]:
    return {
        "arm": arm.cell,
        "what it says": arm.sentence,
        "p (Holm)": _probability(arm.p_adjusted),
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
    others = list(_other_values(plan, effect))
    if len(changed) == 1 and not others:
        return "".join(said_of.values())
    return "; ".join([*(f"{name}: {control}" for name, control in said_of.items()), *others])


def _other_values(plan: GridPlan, effect: Effect) -> Iterator[str]:
    """Of an arm with another dose, or with recipe paths of its own: what stands there without them."""
    reference = effect.reference or effect.cell
    for name, fields in plan.doses_apart(effect.cell, reference):
        yield f"{name}: {', '.join(f'{field}={value}' for field, value in fields.items())}"
    for path, value in plan.set_apart(effect.cell, reference).items():
        yield f"without {path}={value}"


def _listed(runs: pd.DataFrame, metric: str) -> list[dict[str, Any]]:
    told = runs[["cell", "pair", "seed", "run", "status", metric, "code"]]
    told = told.assign(**{metric: [number(value, ".4f") for value in told[metric]]})
    columns = [str(name) for name in told]
    rows = told.itertuples(index=False, name=None)
    return [dict(zip(columns, row, strict=True)) for row in rows]
