"""Between stages: what a run leaves for those that go on from it, and how one takes it over.

RUN/final/step-00000120-1a2b3c4d.safetensors: a checkpoint of the last step; `evaluated/NAME` beside `model/NAME` where
an average was evaluated.  It stays until a person removes it: no run knows who will go on from it later.
A run whose parent diverged has diverged too: it is a result, and no run is tried again for it.
"""

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ablab.core.errors import ParentDiverged, UserError
from ablab.core.recipe.stage import Handover
from ablab.core.store.record import Record
from ablab.core.store.result import DIVERGED, FINISHED, Result
from ablab.core.store.state import state_of
from ablab.core.train import checkpoint
from ablab.core.train.checkpoint import Origin, Tensors
from ablab.core.train.trainer import Trainer

WEIGHTS = {
    "trained": "model",
    "evaluated": "evaluated",
}  # what is read -> the head of its names


def keep(trainer: Trainer, folder: Path) -> None:
    """Leave the last state of a run in its folder, in the place of any that stands there."""
    place = state_of(folder)
    shutil.rmtree(place, ignore_errors=True)
    trainer.write(place, trainer.tensors() | _evaluated(trainer), trainer.origin())


def _evaluated(trainer: Trainer) -> Tensors:
    if not trainer.averages:
        return {}
    with trainer.as_evaluated():
        return {
            f"evaluated/{name}": value.detach().cpu().clone()
            for name, value in trainer.weights().items()
        }


def take_over(trainer: Trainer, source: Path, warn: Callable[[str], None]) -> None:
    """Begin the trainer's run, at step 0, with what its recipe says of its parent, whose folder is `source`.

    Raises ParentDiverged, and UserError where the parent has not finished, left no state, or has other parameters.
    """
    asked = trainer.recipe.before
    if not asked.run:
        return _begin_with_weights(trainer, asked.weights, source)
    saved = _state(asked, source, warn)
    named = {
        f"{WEIGHTS[asked.read]}/{name}": name for name, _ in trainer.model.named_parameters()
    }
    weights = {name: saved[path] for path, name in named.items() if path in saved}
    trainer.begin_with(weights)
    own = trainer.training_step.like()
    for branch in asked.takes:
        taken = {name: value for name, value in own.items() if name.startswith(HEADS[branch])}
        _check(taken, saved, source)
        trainer.training_step.put({name: saved[name] for name in taken})


def _begin_with_weights(trainer: Trainer, digest: str, source: Path) -> None:
    """source: a folder with weights.safetensors, of which this is the digest."""
    path = source / "weights.safetensors"
    try:
        weights = load_file(path)
    except (OSError, SafetensorError) as flaw:
        raise UserError(
            f"cannot read {path} ({flaw!s:.80}); it was there when the run was planned"
        ) from None
    trainer.begin_with(weights)
    if (found := trainer.digest()) != digest:
        raise UserError(
            f"{path} holds weights {found}, and the run was planned with {digest}; "
            "start the command again, which names another run"
        )


HEADS = {"optimizer": "optimizer/", "average": "after/"}  # of the names of a state


def _state(asked: Handover, source: Path, warn: Callable[[str], None]) -> Tensors:
    result = Record(source, asked.run).result()
    if result and result.status == DIVERGED:
        raise ParentDiverged(asked.run, result.error)
    if result is None or result.status != FINISHED:
        raise UserError(f"run {asked.run}, from which this one goes on, {_unfinished(result)}")

    def foreign(origin: Origin, tensors: Tensors) -> str:
        return "" if origin.run == asked.run else f"is of run {origin.run or 'unknown'}"

    found = checkpoint.newest(state_of(source), warn, foreign)
    if found is None:
        raise UserError(
            f"run {asked.run} left no state to go on from; delete {source} to train it again"
        )
    _, saved = found
    return saved


def _unfinished(result: Result | None) -> str:
    if result is None:
        return "has not finished; train it first"
    return f"ended as {result.status.replace('_', ' ')}; train it again first"


def _check(own: Mapping[str, Tensor], saved: Tensors, source: Path) -> None:
    """Raises UserError where the parent's state is of another shape."""
    for name, value in own.items():
        there = saved.get(name)
        if there is None or there.shape != value.shape:
            found = "lacks it" if there is None else f"has {list(there.shape)}"
            raise UserError(
                f"{name} {list(value.shape)} cannot be taken over: {source.name} {found}; "
                "keep its optimizer and averages, or take over weights alone"
            )
