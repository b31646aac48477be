"""MLflow as a view of the run folders: one experiment per ablab experiment, one flat run per planned run.

    live        workers -> runner -> MlflowTracker -> MLflow
    ablab sync  run folder -> replay -> MlflowTracker -> MLflow     the same code, so the same content

A step counts as shown once the tag `ablab.step` has reached it, and a run as complete once `ablab.result` is the
fingerprint of its result.json.  Both are written after what they vouch for: a kill in between only repeats work.
MLflow's limits: mlflow/utils/validation.py, 3.17.
"""

import functools
import math
import re
import time
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ablab.core.errors import UserError
from ablab.core.store.planned import GridPlan, Planned
from ablab.core.store.record import Record
from ablab.core.store.result import DIVERGED, FAILED, FINISHED, OUT_OF_MEMORY, PRUNED, Result
from ablab.core.store.store import Store
from ablab.experiments.track.mlflow_view import NOTE, MlflowView, colour_of, cure, errors
from ablab.experiments.track.tracker import Card

RUNNING = "running"
STATUS = {
    FINISHED: "FINISHED",
    DIVERGED: "FAILED",
    FAILED: "FAILED",
    OUT_OF_MEMORY: "FAILED",
    PRUNED: "KILLED",
}
METRICS, PARAMS, CHARACTERS = (
    1000,
    100,
    6000,
)  # MLflow's limits: metrics and params a batch, characters a value
CURVES = 25  # metric keys a run: the UI draws a chart for each
STEPS, SECONDS = (
    100,
    5.0,
)  # a batch leaves at so many steps, or when the last one left so long ago


# -- who a run is ------------------------------------------------------------------------------------------------------
def card_of(store: Store, plan: GridPlan, planned: Planned) -> Card:
    """The card of one planned run, for the live tracker and for `ablab sync` alike; params come from its run.json."""
    record = store.run(planned.run)
    about = record.about()
    own = {
        "ablab.design": plan.design,
        "ablab.reference": planned.reference,
        "ablab.note": planned.note,
    }
    tags = {key: value for key, value in own.items() if value} | {
        "mlflow.runColor": colour_of(plan, planned.cell)
    }
    return Card(
        planned.run,
        plan.name,
        planned.cell,
        planned.pair,
        planned.seed,
        record.folder,
        tags | about.get("tags", {}) | planned.tags,
        about.get("params", {}),
    )


def summary_of(result: Result) -> dict[str, float]:
    """What a finished run shows besides its curves: final metrics, tokens/second, peak device memory in GiB."""
    summary = result.metrics | {
        "tokens_per_second": result.tokens_per_second,
        "peak_gib": result.peak_bytes / 2**30,
    }
    return {key: value for key, value in summary.items() if value != 0 or key in result.metrics}


def _started(folder: Path) -> float:
    """When the run began, unix seconds: as run.json says, else the age of its recipe, else now."""
    recipe = folder / "recipe.yaml"
    return float(
        Record(folder).about().get("started")
        or (recipe.stat().st_mtime if recipe.is_file() else time.time())
    )


def _data_of(recipe: Path) -> tuple[str, str] | None:
    """Name and digest (MLflow keeps 36 characters) of the data that a recipe.yaml names."""
    import yaml

    data = (
        yaml.load(recipe.read_text(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        or {}
    ).get("data") or {}
    return (
        (str(data["name"]), str(data["digest"])[:36])
        if data.get("name") and data.get("digest")
        else None
    )


def _tags_of(card: Card) -> dict[str, str]:
    own = {
        "experiment": card.experiment,
        "cell": card.cell,
        "pair": card.pair,
        "seed": card.seed,
        "run_id": card.run,
    }
    tags = {f"ablab.{key}": value for key, value in own.items()} | dict(card.tags)
    return {key: str(value)[:CHARACTERS] for key, value in tags.items()}


def _changed(tags: Mapping[str, str], held: Mapping[str, str]) -> dict[str, str]:
    """What MLflow should hold and does not.  Its own keys, such as a run's colour, are the user's once the run exists."""
    return {
        key: value
        for key, value in tags.items()
        if held.get(key) != value and not key.startswith("mlflow.")
    }


def _identity(tags: Mapping[str, str]) -> tuple:
    return tuple(tags.get(f"ablab.{key}") for key in ("run_id", "cell", "pair"))


def _key(name: str) -> str:
    """`name` in the characters that MLflow allows in a key: optim.chains[hidden] -> optim.chains.hidden."""
    return re.sub(r"[^\w\-./: ]+", ".", name).strip("./")


def _fingerprint(folder: Path) -> str:
    result = folder / "result.json"
    return f"{zlib.crc32(result.read_bytes()):08x}" if result.is_file() else ""


# -- the tracker -------------------------------------------------------------------------------------------------------
def _isolated(method):
    """Training never stops for a view: the first failure warns, and the rest of this run is left to `ablab sync`."""

    @functools.wraps(method)
    def call(self, *arguments):
        try:
            if not self.lost:
                method(self, *arguments)
        except Exception as cause:
            if self.strict:
                raise
            self.lost = True
            self.view.lose(cause)

    return call


class MlflowTracker:
    """Shows one run, and continues it where MLflow already holds it.  Only a `strict` tracker raises."""

    def __init__(self, view: MlflowView, strict: bool = False, held: Any = None):
        self.view, self.strict, self.lost = view, strict, False
        self.held = held  # the mlflow Run, if the caller has looked it up
        self.points = 0  # metric values that were new to MLflow
        self._waiting: list[Any] = []
        self._waiting_steps, self._known_step, self._step, self._seconds = 0, -1, 0, 0.0
        self._latest: dict[str, float] = {}  # key -> the value that MLflow shows

    @_isolated
    def open(self, card: Card) -> None:
        self._folder, self._start, self._sent_at = (
            card.folder,
            _started(card.folder),
            time.monotonic(),
        )
        client, tags = self.view.client, _tags_of(card) | {"ablab.status": RUNNING}
        twins = (
            [self.held] if self.held else self.view.runs(card.experiment, card.run)
        )  # a recipe may answer two cells
        run = next(
            (twin for twin in twins if _identity(twin.data.tags) == _identity(tags)), None
        )
        if run is None:
            source = {
                "mlflow.source.name": f"ablab run {card.experiment}",
                "mlflow.source.type": "LOCAL",
            }
            start, name = (
                round(self._start * 1000),
                f"{card.cell} · "
                + (
                    f"trial {trial}"
                    if (trial := tags.get("ablab.trial"))
                    else f"seed {card.seed}"
                ),
            )
            run = client.create_run(
                self.view.experiment(card.experiment), start, tags | source, name
            )
        elif run.info.status != "RUNNING":
            client.update_run(run.info.run_id, "RUNNING")
        self._id, self._latest = run.info.run_id, dict(run.data.metrics)
        self._known_step = int(run.data.tags.get("ablab.step", -1))
        self._describe(card, tags, run.data)

    def _describe(self, card: Card, tags: dict[str, str], held: Any) -> None:
        """Send the tags and params that MLflow lacks, the recipe, and the name of the data."""
        from mlflow.entities import Dataset, DatasetInput, InputTag, Param, RunTag

        client, changed = (
            self.view.client,
            [RunTag(*tag) for tag in _changed(tags, held.tags).items()],
        )
        params = [
            Param(_key(name), str(value)[:CHARACTERS])
            for name, value in card.params.items()
            if _key(name) not in held.params
        ]
        for first in range(0, max(len(params), len(changed)), PARAMS):
            client.log_batch(
                self._id,
                params=params[first : first + PARAMS],
                tags=changed[first : first + PARAMS],
            )
        if (recipe := card.folder / "recipe.yaml").is_file():
            client.log_artifact(self._id, str(recipe))
            if data := _data_of(recipe):
                data = Dataset(*data, source_type="ablab", source="{}")
                client.log_inputs(
                    self._id,
                    [DatasetInput(data, [InputTag("mlflow.data.context", "training")])],
                )

    @_isolated
    def log(self, step: int, scalars: Mapping[str, float], seconds: float) -> None:
        """Queue one step; `seconds` of training so far place it on the time axis.  What MLflow holds is not sent again."""
        self._step, self._seconds = step, seconds
        if step <= self._known_step:
            return
        self._known_step = step
        self._queue(self._with_a_curve(scalars), seconds)
        self._waiting_steps += 1
        if self._waiting_steps >= STEPS or time.monotonic() - self._sent_at >= SECONDS:
            self._send()

    def _with_a_curve(self, scalars: Mapping[str, float]) -> dict[str, float]:
        surplus = [key for key in scalars if _key(key) not in self._latest][
            max(CURVES - len(self._latest), 0) :
        ]
        if surplus:
            self.view.warn_once(
                "curves",
                f"MLflow shows the first {CURVES} metrics of a run; {surplus[0]!r} is in metrics.jsonl alone",
            )
        return {key: value for key, value in scalars.items() if key not in surplus}

    def _queue(self, scalars: Mapping[str, float], seconds: float) -> None:
        """A value that is no finite number leaves a gap: MLflow would draw inf as 1.8e308."""
        from mlflow.entities import Metric

        new = {
            _key(key): float(value)
            for key, value in scalars.items()
            if isinstance(value, (int, float)) and math.isfinite(value)
        }
        if len(self._waiting) + len(new) > METRICS:
            self._send()
        when = round((self._start + seconds) * 1000)
        self._waiting += [Metric(key, value, when, self._step) for key, value in new.items()]
        self._latest |= new
        self.points += len(new)

    def _send(self, closing: Mapping[str, str] | None = None) -> None:
        """Metrics first, then the tags that vouch for them: MLflow writes a batch in this order."""
        from mlflow.entities import RunTag

        shown = {"ablab.step": str(self._waiting[-1].step)} if self._waiting else {}
        if tags := [RunTag(*tag) for tag in (shown | (closing or {})).items()]:
            self.view.client.log_batch(self._id, metrics=self._waiting, tags=tags)
        self._waiting, self._waiting_steps, self._sent_at = [], 0, time.monotonic()

    @_isolated
    def flush(self) -> None:
        """Send what waits, for a run that has not ended."""
        self._send()

    @_isolated
    def close(self, status: str, summary: Mapping[str, float]) -> None:
        """End the run.  A final value that differs from its curve's last one follows it under the same key."""
        end = self._seconds + 0.001  # of two values at one step, MLflow shows the later
        result = Record(self._folder).result()
        self._queue(
            {
                key: value
                for key, value in summary.items()
                if self._latest.get(_key(key)) != value
            },
            end,
        )
        if result:
            self.view.client.log_artifact(self._id, str(self._folder / "result.json"))
        self.view.client.set_terminated(
            self._id, STATUS.get(status, "FAILED"), round((self._start + end) * 1000)
        )
        self._send(
            {
                "ablab.status": status,
                "ablab.result": _fingerprint(self._folder),
                NOTE: result.error if result else "",
            }
        )


# -- rebuilding the view -----------------------------------------------------------------------------------------------
def replay(
    record: Record, card: Card, tracker: MlflowTracker, result: Result | None = None
) -> None:
    """Show a run folder as if it were training now; `result` ends the run, without one it goes on."""
    pace, seconds = {line["step"]: line for line in record.pace()}, 0.0
    tracker.open(card)
    for line in record.metrics():
        clock = pace.get(line["step"], {})
        seconds = clock.get("seconds", seconds)
        scalars = {
            key: value
            for key, value in (line | clock).items()
            if key not in ("step", "seconds")
        }
        tracker.log(line["step"], scalars, seconds)
    if result:
        tracker.close(result.status, summary_of(result))
    else:
        tracker.flush()


def sync(
    store: Store, experiments: list[str] | None = None, uri: str | None = None
) -> dict[str, int]:
    """Send to MLflow what it lacks of these experiments, or of all.

    Returns the number of planned runs that were added, continued, already current, or missing (never started).
    Raises UserError when MLflow cannot be written.
    """
    view, counts = (
        MlflowView(store, uri),
        dict.fromkeys(("added", "continued", "current", "missing"), 0),
    )
    for name in experiments or store.experiments():
        plan = store.read_plan(name)
        try:
            held = {
                _identity(run.data.tags): run for run in view.runs(name)
            }  # newest first: of twins, the oldest stays
            for planned in plan.rows:
                counts[
                    _sync(view, card_of(store, plan, planned), store.run(planned.run), held)
                ] += 1
        except errors() as cause:
            raise UserError(f"{view.describe(cause)}; {cure(view.uri, store.root)}") from cause
    return counts


def _sync(view: MlflowView, card: Card, record: Record, shown: dict[tuple, Any]) -> str:
    tags = _tags_of(card)
    run, result = shown.get(_identity(tags)), record.result()
    if result is None and not record.metrics_path.exists():
        return "missing"
    if run and result:
        tags |= {"ablab.status": result.status, "ablab.result": _fingerprint(record.folder)}
        if not _changed(tags, run.data.tags):
            return "current"
    tracker = MlflowTracker(view, strict=True, held=run)
    replay(record, card, tracker, result)
    return "added" if run is None else "continued" if tracker.points or result else "current"
