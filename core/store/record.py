"""The run folder: what a run leaves behind, and how it is read again.  No torch here.

    STORE/runs/ID/recipe.yaml     the resolved recipe; ID is its hash
                  run.json        who started it, how (Runtime), with which code and packages
                  metrics.jsonl   {"step", "tokens", "train/loss", ...}: the same bits whether or not the run was killed
                  pace.jsonl      {"step", "seconds", "tokens_per_second"}: what depends on the clock
                  result.json     status and final numbers; written once, in one step, at the end

Every file is whole at every instant, or a log whose last line may be torn: a reader may look at any time.
"""

import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from ablab.core.errors import UserError
from ablab.core.store.files import write_atomically, writing
from ablab.core.store.result import Result


class Record:
    """One run folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.metrics_path = folder / "metrics.jsonl"
        self.pace_path = folder / "pace.jsonl"
        self.result_path = folder / "result.json"

    def result(self) -> Result | None:
        """The final result; None while there is none.  A damaged one is named and refused."""
        try:
            return msgspec.json.decode(self.result_path.read_bytes(), type=Result)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except msgspec.MsgspecError as flaw:
            raise UserError(
                f"{self.result_path} is damaged ({flaw}); "
                "`ablab run` sets it aside and trains the run again"
            ) from None

    def stamp(self) -> int:
        """Tells one result from the next: its time in nanoseconds, 0 while there is none."""
        try:
            return self.result_path.stat().st_mtime_ns
        except (FileNotFoundError, NotADirectoryError):
            return 0

    def begin(self, recipe: str, about: Mapping[str, Any]) -> None:
        """Open the folder for a new or resumed run: recipe.yaml, and run.json with the unix seconds of the first start.

        Only the process that holds the run's lock may call this: what an earlier attempt left behind goes.
        """
        first_start = self.about().get("started", time.time())
        partial = self.folder.glob(".*.partial")
        for old in (self.result_path, self.folder / "error.txt", *partial):
            old.unlink(missing_ok=True)
        write_atomically(self.folder / "recipe.yaml", recipe.encode())
        encoded = msgspec.json.encode({**about, "started": first_start})
        write_atomically(self.folder / "run.json", msgspec.json.format(encoded, indent=1))

    def about(self) -> dict[str, Any]:
        """What run.json says; empty while there is none."""
        try:
            return msgspec.json.decode((self.folder / "run.json").read_bytes())
        except (OSError, msgspec.MsgspecError):
            return {}

    def finish(self, result: Result) -> None:
        encoded = msgspec.json.encode(result)
        write_atomically(self.result_path, msgspec.json.format(encoded, indent=1))

    def log(self, step: int, scalars: Mapping[str, float], pace: Mapping[str, float]) -> None:
        """Append one line to each log; flushed, so that a reader beside us sees it."""
        for path, values in ((self.metrics_path, scalars), (self.pace_path, pace)):
            with writing(path), open(path, "ab") as file:
                file.write(_line({"step": step, **values}))

    def rewind(self, step: int) -> None:
        """Forget every logged line after `step`, and a torn last line: the state as of that checkpoint."""
        for path in (self.metrics_path, self.pace_path):
            if not path.exists():
                continue
            until = [values for values in _lines(path) if values["step"] <= step]
            kept = b"".join(map(_line, until))
            if kept != path.read_bytes():
                write_atomically(path, kept)

    def metrics(self) -> Iterator[dict[str, float]]:
        return _lines(self.metrics_path)

    def pace(self) -> Iterator[dict[str, float]]:
        return _lines(self.pace_path)


def _line(values: Mapping[str, float]) -> bytes:
    return msgspec.json.encode(values) + b"\n"


def _lines(path: Path) -> Iterator[dict[str, float]]:
    """Each whole JSON line; stops at a last line that a kill has torn.  Raises UserError for any other that is none."""
    if not path.exists():
        return
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                yield msgspec.json.decode(line)
            except msgspec.DecodeError as flaw:
                if not line.endswith(b"\n"):
                    return
                raise UserError(
                    f"{path}:{number} is damaged ({flaw}); delete {path.parent} to train that run again"
                ) from None
