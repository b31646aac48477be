"""MLflow as a view of the run folders: one experiment per ablab experiment, one flat run per planned run.

    live        workers -> runner -> MlflowTracker -> MLflow
    ablab sync  run folder -> replay -> MlflowTracker -> MLflow     the same code, so the same content

A step counts as shown once the tag `ablab.step` has reached it or its points are there, and a run as complete once
`ablab.result` is the fingerprint of its result.json.  Both are written after what they vouch for.
MLflow's limits: mlflow/utils/validation.py, 3.17.
"""

import functools
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Concatenate, ParamSpec

from ablab.core.store.evaluation import FOLDER, files_of
from ablab.core.store.record import Record
from ablab.core.store.result import DIVERGED, FAILED, FINISHED, OUT_OF_MEMORY, PRUNED
from ablab.experiments.track.cards import (
    CHARACTERS,
    changed,
    data_of,
    fingerprint,
    identity,
    key_of,
    name_of,
    params_of,
    started,
    step_of,
    tags_of,
    told,
)
from ablab.experiments.track.mlflow_view import NOTE, MlflowView
from ablab.experiments.track.tracker import Card

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Run

RUNNING = "running"
STATUS = {  # ours -> MLflow's
    FINISHED: "FINISHED",
    DIVERGED: "FAILED",
    FAILED: "FAILED",
    OUT_OF_MEMORY: "FAILED",
    PRUNED: "KILLED",
}
METRICS, PARAMS = 1000, 100  # a batch; MLflow takes no more
EVERY_STEP = "train/loss"  # a metric of each logged step; the points of a step leave together
CURVES = 25  # metric keys a run: the UI draws a chart for each
LAYERS = "layer/"  # begins the keys of looks into the layers, which stand beside those: somebody asked for them
STEPS, SECONDS = (
    100,
    5.0,
)  # a batch leaves at so many steps, or when the last one left so long ago

P = ParamSpec("P")


class Outbox:
    """Metric values on their way to one MLflow run: they leave in batches, each with a tag that vouches for it."""

    def __init__(self, client: "MlflowClient", run: str, start: float):
        """run: MLflow's id.  start: when the run began, unix seconds; its values are placed after it."""
        self.client = client
        self.run = run
        self.start = start
        self.sent_at = time.monotonic()
        self.waiting: list[Metric] = []
        self.steps = 0  # that wait

    @property
    def is_due(self) -> bool:
        return self.steps >= STEPS or time.monotonic() - self.sent_at >= SECONDS

    def put(self, step: int, values: Mapping[str, float], seconds: float) -> None:
        """seconds: of training so far."""
        from mlflow.entities import Metric

        if len(self.waiting) + len(values) > METRICS:
            self.send()
        when = self.milliseconds(seconds)
        self.waiting += [Metric(key, value, when, step) for key, value in values.items()]

    def send(self, closing: Mapping[str, str] = {}) -> None:
        """Metrics first, then the tags that vouch for them: MLflow writes a batch in this order."""
        from mlflow.entities import RunTag

        tags = dict(closing)
        if self.waiting:
            tags = {"ablab.step": str(self.waiting[-1].step)} | tags
        if tags:
            listed = [RunTag(key, value) for key, value in tags.items()]
            self.client.log_batch(self.run, metrics=self.waiting, tags=listed)
        self.waiting = []
        self.steps = 0
        self.sent_at = time.monotonic()

    def milliseconds(self, seconds: float) -> int:
        """Of the unix clock, after so many seconds of training."""
        return round((self.start + seconds) * 1000)


def _isolated(
    method: "Callable[Concatenate[MlflowTracker, P], None]",
) -> "Callable[Concatenate[MlflowTracker, P], None]":
    """Training never stops for a view: the first failure warns, and all the rest is left to `ablab sync`."""

    @functools.wraps(method)
    def call(self: "MlflowTracker", *arguments: P.args, **named: P.kwargs) -> None:
        try:
            if self.strict or not self.view.lost:
                method(self, *arguments, **named)
        except Exception as cause:
            if self.strict:
                raise
            self.view.lose(cause)

    return call


class MlflowTracker:
    """Shows one run, and continues it where MLflow already holds it.  Only a `strict` tracker raises."""

    def __init__(self, view: MlflowView, strict: bool = False, held: "Run | None" = None):
        """held: the mlflow Run, if the caller has looked it up."""
        self.view = view
        self.strict = strict
        self.held = held
        self.points = 0  # metric values that were new to MLflow
        self._known_step = -1
        self._step = 0
        self._seconds = 0.0
        self._latest: dict[str, float] = {}  # key -> the value that MLflow shows

    # -- its beginning ---------------------------------------------------------------------------------------------
    @_isolated
    def open(self, card: Card) -> None:
        self._folder = card.folder
        self._description = card.description
        start = started(card.folder)
        tags = tags_of(card) | {"ablab.status": RUNNING}
        run = self._found(card, tags) or self._created(card, tags, start)
        if run.info.status != "RUNNING":
            self.view.client.update_run(run.info.run_id, "RUNNING")
        self._outbox = Outbox(self.view.client, run.info.run_id, start)
        self._latest = dict(run.data.metrics)
        self._known_step = self._shown_step(run)
        self._describe(card, tags, run)

    def _shown_step(self, run: "Run") -> int:
        """The last step that MLflow holds; -1: none.

        The tag says so unless a kill came between points and tag, or an old tag came late.  A run that goes on from a
        checkpoint logs those steps at other times: sent again, they would be twins.
        """
        said = step_of(run)
        if EVERY_STEP not in run.data.metrics:
            return said
        history = self.view.client.get_metric_history(run.info.run_id, EVERY_STEP)
        shown = max((point.step for point in history), default=said)
        if shown > said:
            self.view.client.set_tag(run.info.run_id, "ablab.step", str(shown))
        return shown

    def _found(self, card: Card, tags: Mapping[str, str]) -> "Run | None":
        """The run that shows this card already: a recipe may answer two cells."""
        if self.held:
            return self.held
        shown = self._twin_of(tags, self.view.runs(card.experiment, card.run))
        if shown:
            return shown
        retired = self._twin_of(tags, self.view.retired(card.experiment, card.run))
        if retired:
            self.view.revive(retired)
        return retired

    def _twin_of(self, tags: Mapping[str, str], runs: "list[Run]") -> "Run | None":
        """The same one that `ablab sync` keeps."""
        who = identity(tags)
        twins = [run for run in runs if identity(run.data.tags) == who]
        return max(twins, key=told, default=None)

    def _created(self, card: Card, tags: Mapping[str, str], start: float) -> "Run":
        source = {
            "mlflow.source.name": f"ablab run {card.experiment}",
            "mlflow.source.type": "LOCAL",
        }
        return self.view.client.create_run(
            self.view.experiment(card.experiment),
            start_time=round(start * 1000),
            tags={**tags, **source, NOTE: _note(card.description)},
            run_name=name_of(card),
        )

    def _describe(self, card: Card, tags: Mapping[str, str], held: "Run") -> None:
        """Send the tags and params that MLflow lacks, the recipe, and the name of the data."""
        from mlflow.entities import Param, RunTag

        lacking = [RunTag(key, value) for key, value in changed(tags, held.data.tags).items()]
        params = [
            Param(key, value)
            for key, value in params_of(card).items()
            if key not in held.data.params
        ]
        for first in range(0, max(len(params), len(lacking)), PARAMS):
            batch = slice(first, first + PARAMS)
            self.view.client.log_batch(
                held.info.run_id, params=params[batch], tags=lacking[batch]
            )
        recipe = card.folder / "recipe.yaml"
        if recipe.is_file():
            self._attach(held.info.run_id, recipe)

    def _attach(self, run: str, recipe: Path) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        self.view.client.log_artifact(run, str(recipe))
        if data := data_of(recipe):
            name, digest = data
            dataset = Dataset(name, digest, source_type="ablab", source="{}")
            trained_on = DatasetInput(dataset, [InputTag("mlflow.data.context", "training")])
            self.view.client.log_inputs(run, [trained_on])

    # -- its curves ------------------------------------------------------------------------------------------------
    @_isolated
    def log(self, step: int, scalars: Mapping[str, float], seconds: float) -> None:
        """Queue one step; `seconds` of training so far place it on the time axis.

        What MLflow holds is not sent again.
        """
        self._step = step
        self._seconds = seconds
        if step <= self._known_step:
            return
        self._known_step = step
        self._queue(self._with_a_curve(scalars), seconds)
        self._outbox.steps += 1
        if self._outbox.is_due:
            self._outbox.send()

    def _with_a_curve(self, scalars: Mapping[str, float]) -> Mapping[str, float]:
        new = [
            key
            for key in scalars
            if key_of(key) not in self._latest and not key.startswith(LAYERS)
        ]
        drawn = sum(not key.startswith(LAYERS) for key in self._latest)
        room = max(CURVES - drawn, 0)
        surplus = new[room:]
        if not surplus:
            return scalars
        self.view.warn_once(
            "curves",
            f"MLflow shows the first {CURVES} metrics of a run; {surplus[0]!r} is in metrics.jsonl alone",
        )
        return {key: value for key, value in scalars.items() if key not in surplus}

    def _queue(self, scalars: Mapping[str, float], seconds: float) -> None:
        """A value that is no finite number leaves a gap: MLflow would draw inf as 1.8e308."""
        new = {}
        for key, value in scalars.items():
            if isinstance(value, (int, float)) and math.isfinite(value):
                new[key_of(key)] = float(value)
        self._outbox.put(self._step, new, seconds)
        self._latest |= new
        self.points += len(new)

    @_isolated
    def flush(self) -> None:
        """Send what waits, for a run that has not ended."""
        self._outbox.send()

    # -- its end ---------------------------------------------------------------------------------------------------
    @_isolated
    def close(self, status: str, summary: Mapping[str, float]) -> None:
        """End the run.  A final value that differs from its curve's last one follows it under the same key."""
        end = self._seconds + 0.001  # of two values at one step, MLflow shows the later
        differing = {
            key: value
            for key, value in summary.items()
            if self._latest.get(key_of(key)) != value
        }
        self._queue(differing, end)
        client, run = self._outbox.client, self._outbox.run
        result = Record(self._folder).result()
        if result:
            client.log_artifact(run, str(self._folder / "result.json"))
            for path in files_of(self._folder):
                client.log_artifact(run, str(path), FOLDER)
        ended = self._outbox.milliseconds(end)
        client.set_terminated(run, status_of(status), ended)
        closing = {
            "ablab.status": status,
            "ablab.result": fingerprint(self._folder),
            NOTE: _note(self._description, result.error if result else ""),
        }
        self._outbox.send(closing)


def status_of(status: str) -> str:
    """MLflow's word for how a run ended."""
    return STATUS.get(status, "FAILED")


def _note(description: str, error: str = "") -> str:
    """What the UI shows as a run's description."""
    return "\n\n".join(part for part in (description, error) if part)[:CHARACTERS]
