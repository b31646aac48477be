"""What an evaluation found, item by item: a file beside the result of a run.  No torch here.

    FOLDER/evaluations/core@100.json    `Evaluation`, written in one step
                       core@100.jsonl   the answers so far, of one that is under way (experiments/evaluate/progress.py)

FOLDER is a run's, or STORE/evaluations/NAME of a model that is no run.  A score has a name:

    eval/SUITE[@LIMIT][/PART]           eval/core   eval/core@100   eval/core@100/arc_easy   eval/bpb/austen

@LIMIT: of so many items a task, where not all were asked.  Whatever reads a score finds in its name what it is of.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import msgspec

from ablab.core.errors import UserError
from ablab.core.store.files import FLAWS, write_atomically
from ablab.core.store.record import Record
from ablab.core.store.result import Result

FOLDER = "evaluations"
WIDE = 1.959964  # standard errors on either side of a 95 % interval


@dataclass(frozen=True)
class Part:
    """A task, a paradigm or a source of text, and what each of its items came to.

        score = sum(values) / sum(sizes)

    values: of an item, 1 right, 0 wrong; of a document its bits.  sizes: bytes of a document; [] where each counts 1.
    """

    name: str
    values: list[float]
    sizes: list[int] = field(default_factory=list)
    baseline: float = 0.0  # what guessing scores
    shots: int = 0  # solved examples before each item
    cut: int = 0  # items longer than the model's context, of which the end was read
    there: int = 0  # items that there are to ask
    kind: str = ""

    @property
    def size(self) -> float:
        return float(sum(self.sizes)) if self.sizes else float(len(self.values))

    @cached_property
    def score(self) -> float:
        return math.fsum(self.values) / self.size

    @property
    def centered(self) -> float:
        """0 where guessing is, 1 where everything is right."""
        return (self.score - self.baseline) / (1 - self.baseline)

    @cached_property
    def pulls(self) -> list[float]:
        """How far each item moves the score:  (value - score * size) / sum(sizes).  They sum to 0."""
        sizes = self.sizes or [1] * len(self.values)
        pairs = zip(self.values, sizes, strict=True)
        return [(value - self.score * size) / self.size for value, size in pairs]

    @property
    def is_right_or_wrong(self) -> bool:
        return not self.sizes and set(self.values) <= {0.0, 1.0}

    @property
    def error(self) -> float:
        """Standard error of the score over items.

        Of right and wrong after Agresti & Coull 1998, two of each added: all right is not known for sure.
        """
        if not self.is_right_or_wrong:
            return spread(self.pulls)
        count = len(self.values) + 4
        share = self._shrunk
        return math.sqrt(share * (1 - share) / count)

    @property
    def _shrunk(self) -> float:
        return (math.fsum(self.values) + 2) / (len(self.values) + 4)

    @property
    def interval(self) -> tuple[float, float]:
        """95 % over items."""
        if not self.is_right_or_wrong:
            return self.score - WIDE * self.error, self.score + WIDE * self.error
        reach = WIDE * self.error
        return max(self._shrunk - reach, 0.0), min(self._shrunk + reach, 1.0)


def spread(pulls: list[float]) -> float:
    """Standard error of a sum whose items pull independently: sqrt(n / (n - 1) * sum pull^2).  NaN of one item."""
    count = len(pulls)
    if count < 2:
        return math.nan
    squares = math.fsum(pull * pull for pull in pulls)
    return math.sqrt(squares * count / (count - 1))


@dataclass(frozen=True)
class Estimate:
    """A score, or a difference of two, and its standard error over items."""

    value: float
    error: float
    items: int

    @property
    def low(self) -> float:
        return self.value - WIDE * self.error

    @property
    def high(self) -> float:
        return self.value + WIDE * self.error


Mean = Literal["centered", "pooled", ""]


@dataclass(frozen=True)
class Evaluation:
    """The answers of one model to one suite.

    mean: what `headline` is of: the mean of the parts' centered scores, or all items together; "": the parts stand
    alone, and `headline` is where their names begin.
    bundle: digest of what was asked, as it stands in its files.  weights: digest of the weights that answered.
    """

    suite: str  # core@100
    headline: str  # eval/core@100
    mean: Mean
    parts: list[Part]
    bundle: str
    weights: str
    source: str = ""  # where the items were read
    missing: list[str] = field(default_factory=list)  # parts of the suite that are not there
    how: dict[str, Any] = field(default_factory=dict)  # device, dtype
    code: str = ""
    seconds: float = 0.0

    @property
    def items(self) -> int:
        return sum(len(part.values) for part in self.parts)

    @property
    def headlines(self) -> dict[str, Estimate]:
        """What a report shows of it: the mean, or each part where none is taken."""
        if self.mean == "pooled":
            return {self.headline: self._pooled(), **self._alone()}
        if self.mean == "centered":
            return {self.headline: self._centered()}
        return self._alone()

    @property
    def scores(self) -> dict[str, float]:
        """All of it, by name."""
        found = {name: one.value for name, one in self.headlines.items()}
        return found | {self.name_of(part): part.score for part in self.parts}

    def name_of(self, part: Part) -> str:
        return f"{self.headline}/{part.name}"

    def _alone(self) -> dict[str, Estimate]:
        return {
            self.name_of(part): Estimate(part.score, part.error, len(part.values))
            for part in self.parts
        }

    def _centered(self) -> Estimate:
        errors = [part.error / (1 - part.baseline) for part in self.parts]
        value = math.fsum(part.centered for part in self.parts) / len(self.parts)
        return Estimate(value, math.hypot(*errors) / len(self.parts), self.items)

    def _pooled(self) -> Estimate:
        whole = self._together()
        return Estimate(whole.score, whole.error, len(whole.values))

    def _together(self) -> Part:
        values = [value for part in self.parts for value in part.values]
        sizes = [size for part in self.parts for size in part.sizes]
        return Part("", values, sizes)

    def minus(self, other: "Evaluation") -> dict[str, Estimate]:
        """This model's headlines minus another's on the same items; {} where they were asked other ones."""
        if not self.asks_as(other):
            return {}
        if self.mean == "centered":
            return {self.headline: self._centered_minus(other)}
        found = {}
        if self.mean == "pooled":
            found[self.headline] = minus(self._together(), other._together())
        pairs = zip(self.parts, other.parts, strict=True)
        return found | {self.name_of(own): minus(own, their) for own, their in pairs}

    def asks_as(self, other: "Evaluation") -> bool:
        """Whether both were asked the same items."""
        return self._asked == other._asked

    @property
    def _asked(self) -> tuple[Any, ...]:
        listed = tuple((part.name, len(part.values)) for part in self.parts)
        return self.headline, self.mean, self.bundle, listed

    def _centered_minus(self, other: "Evaluation") -> Estimate:
        pairs = zip(self.parts, other.parts, strict=True)
        parts = [(minus(own, their), 1 - own.baseline) for own, their in pairs]
        count = len(parts)
        value = math.fsum(one.value / room for one, room in parts) / count
        error = math.hypot(*(one.error / room for one, room in parts)) / count
        return Estimate(value, error, self.items)


def minus(own: Part, their: Part) -> Estimate:
    """The difference of two scores on the same items: what both find hard moves neither."""
    pulls = [a - b for a, b in zip(own.pulls, their.pulls, strict=True)]
    return Estimate(own.score - their.score, spread(pulls), len(pulls))


# -- its file ----------------------------------------------------------------------------------------------------------
def path_of(folder: Path, suite: str) -> Path:
    return folder / FOLDER / f"{suite}.json"


def write(folder: Path, evaluation: Evaluation) -> Path:
    path = path_of(folder, evaluation.suite)
    write_atomically(path, msgspec.json.encode(evaluation) + b"\n")
    return path


def read(path: Path) -> Evaluation:
    """Raises UserError for one that is damaged or not there."""
    try:
        found = msgspec.json.decode(path.read_bytes(), type=Evaluation)
        if flaw := next(_flaws(found), ""):
            raise msgspec.ValidationError(flaw)
    except (OSError, *FLAWS) as flaw:
        why = getattr(flaw, "strerror", None) or flaw
        raise UserError(f"{path} is damaged ({why}); delete it and evaluate again") from None
    return found


MOST = 1e15  # of a value: sums of such stay finite


def _flaws(found: Evaluation) -> Iterator[str]:
    """What no evaluation leaves."""
    if not found.parts:
        yield "it has no parts"
    for part in found.parts:
        if not part.values:
            yield f"part {part.name!r:.40} has no items"
        if len(part.sizes) not in (0, len(part.values)):
            yield f"part {part.name!r:.40} has {len(part.values)} items and {len(part.sizes)} sizes"
        if not all(0 < size < MOST for size in part.sizes):
            yield f"part {part.name!r:.40} has an item of no size"
        if not all(abs(value) < MOST for value in part.values):
            yield f"part {part.name!r:.40} has a value beyond all measure"
        if not 0 <= part.baseline < 1:
            yield f"part {part.name!r:.40} has the baseline {part.baseline}"


def evaluations_of(record: Record, result: Result) -> Iterator[Evaluation]:
    """Those of a run's weights, in the order of their names; damaged ones are passed over (`damages_of` names them).

    An evaluation of other weights, as the run had before it was trained again, says nothing of it.
    """
    weights = result.evaluated or result.weights
    for path in files_of(record.folder):
        try:
            found = read(path)
        except UserError:
            continue
        if found.weights == weights:
            yield found


def files_of(folder: Path) -> list[Path]:
    """Sorted; as glob finds them, of which most runs have none."""
    place = folder / FOLDER
    return sorted(place.glob("*.json")) if place.is_dir() else []


def damages_of(folder: Path) -> Iterator[str]:
    """A line for each evaluation that cannot be read."""
    for path in files_of(folder):
        try:
            read(path)
        except UserError as damage:
            yield str(damage)


def scores_of(record: Record, result: Result) -> dict[str, float]:
    """The headlines of a run's evaluations, where its result does not have them."""
    found: dict[str, float] = {}
    for evaluation in evaluations_of(record, result):
        found |= {name: one.value for name, one in evaluation.headlines.items()}
    return {name: value for name, value in found.items() if name not in result.metrics}
