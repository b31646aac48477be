"""The question of an experiment answered in one sentence, from its verdicts."""

from collections.abc import Sequence

from ablab.analysis.effects.effect import (
    BETTER,
    EQUIVALENT,
    HELPS,
    HURTS,
    INADMISSIBLE,
    INERT,
    REFERENCE,
    WORSE,
    Effect,
    ingredient,
)
from ablab.analysis.effects.factorial import FactorEffect
from ablab.analysis.effects.frame import unit

SHOWN = {  # of one, of several
    HELPS: ("helps", "help"),
    HURTS: ("hurts", "hurt"),
    BETTER: ("is better", "are better"),
    WORSE: ("is worse", "are worse"),
}
MOST_NAMED = 4  # ingredients that a sentence names; of more it says how many


Judged = Effect | FactorEffect


def answer(effects: Sequence[Effect], metric: str, crossed: Sequence[FactorEffect] = ()) -> str:
    """One sentence.  Names stand in backticks.  crossed: what a design that crosses factors says, where it is one."""
    arms: list[Judged] = [effect for effect in effects if effect.verdict != REFERENCE]
    if crossed:
        arms = [*crossed]
    if not arms:
        return _of_one_cell(effects, metric)
    by_word: dict[str, list[Judged]] = {}
    for arm in arms:
        by_word.setdefault(arm.word, []).append(arm)
    told = {word: by_word.pop(word) for word in SHOWN if word in by_word}
    parts = [_shown(word, found, metric) for word, found in told.items()]
    if not told:
        parts.append("nothing is shown to make a difference")
    elif HELPS in told and HURTS not in told:
        parts.append("nothing is shown to hurt")
    elif HURTS in told and HELPS not in told:
        parts.append("nothing is shown to help")
    parts += [_others(word, found) for word, found in by_word.items()]
    sentence = "; ".join(parts)
    return f"{sentence[0].upper()}{sentence[1:]}."


def _of_one_cell(effects: Sequence[Effect], metric: str) -> str:
    """Of an experiment that compares nothing."""
    known = [effect for effect in effects if effect.mean is not None]
    if not known:
        return "No run has finished yet."
    values = ", ".join(
        f"`{one.cell}` {one.mean:.4f} {unit(metric)}" for one in known[:MOST_NAMED]
    )
    return f"Nothing is compared here: {values}."


def _shown(word: str, arms: Sequence[Judged], metric: str) -> str:
    """What makes a difference, and how large a one."""
    one, several = SHOWN[word]
    verb = one if len(arms) == 1 else several
    return f"{_named(arms)} {verb} ({_sizes(arms, metric)})"


def _others(word: str, arms: Sequence[Judged]) -> str:
    """What neither helps nor hurts."""
    if word == EQUIVALENT:
        return (
            f"{_named(arms)} {'makes' if len(arms) == 1 else 'make'} no difference that matters"
        )
    if word == INERT:
        return f"{_named(arms)} {'changes' if len(arms) == 1 else 'change'} nothing at all"
    if word == INADMISSIBLE:
        return f"no run of {_named(arms)} finished"
    fewest = min(arm.n for arm in arms)
    if fewest == 0:
        return f"{_named(arms)} cannot be compared yet"
    seeds = f"{fewest} seed{'' if fewest == 1 else 's'}"
    return f"{seeds} cannot tell for {_named(arms)}"


def _named(arms: Sequence[Judged]) -> str:
    """By name; many are counted."""
    names = [f"`{arm.subject}`" for arm in arms]
    if len(names) <= MOST_NAMED:
        return _listed(names)
    first = arms[0]
    if isinstance(first, FactorEffect):
        return f"{len(names)} effects"
    cells = [arm.cell for arm in arms if not isinstance(arm, FactorEffect)]
    of_ingredients = all(ingredient(cell)[0] for cell in cells)
    return f"{len(names)} {'ingredients' if of_ingredients else 'arms'}"


def _listed(names: Sequence[str]) -> str:
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last


def _sizes(arms: Sequence[Judged], metric: str) -> str:
    """By how much, the largest first or from the smallest to the largest."""
    sizes = sorted((abs(arm.delta) for arm in arms if arm.delta is not None), reverse=True)
    if not sizes:
        return "by an unknown amount"
    if len(sizes) == 1:
        return f"by {sizes[0]:.4f} {unit(metric)}"
    return f"by {sizes[-1]:.4f} to {sizes[0]:.4f} {unit(metric)}"
