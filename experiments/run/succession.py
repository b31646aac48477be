"""Which runs an experiment needs, and in which order: one that goes on from another waits until that has finished."""

from collections.abc import Callable, Iterable, Mapping

from ablab.core.errors import UserError
from ablab.core.store.result import FINISHED, Result
from ablab.core.store.state import left_state
from ablab.core.store.store import Store
from ablab.experiments.plan.experiment import PlannedRun


def needed(
    runs: Iterable[PlannedRun], result_of: Callable[[str], Result | None]
) -> tuple[list[PlannedRun], dict[str, Result]]:
    """The runs to train, parents first, and the results that are there already, by run.

    Of a run that has a result, no parent is asked for.  A run that two cells share is named for each of them.
    """
    known: dict[str, Result | None] = {}
    claims: list[PlannedRun] = []
    for run in runs:
        missing: list[PlannedRun] = []
        for one in reversed(run.chain):
            if one.id not in known:
                known[one.id] = result_of(one.id)
            if known[one.id]:
                break
            missing.append(one)
        claims += reversed(missing)
    return claims, {id: result for id, result in known.items() if result}


def once(runs: Iterable[PlannedRun]) -> list[PlannedRun]:
    """Each run for the first cell that has it."""
    first: dict[str, PlannedRun] = {}
    for run in runs:
        first.setdefault(run.id, run)
    return list(first.values())


def check_parents(
    runs: Iterable[PlannedRun], known: Mapping[str, Result], store: Store
) -> None:
    """Raises UserError for a run whose parent has finished and left nothing to go on from."""
    for run in runs:
        parent = known.get(run.recipe.before.run)
        folder = store.run(run.recipe.before.run).folder
        if parent and parent.status == FINISHED and not left_state(folder):
            raise UserError(
                f"{run.title}, seed {run.recipe.seed}, goes on from run {parent.run}, whose last state is gone; "
                f"delete {folder} to train that run again"
            )


class Succession:
    """Lets each run begin once: when it is admitted, and its parent, if that trains here too, has finished."""

    def __init__(self, runs: Iterable[PlannedRun]):
        self.unfinished = {run.id for run in runs}
        self.waiting: dict[str, list[PlannedRun]] = {}  # by the run that they wait for
        self.begun: set[str] = set()

    def admit(self, runs: Iterable[PlannedRun]) -> list[PlannedRun]:
        """Those of them that may begin now; the others follow from `ended`."""
        ready = []
        for run in runs:
            parent = run.recipe.before.run
            if parent in self.unfinished:
                self.waiting.setdefault(parent, []).append(run)
            elif run.id not in self.begun:
                self.begun.add(run.id)
                ready.append(run)
        return ready

    def ended(self, run: str) -> list[PlannedRun]:
        """The runs that waited for this one, which is there to go on from, and may begin now."""
        self.unfinished.discard(run)
        return self.admit(self.waiting.pop(run, []))

    def lost(self, run: str) -> list[PlannedRun]:
        """The runs that waited for this one, which is not there to go on from, and those that wait for them."""
        waiting = once(self.waiting.pop(run, []))
        later = [self.lost(one.id) for one in waiting]
        return waiting + [one for some in later for one in some]
