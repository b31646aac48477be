"""What the ledger adds to a report: deviations from what was registered, looks, challenges."""

from collections.abc import Iterator, Sequence

from ablab.analysis.effects.effect import INCONCLUSIVE, REFERENCE, TOO_FEW, Effect
from ablab.analysis.effects.looks import alpha_at
from ablab.core.store.ledger import CHALLENGE, Ledger
from ablab.core.store.planned import GridPlan
from ablab.core.store.registration import Standing, standing
from ablab.core.store.store import Store


def standing_of(store: Store, plan: GridPlan) -> Standing:
    """Raises UserError where the ledger was edited."""
    return standing(Ledger(store.root), plan)


def registered(found: Standing) -> str:
    """A sentence for the provenance of a report."""
    if found.entry is None:
        return "not registered: no entry of the ledger says what was asked before these runs"
    kept = "nothing deviates from it" if not found.deviations else "deviations are named above"
    return f"registered {found.entry.day} as entry {found.entry.hash} of the ledger; {kept}"


def look_of(plan: GridPlan, effects: Sequence[Effect]) -> Iterator[str]:
    """That the verdicts are those of a look, and what they had to pass."""
    if not plan.looks:
        return
    arms = [one for one in effects if one.verdict != REFERENCE]
    undecided = [one for one in arms if one.verdict in (INCONCLUSIVE, TOO_FEW)]
    seeds = max((one.n for one in effects), default=0)
    reached = max((look for look in plan.looks if look <= seeds), default=plan.looks[0])
    kind = "the last look" if reached == plan.looks[-1] else "a look"
    listed = ", ".join(f"`{one.cell}` ({one.n})" for one in undecided)
    state = (
        f"{len(undecided)} of {len(arms)} arms are undecided: {listed}"
        if undecided
        else "all arms are decided"
    )
    yield (
        f"{kind}, at {reached} of at most {plan.looks[-1]} seeds: {state}; a verdict passes what O'Brien and Fleming "
        f"leave to its look, p (Holm) < {alpha_at(reached, plan.looks):.4f} here"
    )


def challenges(store: Store, plan: GridPlan) -> Iterator[str]:
    """What fresh seeds said of the verdicts."""
    for entry in Ledger(store.root).entries(plan.name, CHALLENGE):
        yield f"challenged {entry.day}: {entry.content['sentence']}"
