"""How much of a grid's wall time is training: `ablab bench grid`.

A cold run first, with empty compile caches, gives the rate, and so the budget that makes each cell train for the
seconds asked for.  Then the grid: the real runner with its check that arms are alive, one warm worker, a fresh
store, random tokens, one evaluation a cell (its last step).
    pure training   seconds of core/train/stopwatch.py: no first step, no evaluation, no saving
    before a cell   from the end of the cell before it to the end of its first step; of the first cell from the call
                    of the runner, so it holds the start of the worker and the check.  With several jobs a cell
                    begins when a worker takes it, and waiting for its turn on the GPU counts
"""

import math
import os
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import typer

from ablab.core.errors import UserError
from ablab.core.recipe.recipe import run_id
from ablab.core.runtime.runtime import settle
from ablab.core.store.record import Record
from ablab.core.store.result import FINISHED, Result
from ablab.core.store.store import Store
from ablab.experiments.bench.random_tokens import experiment_on_random_tokens
from ablab.experiments.plan.experiment import Experiment, PlannedRun
from ablab.experiments.run.progress import Quiet
from ablab.experiments.run.runner import execute
from ablab.experiments.text import table
from ablab.experiments.track.chosen import MLFLOW

CELLS = {"cuda": 12, "cpu": 4}
SECONDS = {"cuda": 60.0, "cpu": 3.0}
PROBE = 30  # steps of the cold run, or the schedule's warm-up if that is longer
# What torch and Triton read; inherited by the workers.
CACHES = ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR")


@dataclass(frozen=True)
class CellTime:
    """Seconds of one cell: before its first step ended, training, and everything after that until it was reported."""

    cell: str
    seed: int
    before: float
    training: float
    rest: float


class Observer(Quiet):
    """Notes when each run's first log came and when it ended: seconds since the runner was called."""

    def __init__(self) -> None:
        self.called = time.perf_counter()
        self.began: dict[str, float] = {}
        self.first: dict[str, float] = {}
        self.ended: dict[str, float] = {}
        self.order: list[tuple[PlannedRun, Result]] = []

    def now(self) -> float:
        return time.perf_counter() - self.called

    def started(self, run: PlannedRun) -> None:
        self.began[run.id] = self.now()

    def logged(self, run: PlannedRun, step: int, scalars: dict[str, float]) -> None:
        if run.id not in self.first:
            self.first[run.id] = self.now()

    def finished(self, run: PlannedRun, result: Result) -> None:
        if result.status != FINISHED:
            raise UserError(
                f"cell {run.cell!r} of the grid ended {result.status}: {result.error};"
                " a benchmark needs all of them"
            )
        self.order.append((run, result))
        self.ended[run.id] = self.now()

    def times(self, store: Store, jobs: int = 1) -> list[CellTime]:
        """In the order in which the runs ended; with one worker each begins where the one before ended."""
        cells = []
        since = 0.0
        for run, result in self.order:
            if jobs > 1:
                since = self.began[run.id]
            stepped = self.first[run.id] - first_pace(store.run(run.id))
            rest = self.ended[run.id] - stepped - result.seconds
            cell = CellTime(run.cell, run.recipe.seed, stepped - since, result.seconds, rest)
            cells.append(cell)
            since = self.ended[run.id]
        return cells


def first_pace(record: Record) -> float:
    """Training seconds at a run's first log: the first step had ended so long before."""
    return next(iter(record.pace()))["seconds"]


@dataclass(frozen=True)
class Bench:
    """A grid to be timed, and how it is started."""

    experiment: Experiment
    jobs: int
    mlflow: bool
    plugins: list[str]

    def train(self, store: Store, runs: list[PlannedRun], jobs: int) -> tuple[Observer, float]:
        """What was seen, and the wall time in seconds."""
        watcher = Observer()
        tracked = (MLFLOW,) if self.mlflow else ()
        execute(self.experiment, store, runs, watcher, jobs, self.plugins, tracked)
        return watcher, watcher.now()

    def probe(self, store: Store) -> tuple[CellTime, float]:
        """A short run of the first cell in a new worker: its times, and its tokens/s."""
        watcher, _ = self.train(store, self.runs(1, 0), jobs=1)
        ((_, result),) = watcher.order
        return watcher.times(store)[0], result.tokens_per_second

    def runs(self, count: int, tokens: float) -> list[PlannedRun]:
        """The first `count` runs of so many tokens each, but no fewer than the schedule's warm-up.

        Seed 0 of every cell comes before seed 1.
        """
        seeds = range(math.ceil(count / len(self.experiment.cells)))
        return [_of_length(run, tokens) for run in self.experiment.runs(seeds)[:count]]


def bench_grid(
    name: str,
    overrides: dict[str, Any],
    cells: int | None,
    seconds: float | None,
    mlflow: bool,
    plugins: list[str],
    jobs: int = 1,
) -> dict[str, Any]:
    """Time a cold run, then a grid.  None: the device's own number.

    Raises UserError, also where a cell does not finish.
    """
    with tempfile.TemporaryDirectory() as folder, _caches_in(Path(folder) / "caches"):
        root = Path(folder)
        once = {"runtime.evaluations": 1}
        experiment = experiment_on_random_tokens(name, once | overrides, root)
        kind = settle(
            experiment.sheet.runtime, experiment.base.batches.largest_micro_batch
        ).device
        count = cells or CELLS[kind]
        asked = seconds or SECONDS[kind]
        bench = Bench(experiment, jobs, mlflow, plugins)
        cold, rate = bench.probe(Store(root))
        store = _fresh_store(root)
        watcher, wall = bench.train(store, bench.runs(count, rate * asked), jobs)
        times = watcher.times(store, jobs)
    if len(times) < 2:
        raise UserError(
            f"only {len(times)} of {count} cells trained, for the liveness check sees no difference in the others;"
            " name an experiment with more live cells"
        )
    training = sum(one.training for one in times)
    tokens = sum(result.tokens for _, result in watcher.order)
    return {
        "experiment": experiment.name.split("@")[0],
        "device": kind,
        "cells": len(times),
        "jobs": jobs,
        "seconds_asked": asked,
        "mlflow": mlflow,
        "wall_seconds": wall,
        "training_seconds": training,
        "training_over_wall": training / wall,
        "tokens_per_second_cold_run": rate,
        "tokens_per_second": tokens / wall,
        "of_lone_pace": tokens / wall / rate,
        "cold_start_seconds": cold.before,
        "first_cell_seconds": times[0].before,
        "second_cell_seconds": times[1].before,
        "median_later_cell_seconds": median(one.before for one in times[1:]),
        "times": [asdict(one) for one in times],
    }


@contextmanager
def _caches_in(folder: Path) -> Iterator[None]:
    """Compile caches of our own, empty at first: a cold start is cold, and the user's caches stay as they are."""
    kept = {name: os.environ.get(name) for name in CACHES}
    for name in CACHES:
        os.environ[name] = str(folder / name.lower())
    try:
        yield
    finally:
        for name, value in kept.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value


def _fresh_store(root: Path) -> Store:
    """Without a run, and with the tokens of the store at root."""
    store = Store(root / "grid")
    store.root.mkdir()
    (store.root / "data").symlink_to(root / "data")
    return store


def _of_length(run: PlannedRun, tokens: float) -> PlannedRun:
    recipe = run.recipe
    fewest = max(PROBE, getattr(recipe.schedule, "warmup_steps", 0) or 0)
    steps = max(round(tokens / recipe.tokens_per_step), fewest)
    budget = replace(recipe.budget, tokens=steps * recipe.tokens_per_step)
    recipe = replace(recipe, budget=budget)
    return replace(run, recipe=recipe, id=run_id(recipe))


# -- showing it ------------------------------------------------------------------------------------------
def show_grid(found: dict[str, Any]) -> None:
    logged = "with MLflow" if found["mlflow"] else "without MLflow"
    length = f"{found['cells']} cells of about {found['seconds_asked']:g} s"
    cells = f"{length}, {found['jobs']} at a time"
    typer.echo(f"{found['experiment']} on {found['device']}: {cells}, {logged}; random tokens")
    table([_row(one) for one in found["times"]])
    typer.echo("")
    for what, value in _totals(found):
        typer.echo(f"{what:<40}  {value}")


def _totals(found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    spent = f"({found['training_seconds']:.1f} of {found['wall_seconds']:.1f} s)"
    yield "training / wall", f"{100 * found['training_over_wall']:.1f} %  {spent}"
    pace = f"(grid {found['tokens_per_second']:,.0f})"
    share = f"{100 * found['of_lone_pace']:.1f} %  {pace}"
    yield "tokens/s of the grid / of the cold run", share
    cold = f"{found['cold_start_seconds']:.2f} s before the first step ended"
    yield "cold: new worker, empty compile caches", cold
    yield "first cell: new worker, caches on disk", f"{found['first_cell_seconds']:.2f} s"
    yield "second cell: warm worker", f"{found['second_cell_seconds']:.2f} s"
    yield "later cells, median", f"{found['median_later_cell_seconds']:.2f} s"


def _row(one: dict[str, Any]) -> dict[str, str]:
    return {
        "cell": one["cell"],
        "seed": str(one["seed"]),
        "before, s": f"{one['before']:.2f}",
        "training, s": f"{one['training']:.2f}",
        "rest, s": f"{one['rest']:.2f}",
    }
