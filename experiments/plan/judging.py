"""What the runs of an experiment are asked at their end, and whether its metric is among that."""

from dataclasses import dataclass
from pathlib import Path

from ablab.core.errors import UserError
from ablab.experiments.evaluate.names import asked_of, is_evaluation
from ablab.experiments.plan.sheets import Sheet


@dataclass(frozen=True)
class Judging:
    """Plain data: it crosses a pipe.  suites: what is asked -> where it lies.  metric: '' where none of it judges."""

    suites: dict[str, str]
    limit: int | None = None
    metric: str = ""


def judging_of(sheet: Sheet, folder: Path) -> Judging | None:
    """None where nothing is asked.  folder: of the sheet, from which its paths are meant.

    Raises UserError for a metric that `evaluate` does not ask for.
    """
    suites = {
        suite: str(folder.absolute() / Path(path).expanduser())
        for suite, path in sheet.evaluate.suites.items()
    }
    limit = sheet.evaluate.max_per_task
    metric = sheet.metric.name
    if not is_evaluation(metric):
        return Judging(suites, limit) if suites else None
    asked = asked_of(metric)
    if asked.suite not in suites:
        raise UserError(
            f"metric {metric} is measured at the end of each run; say on what: evaluate: {{{asked.suite}: PATH}}"
        )
    if asked.limit != limit:
        wanted = "drop evaluate.max_per_task"
        if asked.limit:
            wanted = f"write evaluate: {{max_per_task: {asked.limit}}}"
        raise UserError(
            f"metric {metric} is of {asked.limit or 'all'} items a task, but evaluate.max_per_task={limit}; {wanted}"
        )
    return Judging(suites, limit, metric)
