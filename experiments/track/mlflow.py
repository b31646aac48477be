"""MLflow as one of the views; its own files are mlflow_view.py, mlflow_tracker.py and mlflow_sync.py."""

from collections.abc import Callable, Sequence

from ablab.core.store.store import Store
from ablab.experiments.track.mlflow_sync import sync
from ablab.experiments.track.mlflow_tracker import MlflowTracker
from ablab.experiments.track.mlflow_view import MlflowView
from ablab.experiments.track.store_view import to_stderr


class Mlflow:
    """The store's own database, or what MLFLOW_TRACKING_URI names."""

    def __init__(self, store: Store, warn: Callable[[str], None] = to_stderr):
        self.store = store
        self.view = MlflowView(store, warn=warn)

    @property
    def lost(self) -> bool:
        return self.view.lost

    def ensure(self) -> bool:
        return self.view.ensure()

    def again(self) -> bool:
        self.view.lost = False
        return self.view.ensure()

    def lose(self, cause: Exception) -> None:
        self.view.lose(cause)

    def tracker(self) -> MlflowTracker:
        return MlflowTracker(self.view)

    def sync(self, experiments: Sequence[str], unfinished: bool = True) -> dict[str, int]:
        """Unfinished runs always: MLflow says of each which steps it holds."""
        return sync(self.store, list(experiments) or None, view=self.view)
