"""Questions in texts, as suites ask them; each kind knows which tokens of which rows answer it.

A scorer (core/interop/score.py) says how likely it finds tokens after those before them, and no more.  How rows are
made of texts follows nanochat for the kinds of CORE, and lm-evaluation-harness for all others.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from ablab.core.interop.score import Row, Score, Scorer

Ids = list[int]


@dataclass(frozen=True)
class Question:
    """One item.  Plain data: it crosses a pipe.  number: of the item in its part, from 0."""

    part: str
    number: int
    kind: str  # of KINDS
    texts: tuple[str, ...]
    gold: int = 0  # which text is right

    @property
    def key(self) -> str:
        return f"{self.part}/{self.number}"

    @property
    def length(self) -> int:
        """In characters, about; questions of like length are answered together."""
        return max(map(len, self.texts))


@dataclass(frozen=True)
class Answer:
    """values: what the kind says of it.  cut: the model's context was too short for it."""

    key: str
    values: list[float]
    cut: bool = False


class Kind(Protocol):
    def rows(self, scorer: "Scorer", texts: Sequence[str]) -> "list[Row]": ...

    def values(self, scores: "Sequence[Score]", gold: int) -> list[float]: ...


@dataclass(frozen=True)
class Laid:
    """The rows of several questions, one after another.  spans: first and last row of each, and whether one is cut."""

    questions: Sequence[Question]
    rows: "list[Row]" = field(default_factory=list)
    spans: list[tuple[int, int, bool]] = field(default_factory=list)

    @classmethod
    def of(cls, questions: Sequence[Question], scorer: "Scorer") -> "Laid":
        laid = cls(questions)
        for question in questions:
            rows = KINDS[question.kind].rows(scorer, question.texts)
            cut = any(len(row) - 1 > scorer.context for row in rows)
            first = len(laid.rows)
            laid.rows.extend(fitted(row, scorer.context) for row in rows)
            laid.spans.append((first, len(laid.rows), cut))
        return laid


def answers(questions: Sequence[Question], scorer: "Scorer") -> list[Answer]:
    """In the order of the questions."""
    laid = Laid.of(questions, scorer)
    scores = scorer.scores(laid.rows)
    found = []
    for question, (first, last, cut) in zip(questions, laid.spans, strict=True):
        values = KINDS[question.kind].values(scores[first:last], question.gold)
        found.append(Answer(question.key, values, cut))
    return found


def fitted(row: "Row", context: int) -> "Row":
    """Of more to score than the context has, the end; the scorer itself leaves out what is given before."""
    from ablab.core.interop.score import Row

    beyond = len(row.scored) - context
    if beyond <= 0:
        return row
    return Row((row.scored[beyond - 1],), row.scored[beyond:])


def row_of(ids: Ids, first: int) -> "Row":
    """The ids from `first` on are scored, but always one is given and one is scored, where there are two."""
    from ablab.core.interop.score import Row

    place = max(min(first, len(ids) - 1), 1)
    return Row(tuple(ids[:place]), tuple(ids[place:]))


def begun(scorer: "Scorer", text: str) -> Ids:
    """The ids of a text, behind what stands before a text with nothing before it."""
    begin = [] if scorer.first is None else [scorer.first]
    return begin + scorer.ids(text)


def common(rows: Sequence[Ids]) -> int:
    """How many ids all rows begin with."""
    count = 0
    for ids in zip(*rows, strict=False):
        if len(set(ids)) > 1:
            break
        count += 1
    return count


def mean_nats(score: "Score") -> float:
    return math.fsum(score.nats) / len(score.nats) if score.nats else math.inf


def likeliest(scores: "Sequence[Score]", gold: int) -> list[float]:
    """1 where the right one has the fewest nats a scored token; of equals, the first is taken."""
    nats = [mean_nats(score) for score in scores]
    return [float(nats.index(min(nats)) == gold)]


# -- the three kinds of CORE, as nanochat reads them -------------------------------------------------------------------
class Choice:
    """Texts that begin alike: each is scored from the first token in which they differ."""

    def rows(self, scorer: "Scorer", texts: Sequence[str]) -> "list[Row]":
        ids = [begun(scorer, text) for text in texts]
        alike = common(ids)
        return [row_of(one, alike) for one in ids]

    def values(self, scores: "Sequence[Score]", gold: int) -> list[float]:
        return likeliest(scores, gold)


class Schema:
    """Texts that end alike: the tokens of that end are scored, after one beginning and after the other."""

    def rows(self, scorer: "Scorer", texts: Sequence[str]) -> "list[Row]":
        ids = [begun(scorer, text) for text in texts]
        alike = common([one[::-1] for one in ids])
        return [row_of(one, len(one) - alike) for one in ids]

    def values(self, scores: "Sequence[Score]", gold: int) -> list[float]:
        return likeliest(scores, gold)


class Continuation:
    """A text without its end, and whole: right if the model would write that end, token by token."""

    def rows(self, scorer: "Scorer", texts: Sequence[str]) -> "list[Row]":
        without, whole = (begun(scorer, text) for text in texts)
        return [row_of(whole, common([without, whole]))]

    def values(self, scores: "Sequence[Score]", gold: int) -> list[float]:
        return [float(scores[0].greedy)]


# -- the others, as lm-evaluation-harness reads them -------------------------------------------------------------------
class Sentences:
    """Whole sentences: the likeliest, all its tokens together, must be the right one."""

    def rows(self, scorer: "Scorer", texts: Sequence[str]) -> "list[Row]":
        return [row_of(begun(scorer, text), 1) for text in texts]

    def values(self, scores: "Sequence[Score]", gold: int) -> list[float]:
        nats = [-score.log_likelihood for score in scores]
        return [float(nats.index(min(nats)) == gold)]


@dataclass(frozen=True)
class Document:
    """A text in rows as long as the context; each token is scored once.  Its log-likelihood, in nats.

    led: behind what the model's tokenizer itself puts before a text, too.
    """

    led: bool = False

    def rows(self, scorer: "Scorer", texts: Sequence[str]) -> "list[Row]":
        from ablab.core.interop.score import Row

        (text,) = texts
        lead = list(scorer.lead) if self.led else []
        begin = [] if scorer.first is None else [scorer.first]
        whole = begin + lead + scorer.ids(text)
        rows = []
        for first in range(1, len(whole), scorer.context):
            end = min(first + scorer.context, len(whole))
            # The last row reads back as far as the context goes.
            start = max(end - scorer.context - 1, 0)
            rows.append(Row(tuple(whole[start:first]), tuple(whole[first:end])))
        return rows

    def values(self, scores: "Sequence[Score]", gold: int) -> list[float]:
        return [math.fsum(score.log_likelihood for score in scores)]


class Likelihood:
    """A continuation after a context: its log-likelihood in nats, and 1 where the model would write it."""

    def rows(self, scorer: "Scorer", texts: Sequence[str]) -> "list[Row]":
        context, continuation = texts
        if not context:
            return [row_of(begun(scorer, continuation), 1)]
        spaces = len(context) - len(context.rstrip())
        before = [*scorer.lead, *scorer.ids(context[: len(context) - spaces])]
        whole = [*scorer.lead, *scorer.ids(context + continuation)]
        return [row_of(whole, len(before))]

    def values(self, scores: "Sequence[Score]", gold: int) -> list[float]:
        return [scores[0].log_likelihood, float(scores[0].greedy)]


CHOICE = "multiple_choice"
SCHEMA = "schema"
CONTINUATION = "language_modeling"
SENTENCES = "sentences"
DOCUMENT = "document"
ROLLING = "rolling"
LIKELIHOOD = "likelihood"
KINDS: Mapping[str, Kind] = {
    CHOICE: Choice(),
    SCHEMA: Schema(),
    CONTINUATION: Continuation(),
    SENTENCES: Sentences(),
    DOCUMENT: Document(),
    ROLLING: Document(led=True),
    LIKELIHOOD: Likelihood(),
}
