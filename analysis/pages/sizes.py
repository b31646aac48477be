"""The same arms in several experiments, one a size: what becomes of an effect as models grow.

    ablab report A B C    write_markdown():  OUT/report.md and OUT/sizes.png; OUT/report.html is sizes_html.py's
                          table():           the same numbers as rows of text, for the terminal
                          as_json():         the same as plain data

Each experiment keeps its own verdicts; what stands here is the difference and the speedup of each arm at each size, and
how the speedup changes when the size doubles.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from ablab.analysis.effects import frame
from ablab.analysis.effects.comparison import finished
from ablab.analysis.effects.effect import REFERENCE, Effect
from ablab.analysis.effects.sizes import AtSize, OverSizes, at_size, over_sizes
from ablab.analysis.effects.speedup import TOKENS, Trend
from ablab.analysis.pages import report as reports
from ablab.analysis.pages.html_tables import counted
from ablab.analysis.pages.report import Report, mixtures, times
from ablab.analysis.pages.text import NONE, bullets, markdown_table, number
from ablab.analysis.pictures.sizes import draw_sizes
from ablab.core.errors import UserError
from ablab.core.store.files import write_atomically
from ablab.core.store.store import Store

DOUBLING = "a doubling: x"  # the head of the column of trends
METHOD = """\
The speedup is how many times less an arm needs than its reference for the worse one's final loss: above 1 the arm is
cheaper, below it dearer.  Its trend is the slope of log speedup over log2 size, least squares over the means of the
sizes, with a 95 % interval from the seeds of each (Welch and Satterthwaite); each interval stands alone.  Size is the
number of parameters of the reference.  Two sizes tell a slope and not whether it stays; a size that was trained for
fewer tokens a parameter differs in that too."""


@dataclass(frozen=True)
class SizesReport:
    """Several experiments, the smallest first, and what their common arms say."""

    reports: Sequence[Report]
    sizes: Sequence[AtSize]  # beside the reports
    arms: Sequence[OverSizes]
    warnings: Sequence[str]

    @property
    def metric(self) -> str:
        return self.reports[0].plan.metric

    @property
    def name(self) -> str:
        return ", ".join(size.experiment for size in self.sizes)

    @property
    def title(self) -> str:
        smallest, *_, largest = (counted(size.parameters) for size in self.sizes)
        return f"What becomes of the effects from {smallest} to {largest} parameters?"

    @property
    def answer(self) -> str:
        """One sentence about the arms whose trend is told apart, in tokens."""
        told = [arm for arm in self.arms if arm.unit == TOKENS and arm.trend]
        apart = [arm for arm in told if arm.told_apart]
        if not told:
            return "No arm has a speedup at two sizes: its curves need two evaluations or more at each."
        if not apart:
            return "No speedup in tokens is told apart from one that is the same at every size."
        said = "; ".join(f"`{arm.cell}`: {arm.direction}" for arm in apart)
        others = len(told) - len(apart)
        rest = (
            f"; the trends of {others} other arms are not told apart from none"
            if others
            else ""
        )
        return f"{said}{rest}."


def read(store: Store, experiments: Sequence[str], mixed: bool = False) -> SizesReport:
    """Measure several experiments.

    mixed: also where their runs differ in code, precision or kernels.  UserError: they do, and it is not asked for;
    one has no finished run; they are judged by different metrics; two are of one size.
    """
    found: list[tuple[AtSize, Report]] = []
    for name in experiments:
        report = reports.read(store, name, mixed)
        plan = report.plan
        logged = frame.curves(store, name)
        size = at_size(store, name, report.runs, logged, plan.metric, plan.better)
        found.append((size, report))
    _refuse_other_metrics([report for _, report in found])
    arms = over_sizes([size for size, _ in found])
    found.sort(key=lambda pair: pair[0].parameters)
    every = finished(pd.concat([report.runs for _, report in found], ignore_index=True))
    between = list(mixtures(every))
    if between and not mixed:
        raise UserError(
            f"{', '.join(experiments)}: {between[0]}; to read them together all the same add --mixed"
        )
    own = [
        f"{size.experiment}: {warning}" for size, report in found for warning in report.warnings
    ]
    return SizesReport(
        reports=[report for _, report in found],
        sizes=[size for size, _ in found],
        arms=arms,
        warnings=[*between, *_at_one_size(arms, len(found)), *own],
    )


def _refuse_other_metrics(found: Sequence[Report]) -> None:
    first, *others = (report.plan for report in found)
    for plan in others:
        if (plan.metric, plan.better) != (first.metric, first.better):
            raise UserError(
                f"{first.name!r} is judged by {first.metric} ({first.better} is better) and {plan.name!r} by "
                f"{plan.metric} ({plan.better}); sizes can be compared by one metric"
            )


def _at_one_size(arms: Sequence[OverSizes], sizes: int) -> Iterator[str]:
    in_tokens = [arm for arm in arms if arm.unit == TOKENS]
    alone = [f"`{arm.cell}`" for arm in in_tokens if len(arm.by_size) < sizes]
    if alone:
        yield f"not at every size: {', '.join(alone)}"


def sentence(arm: OverSizes) -> str:
    """What an arm's speedup is at each size, and what its trend says."""
    places = ", ".join(
        f"{one.factor:.2f} at {counted(parameters)}" for parameters, one in arm.by_size.items()
    )
    trend = f"; each doubling of size multiplies it by {slope(arm.trend)}" if arm.trend else ""
    return f"`{arm.cell}`: speedup in {arm.unit} {places}{trend}: {arm.direction}."


def slope(trend: Trend | None) -> str:
    if trend is None:
        return NONE
    if trend.low is None or trend.high is None:
        return f"{trend.factor:.2f}"
    return f"{trend.factor:.2f} [{trend.low:.2f}, {trend.high:.2f}]"


def sentences(report: SizesReport) -> list[str]:
    return [sentence(arm) for arm in report.arms if arm.unit == TOKENS]


def answers(report: SizesReport) -> list[str]:
    """What each experiment says by itself."""
    return [
        f"`{size.experiment}`: {counted(size.parameters)} parameters, {_tokens(one)}: {one.answer}"
        for size, one in zip(report.sizes, report.reports, strict=True)
    ]


def _tokens(report: Report) -> str:
    """What its finished runs were trained for."""
    trained = sorted(set(finished(report.runs).tokens))
    least, most = counted(trained[0]), counted(trained[-1])
    return f"{least} tokens" if least == most else f"{least} to {most} tokens"


def effects_at(report: SizesReport) -> dict[str, list[Effect | None]]:
    """Arm -> its effect at each size, None where it was not tried."""
    found: dict[str, list[Effect | None]] = {}
    for i, one in enumerate(report.reports):
        for effect in one.effects:
            if effect.verdict != REFERENCE:
                places = found.setdefault(effect.cell, [None] * len(report.reports))
                places[i] = effect
    return found


# -- as text -----------------------------------------------------------------------------------------------------------


def table(report: SizesReport) -> list[dict[str, str]]:
    """A row an arm and unit."""
    return [
        {"arm": arm.cell, "in": arm.unit, DOUBLING: slope(arm.trend)}
        | {
            counted(size.parameters): times(arm.by_size.get(size.parameters))
            for size in report.sizes
        }
        for arm in report.arms
    ]


def differences(report: SizesReport) -> list[dict[str, str]]:
    """A row an arm: its delta and verdict at each size."""
    heads = [counted(size.parameters) for size in report.sizes]
    return [
        {"arm": cell} | dict(zip(heads, map(_difference, effects), strict=True))
        for cell, effects in effects_at(report).items()
    ]


def _difference(effect: Effect | None) -> str:
    if effect is None:
        return NONE
    return f"{number(effect.delta, '+.4f')} ({reports.verdict_in_words(effect)})"


def write_markdown(report: SizesReport, folder: Path) -> Path:
    """Write report.md and its picture into `folder`; the path of report.md."""
    picture = ""
    if any(arm.trend for arm in report.arms):
        picture = (
            f"![speedups over sizes]({draw_sizes(report.arms, folder / 'sizes.png').name})"
        )
    unit = frame.unit(report.metric)
    parts = [
        f"# {report.title}",
        f"**{report.answer}**",
        bullets(answers(report)),
        "## Read first\n\n" + bullets(report.warnings) if report.warnings else "",
        "## Effect in compute over sizes\n\n" + bullets(sentences(report)),
        picture,
        markdown_table(table(report)) if report.arms else "",
        f"## Differences in {unit}\n\n" + markdown_table(differences(report)),
        f"## How to read this\n\n{METHOD}",
    ]
    page = "\n\n".join(part for part in parts if part) + "\n"
    write_atomically(folder / "report.md", page.encode())
    return folder / "report.md"


def as_json(report: SizesReport) -> dict[str, Any]:
    """The report as plain data: numbers, strings, lists and None."""
    return {
        "experiments": [
            {"name": size.experiment, "parameters": size.parameters} for size in report.sizes
        ],
        "metric": report.metric,
        "answer": report.answer,
        "arms": [
            {
                "cell": arm.cell,
                "reference": arm.reference,
                "unit": arm.unit,
                "sizes": [
                    {"parameters": parameters} | asdict(one)
                    for parameters, one in arm.by_size.items()
                ],
                "trend": asdict(arm.trend) if arm.trend else None,
                "sentence": sentence(arm),
            }
            for arm in report.arms
        ],
        "warnings": list(report.warnings),
    }
