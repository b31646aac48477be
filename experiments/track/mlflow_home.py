"""Where MLflow lives: the store's own database, or what MLFLOW_TRACKING_URI names; and what to do when it fails.

Nothing here imports mlflow before it is used: that takes 1.7 s.
"""

import os
import sqlite3
from contextlib import closing
from pathlib import Path
from types import ModuleType

from ablab.core.errors import UserError
from ablab.core.store.files import sqlite_url

DATABASES = ("sqlite:", "postgresql", "mysql", "mssql")
QUIET = {  # defaults of ours, which the user's own environment overrides
    "MLFLOW_DISABLE_TELEMETRY": "true",
    # MLflow prints a traceback for each failure that we report in a line.
    "MLFLOW_LOGGING_LEVEL": "CRITICAL",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    # Background workers for evaluating language-model traces.
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    # MLflow's 7 of 120 s would hold up the view for minutes when a server is gone or hangs.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "GIT_PYTHON_REFRESH": "quiet",
}


def database(root: Path) -> Path:
    return root.absolute() / "mlflow.db"


def artifacts(root: Path) -> Path:
    return root.absolute() / "mlartifacts"


def local_uri(root: Path) -> str:
    return sqlite_url(database(root))


def tracking_uri(root: Path) -> str:
    """$MLFLOW_TRACKING_URI, else the store's own database."""
    return os.environ.get("MLFLOW_TRACKING_URI") or local_uri(root)


def cure(uri: str, root: Path) -> str:
    """What to do about an MLflow that fails."""
    if uri == local_uri(root):
        return f"it is only a view: delete {database(root)} and make it anew with `ablab sync`"
    return "check MLFLOW_TRACKING_URI, or unset it to use the store's own database"


def import_mlflow() -> ModuleType:
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    import mlflow

    return mlflow


def open_database_once() -> None:
    """MLflow tries ten times, for 102 s, whatever stands in the place of a database."""
    from mlflow.store.db import utils

    utils.MAX_RETRY_COUNT = 1


def check_schema(uri: str) -> None:
    """Raises UserError for a database of others that our MLflow would migrate at its first touch, or cannot read.

    Where a table is missing, MLflow takes a database for a fresh one and migrates it, whoever writes to it meanwhile.
    """
    from alembic.runtime.migration import MigrationContext
    from mlflow.store.db.utils import _get_latest_schema_revision
    from mlflow.version import VERSION
    from sqlalchemy import create_engine

    engine = create_engine(uri)
    try:
        with engine.connect() as connection:
            found = MigrationContext.configure(connection).get_current_revision()
    finally:
        engine.dispose()
    wanted = _get_latest_schema_revision()
    if found not in (None, wanted):
        raise UserError(
            f"its schema {found} is not that of MLflow {VERSION} here, {wanted}; ablab migrates no database of others: "
            "back it up, stop who writes, `mlflow db upgrade URI`"
        )


def errors() -> tuple[type[Exception], ...]:
    """What MLflow raises when its database or server does not do its part."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    return MlflowException, SQLAlchemyError, OSError


def create_database(root: Path) -> None:
    """Make the store's database unless it exists.  It gets its name in one step: no one ever sees half a schema."""
    path = database(root)
    if path.exists():
        return
    from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

    partial = path.with_name(f"mlflow-{os.getpid()}.partial")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        fresh = SqlAlchemyStore(sqlite_url(partial), artifacts(root).as_uri())
        fresh.engine.dispose()
        if not path.exists():  # another process may have been quicker, and logged already
            os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def follow_the_store(root: Path) -> None:
    """MLflow notes whole paths: in a store that was moved or copied, those of our artifacts are set right.

    Raises sqlite3.Error for a file that is no database of MLflow's.
    """
    if not database(root).exists():
        return
    here = artifacts(root).as_uri()
    elsewhere = (
        "select experiment_id, artifact_location from experiments "
        "where name like 'ablab/%' and artifact_location != ?"
    )
    with closing(sqlite3.connect(database(root))) as base, base:
        moved = base.execute(elsewhere, [here]).fetchall()
        for experiment, old in moved:
            base.execute(
                "update runs set artifact_uri = ? || substr(artifact_uri, ?) "
                "where experiment_id = ? and substr(artifact_uri, 1, ?) = ?",
                [here, len(old) + 1, experiment, len(old), old],
            )
            base.execute(
                "update experiments set artifact_location = ? where experiment_id = ?",
                [here, experiment],
            )
