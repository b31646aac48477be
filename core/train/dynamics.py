"""Training dynamics: what goes on inside a run, looked at every few steps, beside what is trained and never in it.

    layer/ROLE.weight/I    |w| of a layer's parameters of a role
    layer/ROLE.update/I    |w - w before the step|
    layer/..., train/...   of rows of the step, PROBED tokens at most: probe.py

A look is taken where the log is, the only wait for the device, with the clock stopped.  The step before it copies the
weights; it reads them, and writes nothing that training reads: a run has the same bits with looks and without.  Off is
absent: no hook, no copy, no operation.
"""

import math
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from ablab.core.runtime.replay import finest
from ablab.core.train.probe import Probe, place_of
from ablab.core.train.trainer import Trainer

PROBED = 4096  # tokens
Looked = dict[str, float]


class Looks(Protocol):
    """How a run is looked at while it trains."""

    def advance(self) -> Tensor:
        """One step of the trainer; the gradient norm before clipping."""
        ...

    def look(self) -> Looked:
        """What is seen after that step, once the device has caught up; nothing where no look is due."""
        ...


class Unwatched:
    """A run into which nobody looks."""

    def __init__(self, trainer: Trainer):
        self.advance = trainer.advance

    def look(self) -> Looked:
        return {}


class Watched:
    """Looks into a run after every `every`-th step and after the last."""

    def __init__(self, trainer: Trainer, every: int, warn: Callable[[str], None]):
        self.trainer = trainer
        self.every = every
        self.warn = warn
        self.probe = Probe(trainer.model, trainer.recipe)
        self.token_bytes = trainer.tokens.token_bytes.to(trainer.device)
        self.before: list[Tensor] = []  # weights, while a look is due

    def advance(self) -> Tensor:
        trainer = self.trainer
        t = trainer.step + 1
        if t % self.every == 0 or t == trainer.recipe.steps:
            self.before = [weight.clone() for weight in trainer.training_step.weights]
        return trainer.advance()

    def look(self) -> Looked:
        before, self.before = self.before, []
        if not before:
            return {}
        try:
            norms = self._norms(before)
            found = norms | self.probe.look(self._rows(), self.token_bytes)
        except torch.OutOfMemoryError:
            self.warn(f"step {self.trainer.step}: no memory for a look into the layers")
            return {}
        # What is not finite is said by the loss; JSON has no word for it.
        return {name: value for name, value in found.items() if math.isfinite(value)}

    def _rows(self) -> Tensor:
        """The first rows of the step that was taken."""
        trainer = self.trainer
        few = max(1, PROBED // trainer.recipe.data.context)
        count = min(few, trainer.runtime.micro_batch)
        step = trainer.step - 1  # counted from 0, as the tokens are
        rows = trainer.tokens.rows(step, 0, count)
        return rows.to(trainer.device)

    @torch.no_grad()
    def _norms(self, before: list[Tensor]) -> Looked:
        """Of weights and of what the step changed, by role and place."""
        squares: dict[str, list[Tensor]] = {}
        for bank, old in zip(self.trainer.optimizer.banks, before, strict=True):
            role = bank.declared.role
            for kind, tensor in (("weight", bank.weight), ("update", bank.weight - old)):
                for name, square in zip(bank.names, _squares(tensor), strict=True):
                    place, _ = place_of(name)
                    quantity = f"layer/{role}.{kind}/{place}"
                    squares.setdefault(quantity, []).append(square)
        sums = [torch.stack(own).sum() for own in squares.values()]
        norms = torch.stack(sums).sqrt()
        return dict(zip(squares, norms.tolist(), strict=True))


def _squares(members: Tensor) -> Tensor:
    """[N, ...] -> the sum of squares of each, in the finest numbers that the device has, [N]."""
    rows = members.flatten(1)
    norms = torch.linalg.vector_norm(rows, dim=1, dtype=finest(rows.device))
    return norms.square()


def looks_into(trainer: Trainer, warn: Callable[[str], None]) -> Looks:
    """As runtime.dynamics asks."""
    every = trainer.runtime.dynamics
    return Watched(trainer, every, warn) if every else Unwatched(trainer)
