"""The runner: from the runs that an experiment wants to results on disk.  Asking twice runs once.

The parent plans, watches and tracks; warm worker processes train.  A run that has a result is never run again, a run
that another process holds is waited for, a killed run resumes, a crash is a record and the grid goes on.
"""

import glob
import importlib.util
import multiprocessing
import os
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field, replace
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, Protocol

import msgspec

from ablab.ablations.registry import discover
from ablab.core.errors import UserError
from ablab.core.files import write_atomically
from ablab.core.recipe import Recipe, plain
from ablab.core.record import FAILED, OUT_OF_MEMORY, Plan, Planned, Record, Result, Store
from ablab.core.runtime import Runtime, code_fingerprint
from ablab.experiments.experiment import Experiment, Run, merged_plan
from ablab.experiments.worker import Job, serve

RETRY = (FAILED, OUT_OF_MEMORY)  # asked for again, these run again: code and runtime may have changed


class Watcher(Protocol):
    """Shows what happens.  Every method returns at once."""

    def planned(self, total: int, done: int, jobs: int) -> None: ...
    def started(self, run: Run) -> None: ...
    def logged(self, run: Run, step: int, scalars: dict[str, float]) -> None: ...
    def finished(self, run: Run, result: Result) -> None: ...
    def say(self, line: str) -> None: ...


@dataclass
class Outcome:
    """What one call of `execute` did: run ids by what became of them."""

    trained: list[str] = field(default_factory=list)
    reused: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    inert: list[str] = field(default_factory=list)  # cells


def result_of(record: Record, say: Callable[[str], None]) -> Result | None:
    """The result of a run, or None when it has to run (again).  A damaged record is named and counts as none."""
    try:
        result = record.result()
    except UserError as damage:
        say(f"{damage}")
        record.result_path.rename(record.result_path.with_suffix(".damaged"))
        return None
    return None if result and result.status in RETRY else result


def execute(
    experiment: Experiment, store: Store, runs: list[Run], watcher: Watcher, jobs: int | None = None,
    plugins: Iterable[str] = (), mlflow: bool = True, run_inert: bool = False, only: list[Run] | None = None,
) -> Outcome:  # fmt: skip
    """Train what is missing of `runs` (or of `only`), and return what was done.  Raises UserError, KeyboardInterrupt."""
    plan = merged_plan(experiment, runs, store)
    store.write_plan(plan)
    unique = {run.id: run for run in (runs if only is None else only)}
    results = {id: result_of(store.run(id), watcher.say) for id in unique}
    outcome = Outcome(reused=[id for id, result in results.items() if result])
    todo = [run for id, run in unique.items() if not results[id]]
    jobs = min(jobs or default_jobs(experiment.sheet.runtime), max(len(todo), 1))
    watcher.planned(len(unique), len(outcome.reused), jobs if todo else 0)
    trackers = _trackers(store, plan, watcher.say) if mlflow else None
    if todo:
        pool = Pool(experiment, store, watcher, jobs, list(plugins), trackers)
        try:
            if not run_inert:
                outcome.inert = pool.inert_cells(todo)
                barred = {cell for cell, _ in outcome.inert}
                for cell, reference in outcome.inert:
                    watcher.say(f"INERT: {cell} computes the same bits as {reference}; not run (--run-inert runs it all the same)")
                store.write_plan(replace(plan, rows=[_noted(row, dict(outcome.inert)) for row in plan.rows]))
                todo = [run for run in todo if run.cell not in barred]
            pool.train(todo, outcome)
        finally:
            pool.close()
    if trackers:
        trackers.finish()
    return outcome


def _trackers(store: Store, plan: Plan, say: Callable[[str], None]) -> "Trackers | None":
    if importlib.util.find_spec("mlflow"):
        return Trackers(store, plan, say)
    say("mlflow is not installed here; the run folders are complete without it, and `ablab sync` can show them later")
    return None


def _noted(row: Planned, inert: dict[str, str]) -> Planned:
    return replace(row, note=f"inert: same bits as {inert[row.cell]}") if row.cell in inert else row


def default_jobs(runtime: Runtime) -> int:
    """One worker a GPU; without one, as many as the cores carry at `threads` each."""
    gpus = 0 if runtime.device == "cpu" else visible_gpus()
    return gpus or max((os.cpu_count() or 1) // runtime.threads, 1)


def visible_gpus() -> int:
    """Counted without importing torch."""
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    return len([one for one in listed.split(",") if one.strip()]) if listed is not None else len(glob.glob("/dev/nvidia[0-9]*"))


class Pool:
    """Warm workers and the runs they hold."""

    def __init__(self, experiment: Experiment, store: Store, watcher: Watcher, jobs: int, plugins: list[str], trackers: "Trackers | None"):
        self.experiment, self.store, self.watcher, self.plugins, self.trackers = experiment, store, watcher, plugins, trackers
        self.data = data_folder(experiment.base, store, watcher.say)
        self.context = multiprocessing.get_context("spawn")
        self.workers: dict[Any, Any] = {}  # pipe -> process
        self.holds: dict[Any, Run] = {}  # pipe -> the run in hand
        self.idle: list[Any] = []  # pipes of workers that are ready and hold nothing
        for slot in range(jobs):
            self._start(slot)

    def _start(self, slot: int) -> None:
        ours, theirs = self.context.Pipe()
        gpus = 0 if self.experiment.sheet.runtime.device == "cpu" else visible_gpus()
        environment = {"CUDA_VISIBLE_DEVICES": str(slot % gpus)} if gpus > 1 else {}
        process = self.context.Process(target=serve, args=(theirs, self.plugins, environment), daemon=True)
        process.slot = slot
        process.start()
        theirs.close()
        self.workers[ours] = process

    def close(self) -> None:
        for pipe, process in self.workers.items():
            pipe.close()
            process.terminate()
        for process in self.workers.values():
            process.join(timeout=10)

    # -- liveness --------------------------------------------------------------------------------------------------
    def inert_cells(self, todo: list[Run]) -> list[tuple[str, str]]:
        """(cell, reference) of every cell among `todo` that computes what its reference computes."""
        reference_of = {cell.name: cell.reference for cell in self.experiment.cells}
        wanted = {name for run in todo if reference_of[run.cell] for name in (run.cell, reference_of[run.cell])}
        first = {run.cell: run for run in self.experiment.runs(self.experiment.sheet.seeds[:1]) if run.cell in wanted}
        traces = self._traces(first)
        pairs = [(cell, reference_of[cell]) for cell in first if reference_of[cell]]
        return [(cell, reference) for cell, reference in pairs if traces.get(cell) and traces[cell] == traces.get(reference)]

    def _traces(self, first: dict[str, Run]) -> dict[str, str]:
        path, code = self.store.root / "liveness.json", code_fingerprint()
        known = msgspec.json.decode(path.read_bytes(), type=dict[str, str]) if path.exists() else {}
        missing = {run.id: run for run in first.values() if f"{run.id}/{code}" not in known}
        if missing:
            self.watcher.say(f"checking that {len(missing)} arms are alive ...")
            self._work(list(missing.values()), "trace", lambda word, run, payload: known.update({f"{run.id}/{code}": payload}))
            write_atomically(path, msgspec.json.encode(known))
        return {cell: known[f"{run.id}/{code}"] for cell, run in first.items()}

    # -- training --------------------------------------------------------------------------------------------------
    def train(self, todo: list[Run], outcome: Outcome) -> None:
        def heard(word: str, run: Run, payload: Any) -> None:
            if word == "log":
                self.watcher.logged(run, payload[0], payload[1])
                if self.trackers:
                    self.trackers.log(run.id, *payload)
                return
            (outcome.failed if payload.status in RETRY else outcome.trained).append(run.id)
            self.watcher.finished(run, payload)
            if self.trackers:
                self.trackers.close(run.id)

        self._work(todo, "train", heard)

    def _work(self, runs: list[Run], kind: str, heard: Callable[[str, Run, Any], None]) -> None:
        """Hand out runs until each is answered; a dead worker's run is a failure, one held elsewhere is asked again."""
        queue, open_runs, busy = deque(runs), {run.id: run for run in runs}, {}
        while open_runs:
            while queue and self.idle:
                self._give(self.idle.pop(), queue.popleft(), kind)
            for pipe in wait(list(self.workers), timeout=0.5):
                try:
                    word, id, payload = pipe.recv()
                except (EOFError, ConnectionResetError):
                    if run := self._bury(pipe, kind):
                        heard("done", open_runs.pop(run.id), self.store.run(run.id).result())
                    continue
                if word == "log":
                    heard(word, open_runs[id], payload)
                    continue
                if word == "warning":
                    self.watcher.say(payload)
                    continue
                if word == "refused":
                    raise UserError(payload)
                self.holds.pop(pipe, None)
                self.idle.append(pipe)
                if word == "busy":
                    self._wait_for(open_runs[id], busy)
                elif word in ("done", "traced"):
                    heard(word, open_runs.pop(id), payload)
            for id in [id for id, due in busy.items() if due < time.monotonic()]:
                busy[id] = float("inf")
                queue.append(open_runs[id])

    def _wait_for(self, run: Run, busy: dict[str, float]) -> None:
        if run.id not in busy:
            self.watcher.say(f"{run.cell}, seed {run.recipe.seed}: another process holds run {run.id}; waiting for it")
        busy[run.id] = time.monotonic() + 1.0

    def _give(self, pipe: Any, run: Run, kind: str) -> None:
        self.holds[pipe] = run
        about = {"experiment": self.experiment.name, "params": self.experiment.params(run), "again": self._again(run)}
        runtime = asdict(self.experiment.sheet.runtime)
        pipe.send(Job(kind, run.id, plain(run.recipe), runtime, self.store.run(run.id).folder, self.data, about))
        if kind == "train":
            self.watcher.started(run)

    def _again(self, run: Run) -> bool:
        result = self.store.run(run.id).result()
        return bool(result and result.status in RETRY)

    def _bury(self, pipe: Any, kind: str) -> Run | None:
        """A worker died: record what it held as failed, and start another in its place."""
        process, run = self.workers.pop(pipe), self.holds.pop(pipe, None)
        self.idle = [one for one in self.idle if one is not pipe]
        process.join(timeout=10)
        self._start(process.slot)
        if not run:
            raise UserError(f"a worker ended with exit code {process.exitcode} before it could start; run one cell with --jobs 1 --debug to see why")
        cause = f"the worker died with exit code {process.exitcode} (-9: killed, often for lack of host memory); run again to resume from its last checkpoint"
        if kind != "train":
            raise UserError(f"checking {run.cell}: {cause}")
        record = self.store.run(run.id)
        if not record.result():
            record.finish(Result(run.id, FAILED, 0, 0, error=cause))
        return run


def data_folder(recipe: Recipe, store: Store, say: Callable[[str], None]) -> Path:
    """The token folder of a recipe; the shipped text is tokenized on first use.  Raises UserError where there is none."""
    from ablab.core.corpus import ensure_embedded, load_meta

    folder = store.root / "data" / recipe.data.name
    if recipe.data.name == "embedded":
        if not folder.exists():
            say(f"tokenizing the shipped text into {folder} (once, about 15 s) ...")
        return ensure_embedded(store.root)
    load_meta(folder)
    return folder


class Trackers:
    """MLflow, as a view: one tracker for each live run, and a sync at the end for everything that it lacks."""

    def __init__(self, store: Store, plan: Plan, say: Callable[[str], None]):
        from ablab.experiments.mlflow_view import MlflowView

        self.store, self.plan, self.view, self.live = store, plan, MlflowView(store, warn=say), {}

    def log(self, run: str, step: int, scalars: dict[str, float], seconds: float) -> None:
        from ablab.experiments.mlflow_tracker import MlflowTracker, card_of, replay

        if run not in self.live:
            self.live[run] = MlflowTracker(self.view)
            row = next(row for row in self.plan.rows if row.run == run)
            replay(self.store.run(run), card_of(self.store, self.plan, row), self.live[run])
        self.live[run].log(step, scalars, seconds)

    def close(self, run: str) -> None:
        from ablab.experiments.mlflow_tracker import summary_of

        if (tracker := self.live.pop(run, None)) and (result := self.store.run(run).result()):
            tracker.close(result.status, summary_of(result))

    def finish(self) -> None:
        """Show what was not trained here just now: reused runs, and cells that share a run."""
        from ablab.experiments.mlflow_tracker import sync

        if self.view.ensure():
            sync(self.store, [self.plan.name])


def plugins_of(folders: Iterable[str]) -> list[str]:
    """Discover every intervention; returns the plugin folders as absolute paths, for the workers."""
    folders = [str(Path(folder).resolve()) for folder in folders]
    discover(folders)
    return folders
