"""How an experiment is dressed in the MLflow UI: columns, order and charts that answer its question at a glance.

A saved view is what the MLflow UI, 3.17, reads from the tag mlflow.sharedViewState.KEY.
"""

import json
from collections.abc import Sequence
from typing import Any

from ablab.core.store import study_record
from ablab.core.store.planned import GridPlan
from ablab.core.store.store import Store

View = dict[str, Any]
Chart = dict[str, Any]

# Pixels of a column.  MLflow gives 88, too few for "0.8763 (average)".
GRID_WIDTH, STUDY_WIDTH = 215, 130


def grid_view(plan: GridPlan) -> View:
    """Of a grid: rows grouped by cell, best first, every seed's curve in its arm's colour."""
    columns = [f"metrics.`{plan.metric}`", "metrics.`tokens_per_second`", "tags.`ablab.status`"]
    by_cell = {
        "aggregateFunction": "average",
        "groupByKeys": [{"mode": "tag", "groupByData": "ablab.cell"}],
    }
    curves = ["train/loss", "tokens_per_second", "train/grad_norm", "optim/lr"]
    charts = [_curve(plan.metric), _curve(plan.metric, over="tokens")]
    charts += [_curve("train/loss", over="tokens")]
    charts += [_curve(metric) for metric in curves]
    return _rows(plan, columns, GRID_WIDTH, by_cell) | _section("arms", charts)


def study_view(store: Store, plan: GridPlan) -> View:
    """Of NAME@study: a line a trial, and the metric over what was searched."""
    paths = _paths(store, plan)
    columns = [
        f"metrics.`{plan.metric}`",
        *(f"params.`{path}`" for path in paths),
        "tags.`ablab.cell`",
        "tags.`ablab.trial`",
        "tags.`ablab.trial_state`",
    ]
    charts = _searched(paths, plan.metric)
    return _rows(plan, columns, STUDY_WIDTH, None) | _section("study", charts)


def _paths(store: Store, plan: GridPlan) -> list[str]:
    """The searched paths that a run has as a parameter; optim.lr while the study has left no record."""
    path = study_record.study_path(store, plan.name.removesuffix("@study"))
    try:
        space = list(json.loads(path.read_bytes())["space"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):  # none, or damaged
        space = []
    return space or [study_record.LR]


# -- rows --------------------------------------------------------------------------------------------------------------
def _rows(plan: GridPlan, columns: Sequence[str], width: int, grouped: View | None) -> View:
    """The table, ordered by its first column: the metric."""
    return {
        "groupBy": grouped,
        "selectedColumns": columns,
        "columnOrder": columns,
        "columnWidths": dict.fromkeys(columns, width),
        # Every seed's curve, in its arm's colour; the table has the averages.
        "useGroupedValuesInCharts": False,
        "runsHiddenMode": "SHOW_ALL",
        "orderByKey": columns[0],
        "orderByAsc": plan.better == "lower",
    }


# -- charts ------------------------------------------------------------------------------------------------------------
def _section(name: str, charts: Sequence[Chart]) -> View:
    """The part of a saved view that draws `charts`, in one section of that name, in this order."""
    shown = {
        "metricSectionId": name,
        "runsCountToCompare": 100,
        "deleted": False,
        "isGenerated": False,
    }
    section = {
        "uuid": name,
        "name": name.capitalize(),
        "display": True,
        "isReordered": False,
        "isGenerated": False,
    }
    return {
        "compareRunCharts": [
            shown | chart | {"uuid": f"{name}-{i}"} for i, chart in enumerate(charts)
        ],
        "compareRunSections": [section],
        "isAccordionReordered": True,
    }


def _curve(metric: str, over: str = "") -> Chart:
    """A metric over steps, or over another metric."""
    axis = {"xAxisKey": "step", "useGlobalXaxisKey": True}
    if over:
        axis = {
            "xAxisKey": "metric",
            "selectedXAxisMetricKey": over,
            "useGlobalXaxisKey": False,
        }
    return axis | {
        "type": "LINE",
        "xAxisScaleType": "linear",
        "yAxisKey": "metric",
        "scaleType": "linear",
        "lineSmoothness": 0,
        "metricKey": metric,
        "selectedMetricKeys": [metric],
    }


def _searched(paths: Sequence[str], metric: str) -> list[Chart]:
    """The metric over what was searched: all paths at once, then each alone, then the first two."""
    value = {"key": metric, "type": "METRIC"}
    params = [{"key": path, "type": "PARAM"} for path in paths]
    charts: list[Chart] = [
        {"type": "PARALLEL", "selectedParams": [*reversed(paths)], "selectedMetrics": [metric]}
    ]
    for param in params:
        charts.append({"type": "SCATTER", "xaxis": param, "yaxis": value})
    if len(params) > 1:
        first, second, *_ = params
        charts.append({"type": "CONTOUR", "xaxis": first, "yaxis": second, "zaxis": value})
    return charts
