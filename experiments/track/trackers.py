"""The trackers of a grid: views such as MLflow, each shown in a thread of its own.

Importing mlflow takes seconds, a new database takes migrations, a locked one makes its writers wait, a server may hang:
a grid waits for none of that, it only puts what happened into a queue.
"""

import time
from collections.abc import Callable
from functools import partial
from queue import SimpleQueue
from threading import Thread

from ablab.core.errors import UserError
from ablab.core.store.planned import GridPlan
from ablab.core.store.store import Store
from ablab.experiments.track.chosen import (
    MLFLOW,
    TENSORBOARD,
    TITLES,
    WANDB,
    Tracked,
    is_installed,
    sync_command,
)
from ablab.experiments.track.tracker import Tracker, View

Task = Callable[[], object]
Say = Callable[[str], None]
AGAIN_SECONDS = 30.0  # between two questions to a view that is lost whether it is there again
FINISH_SECONDS = 60.0  # that a command waits for its views at the end, however slow they are


def _mlflow(store: Store, warn: Say) -> View:
    from ablab.experiments.track.mlflow import Mlflow

    return Mlflow(store, warn)


def _tensorboard(store: Store, warn: Say) -> View:
    from ablab.experiments.track.tensorboard import TensorBoard

    return TensorBoard(store, warn)


def _wandb(store: Store, warn: Say) -> View:
    from ablab.experiments.track.wandb import Wandb

    return Wandb(store, warn)


# Each imports its package when it is opened, and none is opened unless it was chosen.
VIEWS: dict[str, Callable[[Store, Say], View]] = {
    MLFLOW: _mlflow,
    TENSORBOARD: _tensorboard,
    WANDB: _wandb,
}


def trackers_for(store: Store, plan: GridPlan, say: Say, tracked: Tracked) -> "Trackers | None":
    chosen = [name for name in tracked if is_installed(name)]
    if MLFLOW in tracked and MLFLOW not in chosen:
        say(
            "mlflow is not installed here; the run folders are complete without it, "
            "and `ablab sync` can show them later"
        )
    return Trackers(store, plan, say, chosen) if chosen else None


class Trackers:
    """What happens in a grid, passed on to each of its views."""

    def __init__(self, store: Store, plan: GridPlan, say: Say, tracked: Tracked | list[str]):
        self.plan = plan
        self.feeds = [Feed(name, store, say) for name in tracked]

    def over(self, plan: GridPlan) -> "Trackers":
        """The same views, from now on of another plan."""
        self.plan = plan
        return self

    def log(self, run: str, step: int, scalars: dict[str, float], seconds: float) -> None:
        for feed in self.feeds:
            feed.put(partial(feed.log, self.plan, run, step, scalars, seconds))

    def close(self, run: str) -> None:
        for feed in self.feeds:
            feed.put(partial(feed.close, run))

    def finish(self, note: Say = lambda line: None) -> None:
        """Show what was not trained here just now (reused runs, cells that share a run), and wait until all is seen."""
        for feed in self.feeds:
            feed.end(self.plan.name)
        until = time.monotonic() + FINISH_SECONDS
        for feed in self.feeds:
            feed.wait(until, note)


class Feed:
    """One view: a tracker for each live run, and a sync at the end for everything that it lacks."""

    def __init__(self, name: str, store: Store, say: Say):
        self.name = name
        self.store = store
        self.say = say
        self.live: dict[str, Tracker] = {}  # by run id
        self.asked_at = time.monotonic()  # the view, whether it is there
        self.view = VIEWS[name](store, say)
        self.queue: SimpleQueue[Task | None] = SimpleQueue()
        self.put(self.view.ensure)
        self.thread = Thread(target=self._serve, daemon=True)
        self.thread.start()

    def put(self, task: Task) -> None:
        self.queue.put(task)

    def end(self, experiment: str) -> None:
        self.put(partial(self._sync, experiment))
        self.queue.put(None)

    def wait(self, until: float, note: Say) -> None:
        """until: by time.monotonic()."""
        self.thread.join(timeout=min(1, max(until - time.monotonic(), 0)))
        if self.thread.is_alive():
            leave = "--no-mlflow" if self.name == MLFLOW else "--track without it"
            note(
                f"bringing the {TITLES[self.name]} view up to date ... "
                f"({leave} leaves it to `{sync_command(self.name)}`)"
            )
            self.thread.join(max(until - time.monotonic(), 0))
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
                self.view.lose(fault)

    def log(
        self, plan: GridPlan, run: str, step: int, scalars: dict[str, float], seconds: float
    ) -> None:
        if not self._is_there():
            return
        if run not in self.live:
            self.live[run] = self._opened(plan, run)
        self.live[run].log(step, scalars, seconds)

    def _is_there(self) -> bool:
        """A view that was lost and has come back shows all that the folders hold: each run is opened anew."""
        if not self.view.lost:
            return True
        if time.monotonic() - self.asked_at < AGAIN_SECONDS:
            return False
        self.live.clear()
        found = self.view.again()
        self.asked_at = time.monotonic()
        if found:
            self.say(f"{TITLES[self.name]} is there again, and shows what it missed")
        return found

    def _opened(self, plan: GridPlan, run: str) -> Tracker:
        """A tracker that has shown what the run's folder holds."""
        from ablab.experiments.track.cards import card_of
        from ablab.experiments.track.replay import replay

        tracker = self.view.tracker()
        row = next(row for row in plan.all_rows if row.run == run)
        replay(self.store.run(run), card_of(self.store, plan, row), tracker)
        return tracker

    def close(self, run: str) -> None:
        from ablab.experiments.track.cards import summary_of

        tracker = self.live.pop(run, None)
        record = self.store.run(run)
        result = record.result()
        if tracker and result and not self.view.lost:
            tracker.close(result.status, summary_of(result, record))

    def _sync(self, name: str) -> None:
        if self._is_there():
            self.view.sync([name], unfinished=False)
