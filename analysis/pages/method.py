"""How to read the intervals of a report: the methods that it used, each named once, and what they do not cover."""

from collections import Counter
from collections.abc import Sequence

from ablab.analysis.effects.effect import REFERENCE, Effect
from ablab.analysis.effects.family import WITH_SEEDS
from ablab.analysis.effects.intervals import DIFFMAX, MODERATED, PAIRED, WELCH

DIFFERENCES = """\
A delta is the mean of arm minus reference over the seeds that both finished: they share initial weights and batches,
so what counts is the spread of the differences, not that of the losses.  {methods}"""

SAYS = {
    PAIRED: "Student's t on the differences",
    MODERATED: (
        "Student's t on the differences, each arm's variance shrunk towards those of the others as far as they look "
        "alike (Smyth 2004)"
    ),
    DIFFMAX: "the larger of the two arms' common error and each one's own",
    WELCH: "arm and reference share no seed, so nothing is paired",
    WITH_SEEDS: "some runs are lost, so one model of all finished runs is fitted",
}

VERDICTS = """\
The interval is a 95 % interval *of that comparison alone*.  The verdict comes from p (Holm), adjusted for all {judged}
comparisons together: if nothing had an effect, a report would hold a false verdict in one of twenty.{equivalent}
`ablab check stats` measures both."""

EQUIVALENCE = """
*Equivalent*: the 90 % interval lies within +-{margin:g}, the smallest effect of interest that the sheet declares."""

LIMITS = """\
What the intervals do not cover.  *Same hyper-parameters, not tuned*: the learning rate was not re-tuned per arm, so
an arm that wants another one is judged too harshly.  One size, one dataset, one token budget: nothing here says that
a delta survives scale.  All runs share one held-out text: what another text would change is not in the interval."""

TOKENS = """\
*SE text* is that: the standard error of a delta over the {documents} documents of the held-out text, tokens of one
document taken together (Miller 2024), the seeds held fixed.  A delta below twice its size may be this text's alone."""


def how_to_read(effects: Sequence[Effect], equivalence: float | None = None) -> str:
    """Markdown paragraphs about the methods behind these effects."""
    arms = [effect for effect in effects if effect.verdict != REFERENCE]
    judged = sum(arm.p_adjusted is not None for arm in arms)
    parts = [DIFFERENCES.format(methods=methods_of(arms)).rstrip()]
    if judged:
        declared = "" if equivalence is None else EQUIVALENCE.format(margin=equivalence)
        parts.append(VERDICTS.format(judged=judged, equivalent=declared))
    limits = [LIMITS]
    if texts := [arm.tokens.documents for arm in arms if arm.tokens]:
        limits.append(TOKENS.format(documents=max(texts)))
    return "\n\n".join([*parts, "\n".join(limits)])


def methods_of(arms: Sequence[Effect]) -> str:
    """Each method once, with the arms that it serves where there are several."""
    counts = Counter(arm.method for arm in arms if arm.method)
    if len(counts) == 1:
        (method,) = counts
        return f"Method: {method}, {SAYS[method]}."
    told = [f"{method} ({_served(arms, method)}), {SAYS[method]}" for method in counts]
    return f"Methods: {'; '.join(told)}." if told else ""


def _served(arms: Sequence[Effect], method: str) -> str:
    cells = [f"`{arm.cell}`" for arm in arms if arm.method == method]
    return ", ".join(cells) if len(cells) <= 3 else f"{len(cells)} arms"
