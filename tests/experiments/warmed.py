"""Commands in processes that are forked from one that has imported everything, as those of tests/faults are.

It is the real command line with real workers, pipes and locks, for a tenth of the time of interpreters that start anew
and import torch, pandas and MLflow.  As a program this file is the process from which the commands fork: it is asked
for one with a line of JSON, and the file `code` of a command's folder says how it ended.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from threading import Lock

FAULTS = Path(__file__).parents[1] / "faults"
PATIENCE = 300.0  # seconds; the one that forks gives up before
PAUSE = 0.005


class Warmed:
    """The process from which commands are forked; it starts when the first one is asked for."""

    def __init__(self) -> None:
        self.process: subprocess.Popen | None = None
        self.asking = Lock()

    def run(
        self, words: Sequence[str], folder: Path, environment: dict[str, str]
    ) -> tuple[int, str, str]:
        """`ablab WORDS` in the folder, to its end: exit code, what it said, and what it said aside."""
        with tempfile.TemporaryDirectory(prefix="ablab-warmed-") as told:
            asked = {
                "words": [*words],
                "folder": str(folder),
                "environment": environment,
                "told": told,
            }
            self._ask(json.dumps(asked))
            code = Path(told, "code")
            until = time.monotonic() + PATIENCE
            while not code.exists():
                assert time.monotonic() < until, f"ablab {words} has not ended"
                time.sleep(PAUSE)
            out, err = (Path(told, name).read_text() for name in ("out", "err"))
            return int(code.read_text()), out, err

    def _ask(self, line: str) -> None:
        with self.asking:
            if self.process is None:
                self.process = subprocess.Popen(
                    [sys.executable, __file__], stdin=subprocess.PIPE, text=True
                )
            assert self.process.stdin
            self.process.stdin.write(line + "\n")
            self.process.stdin.flush()

    def stop(self) -> None:
        if self.process:
            self.process.communicate()


def serve() -> None:
    """Fork a keeper for each command that is asked for, until nobody can ask any more."""
    import signal

    sys.path.insert(0, str(FAULTS))
    import processes

    processes.warm_up()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for keepers
    while line := sys.stdin.readline():
        if not os.fork():
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            keep(**json.loads(line))


def keep(words: list[str], folder: str, environment: dict[str, str], told: str) -> None:
    """Fork the command, wait for it and for all that it started, and note how it ended.  Never returns."""
    import processes

    code = -1
    try:
        with open(os.devnull) as nothing:
            os.dup2(nothing.fileno(), 0)
        os.environ.clear()
        sys.path.insert(0, folder)  # as `python -m` has it
        out, err = (Path(told, name) for name in ("out", "err"))
        code = processes.fork(words, Path(folder), environment, out, aside=err).end().code
    finally:
        noted = Path(told, "noted")
        noted.write_text(str(code))
        noted.rename(Path(told, "code"))
        os._exit(0)


if __name__ == "__main__":
    serve()
