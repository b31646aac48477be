"""What a person sees while a grid runs: a live table on a terminal, plain lines elsewhere, nothing when quiet."""

import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from ablab.core.store.result import FINISHED, Result
from ablab.experiments.plan.experiment import PlannedRun

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.progress import Progress, Task, TaskID
    from rich.table import Table


CADENCE = 30.0  # seconds between two lines of one run, off a terminal


@dataclass(frozen=True)
class ArmProgress:
    """One arm of a study."""

    cell: str
    done: int
    total: int  # as many as are planned; a widening adds more
    best: float | None  # until a trial has finished
    at: dict[str, Any]  # path -> value of that trial
    ends: dict[str, int]  # how the trials ended that did not finish, and how many did so
    last: dict[str, Any] = field(
        default_factory=dict
    )  # path -> value of the trial that ended last
    outcome: str = ""  # of that trial: its value, or how it ended


class Watcher(Protocol):
    """Shows what happens.  Every method returns at once."""

    def planned(self, total: int, done: int, jobs: int, steps: int) -> None:
        """steps: of all runs that are to be trained, together."""
        ...

    def started(self, run: PlannedRun) -> None: ...
    def logged(self, run: PlannedRun, step: int, scalars: dict[str, float]) -> None: ...
    def finished(self, run: PlannedRun, result: Result) -> None: ...
    def arms(self, arms: list[ArmProgress], metric: str) -> None: ...  # of a study
    def note(self, line: str) -> None: ...  # good to know
    def say(self, line: str) -> None: ...  # not to be missed


def watcher(metric: str, quiet: bool) -> "Quiet":
    if quiet:
        return Quiet()
    return Live(metric) if sys.stderr.isatty() else Lines(metric)


# -- nothing, and lines ------------------------------------------------------------------------------------------------
class Quiet:
    """Says only what must not be missed, on stderr."""

    def note(self, line: str) -> None: ...
    def planned(self, total: int, done: int, jobs: int, steps: int) -> None: ...
    def started(self, run: PlannedRun) -> None: ...
    def logged(self, run: PlannedRun, step: int, scalars: dict[str, float]) -> None: ...
    def arms(self, arms: list[ArmProgress], metric: str) -> None: ...
    def close(self) -> None: ...

    def finished(self, run: PlannedRun, result: Result) -> None:
        if result.status != FINISHED:
            self.say(line_of(run, result, ""))

    def say(self, line: str) -> None:
        print(line, file=sys.stderr, flush=True)


class Lines(Quiet):
    """Plain lines for logs and pipes: one for every run that ends, and at a cadence one for each that goes on."""

    def __init__(self, metric: str):
        self.metric = metric
        self.began = time.monotonic()
        self.total = 0
        self.done = 0
        self.marks: dict[str, Mark] = {}  # run id -> where it was when a line last said so
        self.losses: dict[str, str] = {}  # run id -> its last loss in words
        self.trials: dict[
            str, int
        ] = {}  # arm of a study -> its trials when a line last said so

    def planned(self, total: int, done: int, jobs: int, steps: int) -> None:
        self.total = total
        self.done = done
        left = total - done
        coming = f"{left} to train, {jobs} at a time" if left else "nothing to train"
        self.say(f"{total} runs: {done} done already, {coming}")

    def note(self, line: str) -> None:
        self.say(line)

    def started(self, run: PlannedRun) -> None:
        self.marks[run.id] = Mark(time.monotonic())

    def logged(self, run: PlannedRun, step: int, scalars: dict[str, float]) -> None:
        mark = self.marks.setdefault(run.id, Mark(time.monotonic()))
        said = self._said_of(run, scalars)
        pace = mark.at(step, run.recipe.steps)
        if pace:
            self.say(
                f"{run.cell}, seed {run.recipe.seed}: step {step}/{run.recipe.steps}, {said}{pace}"
            )

    def _said_of(self, run: PlannedRun, scalars: dict[str, float]) -> str:
        """Its last loss, which an evaluation between two windows does not carry, and its pace."""
        if "train/loss" in scalars:
            self.losses[run.id] = f"loss {scalars['train/loss']:.3f}  "
        return f"{self.losses.get(run.id, '')}{scalars.get('tokens_per_second', 0.0):,.0f} tokens/s"

    def arms(self, arms: list[ArmProgress], metric: str) -> None:
        for arm in arms:
            if arm.done != self.trials.get(arm.cell, 0):
                self.trials[arm.cell] = arm.done
                self.say(_trials_of(arm, metric))

    def finished(self, run: PlannedRun, result: Result) -> None:
        self.marks.pop(run.id, None)
        self.losses.pop(run.id, None)
        self.done += 1
        self.say(f"[{self.done}/{self.total}] {line_of(run, result, self.metric)}")

    def say(self, line: str) -> None:
        print(f"{self.clock()}{line}", file=sys.stderr, flush=True)

    def clock(self) -> str:
        return f"{time.monotonic() - self.began:6.0f}s  "


@dataclass
class Mark:
    """Where a run was when a line last spoke of it."""

    since: float  # seconds on the clock
    step: int = 0

    def at(self, step: int, steps: int) -> str:
        """The time left in words where a line is due again; empty before, and at the end, which has its own."""
        now = time.monotonic()
        elapsed = now - self.since
        if elapsed < CADENCE or not self.step < step < steps:
            return ""
        left = elapsed / (step - self.step) * (steps - step)
        self.since = now
        self.step = step
        return f", about {duration(left)} left"


def _trials_of(arm: ArmProgress, metric: str) -> str:
    """Trial 5 of 8 of - muon: optim.lr=0.008 -> 3.4012; best val/loss 3.2109 at optim.lr=0.004."""
    tried = (
        f"trial {arm.done} of {arm.total} of {arm.cell}: {_point(arm.last)} -> {arm.outcome}"
    )
    if arm.best is None:
        return f"{tried}; none has finished"
    return f"{tried}; best {metric} {arm.best:.4f} at {_point(arm.at)}"


def _point(values: dict[str, Any]) -> str:
    return ", ".join(f"{path}={_short(value)}" for path, value in values.items())


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def line_of(run: PlannedRun, result: Result, metric: str) -> str:
    head = f"{run.title}, seed {run.recipe.seed}"
    if result.status != FINISHED:
        return f"{head}: {result.status.upper()}: {result.error}"
    value = result.final(metric)
    told = "not left" if value is None else f"{value:.4f}"
    pace = f"{result.tokens_per_second:,.0f} tokens/s, {result.seconds:.0f} s"
    return f"{head}: {metric} {told}, {pace}"


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


# -- a terminal --------------------------------------------------------------------------------------------------------
class Live(Lines):
    """A bar for the grid and one for each run in hand, with rates and the time left; above them the arms of a study."""

    def __init__(self, metric: str):
        super().__init__(metric)
        self.arms_above: list[Table] = []  # at most one
        self.arms_pace = Pace()
        self.bars = _bars_below(self.arms_above)
        self.grid = self.bars.add_task("grid", total=None, note="")
        self.tasks: dict[str, TaskID] = {}  # run id -> its bar
        self.bars.start()

    def planned(self, total: int, done: int, jobs: int, steps: int) -> None:
        super().planned(total, done, jobs, steps)
        self.bars.reset(self.grid, description=self._runs(), total=steps)

    def started(self, run: PlannedRun) -> None:
        title = f"{run.title} · seed {run.recipe.seed}"
        self.tasks[run.id] = self.bars.add_task(title, total=run.recipe.steps, note="")

    def logged(self, run: PlannedRun, step: int, scalars: dict[str, float]) -> None:
        task = self.tasks[run.id]
        gained = step - self._bar(task).completed
        note = self._said_of(run, scalars)
        self.bars.update(task, completed=step, note=note)
        self.bars.update(self.grid, advance=gained)

    def finished(self, run: PlannedRun, result: Result) -> None:
        task = self.tasks.pop(run.id, None)
        if task is not None:
            unseen = run.recipe.steps - self._bar(task).completed
            self.bars.update(self.grid, advance=unseen)
            self.bars.remove_task(task)
        super().finished(run, result)
        self.bars.update(self.grid, description=self._runs())

    def arms(self, arms: list[ArmProgress], metric: str) -> None:
        done = sum(arm.done for arm in arms)
        total = sum(arm.total for arm in arms)
        left = self.arms_pace.left(done, total)
        title = f"{done} of {total} trials{left}"
        self.arms_above[:] = [_table_of(arms, metric, title)]

    def say(self, line: str) -> None:
        from rich.text import Text

        text = Text.assemble((self.clock(), "dim"), line)
        self.bars.console.print(text, soft_wrap=True)

    def close(self) -> None:
        self.bars.stop()

    def _runs(self) -> str:
        return f"{self.done}/{self.total} runs"

    def _bar(self, task: "TaskID") -> "Task":
        return self.bars.tasks[self.bars.task_ids.index(task)]


@dataclass
class Pace:
    """How fast trials have ended since the first look."""

    began: float | None = None  # seconds on the clock at the first look
    before: int = 0  # trials that were done then

    def left(self, done: int, total: int) -> str:
        """In words; nothing while no trial has ended since, and when all have."""
        now = time.monotonic()
        if self.began is None:
            self.began = now
            self.before = done
        if not self.before < done < total:
            return ""
        seconds_each = (now - self.began) / (done - self.before)
        return f", about {duration(seconds_each * (total - done))} left"


def _bars_below(above: "list[Table]") -> "Progress":
    """Progress bars on stderr that leave nothing behind, under whatever `above` holds when they are drawn."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    class Bars(Progress):
        def get_renderables(self) -> "Iterable[RenderableType]":
            yield from above
            yield from super().get_renderables()

    return Bars(
        TextColumn("{task.description}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        transient=True,
    )


def _table_of(arms: list[ArmProgress], metric: str, title: str) -> "Table":
    from rich.table import Table

    table = Table(
        "arm",
        "trials",
        f"best {metric}",
        "at",
        box=None,
        header_style="bold",
        title=title,
        title_justify="left",
    )
    for arm in arms:
        ends = "".join(f", {count} {state}" for state, count in arm.ends.items())
        trials = f"{arm.done}/{arm.total}{ends.replace('_', ' ')}"
        best = "–" if arm.best is None else f"{arm.best:.4f}"
        table.add_row(arm.cell, trials, best, _point(arm.at))
    return table
