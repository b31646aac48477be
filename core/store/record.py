"""The run folder: what a run leaves behind, and how it is read again.  No torch here.

    STORE/runs/ID/recipe.yaml     the resolved recipe; ID is its hash
                  run.json        who started it, how (Runtime), with which code and packages
                  metrics.jsonl   {"step", "tokens", "train/loss", ...}: the same bits whether or not the run was killed
                  pace.jsonl      {"step", "seconds", "tokens_per_second"}: what depends on the clock
                  dynamics.jsonl  {"step", "layer/kurtosis/00", ...}: the same of looks into layers, if there were any
                  held_out.npz    the losses of the last evaluation, token by token (held_out.py)
                  result.json     status and final numbers; written once, in one step, at the end
                  interrupted.json  where it was saved when it was stopped in time; gone when it goes on

Every file is whole at every instant, or a log whose last line may be torn: a reader may look at any time.  A log that
lost a line is known: by a checkpoint of its run, by the writer when it saves and ends, by its digest in the result,
which has those of dynamics.jsonl and held_out.npz too.
"""

import hashlib
import os
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec

from ablab.core.errors import UserError
from ablab.core.store.files import FLAWS, set_aside, unfenced, write_atomically, writing
from ablab.core.store.held_out import HeldOut, decoded, encoded
from ablab.core.store.result import STATUSES, Result

SEAL = "seal"  # key of result.json: digest of all the others
Say = Callable[[str], None]
Scalars = dict[str, int | float]


class Damaged(UserError):
    """What is there is not what a run leaves.  A file that cannot be read (rights, a lost disk) is not damaged."""


@dataclass(frozen=True)
class Mark:
    """How far a run had come when it was stopped in time."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0  # of training


class Beside:
    """A file of a run folder: its path is made when it is asked for first, for a report looks into 10,000 folders."""

    def __init__(self, name: str):
        self.name = name

    def __set_name__(self, kind: type, attribute: str) -> None:
        self.attribute = attribute

    def __get__(self, record: "Record", kind: type) -> Path:
        path = record.folder / self.name
        vars(record)[self.attribute] = path  # from now on found there
        return path


class Record:
    """One run folder.  run: whose it must be, where the caller knows; a record of another is refused.

    fence: asked before every write; it raises where another process holds the run (core/store/claim.py).
    """

    claim_path = Beside(".claim")
    metrics_path = Beside("metrics.jsonl")
    pace_path = Beside("pace.jsonl")
    dynamics_path = Beside("dynamics.jsonl")
    held_out_path = Beside("held_out.npz")
    result_path = Beside("result.json")
    about_path = Beside("run.json")
    recipe_path = Beside("recipe.yaml")
    interrupted_path = Beside("interrupted.json")

    def __init__(
        self, folder: Path, run: str | None = None, fence: Callable[[], None] = unfenced
    ):
        self.folder = folder
        self.run = run
        self.fence = fence
        # Path -> what this object wrote there: a file that something else cut or removed is written again.
        self.written: dict[Path, bytearray] = {}

    # -- how the run ended -----------------------------------------------------------------------------------------
    def result(self) -> Result | None:
        """The final result; None while there is none.  UserError names a damaged, foreign or impossible one."""
        try:
            content = self.result_path.read_bytes()
            result = msgspec.json.decode(content, type=Result)
            sealed = _is_sealed(content)
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (IsADirectoryError, *FLAWS) as flaw:
            raise self._damaged(getattr(flaw, "strerror", None) or str(flaw)) from None
        except OSError as refusal:
            raise _unreadable(self.result_path, refusal) from None
        if self.run and result.run != self.run:
            raise self._damaged(f"it is of run {result.run[:80]!r}")
        if result.status not in STATUSES:
            raise self._damaged(f"there is no status {result.status[:40]!r}")
        if not sealed:
            raise self._damaged("something changed it after the run had left it")
        return result

    def _damaged(self, flaw: str) -> Damaged:
        return Damaged(
            f"{self.result_path} is damaged ({flaw}); "
            "`ablab run` sets it aside and trains the run again"
        )

    def sound_result(self, say: Say) -> Result | None:
        """As `result`; a damaged one, or one whose log or losses changed, is named, set aside, and counts as none."""
        try:
            result = self.result()
            if result:
                self._check_log(result)
            if result and result.held_out:
                self._kept_losses(result.held_out)
        except Damaged as damage:
            say(str(damage))
            set_aside(self.result_path)
            return None
        return result

    def hole(self, result: Result | None) -> str:
        """Where metrics.jsonl is not what the run left, or not what a run can leave; empty where it is."""
        try:
            self._check_log(result)
        except UserError as damage:
            return str(damage)
        return ""

    def _check_log(self, result: Result | None) -> None:
        """Raises Damaged."""
        if not (result and result.log):
            for _ in self.metrics():
                pass
        elif result.log != digest_of(self.logged()):
            raise Damaged(
                f"{self.metrics_path} is not what the run left: lines are lost or changed; "
                "`ablab run` trains the run again"
            )

    def held_out(self, digest: str) -> HeldOut:
        """The losses of the last evaluation, whose digest the result has.  Raises Damaged: lost or changed."""
        content = self._kept_losses(digest)
        try:
            return decoded(content)
        except ValueError as flaw:
            raise Damaged(
                f"{self.held_out_path} is damaged ({flaw}); delete {self.folder} to train that run again"
            ) from None

    def _kept_losses(self, digest: str) -> bytes:
        content = _content(self.held_out_path)
        if digest_of(content) != digest:
            raise Damaged(
                f"{self.held_out_path} is not what the run left: it is lost or changed; "
                "`ablab run` trains the run again"
            )
        return content

    def keep(self, held_out: HeldOut) -> str:
        """Write the losses of the last evaluation; their digest, for the result."""
        self.fence()
        content = encoded(held_out)
        write_atomically(self.held_out_path, content)
        return digest_of(content)

    def stamp(self) -> int:
        """Tells one result from the next: its time in nanoseconds, 0 while there is none."""
        try:
            return self.result_path.stat().st_mtime_ns
        except (FileNotFoundError, NotADirectoryError):
            return 0

    def finish(self, result: Result) -> None:
        self.fence()
        encoded = msgspec.json.encode(result)
        sealed = msgspec.json.decode(encoded) | {SEAL: digest_of(encoded)}
        written = msgspec.json.encode(sealed)
        write_atomically(self.result_path, msgspec.json.format(written, indent=1))

    # -- how far it came -------------------------------------------------------------------------------------------
    def interrupted(self, step: int, tokens: int, seconds: float) -> None:
        """The run was stopped in time, and saved at this step."""
        self.fence()
        told = msgspec.json.encode(Mark(step, tokens, seconds))
        write_atomically(self.interrupted_path, told)

    def mark(self) -> "Mark":
        """Where it was stopped in time; zeros where it was not, or where nobody knows."""
        try:
            return msgspec.json.decode(self.interrupted_path.read_bytes(), type=Mark)
        except (OSError, *FLAWS):
            return Mark()

    # -- how it began ----------------------------------------------------------------------------------------------
    def begin(self, recipe: str, about: Mapping[str, Any], say: Say = print) -> None:
        """Open the folder for a new or resumed run: recipe.yaml, and run.json with the unix seconds of the first start.

        Only the process that holds the run's claim may call this: what an earlier attempt left behind goes.
        """
        self.fence()
        first_start = self.about().get("started")
        if not isinstance(first_start, int | float):
            first_start = time.time()
        error = self.folder / "error.txt"
        self._clear_the_places_of_files(error, say)
        partial = self.folder.glob(".*.partial")
        ends = (self.result_path, self.held_out_path, self.interrupted_path, error)
        for old in (*ends, *partial):
            old.unlink(missing_ok=True)
        told = {**about, "started": first_start}
        if self.run:
            told["run"] = self.run
        encoded = msgspec.json.encode(told)
        self._write(self.recipe_path, recipe.encode())
        self._write(self.about_path, msgspec.json.format(encoded, indent=1))

    def _clear_the_places_of_files(self, error: Path, say: Say) -> None:
        """A folder or a dead link where a file should be, or a file where checkpoints should be, goes aside."""
        files = (self.recipe_path, self.about_path, *self._logs)
        ends = (self.held_out_path, self.result_path, self.interrupted_path, error)
        wrong = [path for path in (*files, *ends) if path.is_dir() or _is_dead_link(path)]
        checkpoints = self.folder / "checkpoints"
        if checkpoints.exists() and not checkpoints.is_dir():
            wrong.append(checkpoints)
        for path in wrong:
            say(
                f"{path} is damaged (a folder or a dead link for a file, or the reverse); set aside"
            )
            set_aside(path)

    def _write(self, path: Path, content: bytes) -> None:
        write_atomically(path, content)
        self.written[path] = bytearray(content)

    def about(self) -> dict[str, Any]:
        """What run.json says; empty while there is none, or one of another run, or a damaged one."""
        try:
            about = msgspec.json.decode(self.about_path.read_bytes(), type=dict[str, Any])
        except (OSError, *FLAWS):
            return {}
        foreign = self.run and about.get("run", self.run) != self.run
        return {} if foreign else about

    def restore_about(self, told: Mapping[str, Any]) -> None:
        """Write run.json of a run that has ended, as far as it can be known again: not when and where it began."""
        if self.about_path.is_dir():
            set_aside(self.about_path)
        told = {**told, "restored": time.time()}
        if self.run:
            told["run"] = self.run
        write_atomically(
            self.about_path, msgspec.json.format(msgspec.json.encode(told), indent=1)
        )

    # -- its logs --------------------------------------------------------------------------------------------------
    def log(self, step: int, scalars: Mapping[str, float], pace: Mapping[str, float]) -> None:
        """Append one line to each log; flushed, so that a reader beside us sees it."""
        self.fence()
        self._append(self.metrics_path, step, scalars)
        self._append(self.pace_path, step, pace)

    def note_look(self, step: int, values: Mapping[str, float]) -> None:
        """Append what was seen of the layers; nothing where nobody looked."""
        if values:
            self.fence()
            self._append(self.dynamics_path, step, values)

    def _append(self, path: Path, step: int, values: Mapping[str, float]) -> None:
        line = _line({"step": step, **values})
        with writing(path):
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(path, "ab") as file:
                file.write(line)
        self.written.setdefault(path, bytearray()).extend(line)

    @property
    def _logs(self) -> tuple[Path, ...]:
        return self.metrics_path, self.pace_path, self.dynamics_path

    def logged(self) -> bytes:
        """What metrics.jsonl holds; nothing where it cannot be read."""
        return _content(self.metrics_path)

    def rewind(self, step: int) -> None:
        """Forget every logged line after `step`, a torn last line and damaged ones: the state as of that checkpoint."""
        self.fence()
        for path in self._logs:
            kept = _until(step, _content(path))
            if path.exists() and kept != _content(path):
                write_atomically(path, kept)
            self.written[path] = bytearray(kept)

    def sync(self, say: Say) -> bytes:
        """Bring what was written to the disk, and what something else cut or removed back; what metrics.jsonl holds."""
        self.fence()
        for path, content in self.written.items():
            if _content(path) != content:
                say(f"{path} was changed while the run went on; written again")
                if path.is_dir():
                    set_aside(path)
                write_atomically(path, bytes(content))
        metrics = bytes(self.written.get(self.metrics_path, b""))
        if metrics:
            with writing(self.metrics_path), open(self.metrics_path, "r+b") as file:
                os.fsync(file.fileno())
        return metrics

    def metrics(self) -> Iterator[Scalars]:
        return _lines(self.metrics_path)

    def dynamics(self, result: Result | None = None) -> Iterator[Scalars]:
        """What was seen of the layers.  Raises Damaged where it is not what the run left, or no run can leave it."""
        if result and result.dynamics and result.dynamics != self.digest_of_looks():
            raise Damaged(
                f"{self.dynamics_path} is not what the run left: lines are lost or changed; "
                "no verdict rests on it, so delete it, or the run's folder to train that run again"
            )
        return _lines(self.dynamics_path)

    def looks(self) -> Iterator[Scalars]:
        """The same for a view: damaged lines are left out."""
        return iter(_readable(_content(self.dynamics_path)))

    def digest_of_looks(self) -> str:
        """Empty where nobody looked."""
        content = _content(self.dynamics_path)
        return digest_of(content) if content else ""

    def pace(self) -> Iterator[Scalars]:
        """Damaged lines are left out: what the clock says is in no verdict."""
        return iter(_readable(_content(self.pace_path)))

    def lost_pace(self) -> str:
        """What is lost of pace.jsonl, whose lines are as many as those of metrics.jsonl; empty where nothing is."""
        lines = self.logged().count(b"\n")
        lost = lines - len(_readable(_content(self.pace_path)))
        if lost <= 0:
            return ""
        return (
            f"{self.pace_path} has lost {lost} of {lines} lines: how fast the run was then is not shown, "
            f"its numbers stand; delete {self.folder} to train it again"
        )


# -- the bytes of a log ------------------------------------------------------------------------------------------------
def extent(logged: bytes) -> str:
    """Length and CRC-32 of a log: what a checkpoint keeps of it."""
    return f"{len(logged)}-{zlib.crc32(logged):08x}"


def holds(logged: bytes, known: str) -> bool:
    """Whether a log begins with what `extent` was told of it."""
    length = known.partition("-")[0]
    return length.isdecimal() and extent(logged[: int(length)]) == known


def digest_of(content: bytes) -> str:
    """sha256 of a file, 16 hex digits: what a result keeps of it."""
    return hashlib.sha256(content).hexdigest()[:16]


def _is_dead_link(path: Path) -> bool:
    return path.is_symlink() and not path.exists()


def _is_sealed(content: bytes) -> bool:
    """Whether a result says what it was written with; one without a seal, of before there were any, is believed."""
    told = msgspec.json.decode(content)
    seal = told.pop(SEAL, None)
    return seal is None or seal == digest_of(msgspec.json.encode(told))


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return b""
    except OSError as refusal:
        raise _unreadable(path, refusal) from None


def _unreadable(path: Path, refusal: OSError) -> UserError:
    why = refusal.strerror or refusal
    return UserError(
        f"cannot read {path}: {why}; mend its rights or its disk, or choose another store"
    )


def _line(values: Mapping[str, float]) -> bytes:
    return msgspec.json.encode(values) + b"\n"


def _until(step: int, logged: bytes) -> bytes:
    """The whole lines of a log up to `step`, as they are; of damaged and doubled ones, none."""
    return b"".join(line for line, _ in _sound(step, logged))


def _sound(step: int, logged: bytes) -> Iterator[tuple[bytes, Scalars]]:
    """Those lines, each with what it says."""
    last = -1
    for line in BytesIO(logged):
        try:
            values = _scalars(line)
        except FLAWS:
            continue
        at = int(values["step"])
        if last < at <= step and line.endswith(b"\n"):
            yield line, values
            last = at


def _readable(logged: bytes) -> list[Scalars]:
    """What the sound lines say."""
    whole = _whole(logged)
    return [values for _, values in _sound(sys.maxsize, logged)] if whole is None else whole


LINE = msgspec.json.Decoder(Scalars)


def _whole(logged: bytes) -> list[Scalars] | None:
    """All lines of a log at once; None unless each of them is a sound one: one by one they take five times as long.

    As many values as lines, each of which begins one: then no line holds two, for no value spans lines.
    """
    begun = logged.startswith(b"{") + logged.count(b"\n{")
    if not logged.endswith(b"\n") or begun != logged.count(b"\n"):
        return None
    try:
        lines = LINE.decode_lines(logged)
        steps = [line["step"] for line in lines]
    except (KeyError, *FLAWS):
        return None
    sound = len(lines) == begun and all(isinstance(step, int) for step in steps)
    return lines if sound and all(a < b for a, b in pairwise([-1, *steps])) else None


def _scalars(line: bytes) -> Scalars:
    """One line.  Raises one of FLAWS for what no run logs."""
    values = LINE.decode(line)
    if not isinstance(values.get("step"), int):
        raise msgspec.ValidationError("it has no step")
    return values


def _lines(path: Path) -> Iterator[Scalars]:
    """Each whole JSON line; stops at a last line that a kill has torn.  Raises Damaged for any other that is none."""
    if path.is_dir():
        raise Damaged(
            f"{path} is damaged (it is a folder); delete {path.parent} to train that run again"
        )
    logged = _content(path)
    if (whole := _whole(logged)) is not None:
        yield from whole
        return
    last = -1
    for number, line in enumerate(BytesIO(logged), 1):
        try:
            values = _scalars(line)
            if values["step"] <= last:
                raise msgspec.ValidationError(f"step {values['step']} after step {last}")
        except FLAWS as flaw:
            if not line.endswith(b"\n"):
                return
            raise Damaged(
                f"{path}:{number} is damaged ({flaw}); delete {path.parent} to train that run again"
            ) from None
        last = int(values["step"])
        yield values
