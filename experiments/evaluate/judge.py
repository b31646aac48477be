"""A run judged at its end by evaluations, in the process that trained it: its weights are at hand, kept or not."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ablab.core.errors import UserError
from ablab.core.store.store import Store
from ablab.experiments.evaluate import blimp, core_suite
from ablab.experiments.evaluate.answering import Here
from ablab.experiments.evaluate.asking import exam_of
from ablab.experiments.evaluate.bundle import read_bundle
from ablab.experiments.evaluate.evaluating import Sitting
from ablab.experiments.evaluate.names import asked_of

if TYPE_CHECKING:
    from torch import Tensor

    from ablab.core.interop.score import Scorer
    from ablab.core.recipe.recipe import Recipe
    from ablab.core.runtime.runtime import Settled


def check(suites: Mapping[str, str], metric: str) -> None:
    """Before any run: what is to be asked is there, and its mean is called as the metric says.

    suites: -> path.  metric: '' where none of them judges.  Raises UserError.
    """
    for suite, path in suites.items():
        share, lacks = _share(suite, Path(path))
        if not metric:
            continue
        asked = asked_of(metric)
        if asked.suite == suite and asked.share != share:
            name = metric.replace(f"/{suite}{asked.share}", f"/{suite}{share}")
            raise UserError(f"{path} {lacks}; name the metric {name}, or complete it")


def _share(suite: str, path: Path) -> tuple[str, str]:
    """`_20_of_22` of what lacks parts, '' of what is whole; and what it lacks, in words."""
    if suite == "core":
        bundle = read_bundle(path)
        missing = core_suite.missing(bundle)
        said = f"lacks {', '.join(missing)}" if missing else "has all of CORE"
        return core_suite.name_of(bundle).removeprefix("core"), said
    if suite == "blimp":
        count = len(blimp.paradigms(path))
        return blimp.share_of(count), f"has {count} of {blimp.PARADIGMS} paradigms"
    if not path.is_file():
        exam_of(suite, path)  # refuses it
    return "", ""


@dataclass(frozen=True)
class Judge:
    """suites: -> path.  limit: items of a task.  folder: of the run, in its store.

    metric: a score that is wanted besides the headlines, as that of one task; '': none.
    """

    suites: Mapping[str, str]
    limit: int | None
    folder: Path
    metric: str = ""

    def __call__(
        self, recipe: "Recipe", weights: "Mapping[str, Tensor]", settled: "Settled"
    ) -> dict[str, float]:
        """The scores of a run, by name, and the evaluations beside its record.  Raises UserError."""
        from ablab.core.interop.weights import digest_of

        kept = {name: value.detach().cpu() for name, value in weights.items()}
        sitting = Sitting(self.folder, digest_of(recipe, kept), settled.dtype)

        @contextmanager
        def answerer() -> Iterator[Here]:
            yield Here(self._scorer(recipe, kept, settled))

        found: dict[str, float] = {}
        for suite, path in self.suites.items():
            evaluation = sitting.sit(exam_of(suite, Path(path), self.limit), answerer)
            found |= {name: one.value for name, one in evaluation.headlines.items()}
            if self.metric in evaluation.scores:
                found[self.metric] = evaluation.scores[self.metric]
        return found

    def _scorer(
        self, recipe: "Recipe", weights: "Mapping[str, Tensor]", settled: "Settled"
    ) -> "Scorer":
        """A model of its own, as `ablab eval` builds it of a folder: the same numbers."""
        from ablab.core.interop.folder import tokenizer_of
        from ablab.core.interop.score import AblabScorer
        from ablab.core.interop.speaking import DTYPES, Speaker
        from ablab.core.interop.text import Words
        from ablab.core.interop.weights import Weights, built

        store = Store(self.folder.parents[1])
        tokenizer = tokenizer_of(self.folder, recipe, store)
        if tokenizer is None:
            raise UserError(
                f"{store.root / 'data' / recipe.data.name} has no tokenizer, so its runs cannot read what "
                "`evaluate` asks; tokenize it again"
            )
        held = Weights(self.folder, recipe, dict(weights))
        model = built(held, DTYPES[settled.dtype], settled.device)
        return AblabScorer(Speaker(model, Words(tokenizer, recipe), frozenset()))
