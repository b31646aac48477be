"""Is a toggle alive?  Two recipes take four optimizer steps on the same random tokens; an inert toggle leaves no trace.

The four steps stand at the first, the middle, the last-but-one-tenth and the last step of the schedule, so that a
schedule, a decay or a weight average shows as well as a layer.  The trace is every bit of the weights read out and
of the logits at the start and at the end.  A parameter that no gradient ever reaches is left out: nothing reads it.
"""

import hashlib

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ablab.core.model.init import generator, initialise
from ablab.core.model.objective import heads_of, of_rows
from ablab.core.model.transformer import Transformer
from ablab.core.recipe.recipe import Recipe
from ablab.core.train.banks import Optimizer

ROWS = (
    2  # of the full context, at full depth: an idea may begin at layer 5, or beyond 32 tokens
)


def trace(recipe: Recipe, device: str = "cpu") -> str:
    """A digest of what the recipe computes in four steps; equal traces mean that nothing computed differs.

    In fp32 and, on a GPU too, in a fixed order of sums: else noise would pass for life.
    """
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            return _trace(recipe, device)
    finally:
        torch.use_deterministic_algorithms(before)


def _trace(recipe: Recipe, device: str) -> str:
    model = Transformer(recipe)
    initialise(model, recipe)
    optimizer = Optimizer(model.to(device), recipe)
    descend = of_rows(model, heads_of(model)[0])
    weights = [bank.weight for bank in optimizer.banks]
    after = [(part, part.begin(weights)) for part in recipe.after_step]
    block = torch.randint(
        recipe.data.vocab, (ROWS, recipe.data.context + 1), generator=generator(0, "liveness")
    ).to(device)
    digest, reached = hashlib.sha256(_bits(model(block[:, :-1]))), set()
    for t in sorted(
        {1, max(recipe.steps // 2, 1), max(recipe.steps * 9 // 10, 1), recipe.steps}
    ):
        loss, _ = descend(block)
        (loss / block[:, 1:].numel()).backward()
        reached |= {
            name
            for bank in optimizer.banks
            for name, grad in zip(bank.names, bank.grad, strict=True)
            if grad.any()
        }
        optimizer.step(t)
        for part, state in after:
            part.advance(state, weights, t, recipe.steps)
    for part, state in after:
        for weight, value in zip(weights, part.readout(state, weights), strict=True):
            weight.copy_(value)
    for bank in sorted(optimizer.banks, key=lambda bank: bank.names):
        for name, weight in zip(bank.names, bank.weight, strict=True):
            if name in reached:
                digest.update(name.encode() + _bits(weight))
    digest.update(_bits(model(block[:, :-1])))
    return digest.hexdigest()


def _bits(value: Tensor) -> bytes:
    return value.detach().cpu().contiguous().numpy().tobytes()
