"""Tasks of lm-evaluation-harness, through its own extension point (extra `ablab[eval]`).

The harness is run twice: first it asks, and nobody answers; then the answers are there.  Between the two the
questions are asked like those of any suite: by length, on all devices, resumable.
"""

import hashlib
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import redirect_stderr
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ablab.core.errors import UserError, told
from ablab.core.language.parse import near
from ablab.core.store.evaluation import Evaluation, Part
from ablab.experiments.evaluate.names import PREFIX
from ablab.experiments.evaluate.questions import Answer, Question

if TYPE_CHECKING:
    from lm_eval.api.model import LM
    from lm_eval.tasks import TaskManager

SUITE = "harness"
BITS = "bits_per_byte"  # the harness keeps (log-likelihood, bytes) of a document
Results = Mapping[str, Any]


@dataclass(frozen=True)
class HarnessExam:
    """One task of the harness, or a group of them.  As Exam, to whoever asks its questions."""

    name: str
    limit: int | None
    asked: list[Question]
    bundle: str  # digest of all texts that are asked
    run: "Callable[[LM], Results]"

    @property
    def title(self) -> str:
        at = f"@{self.limit}" if self.limit else ""
        return f"{SUITE}{at}.{self.name}"

    def questions(self) -> Iterator[Question]:
        yield from self.asked

    def evaluation(self, answers: Mapping[str, Answer], weights: str) -> Evaluation:
        from ablab.experiments.evaluate.harness_model import Interviewed

        results = self.run(Interviewed(answers))
        at = f"@{self.limit}" if self.limit else ""
        parts = [part for task in results["samples"] for part in self._parts(results, task)]
        if not parts:
            raise UserError(f"{self.name} has no metric that is a mean over its items")
        return Evaluation(
            suite=self.title,
            headline=f"{PREFIX}{SUITE}{at}/{self.name}",
            mean="",
            parts=parts,
            bundle=self.bundle,
            weights=weights,
            source=f"lm-evaluation-harness {_version()}",
        )

    def _parts(self, results: Results, task: str) -> Iterator[Part]:
        """A part for each metric that is a mean over its items; others, as a perplexity, follow from these."""
        samples = results["samples"][task]
        shots = results["n-shot"].get(task, 0)
        there = results["n-samples"][task]["original"]
        within = "" if task == self.name else f"{task}/"
        for metric in dict.fromkeys(name for one in samples for name in one["metrics"]):
            items = [one[metric] for one in samples]
            values, sizes = _items_of(metric, items)
            reported = results["results"][task].get(f"{metric},{samples[0]['filter']}")
            if not values or not isinstance(reported, int | float):
                continue
            part = Part(
                f"{within}{metric}", values, sizes, shots=shots, there=there, kind=metric
            )
            if math.isclose(part.score, reported, rel_tol=1e-6, abs_tol=1e-9):
                yield part


def _items_of(metric: str, items: list[Any]) -> tuple[list[float], list[int]]:
    """Values and sizes; nothing of what is no number."""
    if metric == BITS:
        return [-nats / math.log(2) for nats, _ in items], [size for _, size in items]
    if all(isinstance(one, int | float) for one in items):
        return [float(one) for one in items], []
    return [], []


def exam(name: str, limit: int | None = None, include: Path | None = None) -> HarnessExam:
    """name: a task, group or tag of the harness, or of the YAML files below `include`.

    Raises UserError: the harness is not installed, no such task, its data cannot be had, a task that generates.
    """
    manager = _manager(
        name, include
    )  # says so where there is no harness, which the next line needs
    from ablab.experiments.evaluate.harness_model import Interviewed

    run = _running(name, limit, manager)
    hearing = Interviewed()
    run(hearing)
    texts = sorted(hearing.asked)
    digest = hashlib.sha256(" ".join(texts).encode()).hexdigest()[:16]
    return HarnessExam(name, limit, list(hearing.asked.values()), digest, run)


def _manager(name: str, include: Path | None) -> "TaskManager":
    """Which knows the task.  The harness's own 14,000 are read only where `include` lacks it: that takes 20 s."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise UserError(
            "tasks of lm-evaluation-harness need it installed: pip install 'ablab[eval]'"
        ) from None
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    known: list[str] = []
    if include:
        if not include.is_dir():
            raise UserError(f"--include-path {include} is no folder; name one with task YAMLs")
        own = TaskManager(include_path=str(include), include_defaults=False)
        if name in own.all_tasks:
            return own
        known = list(own.all_tasks)
    every = TaskManager(include_path=str(include) if include else None)
    if name not in every.all_tasks:
        where = f"{include} holds {', '.join(known) or 'none'}; " if include else ""
        raise UserError(
            f"lm-evaluation-harness has no task {name!r:.60}. {near(name, every.all_tasks)}{where}"
            "its `lm_eval ls tasks` lists them; --include-path DIR adds your own"
        )
    return every


def _running(name: str, limit: int | None, manager: "TaskManager") -> "Callable[[LM], Results]":
    """Load the task once, and give what runs a model on it."""
    from lm_eval.evaluator import simple_evaluate

    try:
        with redirect_stderr(StringIO()):  # bars of data sets
            loaded = manager.load([name])
    except (
        Exception
    ) as flaw:  # of data sets, hubs, templates and networks, each of its own kind
        raise UserError(
            f"the harness cannot load {name}: {told(flaw):.120}; its data need a network, or a task of your own: "
            "--include-path DIR"
        ) from None
    tasks = (
        [loaded["groups"][name]] if name in loaded["groups"] else [*loaded["tasks"].values()]
    )

    def run(model: "LM") -> Results:
        with redirect_stderr(StringIO()):  # bars of prompts
            return simple_evaluate(
                model, tasks=tasks, task_manager=manager, limit=limit, bootstrap_iters=0
            )

    return run


def _version() -> str:
    from importlib.metadata import version

    return version("lm_eval")
