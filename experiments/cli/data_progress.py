"""How far `ablab data tokenize` is: a bar on a terminal, elsewhere a line now and then."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from ablab.core.data.corpus import Done

EVERY = 10.0  # seconds between two lines
MEGA = 1e6


class Pace:
    """Rates and times left, of what this process did: what an earlier try had done cost nothing now."""

    def __init__(self) -> None:
        self.began = perf_counter()

    def told(self, done: "Done") -> str:
        """`1,204 MB of text, 301 M tokens, 84.1 MB/s, 12 min left`."""
        seconds = max(perf_counter() - self.began, 1e-9)
        rate = (done.text - done.kept) / seconds / MEGA
        words = [
            f"{done.text / MEGA:,.0f} MB of text",
            f"{done.tokens / MEGA:,.1f} M tokens",
            f"{rate:.1f} MB/s",
        ]
        if left := self.left(done, seconds):
            words.append(left)
        return ", ".join(words)

    def left(self, done: "Done", seconds: float) -> str:
        worked = done.text - done.kept
        if not (0 < done.share < 1 and worked):
            return ""
        whole = done.text / done.share
        return f"{_time((whole - done.text) / worked * seconds)} left"


def _time(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


class Lines:
    """Off a terminal: a line every EVERY seconds, on stderr."""

    def __init__(self, every: float = EVERY) -> None:
        self.every = every
        self.pace = Pace()
        self.told = perf_counter()

    def __call__(self, done: "Done") -> None:
        if perf_counter() - self.told < self.every:
            return
        self.told = perf_counter()
        typer.echo(f"tokenizing: {done.share:4.0%}, {self.pace.told(done)}", err=True)


@contextmanager
def progress() -> Iterator["Callable[[Done], None]"]:
    """What `corpus.tokenize` calls as parts are done."""
    if not sys.stdout.isatty():
        yield Lines()
        return
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

    told = TextColumn("{task.fields[told]}")
    with Progress("tokenizing", BarColumn(), TaskProgressColumn(), told) as bar:
        task = bar.add_task("", total=1.0, told="")
        pace = Pace()
        yield lambda done: bar.update(task, completed=done.share, told=pace.told(done))
