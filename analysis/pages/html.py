"""An experiment's page: one HTML file that holds everything, from its answer to its run ids, and asks no network.

    render()   the page as text
    write()    OUT/report.html

What a reader sees first is plain HTML: the answer, the verdicts.  Charts are drawn by plotly.js once that is there; it
travels in the page, gzipped (4.8 MB -> 1.9 MB), and is unpacked after the first paint.
"""

import base64
import gzip
import re
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import pandas as pd

from ablab.analysis.effects import frame
from ablab.analysis.effects.effect import INCONCLUSIVE, INERT, REFERENCE, TOO_FEW
from ablab.analysis.effects.factorial import FactorEffect
from ablab.analysis.effects.frame import stretches
from ablab.analysis.pages.html_tables import (
    Table,
    asked_table,
    costs,
    factor_table,
    failures,
    provenance,
    run_list,
    signed,
    speedup_table,
    verdicts,
)
from ablab.analysis.pages.method import how_to_read
from ablab.analysis.pages.report import ASKED, Report
from ablab.analysis.pages.report import read as read_report
from ablab.analysis.pictures.bands import bands, differences, metrics_of
from ablab.core.store.files import write_atomically
from ablab.core.store.result import FINISHED
from ablab.core.store.store import Store

if TYPE_CHECKING:
    from jinja2 import Environment

WEB = files("ablab.analysis.pages") / "web"
PLOTLY = "plotly.min.js"
CURVES_OF_LOST_RUNS = 60  # beyond, they are counted and not drawn


@dataclass(frozen=True)
class Look:
    """A grid that is still running, as `ablab watch` has just seen it."""

    at: str  # the time of day
    progress: str  # 14 of 36 runs finished, 2 training
    left: str  # about 4 min
    share: float  # of all training that is done, in [0, 1]
    training: Table  # a row a run that trains now


@dataclass(frozen=True)
class Page:
    """What a page shows: the report, the curves behind it, and where it all comes from."""

    report: Report
    logged: pd.DataFrame  # of frame.curves
    sources: Table  # of html_tables.provenance
    look: Look | None = None

    @property
    def statuses(self) -> tuple[str, ...]:
        """Of the runs whose curves count: while a grid runs, those that are on their way too."""
        return (FINISHED, frame.INTERRUPTED) if self.look else (FINISHED,)


def write(store: Store, report: Report, logged: pd.DataFrame, folder: Path) -> Path:
    """Write report.html into `folder`."""
    path = folder / "report.html"
    page = Page(report, logged, provenance(store, report.runs))
    write_atomically(path, render(page).encode())
    return path


def read(store: Store, experiment: str, mixed: bool = False) -> Page:
    """UserError when no run has finished yet."""
    report = read_report(store, experiment, mixed)
    logged = frame.curves(store, experiment)
    return Page(report, logged, provenance(store, report.runs))


def render(page: Page) -> str:
    """The whole page, plotly.js in it."""
    return shell(page.report.plan.name, main(page), data(page))


def shell(title: str, main: str, data: str, plotly: str = "") -> str:
    """The page around what `main` and `data` made.  plotly: an address that serves plotly.js to a page that lives."""
    return (
        templates()
        .get_template("page.html")
        .render(
            title=title,
            css=_asset("page.css"),
            script=_asset("page.js"),
            main=main,
            data=data,
            plotly=plotly,
            plotly_packed="" if plotly else _packed_plotly(),
            live=bool(plotly),
        )
    )


def main(page: Page) -> str:
    """What stands between head and scripts."""
    report = page.report
    plan = report.plan
    arms = [effect for effect in report.effects if effect.verdict != REFERENCE]
    return (
        templates()
        .get_template("main.html")
        .render(
            plan=plan,
            unit=frame.unit(plan.metric),
            answer=report.answer,
            warnings=[*report.mixed, *report.warnings],
            look=page.look,
            facts=_facts(report),
            verdicts=verdicts(report),
            speedups=speedup_table(report, page.logged),
            factors=factor_table(report),
            asked=asked_table(report),
            asked_hint=ASKED,
            costs=costs(report, page.logged),
            failures=failures(report, live=bool(page.look)),
            trust=report.provenance,
            sources=page.sources,
            runs=run_list(report),
            method=how_to_read(arms, plan.equivalence),
            has_curves=len(page.logged) > 0,
            has_forest=any(arm.delta is not None for arm in arms),
        )
    )


def _facts(report: Report) -> list[tuple[str, str]]:
    """A word and a number each, below the answer."""
    runs = report.runs
    done = int((runs.status == FINISHED).sum()) if len(runs) else 0
    arms = sum(effect.verdict != REFERENCE for effect in report.effects)
    seeds = sorted(effect.n for effect in report.effects if effect.verdict != INERT)
    each = f"{seeds[0]}" if seeds and seeds[0] == seeds[-1] else ""
    if seeds and not each:
        each = f"{seeds[0]} to {seeds[-1]}"
    plan = report.plan
    return [
        ("metric", f"{plan.metric}, {plan.better} is better"),
        ("design", plan.design.replace("_", " ")),
        ("arms", f"{arms}"),
        ("seeds an arm", each or "0"),
        ("runs", f"{done} of {len(runs)} finished"),
    ]


# -- what the charts are drawn from ------------------------------------------------------------------------------------


def data(page: Page) -> str:
    """JSON that may stand in a <script>: curves, the forest, colours of arms."""
    report = page.report
    logged = page.logged
    plan = report.plan
    found: dict[str, Any] = {
        "metric": plan.metric,
        "unit": frame.unit(plan.metric),
        "better": plan.better,
        "cells": list(dict.fromkeys(row.cell for row in plan.rows)),
        "references": sorted({row.reference for row in plan.rows if row.reference}),
        "forest": _forest(report),
        "interactions": _interactions(report),
        "curves": {},
        "units": {},
        "differences": [],
        "lost": [],
    }
    if len(logged):
        metrics = metrics_of(logged, plan.metric)
        shown = bands(logged, metrics, page.statuses)
        found["curves"] = {
            metric: _lines(rows) for metric, rows in shown.groupby("metric", sort=False)
        }
        found["units"] = {metric: frame.unit(metric) for metric in found["curves"]}
        if plan.metric in found["curves"]:
            found["differences"] = _lines(differences(logged, plan.metric, page.statuses))
            found["lost"] = _lost(logged, plan.metric, page.statuses)
    encoded = msgspec.json.encode(found).decode()
    return encoded.replace("</", "<\\/")


def _forest(report: Report) -> list[dict[str, Any]]:
    return [
        {
            "cell": effect.cell,
            "verdict": effect.word,
            "delta": effect.delta,
            "low": effect.low,
            "high": effect.high,
            "says": effect.sentence,
        }
        for effect in report.effects
        if effect.verdict != REFERENCE and effect.delta is not None
    ]


def _interactions(report: Report) -> dict[str, Any] | None:
    """A square of what pairs of factors do together; None for a design that tells no pair."""
    pairs = {one.factors: one for one in report.crossed if len(one.factors) == 2}
    names = list(dict.fromkeys(name for factors in pairs for name in factors))
    if not names:
        return None
    z: list[list[float | None]] = []
    text: list[list[str]] = []
    for a in names:
        cells = [pairs.get((a, b)) or pairs.get((b, a)) for b in names]
        z.append([one.delta if one else None for one in cells])
        text.append([_told(one) for one in cells])
    return {"names": names, "z": z, "text": text}


def _told(pair: FactorEffect | None) -> str:
    if pair is None or pair.delta is None:
        return ""
    mark = "" if pair.word in (INCONCLUSIVE, TOO_FEW) else " *"
    return signed(pair.delta) + mark


def _lines(rows: pd.DataFrame) -> list[dict[str, Any]]:
    """A line a cell: tokens, seconds, mean and sd, a list each; NaN becomes null.

    flops: of one token.  runs: a number where it is the same all along.
    """
    # All cells at once: rounding a line of ten points takes as long as one of a thousand.
    told = {
        "tokens": rounded(rows.tokens.to_numpy(float)),
        "seconds": rounded(rows.seconds.to_numpy(float), 4),
        "mean": rounded(rows["mean"].to_numpy(float)),
        "sd": rounded(rows.sd.to_numpy(float), 3),
    }
    token_flops = rounded((rows.flops / rows.tokens).to_numpy(float))
    counts = rows.runs.tolist()
    lines = []
    for cell, line in stretches(rows.cell):
        count = counts[line]
        lines.append(
            {
                "cell": cell,
                "tokens": told["tokens"][line],
                "token_flops": token_flops[line][-1],
                "seconds": told["seconds"][line],
                "mean": told["mean"][line],
                "sd": told["sd"][line],
                "runs": count if len(set(count)) > 1 else count[0],
            }
        )
    return lines


def _lost(logged: pd.DataFrame, metric: str, statuses: tuple[str, ...]) -> list[dict[str, Any]]:
    """The runs that did not finish, a line each."""
    rows = logged[~logged.status.isin(statuses) & logged[metric].notna()]
    lines = []
    for _, run in rows.groupby("run", sort=False):
        first = run.iloc[0]
        lines.append(
            {
                "cell": first.cell,
                "status": first.status.replace("_", " "),
                "tokens": rounded(run.tokens.to_numpy(float)),
                "token_flops": rounded((run.flops / run.tokens).to_numpy(float)[-1:])[0],
                "seconds": rounded(run.seconds.to_numpy(float), 4),
                "mean": rounded(run[metric].to_numpy(float)),
            }
        )
    return lines[:CURVES_OF_LOST_RUNS]


def rounded(values: np.ndarray, digits: int = 6) -> list[float | None]:
    """To so many significant digits: what a chart can show, in a third of the bytes."""
    known = np.isfinite(values) & (values != 0)
    exponent = np.floor(np.log10(np.abs(np.where(known, values, 1))))
    places = digits - 1 - exponent
    # Divided by a power of ten that is a whole number, a value keeps the shortest form of its decimal.
    up = 10.0 ** np.maximum(places, 0)
    down = 10.0 ** np.maximum(-places, 0)
    short = np.round(values / down * up) / up * down
    listed = np.where(np.isfinite(values), short, np.nan).tolist()
    return [None if value != value else value for value in listed]


# -- its parts ---------------------------------------------------------------------------------------------------------


@cache
def templates() -> "Environment":
    from jinja2 import Environment, FunctionLoader, StrictUndefined

    found = Environment(
        loader=FunctionLoader(lambda name: _asset(f"{name}.j2")),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found.filters["code"] = _with_code
    found.filters["breakable"] = _breakable
    return found


def _with_code(text: str) -> str:
    """What stands in backticks as code, all else escaped."""
    from markupsafe import Markup, escape

    parts = str(escape(text)).split("`")
    if len(parts) % 2 == 0:  # a backtick without its twin
        return escape(text)
    marked = [f"<code>{part}</code>" if i % 2 else part for i, part in enumerate(parts)]
    return Markup("".join(marked))  # noqa: S704 (its parts are escaped above)


def _breakable(text: str) -> str:
    """A narrow column breaks a name behind underscores, dots and commas and before a bracket, not in numbers."""
    from markupsafe import Markup, escape

    places = r"((?<=[A-Za-z])[_.](?=\w)| (?=\()|, )"
    return Markup(re.sub(places, r"\1<wbr>", str(escape(text))))  # noqa: S704 (escaped)


@cache
def _asset(name: str) -> str:
    return (WEB / name).read_text("utf-8")


@cache
def plotly_js() -> bytes:
    """plotly.js as the Python package brings it."""
    return (files("plotly") / "package_data" / PLOTLY).read_bytes()


@cache
def _packed_plotly() -> str:
    """Gzipped, in base64; the same bytes every time."""
    return base64.b64encode(gzip.compress(plotly_js(), 6, mtime=0)).decode()
