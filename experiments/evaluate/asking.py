"""Which exam a request means, and whom an experiment's name stands for."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ablab.core.errors import UserError
from ablab.core.interop.folder import recipe_of
from ablab.core.store.planned import Planned
from ablab.core.store.result import FINISHED
from ablab.core.store.store import Store
from ablab.experiments.evaluate import blimp, core_suite, harness, per_source
from ablab.experiments.evaluate.exam import Exam, Examination
from ablab.experiments.evaluate.subjects import Subject, of_weights

NEEDED = {  # what --bundle must name
    "core": "a bundle in DCLM's format (ablab eval --fetch-bundle DIR brings the public one)",
    "blimp": "BLiMP's folder (git clone https://github.com/alexwarstadt/blimp)",
    "bpb": 'JSONL whose lines hold "text" and "source"',
}


@dataclass(frozen=True)
class Request:
    """What a model is asked, in words from which every process makes the same exams."""

    suite: str = ""  # core, blimp, bpb; "": tasks of lm-evaluation-harness
    tasks: tuple[str, ...] = ()
    bundle: Path | None = None
    include: Path | None = None  # a folder with tasks of the harness
    limit: int | None = None

    def single(self) -> "Iterator[Request]":
        """An exam each: every task of the harness is one."""
        if self.suite:
            yield self
        elif self.tasks:
            yield from (replace(self, tasks=(task,)) for task in self.tasks)
        else:
            raise UserError("say what to ask: --suite core, blimp or bpb, or --tasks NAMES")

    def anywhere(self) -> "Request":
        """With its files as every machine names them."""
        bundle = self.bundle and self.bundle.absolute()
        include = self.include and self.include.absolute()
        return replace(self, bundle=bundle, include=include)

    def exam(self, subject: Subject, store: Store) -> Examination:
        """Of a single one.  Raises UserError."""
        if self.suite:
            return exam_of(self.suite, self.bundle, self.limit, self.tasks, subject, store)
        (task,) = self.tasks
        return harness.exam(task, self.limit, self.include)


def exam_of(
    suite: str,
    bundle: Path | None,
    limit: int | None = None,
    tasks: Sequence[str] = (),
    subject: Subject | None = None,
    store: Store | None = None,
) -> Exam:
    """subject, store: whose own held-out text is asked where bpb is given none.  Raises UserError."""
    if bundle is None:
        if suite == "bpb" and subject and store and subject.kind == "ablab":
            return exam_of_own_text(subject, store, limit)
        raise UserError(f"--suite {suite} needs --bundle: {NEEDED[suite]}")
    if tasks and suite != "core":
        raise UserError(f"--tasks chooses among the tasks of --suite core, not of {suite}")
    match suite:
        case "core":
            return core_suite.exam(bundle, limit, tasks)
        case "blimp":
            return blimp.exam(bundle, limit)
        case _:
            return per_source.exam_of_file(bundle, limit)


def exam_of_own_text(subject: Subject, store: Store, limit: int | None) -> Exam:
    """The held-out text that a model's recipe names, each source of its mix apart.  Raises UserError."""
    from ablab.core.data.sources import sources_of

    recipe = recipe_of(Path(subject.model))
    folders = sources_of(recipe, store.root / "data" / recipe.data.name)
    return per_source.exam_of_folders(folders, limit)


@dataclass(frozen=True)
class Arms:
    """The runs of an experiment that can be asked, and why others cannot."""

    subjects: list[Subject]
    others: list[str]


def arms_of(experiment: str, store: Store) -> Arms:
    """Raises UserError where none of its runs can be asked."""
    subjects = []
    others = []
    for row, why in _unasked(experiment, store):
        if why:
            others.append(f"{row.cell}, seed {row.seed}: {why}")
        else:
            subjects.append(of_weights(store.run(row.run).folder, store))
    if not subjects:
        raise UserError(
            f"no run of {experiment} can be evaluated: {others[0] if others else 'none is planned'}; "
            "train it with runtime.keep_weights=true"
        )
    return Arms(subjects, others)


def _unasked(experiment: str, store: Store) -> Iterator[tuple[Planned, str]]:
    """Each run once, and why it cannot be asked; '' where it can."""
    seen = set()
    for row in store.read_plan(experiment).rows:
        if row.run in seen:
            continue
        seen.add(row.run)
        record = store.run(row.run)
        result = record.result()
        if result is None or result.status != FINISHED:
            yield row, "it has not finished"
        elif not (record.folder / "weights.safetensors").is_file():
            yield row, "it kept no weights"
        else:
            yield row, ""
