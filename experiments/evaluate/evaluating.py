"""An evaluation from exam to record: what is known already is not asked again."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import Any

import msgspec

from ablab.core.errors import UserError
from ablab.core.runtime.fingerprint import code_fingerprint
from ablab.core.store.claim import take_if_dead
from ablab.core.store.evaluation import Evaluation, path_of, read, write
from ablab.core.store.files import set_aside
from ablab.experiments.evaluate.answering import Answerer, Everywhere, Here
from ablab.experiments.evaluate.exam import Examination, Named
from ablab.experiments.evaluate.progress import Progress, Taking
from ablab.experiments.evaluate.subjects import Device, How, Subject

# Answers known so far, of all.
Watch = Callable[[int, int], None]


def unwatched(done: int, total: int) -> None:
    """Of an evaluation that nobody looks at."""


@dataclass(frozen=True)
class Sitting:
    """Who is asked, and where the answers go.

    dtype: of activations; answers of another are others.  take: how the place is claimed.
    """

    folder: Path
    weights: str
    dtype: str
    take: Taking = take_if_dead

    def standing(self, exam: Named) -> Evaluation | None:
        """What was written of this very exam; a damaged file goes aside."""
        path = path_of(self.folder, exam.title)
        if not path.exists():
            return None
        try:
            found = read(path)
        except UserError:
            set_aside(path)
            return None
        same = found.weights == self.weights and found.how.get("dtype") == self.dtype
        return found if same and found.bundle == exam.bundle else None

    def sit(
        self, exam: Examination, answerer: Callable[[], Any], watch: Watch = unwatched
    ) -> Evaluation:
        """Ask what is not known yet, and write the evaluation.

        answerer: a context that gives an Answerer; entered only where something is to be asked.
        Raises Held where another process asks the same.
        """
        if found := self.standing(exam):
            return found
        began = perf_counter()
        questions = list(exam.questions())
        with Progress(self.folder, exam.title, self._whose(exam), self.take) as progress:
            if found := self.standing(exam):  # written before the place was ours
                progress.done()
                return found
            open_questions = [one for one in questions if one.key not in progress.known]
            watch(len(progress.known), len(questions))
            if open_questions:
                with answerer() as asked:
                    for some in asked.answer(open_questions):
                        progress.add(some)
                        watch(len(progress.known), len(questions))
            evaluation = replace(
                exam.evaluation(progress.known, self.weights),
                how={"dtype": self.dtype},
                code=code_fingerprint(),
                seconds=perf_counter() - began,
            )
            progress.fence()
            write(self.folder, evaluation)
            progress.done()
        return evaluation

    def _whose(self, exam: Examination) -> dict[str, str]:
        asked = {"suite": exam.title, "bundle": exam.bundle}
        return asked | {"weights": self.weights, "dtype": self.dtype}


def evaluate(
    subject: Subject,
    exam: Examination,
    how: How,
    devices: list[Device],
    watch: Watch = unwatched,
    take: Taking = take_if_dead,
) -> Evaluation:
    """Raises UserError."""
    dtype = how.settled_dtype(devices[0])
    sitting = Sitting(subject.folder, subject.weights, dtype, take)
    return sitting.sit(exam, lambda: answering(subject, how, devices), watch)


@contextmanager
def answering(subject: Subject, how: How, devices: list[Device]) -> Iterator[Answerer]:
    """One device answers in this process, several in a process each."""
    if len(devices) > 1:
        with Everywhere(subject, how, devices) as everywhere:
            yield everywhere
    else:
        yield Here(subject.scorer(how, devices[0]), how.batch * 4)


def as_json(evaluation: Evaluation) -> dict[str, Any]:
    """The evaluation without its items, with its headlines' intervals."""
    told = asdict(evaluation)
    told["parts"] = [
        {"name": part.name, "score": part.score, "centered": part.centered, "error": part.error}
        | {"items": len(part.values), "there": part.there, "shots": part.shots, "cut": part.cut}
        for part in evaluation.parts
    ]
    told["headlines"] = {
        name: {"value": one.value, "low": one.low, "high": one.high, "items": one.items}
        for name, one in evaluation.headlines.items()
    }
    return msgspec.to_builtins(told)
