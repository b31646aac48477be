"""What it costs to divide runs among workers that share nothing but a folder: `ablab bench claims`.

Real claims, real records, real processes, and training alone is left out: a run is drawn, as for `ablab bench report`.
Each worker walks the whole plan, so most of what it asks for is held by another or has ended.
"""

import multiprocessing
import os
import signal
import tempfile
import time
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np

from ablab.core.errors import UserError
from ablab.core.store import claim
from ablab.core.store.claim import Watch, standing, take
from ablab.core.store.record import Record
from ablab.core.store.store import Store
from ablab.experiments.bench.report import NAME, measured, planned, write_run
from ablab.experiments.bench.targets import Cost
from ablab.experiments.run.executor import Task
from ablab.experiments.run.messages import Busy, Done, TrainJob
from ablab.experiments.run.worker import Worker
from ablab.experiments.run.workers import PATIENCE, Waiting

POINTS = 10  # logged lines a run
FORK = multiprocessing.get_context("fork")


def bench_claims(runs: int = 10_000, workers: int = 64) -> list[Cost]:
    """Raises UserError where a run was trained twice or not at all."""
    with tempfile.TemporaryDirectory() as folder:
        store = Store(folder)
        ids = planned(store, runs)
        began = time.perf_counter()
        trained = divided(store, ids, workers)
        seconds = time.perf_counter() - began
        twice = [id for id, count in trained.items() if count > 1]
        missing = set(ids) - set(trained)
        if twice or missing:
            raise UserError(
                f"{len(twice)} runs were trained twice, {len(missing)} not at all; the claims failed"
            )
        told, busy, _ = measured("report", NAME, "--store", folder)
        what = f"{runs:,} runs, {workers} workers"
        return [
            Cost(f"{what}: milliseconds a run", 1e3 * seconds / runs, "ms", 50.0),
            Cost(f"{what}: trained twice", len(twice), "", 0.0),
            Cost(f"{what}: the report", told, "s", 15.0),
            Cost(f"{what}: the report, processor", busy, "s", 15.0),
            Cost("a claim taken and let go", 1e3 * _of_one_claim(store), "ms", 1.0),
            Cost("takeover from a host that died", _of_a_takeover(store), "s", 30.0),
        ]


def divided(store: Store, ids: list[str], workers: int) -> Counter[str]:
    """Run -> how often it was trained."""
    told = [store.root / f"trained-{number}" for number in range(workers)]
    processes = [FORK.Process(target=work, args=(store, ids, path)) for path in told]
    for process in processes:
        process.start()
    trained: Counter[str] = Counter()
    for path, process in zip(told, processes, strict=True):
        process.join()
        if process.exitcode:
            raise UserError("a worker broke; what it said stands above")
        trained.update(path.read_text().split())
    return trained


def work(store: Store, ids: list[str], told: Path) -> None:
    """As a runner with one worker does: what another holds is asked for again."""
    worker = Drawing(
        pipe=cast(Any, None), warm=cast(Any, None), turn=nullcontext(), watch=Watch()
    )
    waiting = Waiting(Task(partial(_job, store, id)) for id in ids)
    trained = []
    while waiting:
        if not waiting.is_due:
            time.sleep(0.01)
            continue
        job = waiting.take("", ()).make()
        assert job, "each is made"
        match worker.answer(job):
            case Done():
                trained.append(job.run)
            case Busy():
                waiting.postpone(job, "")
    told.write_text("\n".join(trained))


def _job(store: Store, id: str) -> TrainJob:
    return TrainJob(id, {}, {}, store.run(id).folder, store.root)


@dataclass(frozen=True)
class Drawing(Worker):
    """A worker that draws what a run would leave."""

    def _trained(self, job: TrainJob, record: Record) -> Done:
        draw = np.random.default_rng(int(job.run, 16))
        return Done(write_run(record, float(draw.normal(3, 0.01)), POINTS, draw))


def _of_one_claim(store: Store, times: int = 500) -> float:
    """Seconds."""
    began = time.perf_counter()
    for number in range(times):
        held = take(store.root / "claims" / f"{number}" / ".claim", Watch())
        assert held, "nobody else is here"
        held.release()
    return (time.perf_counter() - began) / times


def _of_a_takeover(store: Store) -> float:
    """Seconds from the death of an owner, as another host sees it, until its run is another's."""
    place = store.root / "takeover" / ".claim"
    owner = FORK.Process(target=_hold, args=(place,))
    owner.start()
    while (held := standing(place)) is None or held.beats < 2:
        time.sleep(0.05)
    assert owner.pid, "it was started"
    os.kill(owner.pid, signal.SIGKILL)
    died = time.perf_counter()
    heir = FORK.Process(target=_inherit, args=(place,))
    heir.start()
    heir.join()
    owner.join()
    return time.perf_counter() - died


def _hold(place: Path) -> None:
    held = take(place, Watch())
    assert held, "nobody else is here"
    with held.beating():
        signal.pause()


def _inherit(place: Path) -> None:
    """Of another host: it cannot see whether the process lives."""
    claim._kernel = lambda: "elsewhere"  # type: ignore[assignment]
    watch = Watch()
    while take(place, watch) is None:
        time.sleep(PATIENCE)


def rate(costs: list[Cost]) -> str:
    """The first of them in words."""
    return f"{1e3 / costs[0].measured:,.0f} claims a second, by all workers together"
