"""What all peers of ablab do alike in a benchmark: the recipe's rows, in its micro-batches, in PyTorch's usual loop."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn

from ablab.core.data.tokens import Tokens
from ablab.core.recipe.recipe import Recipe
from ablab.core.runtime.runtime import Settled, repeat_bits
from ablab.experiments.bench.phases import Marks


@contextmanager
def any_algorithm() -> Iterator[None]:
    """As in a process of its own: a trainer beside it may have asked for algorithms that repeat their bits."""
    asked = torch.are_deterministic_algorithms_enabled()
    repeat_bits(False)
    yield
    repeat_bits(asked)


class Peer:
    """`step()` is one optimizer step on the mean loss of a batch.  runtime: settled."""

    model: nn.Module
    loss: Callable[[Tensor], Tensor]  # mean cross-entropy of int64 [B,T+1], in nats
    optimizer: torch.optim.Optimizer
    clip: float | None = None  # the gradient norm at most
    about: str

    def __init__(
        self,
        recipe: Recipe,
        runtime: Settled,
        folder: Path,
        marks: Marks,
    ) -> None:
        self.recipe = recipe
        self.marks = marks
        self.rows = runtime.micro_batch
        self.device = torch.device(runtime.device)
        self.tokens = Tokens(recipe, folder)
        self.t = 0

    @any_algorithm()
    def step(self) -> None:
        batch = self.recipe.data.batch
        for first in range(0, batch, self.rows):
            self.marks("data")
            block = self._on_device(self.tokens.rows(self.t, first, self.rows))
            self.marks("forward")
            loss = self.loss(block)
            self.marks("backward")
            (loss * (self.rows / batch)).backward()
        self.marks("optimizer")
        if self.clip:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.t += 1

    def _on_device(self, block: Tensor) -> Tensor:
        if self.device.type == "cpu":
            return block
        return block.pin_memory().to(self.device, non_blocking=True)

    @property
    def flops_per_token(self) -> int:
        """6 * parameters in matrix products + causal attention, as core/model/cost.py counts for a recipe."""
        linears = [one for one in self.model.modules() if isinstance(one, nn.Linear)]
        parameters = sum(one.weight.numel() for one in linears)
        model = self.recipe.model
        channels = model.layers * model.heads * model.attention.head_dim
        return 6 * parameters + 6 * self.recipe.data.context * channels

    def peak_memory(self) -> int:
        return torch.cuda.max_memory_allocated()

    def show_phases(self) -> None:
        """Its kernels are launched one by one, each by its phase, already."""
