"""Bundles in the DCLM format, as nanochat's eval_bundle.zip holds CORE.  No torch here.

BUNDLE/core.yaml             icl_tasks: label, icl_task_type, dataset_uri, num_fewshot, continuation_delimiter
       eval_meta_data.csv    of each label: `Random baseline`, in per cent
       eval_data/...jsonl    an item a line

multiple_choice      {"query", "choices", "gold"}
schema               {"context_options", "continuation", "gold"}
language_modeling    {"context", "continuation"}
"""

import csv
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ablab.core.errors import UserError
from ablab.core.language.parse import near, parse
from ablab.core.recipe.load import blaming, read_yaml
from ablab.experiments.evaluate.questions import CHOICE, CONTINUATION, SCHEMA

INDEX = "core.yaml"
BASELINES = "eval_meta_data.csv"
DATA = "eval_data"
LABEL = "Eval Task"
BASELINE = "Random baseline"  # in per cent

Item = Mapping[str, Any]


@dataclass(frozen=True)
class Task:
    """A task of the bundle.  baseline: the share that guessing gets right."""

    label: str
    kind: str
    path: Path
    shots: int
    delimiter: str
    baseline: float


@dataclass(frozen=True)
class Bundle:
    """tasks: those whose items are there.  absent: labels of the index whose file is not."""

    folder: Path
    tasks: list[Task]
    absent: list[str]

    def chosen(self, labels: Iterable[str]) -> list[Task]:
        """Raises UserError for a label that is not there; it lists those that are."""
        known = {task.label: task for task in self.tasks}
        for label in labels:
            if label not in known:
                raise UserError(
                    f"{self.folder} has no task {label!r:.60}. {near(label, known)}"
                    f"There are: {', '.join(known)}"
                )
        return [known[label] for label in labels]

    def digest(self, tasks: Iterable[Task]) -> str:
        """sha256 over the index, the baselines and the items of these tasks, 16 hex digits."""
        files = [self.folder / INDEX, self.folder / BASELINES, *(task.path for task in tasks)]
        return digest_of(files, self.folder)


def digest_of(files: Iterable[Path], folder: Path) -> str:
    total = hashlib.sha256()
    for path in sorted(set(files)):
        with open(path, "rb") as file:
            own = hashlib.file_digest(file, "sha256").hexdigest()
        total.update(f"{path.relative_to(folder).as_posix()} {own}\n".encode())
    return total.hexdigest()[:16]


@dataclass(frozen=True)
class Entry:
    """A task as core.yaml lists it."""

    label: str
    icl_task_type: str
    dataset_uri: str
    num_fewshot: list[int] = field(default_factory=lambda: [0])
    continuation_delimiter: str = " "


def read_bundle(folder: Path) -> Bundle:
    """Raises UserError: no such folder, no or a malformed index, a task of no known type or without a baseline."""
    if not folder.is_dir():
        raise UserError(
            f"no bundle {folder}; fetch the public one: ablab eval --fetch-bundle {folder}"
        )
    for name in (INDEX, BASELINES, DATA):
        if not (folder / name).exists():
            raise UserError(
                f"{folder} holds no {name}, so it is no bundle in DCLM's format; it needs {INDEX}, "
                f"{BASELINES} and {DATA}/ (ablab eval --fetch-bundle NEW_FOLDER)"
            )
    baselines = read_baselines(folder / BASELINES)
    entries = read_index(folder / INDEX)
    tasks = [_task(folder, entry, baselines) for entry in entries]
    there = [task for task in tasks if task.path.is_file()]
    if not there:
        raise UserError(
            f"{folder / DATA} holds the items of none of the {len(tasks)} tasks of {INDEX}; fetch the bundle again"
        )
    absent = [task.label for task in tasks if task not in there]
    return Bundle(folder, there, absent)


def read_index(path: Path) -> list[Entry]:
    with blaming(path):
        listed_tasks = read_yaml(path).get("icl_tasks")
        if not isinstance(listed_tasks, list) or not listed_tasks:
            raise UserError("icl_tasks must list the tasks of the bundle")
        entries = [_entry(one, i) for i, one in enumerate(listed_tasks)]
    labels = [entry.label for entry in entries]
    for label in labels:
        if labels.count(label) > 1:
            raise UserError(f"{path}: task {label!r:.60} is listed twice; drop one")
    return entries


def _entry(plain: Any, place: int) -> Entry:
    """Other keys, such as has_categories, are of no use here."""
    where = f"icl_tasks[{place}]"
    if not isinstance(plain, Mapping):
        raise UserError(f"{where} must be a mapping with label, icl_task_type and dataset_uri")
    known = Entry.__dataclass_fields__
    entry: Entry = parse(Entry, {key: plain[key] for key in plain if key in known}, where)
    if entry.icl_task_type not in CHECKS:
        raise UserError(
            f"{where}: {entry.label} is of type {entry.icl_task_type!r:.40}; known: {', '.join(CHECKS)}"
        )
    if not entry.num_fewshot or entry.num_fewshot[0] < 0:
        raise UserError(f"{where}: num_fewshot must list a number from 0 on, as [10]")
    return entry


def read_baselines(path: Path) -> dict[str, float]:
    """Label -> the share that guessing gets right.  Raises UserError with the line of a malformed one."""
    found = {}
    with open(path, newline="", encoding="utf-8-sig") as file:
        try:
            for row in csv.DictReader(file):
                found[row[LABEL]] = float(row[BASELINE]) / 100
        except (KeyError, TypeError, ValueError, csv.Error) as flaw:
            number = len(found) + 2
            raise UserError(
                f"{path}:{number} must have a {LABEL!r} and a number under {BASELINE!r} ({flaw!s:.60})"
            ) from None
    return found


def _task(folder: Path, entry: Entry, baselines: Mapping[str, float]) -> Task:
    baseline = baselines.get(entry.label)
    if baseline is None or not 0 <= baseline < 1:
        said = "has no row" if baseline is None else f"says {100 * baseline:g} %"
        raise UserError(
            f"{folder / BASELINES} {said} for task {entry.label!r:.60}; it needs a {BASELINE!r} from 0 to below 100"
        )
    return Task(
        label=entry.label,
        kind=entry.icl_task_type,
        path=folder / DATA / entry.dataset_uri,
        shots=entry.num_fewshot[0],
        delimiter=entry.continuation_delimiter,
        baseline=baseline,
    )


# -- items -------------------------------------------------------------------------------------------------------------
def read_items(task: Task) -> list[Item]:
    """Raises UserError with file and line for one that is malformed; for an empty file, and for too few of them."""
    items = read_lines(task.path, CHECKS[task.kind])
    if task.shots >= len(items):
        raise UserError(
            f"{task.path} has {len(items)} items, and {task.label} shows {task.shots} others before each; "
            "it needs more items or a smaller num_fewshot"
        )
    return items


def read_lines(path: Path, flaw_of: Callable[[Item], str]) -> list[Item]:
    """Of a JSONL file.  flaw_of: what is wrong with an item; '' where nothing is.  Raises UserError."""
    items: list[Item] = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                item = json.loads(line)
                flaw = flaw_of(item) if isinstance(item, dict) else "must be an object"
            except (ValueError, RecursionError) as broken:
                flaw = f"is no JSON: {broken!s:.80}"
            if flaw:
                raise UserError(f"{path}:{number} {flaw}")
            items.append(item)
    if not items:
        raise UserError(f"{path} is empty; fetch the bundle again")
    return items


def flaw_of_texts(item: Item, *keys: str) -> str:
    """What is wrong with the texts under these keys."""
    for key in keys:
        if not isinstance(item.get(key), str):
            return f"must hold a text under {key!r}"
    return ""


def _options(item: Item, key: str) -> str:
    """What is wrong with the options under a key, and with the number of the right one."""
    options = item.get(key)
    gold = item.get("gold")
    if not isinstance(options, list) or len(options) < 2 or not all(map(_is_text, options)):
        return f"must list two texts or more under {key!r}"
    if type(gold) is not int or not 0 <= gold < len(options):
        return f"must hold under 'gold' a number from 0 to {len(options) - 1}, not {gold!r:.40}"
    return ""


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def flaw_of_choice(item: Item) -> str:
    return flaw_of_texts(item, "query") or _options(item, "choices")


def flaw_of_schema(item: Item) -> str:
    return flaw_of_texts(item, "continuation") or _options(item, "context_options")


def flaw_of_continuation(item: Item) -> str:
    flaw = flaw_of_texts(item, "context", "continuation")
    return flaw or ("" if item["continuation"].strip() else "has nothing to continue with")


CHECKS: Mapping[str, Callable[[Item], str]] = {
    CHOICE: flaw_of_choice,
    SCHEMA: flaw_of_schema,
    CONTINUATION: flaw_of_continuation,
}
