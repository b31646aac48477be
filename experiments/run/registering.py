"""Before the first run of an experiment trains, the ledger of its store holds what it asks."""

from collections.abc import Callable

from ablab.core.store.ledger import Ledger
from ablab.core.store.registration import register
from ablab.core.store.store import Store
from ablab.experiments.plan.experiment import Experiment, PlannedRun
from ablab.experiments.plan.promise import promise_of


def registered(
    experiment: Experiment, store: Store, runs: list[PlannedRun], say: Callable[[str], None]
) -> str:
    """The hash of the entry that holds what is asked now.

    Raises UserError where the ledger was edited, and where the plan of that name is of another file.
    """
    store.check_owner(experiment.name, experiment.origin, experiment.asked)
    promise = promise_of(experiment, runs, _seen(experiment, store, runs))
    return register(Ledger(store.root), experiment.name, promise, say)


def _seen(experiment: Experiment, store: Store, runs: list[PlannedRun]) -> int:
    """Differences that can be read already: arms whose run of a seed has ended, as has that of their reference."""
    ended = {(run.cell, run.pair) for run in runs if store.run(run.id).stamp()}
    return sum((experiment.cell_named[cell].reference, pair) in ended for cell, pair in ended)
