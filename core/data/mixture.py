"""Mixes: which source each window of training comes from.  No torch, no seed, no clock.

    window n of a run  ->  (source, which window of that source)

Sources take turns as evenly as whole windows allow: of the first n windows a source with share s has had between
n s - 1 and n s + 1, whatever n (Tijdeman, "The chairman assignment problem", Discrete Math. 32, 1980: at most
1 - 1/(2k - 2) from n s with k sources).  So every batch has the mix's shares, and no two runs differ in them.

Weights are taken as the decimals that were written, and the rule is kept in whole numbers: no rounding adds up.
"""

import hashlib
import math
from array import array
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fractions import Fraction

from ablab.core.errors import UserError
from ablab.core.recipe.recipe import Data, Recipe

MARK = 1024  # windows between two counts that are kept: `at` counts at most so many


class Shares:
    """The turns of the sources, which repeat after a period: the sum of the weights as coprime whole numbers.

    Turns are found from the first on, about a microsecond a source each, and kept in two bytes each.
    """

    def __init__(self, weights: Mapping[str, float]):
        """Raises UserError: no source, a weight that is not a finite number > 0."""
        self.names = sorted(weights)
        self.weights = _coprime([_positive(name, weights[name]) for name in self.names])
        self.period = sum(self.weights)
        self.turns = array("H")  # source of each window found so far
        self.taken = [0] * len(self.weights)  # by all of `turns`
        self.marks = [tuple(self.taken)]  # by the first MARK, 2 MARK, ... of them

    def share(self, source: int) -> Fraction:
        return Fraction(self.weights[source], self.period)

    def at(self, window: int) -> tuple[int, int]:
        """Window of the run, from 0 -> its source, and how many windows that source has had before."""
        rounds, place = divmod(window, self.period)
        self._find(place + 1)
        source = self.turns[place]
        return source, rounds * self.weights[source] + self._taken_by(source, place)

    def counts(self, windows: int) -> list[int]:
        """Windows of each source among the first `windows`."""
        rounds, place = divmod(windows, self.period)
        self._find(place)
        sources = range(len(self.weights))
        return [rounds * self.weights[i] + self._taken_by(i, place) for i in sources]

    def _taken_by(self, source: int, place: int) -> int:
        """Windows of a source among the first `place` of a period."""
        mark = place // MARK
        return self.marks[mark][source] + self.turns[mark * MARK : place].count(source)

    def _find(self, count: int) -> None:
        """Settle the first `count` turns."""
        while len(self.turns) < count:
            source = self._next()
            self.turns.append(source)
            self.taken[source] += 1
            if len(self.turns) % MARK == 0:
                self.marks.append(tuple(self.taken))

    def _next(self) -> int:
        """Of the sources that may have a turn the one that must have it first.

        With n = this turn, w a weight, D their sum and x the turns had, a source is due by w n - D x.  It may have one
        once that is at least D / (2k - 2), and must before it exceeds D (2k - 3) / (2k - 2): in (that - due) / w turns.
        """
        weights, total = self.weights, self.period
        spread = max(2 * len(weights) - 2, 1)
        turn = len(self.turns) + 1
        chosen, slack_of_chosen = -1, 0
        for source, weight in enumerate(weights):
            due = spread * (weight * turn - total * self.taken[source])
            if due < total:
                continue
            slack = total * (spread - 1) - due
            # slack / weight, compared without division
            if chosen < 0 or slack * weights[chosen] < slack_of_chosen * weight:
                chosen, slack_of_chosen = source, slack
        return chosen


def _positive(name: str, weight: float) -> Fraction:
    if isinstance(weight, bool) or not isinstance(weight, int | float):
        raise UserError(f"the weight of {name} must be a number > 0, not {weight!r:.40}")
    if not math.isfinite(weight) or weight <= 0:
        raise UserError(
            f"the weight of {name} is {weight}; use a finite number > 0, or drop the source"
        )
    return Fraction(repr(weight))  # 0.1 is a tenth, as it was written


def _coprime(weights: list[Fraction]) -> list[int]:
    if not weights:
        raise UserError("a mix needs a source; name at least one token folder with its weight")
    common = math.lcm(*(weight.denominator for weight in weights))
    whole = [int(weight * common) for weight in weights]
    divisor = math.gcd(*whole)
    return [weight // divisor for weight in whole]


@dataclass(frozen=True)
class Portion:
    """What one source gives to a run."""

    source: str
    share: float  # of the run's tokens
    tokens: int  # asked for, rounded
    windows: int  # in one epoch of the source
    context: int  # tokens of a window

    @property
    def epochs(self) -> float:
        return self.tokens / (self.windows * self.context)


def portions(recipe: Recipe, windows_of: Mapping[str, int]) -> list[Portion]:
    """What a run takes of each source of its mix.  windows_of: source -> windows of one epoch."""
    shares = Shares(recipe.data.mix)
    context = recipe.data.context
    total = recipe.tokens_after(recipe.steps)
    return [
        Portion(
            name,
            float(shares.share(i)),
            round(total * shares.share(i)),
            windows_of[name],
            context,
        )
        for i, name in enumerate(shares.names)
    ]


def check_epochs(recipe: Recipe, windows_of: Mapping[str, int]) -> None:
    """Raises UserError where a mix takes more passes over a source than data.epochs allows."""
    allowed = recipe.data.epochs
    for portion in portions(recipe, windows_of):
        if portion.epochs > allowed:
            there = portion.windows * portion.context
            most = math.floor(allowed * there / portion.share)
            raise UserError(
                f"the mix asks for {portion.tokens:,} tokens of {portion.source}, which has {there:,}: "
                f"{portion.epochs:.2f} epochs; set data.epochs={_above(portion.epochs)}, "
                f"lower its weight, or budget.tokens to {most}"
            )


def _above(epochs: float) -> float:
    """The next tenth."""
    return math.ceil(epochs * 10) / 10


def digest_of_data(data: Data, digest_of: Callable[[str], str | None]) -> str | None:
    """What `data.digest` must be: that of the token folder; of a mix, of the names and digests of all its sources.

    Weights are not in it: the recipe says them.  None while a source is not there.
    """
    if not data.mix:
        return digest_of(data.name)
    lines = []
    for source in sorted(data.mix):
        if (digest := digest_of(source)) is None:
            return None
        lines.append(f"{source} {digest}\n")
    return hashlib.sha256("".join(lines).encode()).hexdigest()[:16]
