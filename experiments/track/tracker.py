"""A tracker watches runs.  The run folder is the truth; every tracker is a view that can be rebuilt from it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol


@dataclass(frozen=True)
class Card:
    """Who a run is: everything a tracker may show besides its numbers."""

    run: str  # content hash of the recipe
    experiment: str
    cell: str
    pair: int  # runs of one experiment with the same pair number share seed and batches
    seed: int
    folder: Path  # the run folder: recipe.yaml, metrics.jsonl, pace.jsonl, result.json
    tags: Mapping[str, str] = field(default_factory=dict)
    params: Mapping[str, str | int | float | bool] = field(
        default_factory=dict
    )  # what differs from the base recipe
    description: str = ""  # a sentence or two about the run, for a person


class Tracker(Protocol):
    """One run, as one view shows it."""

    def open(self, card: Card) -> None: ...
    def log(self, step: int, scalars: Mapping[str, float], seconds: float) -> None: ...
    def flush(self) -> None: ...
    def close(self, status: str, summary: Mapping[str, float]) -> None: ...


class View(Protocol):
    """The runs of a store at one place, such as MLflow; opened when first needed."""

    @property
    def lost(self) -> bool:
        """Given up: nothing more is sent, `ablab sync` does it later."""

    def ensure(self) -> bool:
        """Open it now.  False, after one warning, where that cannot be done."""

    def again(self) -> bool:
        """Of one that is lost: whether it can be reached now, and goes on.  Says nothing."""

    def lose(self, cause: Exception) -> None:
        """Give up, and say once that runs go on unseen."""

    def tracker(self) -> Tracker: ...

    def sync(self, experiments: Sequence[str], unfinished: bool = True) -> dict[str, int]:
        """Send what it lacks of these experiments, or of all; the number of runs of each outcome.

        unfinished: also runs without a result, which another process may be training and showing.
        Raises UserError where the place cannot be written.
        """
