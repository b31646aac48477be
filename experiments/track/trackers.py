"""The trackers of a grid: MLflow as a view, shown in a thread of its own.

Importing mlflow takes seconds, a new database takes migrations, a locked one makes its writers wait: a grid waits for
none of that, it only puts what happened into a queue.
"""

import importlib.util
from collections.abc import Callable
from functools import partial
from queue import SimpleQueue
from threading import Thread

from ablab.core.errors import UserError
from ablab.core.store.planned import GridPlan
from ablab.core.store.store import Store
from ablab.experiments.track.tracker import Tracker

Task = Callable[[], object]
FINISH_SECONDS = 60.0  # that a command waits for its view at the end, however slow MLflow is


def trackers_for(store: Store, plan: GridPlan, say: Callable[[str], None]) -> "Trackers | None":
    if importlib.util.find_spec("mlflow"):
        return Trackers(store, plan, say)
    say(
        "mlflow is not installed here; the run folders are complete without it, "
        "and `ablab sync` can show them later"
    )
    return None


class Trackers:
    """One tracker for each live run, and a sync at the end for everything that the view lacks."""

    def __init__(self, store: Store, plan: GridPlan, say: Callable[[str], None]):
        from ablab.experiments.track.mlflow_view import MlflowView

        self.store = store
        self.plan = plan
        self.say = say
        self.live: dict[str, Tracker] = {}  # by run id
        self.view = MlflowView(store, warn=say)
        self.queue: SimpleQueue[Task | None] = SimpleQueue()
        self.queue.put(self.view.ensure)
        self.thread = Thread(target=self._serve, daemon=True)
        self.thread.start()

    def over(self, plan: GridPlan) -> "Trackers":
        """The same view, from now on of another plan."""
        self.plan = plan
        return self

    def log(self, run: str, step: int, scalars: dict[str, float], seconds: float) -> None:
        self.queue.put(partial(self._log, self.plan, run, step, scalars, seconds))

    def close(self, run: str) -> None:
        self.queue.put(partial(self._close, run))

    def finish(self, note: Callable[[str], None] = lambda line: None) -> None:
        """Show what was not trained here just now (reused runs, cells that share a run), and wait until all is seen."""
        self.queue.put(partial(self._sync, self.plan.name))
        self.queue.put(None)
        self.thread.join(timeout=1)
        if self.thread.is_alive():
            note(
                "bringing the MLflow view up to date ... (--no-mlflow leaves it to `ablab sync`)"
            )
            self.thread.join(FINISH_SECONDS)
        if self.thread.is_alive():
            self.view.lose(TimeoutError(f"not done after {FINISH_SECONDS:.0f} s"))

    # -- in the thread ---------------------------------------------------------------------------------------------
    def _serve(self) -> None:
        while task := self.queue.get():
            try:
                task()
            except UserError as lost:
                self.say(str(lost))
            except Exception as fault:  # a view never stops a grid
                self.say(
                    f"MLflow: {type(fault).__name__}: {fault}; the run folders are complete, "
                    "`ablab sync` shows them later"
                )

    def _log(
        self, plan: GridPlan, run: str, step: int, scalars: dict[str, float], seconds: float
    ) -> None:
        if self.view.lost:
            return
        if run not in self.live:
            self.live[run] = self._opened(plan, run)
        self.live[run].log(step, scalars, seconds)

    def _opened(self, plan: GridPlan, run: str) -> Tracker:
        """A tracker that has shown what the run's folder holds."""
        from ablab.experiments.track.cards import card_of
        from ablab.experiments.track.mlflow_sync import replay
        from ablab.experiments.track.mlflow_tracker import MlflowTracker

        tracker = MlflowTracker(self.view)
        row = next(row for row in plan.all_rows if row.run == run)
        replay(self.store.run(run), card_of(self.store, plan, row), tracker)
        return tracker

    def _close(self, run: str) -> None:
        from ablab.experiments.track.cards import summary_of

        tracker = self.live.pop(run, None)
        result = self.store.run(run).result()
        if tracker and result:
            tracker.close(result.status, summary_of(result))

    def _sync(self, name: str) -> None:
        from ablab.experiments.track.mlflow_sync import sync

        if not self.view.lost:
            sync(self.store, [name], view=self.view)
