"""An exam: all questions of a suite, and what the answers make of each part of it."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from ablab.core.store.evaluation import Evaluation, Mean, Part
from ablab.experiments.evaluate.questions import Answer, Question


class Named(Protocol):
    """An exam, as its evaluation is recognized."""

    @property
    def title(self) -> str:
        """Of the file: core@100."""
        ...

    @property
    def bundle(self) -> str:
        """Digest of what is asked."""
        ...


class Examination(Named, Protocol):
    """What is asked: `Exam`, or the harness's."""

    def questions(self) -> Iterator[Question]: ...

    def evaluation(self, answers: Mapping[str, Answer], weights: str) -> Evaluation:
        """What the answers come to; who gave them, and how, is added by the caller."""
        ...


@dataclass(frozen=True)
class Paper:
    """The questions of one part.  sizes: bytes of each document, where values are nats and the score is in bits."""

    name: str
    questions: list[Question]
    there: int  # items that there are, asked or not
    sizes: list[int] = field(default_factory=list)
    baseline: float = 0.0
    shots: int = 0

    def part(self, answers: Mapping[str, Answer]) -> Part:
        given = [answers[question.key] for question in self.questions]
        values = [answer.values[0] for answer in given]
        if self.sizes:
            values = [-nats / math.log(2) for nats in values]
        return Part(
            name=self.name,
            values=values,
            sizes=self.sizes,
            baseline=self.baseline,
            shots=self.shots,
            cut=sum(answer.cut for answer in given),
            there=self.there,
            kind=self.questions[0].kind,
        )


@dataclass(frozen=True)
class Exam:
    """title: of the file, core@100.  headline: eval/core@100.  bundle: digest of the files that were read."""

    title: str
    headline: str
    mean: Mean
    papers: list[Paper]
    bundle: str
    source: str
    missing: list[str] = field(default_factory=list)  # parts of the suite that are not there

    def questions(self) -> Iterator[Question]:
        for paper in self.papers:
            yield from paper.questions

    def evaluation(self, answers: Mapping[str, Answer], weights: str) -> Evaluation:
        return Evaluation(
            suite=self.title,
            headline=self.headline,
            mean=self.mean,
            parts=[paper.part(answers) for paper in self.papers],
            bundle=self.bundle,
            weights=weights,
            source=self.source,
            missing=self.missing,
        )
