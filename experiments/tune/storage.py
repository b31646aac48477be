"""Where studies are kept: any Optuna storage, and how it is told whose a study is."""

import re
from typing import Any

from ablab.core.errors import UserError
from ablab.experiments.tune.proposals import direction

FACTS = "ablab"  # the user attribute in which a study keeps what it was made with
STALE_SECONDS = 5  # a journal's lock outlives a killed process; a write takes milliseconds, and Optuna would wait 30 s


def open_storage(url: str) -> Any:
    """`journal:PATH`, or any Optuna URL.  Raises UserError when it cannot be reached."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    patience = {
        "sqlite": {"timeout": 60}
    }  # seconds: a writer beside us may take that long, a host that does not answer this
    patience |= dict.fromkeys(
        ("postgresql", "postgresql+psycopg", "postgresql+psycopg2"), {"connect_timeout": 10}
    )
    try:
        if url.startswith("journal:"):
            from optuna.storages.journal import JournalFileBackend, JournalFileSymlinkLock

            path = url.removeprefix("journal:")
            return optuna.storages.JournalStorage(
                JournalFileBackend(
                    path, JournalFileSymlinkLock(path, grace_period=STALE_SECONDS)
                )
            )
        return optuna.storages.RDBStorage(
            url, {"connect_args": patience.get(url.split(":")[0], {})}
        )
    except Exception as cause:
        cause = (
            cause.__cause__ or cause.__context__ if isinstance(cause, ImportError) else cause
        )  # the module that is missing
        line = hide(" ".join(str(cause).split("(Background on")[0].split())[:200])
        raise UserError(
            f"the Optuna storage {hide(url)} cannot be opened ({line or type(cause).__name__}); check --storage"
        ) from None


def hide(url: str) -> str:
    """A URL without its password."""
    return re.sub(r"//[^/@\s]*@", "//", url)


def compare(storage: Any, name: str, facts: dict[str, Any]) -> None:
    """A study of this name that the storage holds must have been made with the same facts; else say which differs."""
    import optuna

    try:
        study = optuna.load_study(study_name=name, storage=storage)
    except KeyError:
        return
    held, cure = (
        study.user_attrs.get(FACTS, {}),
        "rename the experiment or use another --storage",
    )
    if not held and study.get_trials(deepcopy=False):
        raise UserError(f"the storage holds a study {name!r} that ablab did not make; {cure}")
    for key in {**held, **facts} if held else ():
        if held.get(key) != facts.get(key):
            raise UserError(
                f"the storage holds a study {name!r} whose {key} is {held.get(key)}, but this one has {facts.get(key)}; {cure}"
            )


def open_study(storage: Any, name: str, better: str, facts: dict[str, Any], spread: int) -> Any:
    """The Optuna study of one cell, made where it is missing.  spread: remembered, so that more trials go on from the same start."""
    import optuna

    study = optuna.create_study(
        study_name=name, storage=storage, direction=direction(better), load_if_exists=True
    )
    if FACTS not in study.user_attrs:
        study.set_user_attr("spread", spread)
        study.set_user_attr(FACTS, facts)
    return study
