"""The connection to MLflow, and how an experiment is found, made and dressed there."""

import functools
import json
import sqlite3
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING

from ablab.core.errors import UserError, without_password
from ablab.core.store.planned import GridPlan
from ablab.core.store.store import Store
from ablab.experiments.track.mlflow_home import (
    DATABASES,
    artifacts,
    check_schema,
    create_database,
    follow_the_store,
    import_mlflow,
    local_uri,
    open_database_once,
    tracking_uri,
)
from ablab.experiments.track.saved_views import grid_view, study_view

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Experiment, Run

PREFIX = "ablab/"  # of our experiments' names, on a server that others use too
ARMS = "arms"  # the key of the saved view of an experiment: ...?viewStateShareKey=arms
NOTE = "mlflow.note.content"  # the description of a run or an experiment
KIND = "ablab.kind"
SUMMARY = "summary"  # kind of the run that holds an experiment's report
PLANNED = "ablab.planned"  # "no": the experiment no longer asks for this run
PARTS = {  # what ends the name of an experiment that a study has made -> what it shows
    "study": "Here: the trials of its study, every point that was tried.",
    "tuned": "Here: each arm at its own best setting, on seeds that the search has not seen.",
}
SHOWN = 240  # characters of what went wrong
PAGE = 1000  # runs asked for at a time
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


def colour_of(plan: GridPlan, cell: str) -> str:
    """One colour for all seeds of a cell, so that arms can be told apart before anything is grouped."""
    cells = list(dict.fromkeys(row.cell for row in plan.all_rows))
    return COLOURS[cells.index(cell) % len(COLOURS)]


def experiment_tags(store: Store, name: str) -> dict[str, str]:
    """What the UI reads from an experiment: its question, its metric, and the saved view of its arms."""
    # Without a kind the UI asks, and opens on traces.
    kind = {"mlflow.experimentKind": "custom_model_development"}
    try:
        plan = store.read_plan(name)
    except UserError:  # a run outside any plan
        return kind
    view = study_view(store, plan) if plan.design == "study" else grid_view(plan)
    margin = {} if plan.equivalence is None else {"ablab.equivalence": f"{plan.equivalence:g}"}
    return (
        kind
        | margin
        | {
            "ablab.better": plan.better,
            NOTE: description_of(plan),
            "mlflow.experiment.primaryMetric.name": plan.metric,
            f"mlflow.sharedViewState.{ARMS}": json.dumps(view),
        }
    )


def description_of(plan: GridPlan) -> str:
    """The question, and what this experiment is to it where a study has made three of one."""
    _, _, part = plan.name.rpartition("@")
    return " ".join(said for said in (plan.question, PARTS.get(part, "")) if said)


def _to_stderr(line: str) -> None:
    print(f"warning: {line}", file=sys.stderr, flush=True)


class MlflowView:
    """One connection, shared by the trackers of all live runs; opened when first needed."""

    def __init__(
        self, store: Store, uri: str | None = None, warn: Callable[[str], None] = _to_stderr
    ):
        self.store = store
        self.uri = uri or tracking_uri(store.root)
        self.warn = warn
        self.lost = False  # given up: nothing more is sent, `ablab sync` does it later
        self._experiments: dict[str, str] = {}  # our name -> MLflow's id
        self._warned: set[str] = set()

    @functools.cached_property
    def client(self) -> "MlflowClient":
        """A fresh store's database is made first: MLflow's migrations take 3 s, once."""
        mlflow = import_mlflow()
        if self.uri.startswith(DATABASES):
            open_database_once()
            if self.uri != local_uri(self.store.root):
                check_schema(self.uri)
        if self.uri == local_uri(self.store.root):
            create_database(self.store.root)
            with suppress(sqlite3.Error):  # MLflow says what is wrong with it
                follow_the_store(self.store.root)
        return mlflow.MlflowClient(self.uri)

    def ensure(self) -> bool:
        """Connect now rather than at the first run.  False, after one warning, when MLflow cannot be reached."""
        try:
            self.client.search_experiments(max_results=1)
        except Exception as cause:
            self.lose(cause)
            return False
        return True

    # -- when it fails ---------------------------------------------------------------------------------------------
    def lose(self, cause: Exception) -> None:
        """Give up, and say once that runs go on unseen."""
        self.lost = True
        self.warn_once(
            "lost",
            f"{self.describe(cause)}; training goes on, the run folders stay complete, "
            "and `ablab sync` repairs the view",
        )

    def describe(self, cause: Exception) -> str:
        """What failed, in one line; a password in the URI stays out of it."""
        text, _, _ = str(cause).partition("[SQL:")
        text, _, _ = text.partition("(Background on")
        text = " ".join(text.split())
        line = f"MLflow at {self.uri} failed ({text[:SHOWN] or type(cause).__name__})"
        return without_password(line)

    def warn_once(self, topic: str, line: str) -> None:
        if topic not in self._warned:
            self._warned.add(topic)
            self.warn(line)

    # -- what is no longer planned ---------------------------------------------------------------------------------
    def retire(self, run: "Run") -> None:
        """Mark a run that its experiment no longer asks for, or a twin, and take it out of the tables.

        MLflow keeps it.
        """
        self.client.set_tag(run.info.run_id, PLANNED, "no")
        self.client.delete_run(run.info.run_id)

    def revive(self, run: "Run") -> None:
        """Show a retired run again."""
        self.client.restore_run(run.info.run_id)
        self.client.set_tag(run.info.run_id, PLANNED, "yes")

    def retired(self, experiment: str, run: str | None = None) -> "list[Run]":
        """As `runs`, of those that were retired; what a person deleted is not among them."""
        deleted = self._search(experiment, run, "DELETED_ONLY")
        return [one for one in deleted if one.data.tags.get(PLANNED) == "no"]

    # -- what it holds ---------------------------------------------------------------------------------------------
    def experiment(self, name: str) -> str:
        """The id of the MLflow experiment that shows experiment `name`; made, revived and dressed as needed."""
        if name not in self._experiments:
            tags = experiment_tags(self.store, name)
            held = self.client.get_experiment_by_name(PREFIX + name)
            if held is None:
                self._experiments[name] = self._create(name, tags)
            else:
                self._experiments[name] = held.experiment_id
                self._revive(held, tags)
        return self._experiments[name]

    def _create(self, name: str, tags: dict[str, str]) -> str:
        where = None  # a server keeps artifacts at a place of its own
        if self.uri.startswith(DATABASES):
            where = artifacts(self.store.root).as_uri()
        return self.client.create_experiment(PREFIX + name, where, tags)

    def _revive(self, held: "Experiment", tags: dict[str, str]) -> None:
        """A description stays as it is: a user may have edited it."""
        if held.lifecycle_stage == "deleted":
            self.client.restore_experiment(held.experiment_id)
        for key, value in tags.items():
            edited = key == NOTE and held.tags.get(key)
            if held.tags.get(key) != value and not edited:
                self.client.set_experiment_tag(held.experiment_id, key, value)

    def runs(self, experiment: str, run: str | None = None) -> "list[Run]":
        """The mlflow Runs of an experiment, or those of one recipe in it; newest first."""
        return self._search(experiment, run, "ACTIVE_ONLY")

    def summaries(self, experiment: str) -> "list[Run]":
        """The run that holds the report; and twins of it, where a request to create it was done twice."""
        return self._found(experiment, f"tags.`{KIND}` = '{SUMMARY}'", "ACTIVE_ONLY")

    def _search(self, experiment: str, run: str | None, which: str) -> "list[Run]":
        where = f"tags.`ablab.run_id` = '{run}'" if run else ""
        found = self._found(experiment, where, which)
        return [one for one in found if one.data.tags.get(KIND) != SUMMARY]

    def _found(self, experiment: str, where: str, which: str) -> "list[Run]":
        """which: of MLflow's view types."""
        from mlflow.entities import ViewType

        ask = functools.partial(
            self.client.search_runs,
            [self.experiment(experiment)],
            where,
            ViewType.from_string(which.lower()),
            PAGE,
        )
        page = ask()
        found = list(page)
        while page.token:
            page = ask(page_token=page.token)
            found += page
        return found
