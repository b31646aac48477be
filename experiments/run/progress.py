"""What a person sees while a grid runs: a live table on a terminal, plain lines elsewhere, nothing when quiet."""

import sys
import time
from dataclasses import dataclass
from typing import Any

from ablab.core.store.record import FINISHED, Result
from ablab.experiments.plan.experiment import Run


@dataclass(frozen=True)
class Line:
    """One arm.  `best` is None until a trial has finished; `ends` counts the trials that did not, by how they ended."""

    cell: str
    done: int
    total: int  # as many as are planned; a widening adds more
    best: float | None
    at: dict[str, Any]
    ends: dict[str, int]


class Quiet:
    """Says only what must not be missed, on stderr."""

    def note(self, line: str) -> None: ...
    def planned(self, total: int, done: int, jobs: int) -> None: ...
    def started(self, run: Run) -> None: ...
    def logged(self, run: Run, step: int, scalars: dict[str, float]) -> None: ...
    def arms(self, lines: list[Line], metric: str) -> None: ...
    def close(self) -> None: ...

    def finished(self, run: Run, result: Result) -> None:
        if result.status != FINISHED:
            self.say(line_of(run, result, ""))

    def say(self, line: str) -> None:
        print(line, file=sys.stderr, flush=True)


class Lines(Quiet):
    """One plain line for every run that ends: for logs and pipes."""

    def __init__(self, metric: str):
        self.metric, self.began, self.total, self.done = metric, time.monotonic(), 0, 0

    def planned(self, total: int, done: int, jobs: int) -> None:
        self.total, self.done = total, done
        self.say(
            f"{total} runs: {done} done already, "
            + (
                f"{total - done} to train, {jobs} at a time"
                if done < total
                else "nothing to train"
            )
        )

    def note(self, line: str) -> None:
        self.say(line)

    def finished(self, run: Run, result: Result) -> None:
        self.done += 1
        self.say(f"[{self.done}/{self.total}] {line_of(run, result, self.metric)}")

    def say(self, line: str) -> None:
        print(f"{time.monotonic() - self.began:6.0f}s  {line}", file=sys.stderr, flush=True)


def line_of(run: Run, result: Result, metric: str) -> str:
    head = f"{run.cell}, seed {run.recipe.seed}"
    if result.status != FINISHED:
        return f"{head}: {result.status.upper()}: {result.error}"
    return f"{head}: {metric} {result.metrics.get(metric, float('nan')):.4f}, {result.tokens_per_second:,.0f} tokens/s, {result.seconds:.0f} s"


class Live(Lines):
    """A bar for the grid and one for each run in hand, with rates and the time left."""

    def __init__(self, metric: str):
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )

        super().__init__(metric)

        class Bars(Progress):
            """The arms of a study stand above the bars."""

            def get_renderables(bars):
                yield from self.standing
                yield from Progress.get_renderables(bars)

        self.standing: list[Any] = []  # the table of the arms, if there are any
        self.pace: tuple[float, int] | None = (
            None  # when the table was first drawn, and how many trials were done then
        )
        self.bars = Bars(
            TextColumn("{task.description}"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        self.grid = self.bars.add_task("grid", total=None, note="")
        self.tasks: dict[str, int] = {}
        self.bars.start()

    def planned(self, total: int, done: int, jobs: int) -> None:
        super().planned(total, done, jobs)
        self.left, self.steps = total - done, 0
        self.bars.reset(self.grid, description=self._runs())
        self.bars.tasks[0].total = (
            None if self.left else 0
        )  # None: a bar that waits; reset() takes it for "as before"

    def started(self, run: Run) -> None:
        steps = run.recipe.steps
        if not self.steps:
            self.steps = steps
            self.bars.update(self.grid, total=self.left * steps)
        self.tasks[run.id] = self.bars.add_task(
            f"{run.cell} · seed {run.recipe.seed}", total=steps, note=""
        )

    def logged(self, run: Run, step: int, scalars: dict[str, float]) -> None:
        task = self.tasks[run.id]
        before = self.bars.tasks[self.bars.task_ids.index(task)].completed
        rate = scalars.get("tokens_per_second", 0.0)
        self.bars.update(
            task, completed=step, note=f"loss {scalars['train/loss']:.3f}  {rate:,.0f} tokens/s"
        )
        self.bars.update(self.grid, advance=step - before)

    def finished(self, run: Run, result: Result) -> None:
        if (task := self.tasks.pop(run.id, None)) is not None:
            before = self.bars.tasks[self.bars.task_ids.index(task)].completed
            self.bars.update(self.grid, advance=run.recipe.steps - before)
            self.bars.remove_task(task)
        super().finished(run, result)
        self.bars.update(self.grid, description=self._runs())

    def arms(self, lines: list[Line], metric: str) -> None:
        from rich.table import Table

        done, total, now = (
            sum(line.done for line in lines),
            sum(line.total for line in lines),
            time.monotonic(),
        )
        began, before = self.pace = self.pace or (now, done)
        left = (
            f", about {_span((now - began) / (done - before) * (total - done))} left"
            if before < done < total
            else ""
        )
        table = Table(
            "arm",
            "trials",
            f"best {metric}",
            "at",
            box=None,
            header_style="bold",
            title=f"{done} of {total} trials{left}",
            title_justify="left",
        )
        for line in lines:
            ends = "".join(
                f", {count} {state.replace('_', ' ')}" for state, count in line.ends.items()
            )
            at = ", ".join(f"{path}={value}" for path, value in line.at.items())
            table.add_row(
                line.cell,
                f"{line.done}/{line.total}{ends}",
                "–" if line.best is None else f"{line.best:.4f}",
                at,
            )
        self.standing = [table]

    def _runs(self) -> str:
        return f"{self.done}/{self.total} runs"

    def say(self, line: str) -> None:
        from rich.text import Text

        self.bars.console.print(
            Text.assemble((f"{time.monotonic() - self.began:6.0f}s  ", "dim"), line),
            soft_wrap=True,
        )

    def close(self) -> None:
        self.bars.stop()


def _span(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 90
        else f"{seconds / 60:.0f} min"
        if seconds < 5400
        else f"{seconds / 3600:.1f} h"
    )


def watcher(metric: str, quiet: bool) -> Quiet:
    if quiet:
        return Quiet()
    return Live(metric) if sys.stderr.isatty() else Lines(metric)
