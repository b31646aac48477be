"""Where studies are kept: any Optuna storage, and how it is told whose a study is."""

import re
from typing import TYPE_CHECKING, Any, Literal

from ablab.core.errors import UserError

if TYPE_CHECKING:
    from optuna import Study
    from optuna.storages import BaseStorage

# User attributes of a study: what it was made with, and how many of its trials are spread evenly.
FACTS, SPREAD = "ablab", "spread"
# User attributes of a trial: how it ended, and what else the reports want to know.
STATE, TOLD = "state", "told"
# Seconds.  A journal's lock outlives a killed process; a write takes milliseconds, and Optuna would wait 30 s.
STALE_SECONDS = 5
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
            return _journal(url.removeprefix("journal:"))
        patience = PATIENCE.get(url.split(":")[0], {})
        return optuna.storages.RDBStorage(url, {"connect_args": patience})
    except Exception as refusal:
        cause: BaseException | None = refusal
        if isinstance(
            refusal, ImportError
        ):  # Optuna's; its cause names the module that is missing
            cause = refusal.__cause__ or refusal.__context__
        text, _, _ = str(cause).partition("(Background on")
        text = " ".join(text.split())
        line = hide(text[:200]) or type(cause).__name__
        raise UserError(
            f"the Optuna storage {hide(url)} cannot be opened ({line}); check --storage"
        ) from None


def _journal(path: str) -> "BaseStorage":
    from optuna.storages.journal import (
        JournalFileBackend,
        JournalFileSymlinkLock,
        JournalStorage,
    )

    lock = JournalFileSymlinkLock(path, grace_period=STALE_SECONDS)
    return JournalStorage(JournalFileBackend(path, lock))


def hide(url: str) -> str:
    """A URL without its password."""
    return re.sub(r"//[^/@\s]*@", "//", url)


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
    if FACTS not in study.user_attrs:
        study.set_user_attr(SPREAD, spread)
        study.set_user_attr(FACTS, facts)
    return study
