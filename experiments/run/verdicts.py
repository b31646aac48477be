"""What was said of the arms, as the ledger keeps it: every verdict with the runs behind it."""

from collections.abc import Callable, Iterable
from typing import Any

from ablab.analysis.effects import frame
from ablab.analysis.effects.effect import Effect
from ablab.analysis.effects.effects import measure
from ablab.core.store.ledger import VERDICTS, Ledger
from ablab.core.store.result import FINISHED
from ablab.core.store.store import Store
from ablab.experiments.run.pool import Outcome


def note_verdicts(
    ledger: Ledger,
    experiment: str,
    effects: Iterable[Effect],
    say: Callable[[str], None],
    look: int | None = None,
) -> None:
    """Written down unless the last note of the experiment says the same.  look: seeds that it saw; None: all."""
    arms = {one.cell: verdict_of(one) for one in effects if one.reference is not None}
    ledger.note(VERDICTS, experiment, {"look": look, "arms": arms}, say)


def note_final_verdicts(
    store: Store, experiment: str, outcome: Outcome, say: Callable[[str], None]
) -> None:
    """After a grid in which something was trained; nothing where no run has finished, which is no verdict."""
    if not outcome.trained:
        return
    plan = store.read_plan(experiment)
    runs = frame.load(store, experiment)
    if (runs.status == FINISHED).any():
        effects = measure(runs, plan.metric, plan.better, plan.equivalence, plan.looks)
        note_verdicts(Ledger(store.root), experiment, effects, say)


def verdict_of(effect: Effect) -> dict[str, Any]:
    return {
        "verdict": effect.verdict,
        "delta": effect.delta,
        "seeds": list(effect.seeds),
        "runs": list(effect.runs),
    }
