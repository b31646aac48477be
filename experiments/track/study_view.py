"""How a study is dressed in the MLflow UI: a view that answers "which value at which width" without further work."""

import json
from typing import Any

from ablab.core.store import study_record
from ablab.core.store.planned import GridPlan
from ablab.core.store.store import Store

SECTION = "study"


def view_of(store: Store, plan: GridPlan) -> dict[str, Any]:
    """The saved view of NAME@study: parallel coordinates, the metric over each searched path, a contour of the first two; a line a trial.

    What the MLflow UI, 3.17, reads from the tag mlflow.sharedViewState.KEY.
    """
    paths = _paths(store, plan)
    columns = [
        f"metrics.`{plan.metric}`",
        *(f"params.`{path}`" for path in paths),
        "tags.`ablab.cell`",
        "tags.`ablab.trial`",
        "tags.`ablab.trial_state`",
    ]
    return {
        "selectedColumns": columns,
        "columnOrder": columns,
        "columnWidths": dict.fromkeys(columns, 130),  # pixels
        "orderByKey": columns[0],
        "orderByAsc": plan.better == "lower",
        "groupBy": None,
        "useGroupedValuesInCharts": False,
        "runsHiddenMode": "SHOW_ALL",
    } | section(SECTION, _charts(paths, plan.metric))


def section(name: str, charts: list[dict[str, Any]]) -> dict[str, Any]:
    """The part of a saved view that draws `charts`, in one section of that name, in this order."""
    card = {
        "metricSectionId": name,
        "runsCountToCompare": 100,
        "deleted": False,
        "isGenerated": False,
    }
    return {
        "compareRunCharts": [
            card | chart | {"uuid": f"{name}-{i}"} for i, chart in enumerate(charts)
        ],
        "compareRunSections": [
            {
                "uuid": name,
                "name": name.capitalize(),
                "display": True,
                "isReordered": False,
                "isGenerated": False,
            }
        ],
        "isAccordionReordered": True,
    }


def _paths(store: Store, plan: GridPlan) -> list[str]:
    """The searched paths that a run has as a parameter; optim.lr while the study has left no record."""
    try:
        space = list(
            json.loads(
                study_record.study_path(store, plan.name.removesuffix("@study")).read_text()
            )["space"]
        )
    except (OSError, ValueError, KeyError):
        space = []
    return space or [study_record.LR]


def _charts(paths: list[str], metric: str) -> list[dict[str, Any]]:
    param = lambda path: {"key": path, "type": "PARAM"}  # noqa: E731
    value = {"key": metric, "type": "METRIC"}
    charts = [{"type": "PARALLEL", "selectedParams": paths[::-1], "selectedMetrics": [metric]}]
    charts += [{"type": "SCATTER", "xaxis": param(path), "yaxis": value} for path in paths]
    return charts + (
        [
            {
                "type": "CONTOUR",
                "xaxis": param(paths[0]),
                "yaxis": param(paths[1]),
                "zaxis": value,
            }
        ]
        if len(paths) > 1
        else []
    )
