"""Which trackers show the runs: `--track mlflow,tensorboard`, else $ABLAB_TRACK, else MLflow.

None is imported here; of those that were chosen, a package that is not installed is named with its cure.
"""

import importlib.util

from ablab.core.errors import UserError
from ablab.core.language.parse import near

MLFLOW, TENSORBOARD, WANDB = "mlflow", "tensorboard", "wandb"
TRACKERS = (MLFLOW, TENSORBOARD, WANDB)  # each the name of the package that it needs, too
NONE = "none"
USUAL = (MLFLOW,)
TITLES = {MLFLOW: "MLflow", TENSORBOARD: "TensorBoard", WANDB: "Weights & Biases"}

Tracked = tuple[str, ...]  # names among TRACKERS


def tracked(track: str | None, mlflow: bool | None = None) -> Tracked:
    """The trackers that a command was asked for.  mlflow: what --mlflow or --no-mlflow says of that one.

    Raises UserError for a name that is none, and for a package that is not here.
    """
    chosen = _named(track or ",".join(USUAL))
    if mlflow is False:
        chosen = tuple(name for name in chosen if name != MLFLOW)
    elif mlflow and MLFLOW not in chosen:
        chosen = (MLFLOW, *chosen)
    for name in chosen:
        # mlflow comes with ablab; where it was removed, the runs are trained all the same.
        if name != MLFLOW and not is_installed(name):
            raise UserError(
                f"tracker {name} (--track or $ABLAB_TRACK) needs a package that is not installed here: "
                f"pip install 'ablab[{name}]'"
            )
    return chosen


def _named(text: str) -> Tracked:
    words = [word.strip() for word in text.split(",")]
    names = dict.fromkeys(word for word in words if word)
    if list(names) == [NONE]:
        return ()
    for name in names:
        if name not in TRACKERS:
            raise UserError(
                f"there is no tracker {name!r:.40} (--track or $ABLAB_TRACK). {near(name, TRACKERS)}"
                f"Trackers: {', '.join(TRACKERS)}, several by commas; or {NONE}"
            )
    return tuple(names)


def is_installed(package: str) -> bool:
    """A folder of that name beside the caller, such as W&B's own ./wandb, is no package."""
    found = importlib.util.find_spec(package)
    return found is not None and found.origin is not None


def sync_command(name: str) -> str:
    """What brings a view up to date later."""
    return "ablab sync" if name in USUAL else f"ablab sync --track {name}"
