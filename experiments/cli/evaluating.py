"""How far `ablab eval` is: a bar on a terminal, elsewhere a line now and then."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from ablab.experiments.evaluate.evaluating import Watch

EVERY = 10.0  # seconds between two lines


class Pace:
    """Of what this process asked: answers that were known cost nothing now."""

    def __init__(self) -> None:
        self.began = perf_counter()
        self.known: int | None = None

    def told(self, done: int, total: int) -> str:
        """`120 of 400 items, 8.2 items/s, 34 s left`."""
        if self.known is None:
            self.known = done
            self.began = perf_counter()
        words = [f"{done:,} of {total:,} items"]
        asked = done - self.known
        if asked:
            rate = asked / max(perf_counter() - self.began, 1e-9)
            words.append(f"{rate:,.1f} items/s")
            if done < total:
                words.append(f"{(total - done) / rate:,.0f} s left")
        return ", ".join(words)


class Lines:
    """Off a terminal: a line every EVERY seconds, on stderr."""

    def __init__(self, title: str, every: float = EVERY) -> None:
        self.title = title
        self.every = every
        self.pace = Pace()
        self.last = perf_counter()

    def __call__(self, done: int, total: int) -> None:
        told = self.pace.told(done, total)
        if perf_counter() - self.last >= self.every:
            self.last = perf_counter()
            typer.echo(f"{self.title}: {told}", err=True)


@contextmanager
def progress(title: str, quiet: bool) -> Iterator["Watch"]:
    """What `evaluate` calls as answers come."""
    if quiet:
        yield lambda done, total: None
        return
    if not sys.stderr.isatty():
        yield Lines(title)
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

    told = TextColumn("{task.fields[told]}")
    columns = (title, BarColumn(), TaskProgressColumn(), told)
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=None, told="")
        pace = Pace()
        yield lambda done, total: bar.update(
            task, completed=done, total=total, told=pace.told(done, total)
        )
