"""What is lost of the folder of a run that has ended, beside its result: written again, or named; and what is too much.

recipe.yaml   the run's identity says what it held
run.json      but for when the run began and on which machine, which nobody knows any more
pace.jsonl    cannot be known again: how fast each part of the run was.  No verdict rests on it
checkpoints/  of a process that was killed between the result and its last act
"""

import shutil
from collections.abc import Callable

from ablab.core.errors import UserError
from ablab.core.language.parse import parse
from ablab.core.language.written import dump
from ablab.core.model.cost import facts_of
from ablab.core.recipe.load import read_yaml
from ablab.core.recipe.recipe import Recipe, plain
from ablab.core.store.files import set_aside, write_atomically
from ablab.core.store.record import Record
from ablab.core.store.result import FINISHED, Result
from ablab.experiments.plan.experiment import Experiment, PlannedRun

Say = Callable[[str], None]


def mend(
    record: Record, run: PlannedRun, experiment: Experiment, result: Result, say: Say
) -> None:
    """result: the sound one of this run."""
    _mend_recipe(record, run.recipe, say)
    if not record.about():
        say(
            f"{record.about_path} is lost or damaged; written again, "
            "but for when the run began and on which machine"
        )
        known = {
            "experiment": experiment.name,
            "params": experiment.params(run),
            "runtime": result.runtime,
            "kernels": result.kernels,
        }
        record.restore_about(known | facts_of(run.recipe))
    if lost := record.lost_pace():
        say(lost)


def sweep(record: Record, result: Result) -> None:
    """Remove the checkpoints of a finished run that kept none for good."""
    if result.status == FINISHED and not result.runtime.get("keep_every"):
        shutil.rmtree(record.folder / "checkpoints", ignore_errors=True)


def _mend_recipe(record: Record, recipe: Recipe, say: Say) -> None:
    """A file that leaves to a default what was written is completed without a word: it means the same."""
    path = record.recipe_path
    whole = dump(plain(recipe)).encode()
    if path.is_file() and path.read_bytes() == whole:
        return
    try:
        means_the_same = parse(Recipe, read_yaml(path), "") == recipe
        flaw = "" if means_the_same else f"{path} is not what the run left"
    except UserError as refusal:
        flaw = str(refusal)
    if flaw:
        say(f"{flaw}; written again")
    if path.is_dir():
        set_aside(path)
    write_atomically(path, whole)
