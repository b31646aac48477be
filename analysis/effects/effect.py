"""An effect in words and numbers: what one arm says about its ingredient."""

from dataclasses import dataclass, field

from ablab.core.store.result import DIVERGED, FAILED, OUT_OF_MEMORY, PRUNED, said

HELPS = "helps"
HURTS = "hurts"
EQUIVALENT = "equivalent"
INCONCLUSIVE = "inconclusive"
INERT = "inert"
INADMISSIBLE = "inadmissible"  # every run that ended, ended badly
TOO_FEW = "too few seeds"
REFERENCE = "reference"
BETTER = "better"  # of an arm that stands for itself
WORSE = "worse"
DECIDED = (HELPS, HURTS, EQUIVALENT, INERT)
ENDED_BADLY = (DIVERGED, OUT_OF_MEMORY, FAILED, PRUNED)


@dataclass(frozen=True)
class Interval:
    """A 95 % confidence interval of one comparison alone, in the unit of what is compared."""

    low: float
    high: float
    method: str  # intervals.py: "paired t", "moderated paired t", "diffmax", "Welch"; or "y ~ arm + seed"
    standard_error: float
    degrees: float  # of freedom
    p: float  # two-sided, of no difference; of this comparison alone


@dataclass(frozen=True)
class TokenEffect:
    """What the choice of held-out text owes to a delta (tokens.py).  delta, se: in the metric's unit."""

    delta: float
    se: float  # over documents, the seeds held fixed
    documents: int
    tokens: int  # that are counted


@dataclass(frozen=True)
class Effect:
    """One cell against its reference, over the seeds that both finished.  Values in the metric's unit."""

    cell: str
    reference: str | None  # None: this cell is what others are measured against
    # About the ingredient: helps, hurts, equivalent, inconclusive, inert, inadmissible, too few seeds; or "reference".
    # An arm that gets worse without x says that x helps; an arm whose name has no sign speaks of itself.
    verdict: str
    sentence: str
    n: int  # seeds that both finished; of an arm on seeds of its own, its finished runs
    seeds: tuple[int, ...]
    statuses: dict[str, int]  # planned runs of this cell by status
    mean: float | None
    sd: float | None
    runs: tuple[str, ...] = ()  # behind the number, the reference's among them
    reference_mean: float | None = None
    reference_sd: float | None = None
    delta: float | None = None  # cell minus reference
    interval: Interval | None = None  # None below two seeds, and for inert cells
    spread: float | None = None  # sd of the differences over shared seeds
    tokens: TokenEffect | None = None  # None where the runs kept no losses
    correlation: float | None = None  # of cell and reference over shared seeds, from three on
    p_adjusted: float | None = None  # Holm's, over all arms that have a verdict
    p_equivalent: float | None = None  # of a difference as large as `equivalence` (TOST)
    more_seeds: int = 0  # that a verdict still lacks
    tokens_per_second: float | None = None
    tokens_per_second_ratio: float | None = None  # cell over reference
    speed: Interval | None = None  # of that ratio, seed by seed
    # Place -> what served it in the cell and in the reference, where these differ: the ratio compares kernels too.
    service: dict[str, tuple[str, str]] = field(default_factory=dict)
    note: str = ""

    @property
    def low(self) -> float | None:
        return self.interval.low if self.interval else None

    @property
    def high(self) -> float | None:
        return self.interval.high if self.interval else None

    @property
    def seed_error(self) -> float | None:
        """Standard error of the delta over seeds."""
        return self.interval.standard_error if self.interval else None

    @property
    def token_error(self) -> float | None:
        """Standard error of the delta over documents of the held-out text."""
        return self.tokens.se if self.tokens else None

    @property
    def counts(self) -> str:
        """How the planned runs ended, in words: 2 finished, 1 diverged."""
        return said(self.statuses)

    @property
    def method(self) -> str:
        return self.interval.method if self.interval else ""

    @property
    def subject(self) -> str:
        """What the verdict is about: the ingredient, or the arm itself."""
        return ingredient(self.cell)[1]

    @property
    def word(self) -> str:
        """The verdict as a table shows it: helps, hurts; of an arm whose name has no sign, better or worse."""
        if self.better is None or ingredient(self.cell)[0]:
            return self.verdict
        return BETTER if self.better else WORSE

    @property
    def better(self) -> bool | None:
        """Whether the arm, not its ingredient, is better than its reference; None where that is not decided."""
        if self.verdict not in (HELPS, HURTS):
            return None
        without = ingredient(self.cell)[0] == "without"
        return (self.verdict == HELPS) != without


def ingredient(cell: str) -> tuple[str, str]:
    """What a cell's name says it changed: "- qk_norm" -> ("without", "qk_norm"), "+ z_loss" -> ("with", "z_loss")."""
    sign, _, name = cell.partition(" ")
    if sign == "-":
        return "without", name
    if sign == "+":
        return "with", name
    return "", cell
