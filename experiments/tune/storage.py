"""Where studies are kept: any Optuna storage, and how it is told whose a study is."""

import os
import re
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from json import JSONDecodeError
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from ablab.core.errors import UserError, without_password
from ablab.core.store.files import lock_beside, writing

if TYPE_CHECKING:
    from optuna import Study
    from optuna.storages import BaseStorage

# User attributes of a study: what it was made with, and how many of its trials are spread evenly.
FACTS, SPREAD = "ablab", "spread"
# User attributes of a trial: how it ended, and what else the reports want to know.
STATE, TOLD = "state", "told"
# Seconds.  A journal's lock outlives a killed process; a write takes milliseconds, and Optuna would wait 30 s.
STALE_SECONDS = 5
# Two processes that make the tables of a fresh database at once: the slower one finds them there, and asks again.
MADE_MEANWHILE = re.compile("already exists|UNIQUE constraint|duplicate key")
TRIES = 5
PAUSE_SECONDS = 0.2
OP_CODE = b'{"op_code"'  # how a line of Optuna's journal begins
NEW_TRIAL = b'{"op_code":4,'  # and that of one which makes a trial: it holds the writer and the microsecond
CURE = (
    "move that journal away (or name another --storage) and run again: trials whose runs are in the store are told "
    "again, not trained"
)
# What a driver is given: seconds that a writer beside us may take, and that a host may take to answer.
POSTGRES = {"connect_timeout": 10}
PATIENCE = {
    "sqlite": {"timeout": 60},
    "postgresql": POSTGRES,
    "postgresql+psycopg": POSTGRES,
    "postgresql+psycopg2": POSTGRES,
}


def direction(better: str) -> Literal["minimize", "maximize"]:
    """Optuna's word for "lower" or "higher"."""
    return "minimize" if better == "lower" else "maximize"


def open_storage(url: str) -> "BaseStorage":
    """`journal:PATH`, or any Optuna URL.  Raises UserError when it cannot be reached."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        if url.startswith("journal:"):
            return _journal(Path(url.removeprefix("journal:")))
        return _database(url)
    except UserError:
        raise
    except Exception as refusal:
        cause: BaseException = refusal
        if isinstance(refusal, ImportError):  # Optuna's own; its cause names the missing module
            cause = refusal.__cause__ or refusal.__context__ or refusal
        raise UserError(
            f"the Optuna storage {without_password(url)} cannot be opened ({_line(cause)}); check --storage"
        ) from None


def _line(cause: BaseException | None) -> str:
    """What went wrong, in one line without a password."""
    text, _, _ = str(cause).partition("(Background on")
    text = " ".join(text.split())
    return without_password(text[:200]) or type(cause).__name__


def _database(url: str) -> "BaseStorage":
    from optuna.storages import RDBStorage

    patience = PATIENCE.get(url.split(":")[0], {})
    engine = {"connect_args": patience}
    made = _is_made(url, patience)
    for _ in range(TRIES - 1):
        try:
            return RDBStorage(url, engine, skip_table_creation=made)
        except Exception as refusal:
            if not MADE_MEANWHILE.search(str(refusal)):
                raise
        time.sleep(PAUSE_SECONDS)
    return RDBStorage(url, engine, skip_table_creation=made)


def _is_made(url: str, patience: Mapping[str, Any]) -> bool:
    """Whether Optuna's tables are there, of whichever version: it would add those that an older schema lacks.

    It stamps the version after the last of them.
    """
    from alembic.runtime.migration import MigrationContext
    from sqlalchemy import create_engine

    engine = create_engine(url, connect_args=dict(patience))
    try:
        with engine.connect() as connection:
            return MigrationContext.configure(connection).get_current_revision() is not None
    finally:
        engine.dispose()


def _journal(path: Path) -> "BaseStorage":
    """Raises UserError for a damaged or repeated line.

    A last one that a kill has torn is dropped, and its trial told again.
    """
    from optuna.storages.journal import (
        JournalFileBackend,
        JournalFileSymlinkLock,
        JournalStorage,
    )

    lock = JournalFileSymlinkLock(str(path), grace_period=STALE_SECONDS)
    try:
        if path.is_file():
            lock.acquire()
            try:
                _refuse_repetition(path, _without_torn_line(path))
            finally:
                lock.release()
        return JournalStorage(JournalFileBackend(str(path), lock))
    except ValueError as flaw:
        raise UserError(
            f"{path}:{_damaged_line(path)} is damaged ({_line(flaw)}); {CURE}"
        ) from None


def _without_torn_line(path: Path) -> bytes:
    """A journal, cut after its last whole line.  Raises ValueError for any other file, which stays as it is."""
    content = path.read_bytes()
    if content and not content.startswith(OP_CODE):
        raise ValueError("it does not begin as a journal does")
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(path, whole)
    return content[:whole]


def _refuse_repetition(path: Path, content: bytes) -> None:
    """Raises UserError where a trial is written twice, as in a journal appended to itself: Optuna would count both."""
    first: dict[bytes, int] = {}
    for number, line in enumerate(content.splitlines(), 1):
        if not line.startswith(NEW_TRIAL):
            continue
        earlier = first.setdefault(line, number)
        if earlier != number:
            raise UserError(
                f"{path}:{number} writes the trial of line {earlier} again, as a file appended to itself does; {CURE}"
            )


def _damaged_line(path: Path) -> int:
    """The number of the first line that is no JSON."""
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            msgspec.json.decode(line)
        except ValueError:
            return number
    return 1


@contextmanager
def reaching(url: str) -> Iterator[None]:
    """Turn the loss of an open storage into one line: its server has gone, its file was damaged."""
    try:
        yield
    except Exception as loss:
        if not _is_of_a_storage(loss):
            raise
        raise UserError(
            f"the Optuna storage {without_password(url)} was lost ({_line(loss.__cause__ or loss)}); what was trained "
            "is kept, and the same command goes on once it answers, or once a damaged file is moved away"
        ) from loss


def _is_of_a_storage(loss: Exception) -> bool:
    """Whether Optuna's code raised it where it reads one: of a file that holds something else, it may be anything."""
    from sqlalchemy.exc import SQLAlchemyError

    if isinstance(loss, SQLAlchemyError | JSONDecodeError):
        return True
    innermost = traceback.extract_tb(loss.__traceback__)[-1]
    return {"optuna", "storages"} <= set(Path(innermost.filename).parts)


@contextmanager
def opening(root: Path) -> Iterator[None]:
    """One study of a store opens at a time: two would make the tables of a fresh database both."""
    from filelock import FileLock

    with writing(root):
        root.mkdir(parents=True, exist_ok=True)
        lock = FileLock(lock_beside(root / "optuna"))
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def compare(storage: "BaseStorage", name: str, facts: dict[str, Any]) -> None:
    """A study of this name that the storage holds must have been made with the same facts; else say which differs."""
    import optuna

    try:
        study = optuna.load_study(study_name=name, storage=storage)
    except KeyError:
        return
    cure = "rename the experiment or use another --storage"
    held = study.user_attrs.get(FACTS, {})
    if not held:
        if study.get_trials(deepcopy=False):
            raise UserError(
                f"the storage holds a study {name!r} that ablab did not make; {cure}"
            )
        return
    for key in held | facts:
        if held.get(key) != facts.get(key):
            raise UserError(
                f"the storage holds a study {name!r} whose {key} is {held.get(key)}, "
                f"but this one has {facts.get(key)}; {cure}"
            )


def open_study(
    storage: "BaseStorage", name: str, better: str, facts: dict[str, Any], spread: int
) -> "Study":
    """The Optuna study of one cell, made where it is missing.

    spread: how many of its trials are spread evenly; kept, so that a larger budget goes on from the same start.
    """
    import optuna

    study = optuna.create_study(
        study_name=name, storage=storage, direction=direction(better), load_if_exists=True
    )
    if SPREAD not in study.user_attrs and study.get_trials(deepcopy=False):
        raise UserError(
            f"the storage holds a study {name!r} with trials but not how they were spread: it was changed there; {CURE}"
        )
    if FACTS not in study.user_attrs:
        study.set_user_attr(SPREAD, spread)
        study.set_user_attr(FACTS, facts)
    return study
