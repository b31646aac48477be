"""How a study stands while it runs: trials done and the best so far, for each arm."""

from typing import Any

from ablab.analysis.tuning import COMPLETE
from ablab.core.record import FINISHED, Result
from ablab.experiments.progress import Line


class Standing:
    """A watcher that passes everything on, and after each run shows how the arms stand."""

    def __init__(self, watcher: Any, arms: list[Any], metric: Any):
        self.watcher, self.arms, self.metric = watcher, arms, metric
        self.results: dict[str, Result] = {}  # of the runs of this generation, by run id
        self.trials: list[Any] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.watcher, name)

    def generation(self, trials: list[Any], results: dict[str, Result]) -> None:
        """The trials that come next, and the results that some of their runs have already."""
        self.trials, self.results = trials, results
        self.watcher.arms(self.lines(), self.metric.name)

    def finished(self, run: Any, result: Result) -> None:
        self.watcher.finished(run, result)
        self.results[run.id] = result
        self.watcher.arms(self.lines(), self.metric.name)

    def lines(self) -> list[Line]:
        return [self._line(arm) for arm in self.arms]

    def _line(self, arm: Any) -> Line:
        spent = arm.spent()
        ended = [(trial.state, trial.value, trial.params) for trial in spent]
        for trial in (one for one in self.trials if one.cell is arm.cell and one.number >= len(spent)):
            results = [self.results.get(run.id) for run in trial.runs]
            if all(results):
                ended.append(_outcome(results, self.metric.name) + (trial.params,))
        better = min if self.metric.better == "lower" else max
        best = better((one for one in ended if one[0] == COMPLETE), key=lambda one: one[1], default=(None, None, {}))
        states = [state for state, _, _ in ended if state != COMPLETE]
        return Line(arm.cell.name, len(ended), max(arm.total, len(ended)), best[1], best[2], {state: states.count(state) for state in dict.fromkeys(states)})


def _outcome(results: list[Result], metric: str) -> tuple[str, float | None]:
    """State and value of a trial: the mean over its seeds, or how the first of them failed."""
    if worst := next((result.status for result in results if result.status != FINISHED), None):
        return worst, None
    return COMPLETE, sum(result.metrics[metric] for result in results) / len(results)
