"""Commands that train: stopped by a signal or by their deadline, they save and end with exit code 75."""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec

import typer

from ablab.experiments.run.halting import INTERRUPTED, Interrupted, stopped_in_time

Words = ParamSpec("Words")


def ends_in_time(command: Callable[Words, None]) -> Callable[Words, None]:
    """The command, which hears signals from its first moment to its last, and its option `deadline`."""

    @wraps(command)
    def heard(*words: Words.args, **options: Words.kwargs) -> None:
        deadline = options.get("deadline")
        try:
            with stopped_in_time(_seconds(deadline) if isinstance(deadline, str) else None):
                command(*words, **options)
        except Interrupted:
            raise typer.Exit(INTERRUPTED) from None

    return heard


def _seconds(text: str) -> float:
    """Raises UserError."""
    from ablab.experiments.run.sequential import hours_of

    return 3600 * hours_of(text, "--deadline", "9m or 4h")
