"""What a recipe does at every step of its run, on parameters of a few numbers each.

Four steps of a model show its layers.  What depends on the step (schedule, batch shape, factors on gradients, optimizer
chains, their refreshes, weight averages) may be off at all four, say from 20 to 45 % of the run.  So every step is
taken here too, by the same optimizer: it moves one small parameter of each sort by gradients of seven fixed sets.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import groupby

import torch
from torch import Tensor, nn

from ablab.core.language.declare import Param
from ablab.core.model.init import generator
from ablab.core.model.layers import parameter
from ablab.core.model.rates import bank_of
from ablab.core.recipe.batches import Batches
from ablab.core.recipe.recipe import Recipe
from ablab.core.train.banks import Optimizer
from ablab.core.train.step import TrainingStep

SIDE = 16  # rows and columns at most, of each matrix that is fused into one
HEAD = 8  # rows of a head
START = 0.02  # standard deviation of the first weights
# Standard deviations of the sets of gradients, in their order: what acts on large or small norms shows as well.
SIZES = (1.0, 1e-3, 10.0, 0.1, 1e-2, 100.0, 1.0)


def timeline(
    recipe: Recipe, declared: Mapping[str, Param], device: str, kernels: Iterable[str]
) -> bytes:
    """A digest of what moves over the whole run.

    declared: the parameters that a gradient reaches, by name; of each sort the first is taken, made small.
    kernels: the places that kernels serve in the run.
    """
    digest = hashlib.sha256()
    digest.update(repr(_constants(recipe)).encode())
    for bits in _multipliers(recipe), *Miniature(recipe, declared, device, kernels).steps():
        digest.update(bits)
    return digest.digest()


def _constants(recipe: Recipe) -> tuple[object, ...]:
    """Which tokens are read in which batches, on which of them a run is judged, and what it takes over from another.

    Which run that is does not count: its own trace says whether it is alive.
    """
    data = recipe.data
    read = data.digest or data.name, sorted(data.mix.items()), data.replacement
    tokens = *read, data.held_out
    taken = replace(recipe.before, run="")
    return *tokens, recipe.seed, _shapes(recipe.batches), taken


def _shapes(batches: Batches) -> list[tuple[int, int, int]]:
    """(windows of a step, rows of a window, steps) of every stretch of equal steps."""
    spans = [span for span in batches.spans if span.steps]
    alike = groupby(spans, lambda span: (span.windows, span.pieces))
    return [(*shape, sum(span.steps for span in stretch)) for shape, stretch in alike]


def _multipliers(recipe: Recipe) -> bytes:
    """The schedule at every step, in fp32 as the optimizer gets it."""
    steps = range(1, recipe.steps + 1)
    values = [recipe.schedule.multiplier(t, recipe.steps) for t in steps]
    return torch.tensor(values, dtype=torch.float32).numpy().tobytes()


class Miniature:
    """The optimizer of a recipe, over a handful of small parameters."""

    def __init__(
        self,
        recipe: Recipe,
        declared: Mapping[str, Param],
        device: str,
        kernels: Iterable[str],
    ):
        self.recipe = recipe
        optimizer = Optimizer(Handful(declared).to(device), recipe, kernels=frozenset(kernels))
        self.banks = optimizer.banks
        self.gradients = [
            [_drawn(i, bank.grad) for bank in self.banks] for i in range(len(SIZES))
        ]
        self.step = TrainingStep(_not_asked, optimizer, recipe, recipe.tokens_per_step)

    @torch.no_grad()
    def steps(self) -> Iterator[bytes]:
        """The bits of the weights after each step, and of those that an evaluation there would read."""
        for t in range(1, self.recipe.steps + 1):
            for bank, gradient in zip(self.banks, self.gradients[t % len(SIZES)], strict=True):
                bank.grad.copy_(gradient)
            windows = self.recipe.batches.at(t - 1).windows
            self.step.move(t, windows * self.recipe.data.context)
            yield self._seen()

    def _seen(self) -> bytes:
        weights = self.step.weights
        seen = list(weights)
        for part, state in self.step.after:
            read = zip(part.readout(state, weights), weights, strict=True)
            seen += [value for value, weight in read if not torch.equal(value, weight)]
        flat = torch.cat([value.flatten() for value in seen])
        return flat.cpu().numpy().tobytes()


class Handful(nn.Module):
    """One small parameter of each sort; names have dots, as those of a model."""

    def __init__(self, declared: Mapping[str, Param]):
        super().__init__()
        self.names: list[str] = []
        self.values = nn.ParameterList()
        sorts = set()
        for name, param in declared.items():
            small = shrunk(param)
            if bank_of(small) not in sorts:
                sorts.add(bank_of(small))
                self.names.append(name)
                self.values.append(_parameter(name, small))

    def named_parameters(self, *_: object, **__: object) -> Iterator[tuple[str, nn.Parameter]]:
        yield from zip(self.names, self.values, strict=True)


def shrunk(param: Param) -> Param:
    """As many matrices fused, of at most SIDE rows and columns."""
    blocks = (SIDE,) * len(param.blocks)
    shape = tuple(min(length, SIDE) for length in param.shape)
    head = HEAD if param.head else 0
    if blocks or head:
        shape = (sum(blocks) or SIDE, *shape[1:])
    return replace(param, shape=shape, blocks=blocks, head=head)


def _parameter(name: str, small: Param) -> nn.Parameter:
    value = parameter(small)
    with torch.no_grad():
        value.normal_(0.0, START, generator=generator(0, f"timeline {name}"))
    return value


def _drawn(i: int, like: Tensor) -> Tensor:
    source = generator(0, f"timeline {i} {tuple(like.shape)}")
    return (SIZES[i] * torch.randn(like.shape, generator=source)).to(like.device)


def _not_asked(block: Tensor) -> tuple[Tensor, Tensor]:
    raise AssertionError("gradients are given here")
