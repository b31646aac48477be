"""The candidates that all cells propose at a time, and the runs that answer them: two cells may propose one recipe."""

from collections.abc import Mapping
from typing import NamedTuple

from ablab.core.store.store import Store
from ablab.experiments.plan.experiment import PlannedRun
from ablab.experiments.tune.cell_search import CellSearch
from ablab.experiments.tune.trials import Candidate


class Proposed(NamedTuple):
    """A candidate, and whose it is."""

    search: CellSearch
    candidate: Candidate


class Generation:
    """What is trained before the searches are asked again."""

    def __init__(self, proposed: list[Proposed], store: Store, metric: str):
        """metric: the one at whose evaluations a run may be stopped."""
        self.proposed = proposed
        self.store = store
        self.metric = metric
        self.runs: dict[str, PlannedRun] = {}  # by id
        self.answered: dict[
            str, list[Proposed]
        ] = {}  # run id -> the candidates that it answers
        for one in proposed:
            for run in one.candidate.runs:
                for stage in run.chain:
                    self.runs.setdefault(stage.id, stage)
                self.answered.setdefault(run.id, []).append(one)

    @property
    def candidates(self) -> list[Candidate]:
        return [one.candidate for one in self.proposed]

    def is_pruned(self, run: str) -> bool:
        """Whether every candidate that the run answers would end early, as far as its curve has got."""
        answered = self.answered.get(run, [])  # none by an earlier stage, which is never judged
        return bool(answered) and all(
            search.verdict(candidate, self.store) is not None for search, candidate in answered
        )

    def stops(self, run: PlannedRun, step: int, scalars: Mapping[str, float]) -> bool:
        """Whether a run that has just logged should end."""
        return self.metric in scalars and self.is_pruned(run.id)

    def tell(self) -> None:
        """Store every candidate.  All runs have ended."""
        for search, candidate in self.proposed:
            search.tell(candidate, self.store)
