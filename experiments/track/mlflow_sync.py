"""Rebuilding the MLflow view from the run folders: `ablab sync`."""

from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING

from ablab.core.errors import UserError
from ablab.core.store.planned import GridPlan
from ablab.core.store.record import Record
from ablab.core.store.result import Result
from ablab.core.store.store import Store
from ablab.experiments.track.cards import (
    Identity,
    card_of,
    changed,
    fingerprint,
    identity,
    summary_of,
    tags_of,
)
from ablab.experiments.track.mlflow_home import cure, errors
from ablab.experiments.track.mlflow_tracker import MlflowTracker
from ablab.experiments.track.mlflow_view import MlflowView
from ablab.experiments.track.summary import attach
from ablab.experiments.track.tracker import Card, Tracker

if TYPE_CHECKING:
    from mlflow.entities import Run

OUTCOMES = ("added", "continued", "current", "missing")
DAMAGED = "damaged"  # counted where there is one: its record cannot be read, and `ablab report` says why


def replay(record: Record, card: Card, tracker: Tracker, result: Result | None = None) -> None:
    """Show a run folder as if it were training now; `result` ends the run, without one it goes on."""
    pace = {line["step"]: line for line in record.pace()}
    looks = {line["step"]: line for line in record.looks()}
    seconds = 0.0
    tracker.open(card)
    for line in record.metrics():
        clock = pace.get(line["step"], {})
        seconds = clock.get("seconds", seconds)
        scalars = line | clock | looks.get(line["step"], {})
        scalars.pop("seconds", None)
        tracker.log(int(scalars.pop("step")), scalars, seconds)
    if result:
        tracker.close(result.status, summary_of(result))
    else:
        tracker.flush()


def sync(
    store: Store,
    experiments: list[str] | None = None,
    uri: str | None = None,
    view: MlflowView | None = None,
) -> dict[str, int]:
    """Send to MLflow what it lacks of these experiments, or of all.

    Returns the number of planned runs that were added, continued, already current, or missing (never started); also of
    damaged ones, where there are any.
    Raises UserError when MLflow cannot be written.
    """
    view = view or MlflowView(store, uri)
    counts = Counter(dict.fromkeys(OUTCOMES, 0))
    for name in experiments or store.experiments():
        plan = store.read_plan(name)
        try:
            counts.update(_sync_experiment(view, plan))
            attach(view, plan)
        except errors() as cause:
            raise UserError(f"{view.describe(cause)}; {cure(view.uri, store.root)}") from cause
    return dict(counts)


def _sync_experiment(view: MlflowView, plan: GridPlan) -> list[str]:
    """One of OUTCOMES, or DAMAGED, for each planned run."""
    # Newest first: of twins, the oldest stays.
    held = {identity(run.data.tags): run for run in view.runs(plan.name)}
    cards = [card_of(view.store, plan, row) for row in plan.all_rows]
    planned = {identity(tags_of(card)) for card in cards}
    for who, run in held.items():
        if who not in planned:
            view.retire(run)
    for run in view.retired(plan.name):
        who = identity(run.data.tags)
        if who in planned and who not in held:
            view.revive(run)
            held[who] = run
    return [_sync_run(view, card, held) for card in cards]


def _sync_run(view: MlflowView, card: Card, shown: "Mapping[Identity, Run]") -> str:
    record = view.store.run(card.run)
    try:
        result = record.result()
    except UserError:
        return DAMAGED
    if record.hole(result):
        return DAMAGED
    if result is None and not record.metrics_path.exists():
        return "missing"
    tags = tags_of(card)
    run = shown.get(identity(tags))
    if run and result:
        tags["ablab.status"] = result.status
        tags["ablab.result"] = fingerprint(record.folder)
        if not changed(tags, run.data.tags):
            return "current"
    tracker = MlflowTracker(view, strict=True, held=run)
    replay(record, card, tracker, result)
    if run is None:
        return "added"
    return "continued" if tracker.points or result else "current"


def show_report(store: Store, experiment: str) -> None:
    """Attach the report that was just written.  UserError when MLflow cannot be written."""
    view = MlflowView(store)
    try:
        attach(view, store.read_plan(experiment))
    except errors() as cause:
        raise UserError(f"{view.describe(cause)}; {cure(view.uri, store.root)}") from cause
