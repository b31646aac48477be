"""The connection to MLflow: where it lives, how it is made, and how an experiment is dressed in its UI.

Nothing here imports mlflow before it is used: that takes 1.7 s.
"""

import functools
import json
import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ablab.core.errors import UserError
from ablab.core.store.planned import GridPlan
from ablab.core.store.store import Store
from ablab.experiments.track.study_view import section, view_of

PREFIX = "ablab/"  # of our experiments' names, on a server that others use too
ARMS = "arms"  # the saved view that averages the seeds of each cell: ...?viewStateShareKey=arms
NOTE = "mlflow.note.content"  # the description of a run or an experiment
DATABASES = ("sqlite:", "postgresql", "mysql", "mssql")
QUIET = {  # defaults of ours, which the user's own environment overrides
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "CRITICAL",  # MLflow prints a traceback for each failure that we report in a line
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # background workers for evaluating language-model traces
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",  # MLflow's 7 would hold up the runner for 4 minutes when a server is gone
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "GIT_PYTHON_REFRESH": "quiet",
}
COLOURS = (  # Tableau's ten
    "#4e79a7",
    "#f28e2b",
    "#e15759",
    "#76b7b2",
    "#59a14f",
    "#edc948",
    "#b07aa1",
    "#ff9da7",
    "#9c755f",
    "#bab0ac",
)


def database(root: Path) -> Path:
    return root.absolute() / "mlflow.db"


def artifacts(root: Path) -> Path:
    return root.absolute() / "mlartifacts"


def local_uri(root: Path) -> str:
    return _sqlite(database(root))


def _sqlite(path: Path) -> str:
    return "sqlite:///" + str(path).replace("%", "%25").replace("?", "%3F")


def tracking_uri(root: Path) -> str:
    """Where MLflow is: $MLFLOW_TRACKING_URI, else the store's own database."""
    return os.environ.get("MLFLOW_TRACKING_URI") or local_uri(root)


def cure(uri: str, root: Path) -> str:
    """What to do about an MLflow that fails."""
    if uri == local_uri(root):
        return f"it is only a view: delete {database(root)} and make it anew with `ablab sync`"
    return "check MLFLOW_TRACKING_URI, or unset it to use the store's own database"


def import_mlflow() -> Any:
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    import mlflow

    return mlflow


def errors() -> tuple[type[Exception], ...]:
    """What MLflow raises when its database or server does not do its part."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    return MlflowException, SQLAlchemyError, OSError


def create_database(root: Path) -> None:
    """Make the store's database unless it exists.  It gets its name in one step: no one ever sees half a schema."""
    path = database(root)
    if path.exists():
        return
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    partial = path.with_name(f"mlflow-{os.getpid()}.partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        fresh = SqlAlchemyStore(_sqlite(partial), artifacts(root).as_uri())
        fresh.engine.dispose()
        if not path.exists():  # another process may have been quicker, and logged already
            os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def colour_of(plan: GridPlan, cell: str) -> str:
    """One colour for all seeds of a cell, so that arms can be told apart before anything is grouped."""
    cells = list(dict.fromkeys(row.cell for row in plan.rows))
    return COLOURS[cells.index(cell) % len(COLOURS)]


def experiment_tags(store: Store, name: str) -> dict[str, str]:
    """What the UI reads from an experiment: its question, its metric, and the saved view of its arms."""
    kind = {
        "mlflow.experimentKind": "custom_model_development"
    }  # else the UI asks, and opens on traces
    try:
        plan = store.read_plan(name)
    except UserError:  # a run outside any plan
        return kind
    return kind | {
        NOTE: plan.question,
        "mlflow.experiment.primaryMetric.name": plan.metric,
        f"mlflow.sharedViewState.{ARMS}": json.dumps(
            view_of(store, plan) if plan.design == "study" else _arms(plan)
        ),
    }


def _arms(plan: GridPlan) -> dict[str, object]:
    """The saved view of a grid: rows grouped by cell, best first, every seed's curve in its arm's colour."""
    columns = [f"metrics.`{plan.metric}`", "metrics.`tokens_per_second`", "tags.`ablab.status`"]
    return (
        {
            "groupBy": {
                "aggregateFunction": "average",
                "groupByKeys": [{"mode": "tag", "groupByData": "ablab.cell"}],
            },
            "selectedColumns": columns,
            "columnOrder": columns,
            "columnWidths": dict.fromkeys(
                columns, 215
            ),  # pixels: MLflow gives 88, too few for "0.8763 (average)"
            "useGroupedValuesInCharts": False,  # every seed's curve, in its arm's colour; the table has the averages
            "runsHiddenMode": "SHOW_ALL",
            "orderByKey": columns[0],
            "orderByAsc": plan.better == "lower",
        }
        | section(
            ARMS,
            _curves(
                [plan.metric, "train/loss", "tokens_per_second", "train/grad_norm", "optim/lr"]
            ),
        )
    )


def _curves(metrics: list[str]) -> list[dict[str, object]]:
    """A curve over steps for each metric, the experiment's own first."""
    line = {
        "type": "LINE",
        "xAxisKey": "step",
        "xAxisScaleType": "linear",
        "yAxisKey": "metric",
        "scaleType": "linear",
        "lineSmoothness": 0,
        "useGlobalXaxisKey": True,
    }
    return [line | {"metricKey": metric, "selectedMetricKeys": [metric]} for metric in metrics]


def _to_stderr(line: str) -> None:
    print(f"warning: {line}", file=sys.stderr, flush=True)


class MlflowView:
    """One connection, shared by the trackers of all live runs; opened when first needed."""

    def __init__(
        self, store: Store, uri: str | None = None, warn: Callable[[str], None] = _to_stderr
    ):
        self.store, self.uri, self.warn = store, uri or tracking_uri(store.root), warn
        self._experiments: dict[str, str] = {}  # our name -> MLflow's id
        self._warned: set[str] = set()

    @functools.cached_property
    def client(self) -> Any:
        """The MlflowClient.  A fresh store's database is made first: MLflow's migrations take 3 s, once."""
        mlflow = import_mlflow()
        if self.uri == local_uri(self.store.root):
            create_database(self.store.root)
        return mlflow.MlflowClient(self.uri)

    def ensure(self) -> bool:
        """Connect now rather than at the first run.  False, after one warning, when MLflow cannot be reached."""
        try:
            self.client.search_experiments(max_results=1)
        except Exception as cause:
            self.lose(cause)
            return False
        return True

    def lose(self, cause: Exception) -> None:
        """Say once that runs go on unseen."""
        self.warn_once(
            "lost",
            f"{self.describe(cause)}; training goes on, the run folders stay complete, and `ablab sync` repairs the view",
        )

    def describe(self, cause: Exception) -> str:
        """What failed, in one line; a password in the URI stays out of it."""
        text = " ".join(str(cause).split("[SQL:")[0].split("(Background on")[0].split())
        return re.sub(
            r"//[^/@\s]*@",
            "//",
            f"MLflow at {self.uri} failed ({text[:200] or type(cause).__name__})",
        )

    def warn_once(self, topic: str, line: str) -> None:
        if topic not in self._warned:
            self._warned.add(topic)
            self.warn(line)

    def experiment(self, name: str) -> str:
        """The id of the MLflow experiment that shows experiment `name`; made, revived and dressed as needed."""
        if name not in self._experiments:
            tags = experiment_tags(self.store, name)
            held = self.client.get_experiment_by_name(PREFIX + name)
            if held is None:
                where = (
                    artifacts(self.store.root).as_uri()
                    if self.uri.startswith(DATABASES)
                    else None
                )  # else the server's own
                self._experiments[name] = self.client.create_experiment(
                    PREFIX + name, where, tags
                )
            else:
                self._experiments[name] = held.experiment_id
                if held.lifecycle_stage == "deleted":
                    self.client.restore_experiment(held.experiment_id)
                for key, value in tags.items():
                    if held.tags.get(key) != value and not (
                        key == NOTE and held.tags.get(key)
                    ):  # a user may have edited it
                        self.client.set_experiment_tag(held.experiment_id, key, value)
        return self._experiments[name]

    def runs(self, experiment: str, run: str | None = None) -> list[Any]:
        """The mlflow Runs of an experiment, or those of one recipe in it; newest first."""
        found, token = [], None
        where = f"tags.`ablab.run_id` = '{run}'" if run else ""
        while token != "":
            page = self.client.search_runs(
                [self.experiment(experiment)], where, max_results=1000, page_token=token
            )
            found, token = found + list(page), page.token or ""
        return found
