"""The run folder: what a run leaves behind, and how it is read again.  No torch here.

    STORE/runs/ID/recipe.yaml     the resolved recipe; ID is its hash
                  run.json        who started it, how (Runtime), with which code and packages
                  metrics.jsonl   {"step", "tokens", "train/loss", ...}: the same bits whether or not the run was killed
                  pace.jsonl      {"step", "seconds", "tokens_per_second"}: what depends on the clock
                  result.json     status and final numbers; written once, in one step, at the end
    STORE/experiments/NAME.json   the plan: which cells an experiment wants, and which run answers each

Every file is whole at every instant, or a log whose last line may be torn: a reader may look at any time.
"""

import os
import shlex
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from ablab.core.errors import UserError
from ablab.core.store.files import set_aside, write_atomically, writing

FINISHED, DIVERGED, OUT_OF_MEMORY, FAILED, PRUNED = (
    "finished",
    "diverged",
    "out_of_memory",
    "failed",
    "pruned",
)
STATUSES = (
    FINISHED,
    DIVERGED,
    OUT_OF_MEMORY,
    FAILED,
    PRUNED,
)  # a run with no result is missing or interrupted
RETRY = (
    FAILED,
    OUT_OF_MEMORY,
    PRUNED,
)  # asked for again, these run again: code and runtime may have changed


def said(statuses: Mapping[str, int]) -> str:
    """Counts in words: 2 finished, 1 out of memory."""
    return ", ".join(
        f"{count} {status.replace('_', ' ')}" for status, count in statuses.items()
    )


@dataclass(frozen=True)
class Result:
    """How a run ended.  `metrics` are final values; losses in nats/token, times in seconds."""

    run: str
    status: str
    step: int
    tokens: int
    metrics: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0  # training time (core/train/stopwatch.py), summed over resumes
    tokens_per_second: float = 0.0
    peak_bytes: int = 0
    error: str = ""
    code: str = ""  # fingerprint of the code that ran
    runtime: dict[str, Any] = field(default_factory=dict)
    kernels: dict[str, str] = field(default_factory=dict)  # place -> "triton", or "torch: why"
    weights: str = ""  # digest of the final weights' bits
    kernels: dict[str, str] = field(default_factory=dict)  # place -> what served it


@dataclass(frozen=True)
class Planned:
    """One run that an experiment wants."""

    cell: str
    pair: int
    seed: int
    run: str
    reference: str | None = None  # the cell that this one is measured against
    note: str = ""
    tags: dict[str, str] = field(default_factory=dict)  # for trackers


@dataclass(frozen=True)
class GridPlan:
    """An experiment as it was last asked for: the desired state that the runner works towards."""

    name: str
    question: str
    metric: str
    better: str  # "lower" or "higher"
    design: str
    rows: list[Planned]
    treatments: dict[str, dict[str, Any]] = field(
        default_factory=dict
    )  # cell -> intervention -> dose
    off: dict[str, str] = field(
        default_factory=dict
    )  # intervention -> the sentence naming its control


class Store:
    """The folder that holds everything ablab writes."""

    def __init__(self, root: str | Path):
        self.root = Path(root)

    def run(self, run_id: str) -> "Record":
        return Record(self.root / "runs" / run_id)

    def plan_path(self, experiment: str) -> Path:
        return self.root / "experiments" / f"{experiment}.json"

    def write_plan(self, plan: GridPlan) -> None:
        write_atomically(
            self.plan_path(plan.name), msgspec.json.format(msgspec.json.encode(plan), indent=1)
        )

    def change_plan(
        self,
        experiment: str,
        change: Callable[[GridPlan | None], GridPlan],
        say: Callable[[str], None],
    ) -> GridPlan:
        """Write and return `change(the plan as it stands, or None)`; one process at a time.  A damaged plan is set aside."""
        from filelock import FileLock

        path = self.plan_path(experiment)
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(path.with_name(f".{path.name}.lock")):
                try:
                    old = self.read_plan(experiment) if path.exists() else None
                except UserError as damage:
                    say(f"{damage}; set aside as {set_aside(path).name}")
                    old = None
                self.write_plan(plan := change(old))
        return plan

    def read_plan(self, experiment: str) -> GridPlan:
        path = self.plan_path(experiment)
        try:
            return msgspec.json.decode(path.read_bytes(), type=GridPlan)
        except FileNotFoundError:
            raise UserError(
                f"experiment {experiment!r} has no runs in {self.root}; start it with: {command(experiment)}"
            ) from None
        except msgspec.MsgspecError as flaw:
            raise UserError(
                f"{path} is damaged ({flaw}); `{command(experiment)}` writes it again"
            ) from None

    def experiments(self) -> list[str]:
        return sorted(path.stem for path in (self.root / "experiments").glob("*.json"))


def command(experiment: str, verb: str = "run") -> str:
    """What to type to go on with an experiment; its name ends in its overrides, or in what a study made of it."""
    name, *parts = experiment.split("@")
    verb = "study" if {"study", "tuned"} & set(parts) else verb
    overrides = [
        part if "=" in part else "..." for part in parts if part not in ("study", "tuned")
    ]  # a digest: too long for a name
    return f"ablab {verb} {shlex.join([name, *overrides])}"


class Record:
    """One run folder."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.metrics_path, self.pace_path = folder / "metrics.jsonl", folder / "pace.jsonl"
        self.result_path = folder / "result.json"

    def result(self) -> Result | None:
        """The final result; None while there is none.  A damaged one is named and refused."""
        try:
            return msgspec.json.decode(self.result_path.read_bytes(), type=Result)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except msgspec.MsgspecError as flaw:
            raise UserError(
                f"{self.result_path} is damaged ({flaw}); `ablab run` sets it aside and trains the run again"
            ) from None

    def stamp(self) -> int:
        """Tells one result from the next: its time in nanoseconds, 0 while there is none."""
        try:
            return self.result_path.stat().st_mtime_ns
        except (FileNotFoundError, NotADirectoryError):
            return 0

    def begin(self, recipe: str, about: Mapping[str, Any]) -> None:
        """Open the folder for a new or resumed run: recipe.yaml and run.json (`about`, "started": unix seconds of the first start).

        Only the process that holds the run's lock may call this: an earlier, failed result goes.
        """
        first = self.about().get("started", time.time())
        for old in (
            self.result_path,
            self.folder / "error.txt",
            *self.folder.glob(".*.partial"),
        ):
            old.unlink(missing_ok=True)  # what an earlier attempt left behind
        write_atomically(self.folder / "recipe.yaml", recipe.encode())
        write_atomically(
            self.folder / "run.json",
            msgspec.json.format(msgspec.json.encode({**about, "started": first}), indent=1),
        )

    def about(self) -> dict[str, Any]:
        """What run.json says; empty while there is none."""
        try:
            return msgspec.json.decode((self.folder / "run.json").read_bytes())
        except (OSError, msgspec.MsgspecError):
            return {}

    def finish(self, result: Result) -> None:
        write_atomically(
            self.result_path, msgspec.json.format(msgspec.json.encode(result), indent=1)
        )

    def log(self, step: int, scalars: Mapping[str, float], pace: Mapping[str, float]) -> None:
        """Append one line to each log; flushed, so that a reader beside us sees it."""
        for path, values in ((self.metrics_path, scalars), (self.pace_path, pace)):
            with writing(path), open(path, "ab") as file:
                file.write(msgspec.json.encode({"step": step, **values}) + b"\n")

    def rewind(self, step: int) -> None:
        """Forget every logged line after `step`, and a torn last line: the state as of that checkpoint."""
        for path in (self.metrics_path, self.pace_path):
            if not path.exists():
                continue
            kept = b"".join(
                msgspec.json.encode(line) + b"\n"
                for line in _lines(path)
                if line["step"] <= step
            )
            if kept != path.read_bytes():
                write_atomically(path, kept)

    def metrics(self) -> Iterator[dict[str, float]]:
        return _lines(self.metrics_path)

    def pace(self) -> Iterator[dict[str, float]]:
        return _lines(self.pace_path)


def _lines(path: Path) -> Iterator[dict[str, float]]:
    """Each whole JSON line; stops at a last line that a kill has torn.  Raises UserError for any other that is none."""
    if not path.exists():
        return
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            try:
                yield msgspec.json.decode(line)
            except msgspec.DecodeError as flaw:
                if line.endswith(b"\n"):
                    raise UserError(
                        f"{path}:{number} is damaged ({flaw}); delete {path.parent} to train that run again"
                    ) from None
                return


def store_root(flag: str | None = None) -> Path:
    """Where ablab writes: the flag, else $ABLAB_STORE, else ./ablab-store."""
    return Path(flag or os.environ.get("ABLAB_STORE") or "ablab-store")
