"""One training step: micro-batches -> backward -> optimizer -> after_step."""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from ablab.core.recipe.recipe import Recipe
from ablab.core.runtime.replay import OnDevice, Recorder, finest, on_device
from ablab.core.train.banks import Optimizer, put

# rows of tokens, int [B,T+1] -> (nats to descend, nats to report), both summed over tokens
Loss = Callable[[Tensor], tuple[Tensor, Tensor]]


def at_once() -> None:
    """Nothing is waited for."""


class TrainingStep:
    """What every optimizer step of a recipe does; the trainer and the checks take the same one.

        gradient <- d(loss / tokens), summed over micro-batches;  weights <- optimizer(gradient);  after_step(weights)

    tokens: of all micro-batches of a full step together; the gradient is that of the mean over a step's tokens.
    recorder: records what a micro-batch does (core/runtime/replay.py).
    """

    def __init__(
        self,
        loss: Loss,
        optimizer: Optimizer,
        recipe: Recipe,
        tokens: int,
        recorder: Recorder | None = None,
    ):
        self.loss = loss
        self.optimizer = optimizer
        self.tokens = tokens
        self.weights = [bank.weight for bank in optimizer.banks]
        # nats and tokens since whoever reads it last cleared it
        self.window = torch.zeros(2, dtype=finest(optimizer.device), device=optimizer.device)
        self.descend = on_device(self._descend, optimizer.device, recorder)
        self.restart(recipe)

    def restart(self, recipe: Recipe) -> None:
        """The state of step 0, for the weights as they are now; recipes of one structure share a step."""
        self.steps = recipe.steps
        self.averaged = recipe.before.averaged
        self.optimizer.restart(recipe)
        self.after = [(part, part.begin(self.weights)) for part in recipe.after_step]
        self.window.zero_()

    def take(
        self,
        t: int,
        blocks: Iterable[Tensor],
        tokens: int | None = None,
        before_move: Callable[[], None] = at_once,
    ) -> Tensor:
        """Optimizer step t (from 1) on micro-batches, int [B,T+1] each, on the host.

        tokens: of these micro-batches together; None: of a full step.
        before_move: called between the gradients and the optimizer.
        Returns the gradient norm before clipping, 0-D; nothing waits for the device.
        """
        for block in blocks:
            self.descend(block)
        before_move()
        return self.move(t, tokens)

    def move(self, t: int, tokens: int | None = None) -> Tensor:
        """The second half of `take`, for gradients that stand in the banks."""
        tokens = self.tokens if tokens is None else tokens
        norm = self.optimizer.step(t, tokens / self.tokens)
        for part, state in self.after:
            part.advance(state, self.weights, t + self.averaged, self.steps + self.averaged)
        self.window[1] += tokens
        return norm

    def _descend(self, block: Tensor) -> None:
        """Add the gradients of one micro-batch, int [B,T+1] on the device, and its nats."""
        loss, nats = self.loss(block)
        (loss / self.tokens).backward()
        self.window[0] += nats

    def tensors(self) -> dict[str, Tensor]:
        """Everything besides the parameters that a resumed run needs, by name."""
        return _of_optimizer(self.optimizer.tensors()) | self._beside()

    def like(self) -> dict[str, Tensor]:
        """Tensors of the shapes and types of `tensors`, without values."""
        beside = {name: value.to("meta") for name, value in self._beside().items()}
        return _of_optimizer(self.optimizer.like()) | beside

    def put(self, saved: Mapping[str, Tensor]) -> None:
        """Take over those of `tensors` that are given, by name."""
        self.optimizer.put(
            {
                name.removeprefix(OPTIMIZER): value
                for name, value in saved.items()
                if name.startswith(OPTIMIZER)
            }
        )
        put(self._beside(), saved)

    def _beside(self) -> dict[str, Tensor]:
        """What is not the optimizer's."""
        state: dict[str, Tensor] = {}
        for part, values in self.after:
            state |= {f"after/{part.kind}/{name}": value for name, value in values.items()}
        return state | {"window": self.window}

    @property
    def replayed(self) -> list[OnDevice]:
        """What is recorded, or could be: empty on a CPU."""
        own = [self.descend] if isinstance(self.descend, OnDevice) else []
        return own + self.optimizer.replayed


OPTIMIZER = "optimizer/"  # the head of its names


def _of_optimizer(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{OPTIMIZER}{name}": value for name, value in named.items()}
