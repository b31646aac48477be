"""Is a toggle alive?  Two recipes take four optimizer steps on the same random tokens; an inert toggle leaves no trace.

The four steps stand at the first, the middle, the last-but-one-tenth and the last step of the schedule, so that a
schedule, a decay or a weight average shows as well as a layer.  The trace is every bit of the weights read out and
of the logits at the start and at the end.  A parameter that no gradient ever reaches is left out: nothing reads it.
"""

import hashlib
from dataclasses import replace

import torch
from torch import Tensor

from ablab.core.init import generator, initialise
from ablab.core.loss import objective_of
from ablab.core.model import Transformer
from ablab.core.optimizer import Optimizer
from ablab.core.recipe import Recipe

ROWS, TOKENS, LAYERS = 2, 32, 4  # enough for every slot; depth is cut, because init is most of the cost


def trace(recipe: Recipe, device: str = "cpu") -> str:
    """A digest of what the recipe computes in four steps; equal traces mean that nothing computed differs."""
    small = replace(recipe, model=replace(recipe.model, layers=min(recipe.model.layers, LAYERS)))
    model = Transformer(small)
    initialise(model, small)
    optimizer, objective = Optimizer(model.to(device), small), objective_of(small.objective)
    weights = [bank.weight for bank in optimizer.banks]
    after = [(part, part.begin(weights)) for part in small.after_step]
    length = min(TOKENS, recipe.data.context) + 1
    block = torch.randint(small.data.vocab, (ROWS, length), generator=generator(0, "liveness")).to(device)
    digest, reached = hashlib.sha256(_bits(model(block[:, :-1]))), set()
    for t in sorted({1, max(small.steps // 2, 1), max(small.steps * 9 // 10, 1), small.steps}):
        loss, _ = objective(model(block[:, :-1]), block[:, 1:])
        (loss / block[:, 1:].numel()).backward()
        reached |= {name for bank in optimizer.banks for name, grad in zip(bank.names, bank.grad, strict=True) if grad.any()}
        optimizer.step(t)
        for part, state in after:
            part.advance(state, weights, t, small.steps)
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
