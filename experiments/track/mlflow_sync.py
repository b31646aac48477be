"""Rebuilding the MLflow view from the run folders: `ablab sync`."""

from collections import Counter
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

from ablab.core.errors import UserError
from ablab.core.store.planned import GridPlan
from ablab.core.store.store import Store
from ablab.experiments.track.cards import (
    Identity,
    card_of,
    changed,
    fingerprint,
    identity,
    step_of,
    tags_of,
    told,
)
from ablab.experiments.track.mlflow_home import cure, errors
from ablab.experiments.track.mlflow_tracker import MlflowTracker, status_of
from ablab.experiments.track.mlflow_view import PLANNED, MlflowView
from ablab.experiments.track.replay import (
    ADDED,
    CONTINUED,
    CURRENT,
    OUTCOMES,
    lacking,
    replay,
)
from ablab.experiments.track.summary import attach
from ablab.experiments.track.tracker import Card

if TYPE_CHECKING:
    from mlflow.entities import Run


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
    """What became of each planned run."""
    cards = [card_of(view.store, plan, row) for row in plan.all_rows]
    held = _one_of_each(view, plan.name, {identity(tags_of(card)) for card in cards})
    return [_sync_run(view, card, held) for card in cards]


def _one_of_each(
    view: MlflowView, experiment: str, planned: Collection[Identity]
) -> "dict[Identity, Run]":
    """The MLflow run of each planned one that has any.  What is not planned is retired, and of twins all but one."""
    held: dict[Identity, Run] = {}
    for run in sorted(view.runs(experiment), key=told, reverse=True):
        who = identity(run.data.tags)
        if who not in planned or who in held:
            view.retire(run)
            continue
        held[who] = run
        if run.data.tags.get(PLANNED) == "no":  # its revival was not told to the end
            view.revive(run)
    for run in sorted(view.retired(experiment), key=told, reverse=True):
        who = identity(run.data.tags)
        if who in planned and who not in held:
            view.revive(run)
            held[who] = run
    return held


def _sync_run(view: MlflowView, card: Card, shown: "Mapping[Identity, Run]") -> str:
    record = view.store.run(card.run)
    if lack := lacking(record):
        return lack
    result = record.result()
    tags = tags_of(card)
    run = shown.get(identity(tags))
    if run and result:
        tags["ablab.status"] = result.status
        tags["ablab.result"] = fingerprint(record.folder)
        # What a server did late may have set a status or a step back.
        ended = run.info.status == status_of(result.status)
        last = max((int(line["step"]) for line in record.metrics()), default=-1)
        if ended and step_of(run) >= last and not changed(tags, run.data.tags):
            return CURRENT
    tracker = MlflowTracker(view, strict=True, held=run)
    replay(record, card, tracker, result)
    if run is None:
        return ADDED
    return CONTINUED if tracker.points or result else CURRENT


def show_report(store: Store, experiment: str) -> None:
    """Attach the report that was just written.  UserError when MLflow cannot be written."""
    view = MlflowView(store)
    try:
        attach(view, store.read_plan(experiment))
    except errors() as cause:
        raise UserError(f"{view.describe(cause)}; {cure(view.uri, store.root)}") from cause
