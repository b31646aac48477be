"""How a study stands while it runs: for each cell, the trials done, the best so far, and how the others ended."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from ablab.core.store.result import FAILED, FINISHED, Result, mean_of
from ablab.core.store.study_record import COMPLETE
from ablab.experiments.plan.experiment import PlannedRun
from ablab.experiments.plan.sheets import Metric
from ablab.experiments.run.progress import ArmProgress, Watcher
from ablab.experiments.tune.cell_search import CellSearch
from ablab.experiments.tune.space import Point
from ablab.experiments.tune.trials import Candidate


class Leaderboard(Watcher):
    """A watcher that passes everything on, and after each run shows how the cells stand."""

    def __init__(self, watcher: Watcher, searches: Sequence[CellSearch], metric: Metric):
        self.watcher = watcher
        self.searches = searches
        self.metric = metric
        self.lines: dict[str, ArmProgress] = {}  # by cell
        self.results: dict[str, Result] = {}  # of the runs of this generation, by run id
        self.waiting: dict[
            str, list[Candidate]
        ] = {}  # run id -> the candidates that it answers

    # -- what it adds ----------------------------------------------------------------------------------------------
    def generation(
        self, candidates: Sequence[Candidate], results: Mapping[str, Result]
    ) -> None:
        """The candidates that come next, and the results that some of their runs have already."""
        self.lines = {}
        for search in self.searches:
            cell = search.cell.name
            self.lines[cell] = ArmProgress(
                cell, done=0, total=search.total, best=None, at={}, ends={}
            )
        self.results = dict(results)
        self.waiting = {}
        for search in self.searches:
            for spent in search.spent():
                self._count(spent.cell, spent.state, spent.value, spent.params)
        for candidate in candidates:
            for run in candidate.runs:
                self.waiting.setdefault(run.id, []).append(candidate)
            self._count_if_ended(candidate)
        self._show()

    def finished(self, run: PlannedRun, result: Result) -> None:
        self.watcher.finished(run, result)
        self.results[run.id] = result
        for candidate in self.waiting.get(run.id, ()):
            self._count_if_ended(candidate)
        self._show()

    def _show(self) -> None:
        self.watcher.arms(list(self.lines.values()), self.metric.name)

    def _count_if_ended(self, candidate: Candidate) -> None:
        """Count a candidate whose runs have all ended: its value is the mean over them, unless one of them failed."""
        if not all(run.id in self.results for run in candidate.runs):
            return
        results = [self.results[run.id] for run in candidate.runs]
        cell, point = candidate.cell.name, candidate.params
        for result in results:
            if result.status != FINISHED:
                return self._count(cell, result.status, None, point)
        mean = mean_of(results, self.metric.name)
        self._count(cell, FAILED if mean is None else COMPLETE, mean, point)

    def _count(self, cell: str, state: str, value: float | None, point: Point) -> None:
        line = self.lines[cell]
        done = line.done + 1
        outcome = state if value is None else f"{value:.4f}"
        line = replace(
            line, done=done, total=max(line.total, done), last=point, outcome=outcome
        )
        if state != COMPLETE or value is None:
            ends = line.ends | {state: line.ends.get(state, 0) + 1}
            line = replace(line, ends=ends)
        elif self._beats(value, line.best):
            line = replace(line, best=value, at=point)
        self.lines[cell] = line

    def _beats(self, value: float, best: float | None) -> bool:
        if best is None:
            return True
        return value < best if self.metric.better == "lower" else value > best

    # -- what it passes on -----------------------------------------------------------------------------------------
    def planned(self, total: int, done: int, jobs: int, steps: int) -> None:
        self.watcher.planned(total, done, jobs, steps)

    def started(self, run: PlannedRun) -> None:
        self.watcher.started(run)

    def logged(self, run: PlannedRun, step: int, scalars: dict[str, float]) -> None:
        self.watcher.logged(run, step, scalars)

    def arms(self, arms: list[ArmProgress], metric: str) -> None:
        self.watcher.arms(arms, metric)

    def note(self, line: str) -> None:
        self.watcher.note(line)

    def say(self, line: str) -> None:
        self.watcher.say(line)
