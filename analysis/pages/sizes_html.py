"""The page of several experiments over sizes: one HTML file that asks no network, as html.py's."""

from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from ablab.analysis.effects import frame
from ablab.analysis.effects.effect import Effect
from ablab.analysis.effects.sizes import OverSizes
from ablab.analysis.pages.html import rounded, shell, templates
from ablab.analysis.pages.html_tables import UNITS, Cell, Column, Table, counted, signed
from ablab.analysis.pages.report import times, verdict_in_words
from ablab.analysis.pages.sizes import (
    DOUBLING,
    METHOD,
    SizesReport,
    answers,
    effects_at,
    sentences,
    slope,
)
from ablab.analysis.pages.text import NONE
from ablab.core.store.files import write_atomically


def write(report: SizesReport, folder: Path) -> Path:
    """Write report.html into `folder`."""
    path = folder / "report.html"
    write_atomically(path, shell(report.name, main(report), data(report)).encode())
    return path


def main(report: SizesReport) -> str:
    """What stands between head and scripts."""
    return (
        templates()
        .get_template("sizes.html")
        .render(
            report=report,
            unit=frame.unit(report.metric),
            sentences=sentences(report),
            speedups=_speedups(report),
            effects=_effects(report),
            answers=answers(report),
            method=METHOD,
        )
    )


def _speedups(report: SizesReport) -> Table:
    """A row an arm and unit."""
    sizes = [size.parameters for size in report.sizes]
    columns = [
        Column("arm"),
        Column("in"),
        Column(DOUBLING, "num", "what each doubling of size multiplies it by"),
        *(Column(counted(parameters), "num", "parameters") for parameters in sizes),
    ]
    rows = []
    for arm in report.arms:
        found = [arm.by_size.get(parameters) for parameters in sizes]
        places = [Cell(times(one), one.factor if one else None, "num") for one in found]
        factor = arm.trend.factor if arm.trend else None
        rows.append(
            [
                Cell(arm.cell),
                Cell(arm.unit),
                Cell(slope(arm.trend), factor, "num"),
                *places,
            ]
        )
    return Table(columns, rows)


def _effects(report: SizesReport) -> Table:
    """A row an arm."""
    heads = [Column(counted(size.parameters), "num", "parameters") for size in report.sizes]
    rows = [
        [Cell(cell), *map(_effect, effects)] for cell, effects in effects_at(report).items()
    ]
    return Table([Column("arm"), *heads], rows)


def _effect(effect: Effect | None) -> Cell:
    if effect is None or effect.delta is None:
        return Cell(verdict_in_words(effect) if effect else NONE, kind="num wrap")
    text = f"{signed(effect.delta)} ({verdict_in_words(effect)})"
    return Cell(text, effect.delta, "num wrap")


# -- what the chart is drawn from --------------------------------------------------------------------------------------


def data(report: SizesReport) -> str:
    """JSON that may stand in a <script>."""
    cells = list(dict.fromkeys(arm.cell for arm in report.arms))
    found: dict[str, Any] = {
        "metric": report.metric,
        "cells": cells,
        "references": [],
        "forest": [],
        "interactions": None,
        "curves": {},
        "sizes": [_line(arm) for arm in sorted(report.arms, key=_place)],
    }
    return msgspec.json.encode(found).decode().replace("</", "<\\/")


def _place(arm: OverSizes) -> int:
    return UNITS.index(arm.unit)


def _line(arm: OverSizes) -> dict[str, Any]:
    found = list(arm.by_size.values())
    ends = np.array([[one.low, one.factor, one.high] for one in found], float)
    low, factor, high = map(rounded, ends.T)
    return {
        "cell": arm.cell,
        "unit": arm.unit,
        "parameters": list(arm.by_size),
        "factor": factor,
        "low": low,
        "high": high,
        "told": [times(one) for one in found],
    }
