"""The frames of an experiment from an MLflow server: what the view of a store (`ablab sync`) says of its runs.

Tags say who a run is, metrics what it logged.  What only a run folder holds (kernels, settings, code) is not here.
"""

import math
from collections.abc import Iterator
from functools import cache
from typing import TYPE_CHECKING, Any

import pandas as pd

from ablab.core.errors import UserError, without_password
from ablab.core.store.result import FINISHED

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Experiment, Run

PREFIX = "ablab/"  # of our experiments' names
PAGE = 1000  # runs asked for at a time
SUMMARY = "summary"  # kind of the run that holds the report; it is no run of the experiment


def experiments_of(uri: str) -> list[str]:
    found = _client(uri).search_experiments(max_results=PAGE)
    return sorted(one.name.removeprefix(PREFIX) for one in found if one.name.startswith(PREFIX))


def settings_of(uri: str, experiment: str) -> tuple[str, str, float | None]:
    """The metric, which way is better, and the smallest difference of interest, as the experiment is tagged."""
    tags = _experiment(uri, experiment).tags
    margin = tags.get("ablab.equivalence")
    return (
        tags.get("mlflow.experiment.primaryMetric.name", "val/loss"),
        tags.get("ablab.better", "lower"),
        float(margin) if margin else None,
    )


def runs_of(uri: str, experiment: str) -> pd.DataFrame:
    """As `frame.load`, as far as MLflow knows."""
    rows = []
    for run in _runs(uri, experiment):
        metrics = dict(run.data.metrics)
        rows.append(
            _who(run)
            | {
                "seed": int(run.data.tags.get("ablab.seed", 0)),
                "note": run.data.tags.get("ablab.note", ""),
                "step": int(run.data.tags.get("ablab.step", 0)),
                "tokens": metrics.pop("tokens", 0.0),
                "seconds": _seconds(run),
                "tokens_per_second": metrics.pop("tokens_per_second", math.nan),
                "error": "",
                "code": "",
                "hole": "",
            }
            | metrics
        )
    if not rows:
        raise UserError(f"experiment {experiment!r} has no runs at {without_password(uri)}")
    return pd.DataFrame(rows).sort_values(["cell", "pair"], kind="stable", ignore_index=True)


def curves_of(uri: str, experiment: str) -> pd.DataFrame:
    """As `frame.curves`; seconds are those since the run's start, and FLOPs are not known."""
    tables = []
    client = _client(uri)
    for run in _runs(uri, experiment):
        steps: dict[int, dict[str, Any]] = {}
        for key in run.data.metrics:
            for point in client.get_metric_history(run.info.run_id, key):
                line = steps.setdefault(point.step, {"step": point.step})
                # Of two values at one step the first is the curve's, the second a final one that follows it.
                line.setdefault(key, point.value)
                line.setdefault("seconds", (point.timestamp - run.info.start_time) / 1000)
        lines = [steps[step] for step in sorted(steps)]
        tables.append(pd.DataFrame([_who(run) | line for line in lines]))
    logged = pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()
    if logged.empty:
        raise UserError(f"experiment {experiment!r} has no curves at {without_password(uri)}")
    return logged.assign(flops=math.nan)


def _who(run: "Run") -> dict[str, Any]:
    tags = run.data.tags
    return {
        "cell": tags["ablab.cell"],
        "reference": tags.get("ablab.reference"),
        "pair": int(tags.get("ablab.pair", 0)),
        "run": tags["ablab.run_id"],
        "status": tags.get("ablab.status", FINISHED),
    }


def _seconds(run: "Run") -> float:
    if run.info.end_time is None:
        return math.nan
    return (run.info.end_time - run.info.start_time) / 1000


def _runs(uri: str, experiment: str) -> "Iterator[Run]":
    client = _client(uri)
    wanted = [_experiment(uri, experiment).experiment_id]
    page = client.search_runs(wanted, max_results=PAGE)
    while True:
        for run in page:
            if "ablab.cell" in run.data.tags and run.data.tags.get("ablab.kind") != SUMMARY:
                yield run
        if not page.token:
            return
        page = client.search_runs(wanted, max_results=PAGE, page_token=page.token)


def _experiment(uri: str, name: str) -> "Experiment":
    found = _client(uri).get_experiment_by_name(PREFIX + name)
    if found is None:
        known = ", ".join(experiments_of(uri)) or "none"
        raise UserError(f"no experiment {name!r} at {without_password(uri)}; it holds: {known}")
    return found


@cache
def _client(uri: str) -> "MlflowClient":
    from mlflow import MlflowClient

    return MlflowClient(uri)
