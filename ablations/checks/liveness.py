"""Is a toggle alive?  Two recipes take the same steps on the same random numbers; an inert toggle leaves no trace.

The model takes four steps: the first, the middle, the last-but-one-tenth and the last of its schedule.  What depends on
the step is compared at every one (timeline.py).  All are computed by the kernels that will serve the run, so that a
stage which a kernel dropped would show as dead.  The trace is every bit of the weights read out, and of what the trunk
leaves and the nats, at the start and at the end.  A parameter that no gradient ever reaches is left out: nothing reads
it.

Of the model, four steps stay a sample.  What acts beyond a threshold that random tokens never reach is not seen; its
intervention is registered with `acts_late=True`, and then nobody calls it inert.
"""

import gc
import hashlib
from collections.abc import Collection

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ablab.ablations.checks.timeline import timeline
from ablab.core.fusion.places import plan_with
from ablab.core.language.declare import Param
from ablab.core.model.init import generator, initialise
from ablab.core.model.layers import declaration
from ablab.core.model.objective import heads_of, of_rows
from ablab.core.model.transformer import Transformer
from ablab.core.recipe.recipe import Recipe
from ablab.core.runtime.compilation import compile_kernels
from ablab.core.runtime.runtime import KernelPlace
from ablab.core.train.banks import Optimizer
from ablab.core.train.step import TrainingStep

ROWS = (
    2  # of the full context, at full depth: an idea may begin at layer 5, or beyond 32 tokens
)


def trace(recipe: Recipe, device: str = "cpu", kernels: Collection[KernelPlace] = ()) -> str:
    """A digest of what the recipe computes in four steps, and of what moves with the step at every one.

    Equal traces: nothing of that differs.
    kernels: the places that kernels serve in the run, as `served` of core/fusion/places.py says.
    In fp32 and, on a GPU too, in a fixed order of sums: else noise would pass for life.
    """
    # What the trace before left is in cycles, and goes before ours comes: 23 bytes a parameter of quickstart.
    # It is young where garbage is looked for seldom; a look at all takes 0.1 s, a third of an arm of quickstart.
    gc.collect(1)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            return Tracer(recipe, device, kernels).trace()
    finally:
        torch.use_deterministic_algorithms(before)


class Tracer:
    """A model that takes the four steps, and the digest of what it computes."""

    def __init__(self, recipe: Recipe, device: str, kernels: Collection[KernelPlace]):
        self.recipe = recipe
        self.device = device
        self.kernels = kernels
        self.model = Transformer(recipe, plan=plan_with(kernels, recipe)).to(device)
        initialise(self.model, recipe)
        optimizer = Optimizer(self.model, recipe, kernels=kernels)
        descend, measure = heads = heads_of(self.model)
        # Many at a time: one after another, in fp32, they held up the first arm of a grid for a minute.
        compile_kernels(
            self.model, heads, optimizer.rehearse, kernels, recipe.data.context, how=False
        )
        self.measure = of_rows(self.model, measure)
        shape = (ROWS, recipe.data.context + 1)
        drawn = generator(0, "liveness")
        self.rows = torch.randint(recipe.data.vocab, shape, generator=drawn)  # on the host
        tokens = ROWS * recipe.data.context
        self.step = TrainingStep(of_rows(self.model, descend), optimizer, recipe, tokens)
        self.banks = optimizer.banks
        self.reached: set[str] = set()
        self.digest = hashlib.sha256()

    def trace(self) -> str:
        self.read()
        for t in steps_of(self.recipe.steps):
            block = self.block(t)
            self.step.descend(block)
            self.note_reached()
            self.step.move(t, block[:, 1:].numel())
        self.average()
        self.read_weights()
        self.read()
        self.digest.update(timeline(self.recipe, self.declared(), self.device, self.kernels))
        return self.digest.hexdigest()

    def block(self, t: int) -> Tensor:
        """As many of the rows as step t (from 1) takes of a full batch, cut as it cuts its windows."""
        data, span = self.recipe.data, self.recipe.batches.at(t - 1)
        count = max(round(ROWS * span.windows / data.batch), 1)
        context = data.context // span.pieces
        return self.rows[:count].unfold(1, context + 1, context).flatten(0, 1)

    @torch.no_grad()
    def read(self) -> None:
        """What the trunk leaves, and the nats of each token."""
        rows = self.rows.to(self.step.weights[0].device)
        self.digest.update(_bits(self.model.trunk(rows[:, :-1])))
        self.digest.update(_bits(self.measure(rows)))

    def note_reached(self) -> None:
        for bank in self.banks:
            grads = zip(bank.names, bank.grad, strict=True)
            self.reached |= {name for name, grad in grads if grad.any()}

    def declared(self) -> dict[str, Param]:
        """The parameters that a gradient reached."""
        return {
            name: declaration(value)
            for name, value in self.model.named_parameters()
            if name in self.reached
        }

    def average(self) -> None:
        """The weights become those that are read out, as in an evaluation."""
        weights = self.step.weights
        for part, state in self.step.after:
            for weight, value in zip(weights, part.readout(state, weights), strict=True):
                weight.copy_(value)

    def read_weights(self) -> None:
        for bank in sorted(self.banks, key=lambda bank: bank.names):
            for name, weight in zip(bank.names, bank.weight, strict=True):
                if name in self.reached:
                    self.digest.update(name.encode() + _bits(weight))


def steps_of(steps: int) -> list[int]:
    """The four of a run's `steps` that are taken."""
    return sorted({1, max(steps // 2, 1), max(steps * 9 // 10, 1), steps})


def _bits(value: Tensor) -> bytes:
    return value.detach().cpu().contiguous().numpy().tobytes()
