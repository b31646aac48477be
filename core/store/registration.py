"""What an experiment promises before its runs, and in what its plan has deviated from that since."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import msgspec

from ablab.core.store.ledger import REGISTERED, Entry, Ledger
from ablab.core.store.planned import GridPlan

LISTED = 4  # names in a sentence; the others are counted


@dataclass(frozen=True)
class Stopping:
    """When a grid ends: after all of its seeds, or at the first look at which its arms are decided."""

    seeds: tuple[int, ...] = ()  # all that it may use; () where the sheet's are wanted at once
    looks: tuple[int, ...] = ()  # how many of them each look has seen
    hours: float | None = None  # of training, all runs together


@dataclass(frozen=True)
class Promise:
    """What is registered."""

    question: str
    metric: str
    better: str
    equivalence: float | None  # differences below are of no interest, in the metric's unit
    design: str  # as the sheet writes it
    seeds: list[int]
    looks: list[int]  # [] where all seeds are wanted at once
    hours: float | None  # that the looks may spend
    references: dict[str, str | None]  # arm -> what it is measured against
    runs: dict[str, list[str]]  # arm -> its run of each seed
    # Differences between an arm and its reference that could be read before: both runs of the seed had ended.
    seen: int = 0


@dataclass(frozen=True)
class Standing:
    """What the ledger says of an experiment."""

    # The last promise made before any difference could be read, else the first; None where there is none.
    entry: Entry | None
    promise: Promise | None
    deviations: list[str]  # sentences


def register(
    ledger: Ledger, experiment: str, promise: Promise, say: Callable[[str], None]
) -> str:
    """Write the promise down, unless the last one of the experiment is the same; the hash of its entry."""
    known = ledger.entries(experiment, REGISTERED)
    if known and replace(_promise_of(known[-1]), seen=promise.seen) == promise:
        return known[-1].hash
    return ledger.append(REGISTERED, experiment, msgspec.to_builtins(promise), say).hash


def standing(ledger: Ledger, plan: GridPlan) -> Standing:
    """Raises UserError where the ledger was edited, or has lost what the plan names."""
    known = ledger.entries(plan.name, REGISTERED)
    lost = plan.registered and plan.registered not in [entry.hash for entry in known]
    if lost and ledger.exists:
        raise ledger.missing(plan.registered)
    if not known:
        return Standing(None, None, _gone(ledger, plan))
    unseen = [entry for entry in known if not _promise_of(entry).seen]
    entry = unseen[-1] if unseen else known[0]
    promise = _promise_of(entry)
    deviations = list(_deviations(promise, plan))
    if deviations and known[-1] is not entry:
        seen = _promise_of(known[-1]).seen
        deviations.append(
            f"the last change was registered {known[-1].day}, when {seen} differences could be read"
        )
    if promise.seen:
        deviations.insert(0, _late(entry, promise))
    return Standing(entry, promise, deviations)


def _promise_of(entry: Entry) -> Promise:
    return msgspec.convert(entry.content, Promise)


def _gone(ledger: Ledger, plan: GridPlan) -> list[str]:
    """A plan of an older store names no entry, and deviates from nothing."""
    if not plan.registered:
        return []
    return [
        f"{ledger.path.name} is gone, in which this experiment was entry {plan.registered}: "
        "nothing says what was asked before its runs"
    ]


def _late(entry: Entry, promise: Promise) -> str:
    return (
        f"registered late, {entry.day}: {promise.seen} differences between arms and references "
        "could be read before"
    )


def _deviations(promise: Promise, plan: GridPlan) -> Iterator[str]:
    """In what the plan is not what was promised, a sentence each."""
    for name in ("question", "metric", "better", "equivalence"):
        promised, now = getattr(promise, name), getattr(plan, name)
        if promised != now:
            yield f"{name}: registered {_shown(promised)}, now {_shown(now)}"
    if promise.looks != plan.looks:
        yield f"stopping rule: registered {_rule(promise.looks)}, now {_rule(plan.looks)}"
    yield from _changed_arms(promise, plan)
    planned = dict.fromkeys(row.pair for row in plan.rows)
    if added := [seed for seed in planned if seed not in promise.seeds]:
        yield f"seeds added: {_listed(added)}; registered {_listed(promise.seeds)}"
    dropped = [seed for seed in promise.seeds if seed not in planned]
    if dropped and not promise.looks:  # looks end where they have decided
        yield f"seeds dropped: {_listed(dropped)}"


def _changed_arms(promise: Promise, plan: GridPlan) -> Iterator[str]:
    references = {row.cell: row.reference for row in plan.rows}
    if added := [cell for cell in references if cell not in promise.runs]:
        yield f"arms added: {_listed(added)}"
    if dropped := [cell for cell in promise.runs if cell not in references]:
        yield f"arms dropped: {_listed(dropped)}"
    kept = [cell for cell in references if cell in promise.runs]
    promised = {
        (cell, seed): run
        for cell, runs in promise.runs.items()
        for seed, run in zip(promise.seeds, runs, strict=True)
    }
    others = {
        row.cell: None
        for row in plan.rows
        if promised.get((row.cell, row.pair), row.run) != row.run
    }
    if others:
        yield f"arms with another recipe: {_listed(others)}"
    moved = [cell for cell in kept if references[cell] != promise.references[cell]]
    if moved:
        yield f"arms measured against another reference: {_listed(moved)}"


def _rule(looks: list[int]) -> str:
    return f"looks at {_listed(looks)} seeds" if looks else "all seeds at once"


def _shown(value: object) -> str:
    return "none" if value is None else str(value)


def _listed(names: Iterable[object]) -> str:
    listed = [str(name) for name in names]
    more = f" and {len(listed) - LISTED} more" if len(listed) > LISTED else ""
    return ", ".join(listed[:LISTED]) + more
