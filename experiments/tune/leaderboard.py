"""How a study stands while it runs: trials done and the best so far, for each arm."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from ablab.core.store.result import FINISHED, Result
from ablab.core.store.study_record import COMPLETE
from ablab.experiments.run.progress import ArmProgress


class Standing:
    """A watcher that passes everything on, and after each run shows how the arms stand."""

    def __init__(self, watcher: Any, arms: list[Any], metric: Any):
        self.watcher, self.arms, self.metric = watcher, arms, metric
        self.lines: dict[str, ArmProgress] = {}  # by cell
        self.results: dict[str, Result] = {}  # of the runs of this generation, by run id
        self.waiting: dict[str, list[Any]] = {}  # run id -> the trials that it belongs to

    def __getattr__(self, name: str) -> Any:
        return getattr(self.watcher, name)

    def generation(self, trials: list[Any], results: Mapping[str, Result]) -> None:
        """The trials that come next, and the results that some of their runs have already."""
        self.lines = {
            arm.cell.name: ArmProgress(arm.cell.name, 0, arm.total, None, {}, {})
            for arm in self.arms
        }
        self.results, self.waiting = dict(results), {}
        for spent in (one for arm in self.arms for one in arm.spent()):
            self._count(spent.cell, spent.state, spent.value, spent.params)
        for trial in trials:
            for run in trial.runs:
                self.waiting.setdefault(run.id, []).append(trial)
            self._ended(trial)
        self.watcher.arms(list(self.lines.values()), self.metric.name)

    def finished(self, run: Any, result: Result) -> None:
        self.watcher.finished(run, result)
        self.results[run.id] = result
        for trial in self.waiting.get(run.id, ()):
            self._ended(trial)
        self.watcher.arms(list(self.lines.values()), self.metric.name)

    def _ended(self, trial: Any) -> None:
        """Count a trial whose runs have all ended: its value is the mean over them, unless one of them failed."""
        results = [self.results.get(run.id) for run in trial.runs]
        if not all(results):
            return
        if failed := next(
            (result.status for result in results if result.status != FINISHED), None
        ):
            return self._count(trial.cell.name, failed, None, trial.params)
        self._count(
            trial.cell.name,
            COMPLETE,
            sum(result.metrics[self.metric.name] for result in results) / len(results),
            trial.params,
        )

    def _count(
        self, cell: str, state: str, value: float | None, params: dict[str, Any]
    ) -> None:
        line = self.lines[cell]
        line = replace(line, done=line.done + 1, total=max(line.total, line.done + 1))
        if state != COMPLETE:
            line = replace(line, ends=line.ends | {state: line.ends.get(state, 0) + 1})
        elif line.best is None or (
            value < line.best if self.metric.better == "lower" else value > line.best
        ):
            line = replace(line, best=value, at=params)
        self.lines[cell] = line
