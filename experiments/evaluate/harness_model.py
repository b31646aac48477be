"""A model as lm-evaluation-harness knows one: `lm_eval.api.model.LM`.  Imported where lm_eval is installed.

Texts in, likelihoods out.  How texts become rows is questions.py's, which follows the harness's own model of
transformers (lm_eval/models/huggingface.py, 0.4.13).
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM

from ablab.core.errors import UserError
from ablab.experiments.evaluate.questions import LIKELIHOOD, ROLLING, Answer, Question


def question_of(kind: str, texts: tuple[str, ...]) -> Question:
    """Named by what it asks: two requests of the same texts are one question."""
    told = json.dumps([kind, *texts]).encode()
    return Question(hashlib.sha256(told).hexdigest()[:16], 0, kind, texts)


class Interviewed(LM):
    """Gives the answers that are known; without any, hears what is asked and says nothing of worth."""

    def __init__(self, answers: Mapping[str, Answer] | None = None):
        super().__init__()
        self.answers = answers
        self.asked: dict[str, Question] = {}

    def loglikelihood(self, requests: list[Instance], **more: Any) -> list[tuple[float, bool]]:
        found = [self._values(LIKELIHOOD, request.args) for request in requests]
        return [(nats, bool(greedy)) for nats, greedy in found]

    def loglikelihood_rolling(self, requests: list[Instance], **more: Any) -> list[float]:
        return [self._values(ROLLING, request.args)[0] for request in requests]

    def generate_until(self, requests: list[Instance], **more: Any) -> list[str]:
        raise UserError(
            "this task lets the model write; ablab evaluates tasks of likelihoods (multiple choice, perplexity)"
        )

    def _values(self, kind: str, texts: tuple[str, ...]) -> list[float]:
        question = question_of(kind, texts)
        if self.answers is None:
            self.asked[question.key] = question
            return [0.0, 0.0]
        return self.answers[question.key].values
