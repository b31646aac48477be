"""CORE: 22 tasks of in-context learning, each score centered so that guessing is 0 and all right is 1.

    centered = (accuracy - baseline) / (1 - baseline),    CORE = the mean over the 22 tasks

Li et al. 2024 (DCLM), arXiv:2406.11794, section 3.5; the tasks are those of its eval/aggregated_metrics.py.  Items,
their order, the solved examples before each and the layout of prompts are nanochat's, scripts/base_eval.py and
nanochat/core_eval.py.
"""

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol
from zlib import crc32

from ablab.experiments.evaluate.bundle import (
    Bundle,
    Item,
    Task,
    read_bundle,
    read_items,
)
from ablab.experiments.evaluate.exam import Exam, Paper
from ablab.experiments.evaluate.names import PREFIX
from ablab.experiments.evaluate.questions import CHOICE, CONTINUATION, SCHEMA, Question

CORE = (
    "hellaswag_zeroshot",
    "jeopardy",
    "bigbench_qa_wikidata",
    "arc_easy",
    "arc_challenge",
    "copa",
    "commonsense_qa",
    "piqa",
    "openbook_qa",
    "lambada_openai",
    "hellaswag",
    "winograd",
    "winogrande",
    "bigbench_dyck_languages",
    "agi_eval_lsat_ar",
    "bigbench_cs_algorithms",
    "bigbench_operators",
    "bigbench_repeat_copy_logic",
    "squad",
    "coqa",
    "boolq",
    "bigbench_language_identification",
)
ORDER = 1337  # seed of the order of items
SHOTS = 1234  # seed of the examples before item 0; that of item n is SHOTS + n


def exam(folder: Path, limit: int | None = None, labels: Sequence[str] = ()) -> Exam:
    """labels: these tasks alone, no mean of which is taken; (): all of CORE that the bundle has.

    limit: the first so many items of a task, in the suite's own order; examples are taken from among them too.
    Raises UserError as `read_bundle`, `Bundle.chosen` and `read_items` do.
    """
    bundle = read_bundle(folder)
    at = f"@{limit}" if limit else ""
    if labels:
        chosen = bundle.chosen(labels)
        which = crc32(" ".join(labels).encode())
        headline = PREFIX + "core" + at
        title = f"core{at}.{which:08x}"
    else:
        chosen = of_core(bundle)
        title = name_of(bundle) + at
        headline = PREFIX + title
    return Exam(
        title=title,
        headline=headline,
        mean="" if labels else "centered",
        papers=[_paper(task, limit) for task in chosen],
        bundle=bundle.digest(chosen),
        source=str(folder),
        missing=[] if labels else missing(bundle),
    )


def of_core(bundle: Bundle) -> list[Task]:
    """The tasks of CORE that are there; of a bundle of other tasks, all of them."""
    known = [task for task in bundle.tasks if task.label in CORE]
    return known or bundle.tasks


def missing(bundle: Bundle) -> list[str]:
    there = {task.label for task in bundle.tasks}
    return [label for label in CORE if label not in there]


def name_of(bundle: Bundle) -> str:
    """`core` of all 22 tasks alone: a mean over others is not CORE, and says how many there are."""
    lacking = missing(bundle)
    if not lacking:
        return "core"
    return f"core_{len(CORE) - len(lacking)}_of_{len(CORE)}"


def _paper(task: Task, limit: int | None) -> Paper:
    items = read_items(task)
    random.Random(ORDER).shuffle(items)  # noqa: S311  an order, no secret
    pool = items[: max(limit, task.shots + 1)] if limit else items
    return Paper(
        name=task.label,
        questions=[_question(task, pool, number) for number in range(len(pool[:limit]))],
        there=len(items),
        baseline=task.baseline,
        shots=task.shots,
    )


def _question(task: Task, pool: Sequence[Item], number: int) -> Question:
    item = pool[number]
    writer = WRITERS[task.kind]
    solved = [writer.solved(one, task.delimiter) for one in examples(task, pool, number)]
    shown = "".join(f"{one}\n\n" for one in solved)
    texts = writer.asked(item, shown, task.delimiter)
    return Question(task.label, number, task.kind, texts, item.get("gold", 0))


def examples(task: Task, pool: Sequence[Item], number: int) -> list[Item]:
    """Solved items before item `number`, drawn from all others."""
    if not task.shots:
        return []
    others = [i for i in range(len(pool)) if i != number]
    drawn = random.Random(SHOTS + number).sample(others, task.shots)  # noqa: S311
    return [pool[i] for i in drawn]


# -- prompts: the solved examples, an empty line after each, then the item ---------------------------------------------
class Writer(Protocol):
    def solved(self, item: Item, delimiter: str) -> str: ...

    def asked(self, item: Item, shown: str, delimiter: str) -> tuple[str, ...]:
        """shown: what stands before it."""
        ...


class ChoiceWriter:
    """A text for each choice."""

    def solved(self, item: Item, delimiter: str) -> str:
        return item["query"] + delimiter + item["choices"][item["gold"]]

    def asked(self, item: Item, shown: str, delimiter: str) -> tuple[str, ...]:
        return tuple(shown + item["query"] + delimiter + one for one in item["choices"])


class SchemaWriter:
    """A text for each beginning."""

    def solved(self, item: Item, delimiter: str) -> str:
        return item["context_options"][item["gold"]] + delimiter + item["continuation"]

    def asked(self, item: Item, shown: str, delimiter: str) -> tuple[str, ...]:
        end = delimiter + item["continuation"]
        return tuple(shown + one + end for one in item["context_options"])


class ContinuationWriter:
    """The text without its end, and whole.  Space at the ends of a context is no part of it."""

    def solved(self, item: Item, delimiter: str) -> str:
        return item["context"].strip() + delimiter + item["continuation"]

    def asked(self, item: Item, shown: str, delimiter: str) -> tuple[str, ...]:
        before = shown + item["context"].strip() + delimiter
        # A space that is left at the end would be a token of its own, which the whole text does not have.
        return before.strip(), before + item["continuation"]


WRITERS: Mapping[str, Writer] = {
    CHOICE: ChoiceWriter(),
    SCHEMA: SchemaWriter(),
    CONTINUATION: ContinuationWriter(),
}
