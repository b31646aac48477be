"""The coordinate check: does a step move every activation as far in a wide model as in a narrow one?

A few optimizer steps on one batch at a deliberately high learning rate, at several widths; then, for each tensor,

    change(width) = rms(activation after the steps - activation at init),   slope = d log2(change) / d log2(width)

Under a maximal update parametrization every slope is near 0; under the standard one they are not, and a check that
cannot fail there shows nothing.  Heads grow in number, never in size.  Flat slopes are necessary, not sufficient, for a
learning rate that transfers.  Yang & Hu, arXiv:2011.14522, app. D; Yang et al., arXiv:2203.03466, app. D.1.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ablab.core.errors import UserError
from ablab.core.init import generator, initialise
from ablab.core.layers import LinearMap
from ablab.core.loss import objective_of
from ablab.core.model import Transformer
from ablab.core.optimizer import Optimizer
from ablab.core.recipe import Budget, Recipe, check
from ablab.core.schedule import Constant

FLAT = 0.15  # a slope within +-FLAT passes
CHANGES = ("attention out", "feed-forward up", "feed-forward out", "residual", "logits")  # each must be flat
START, PEAK = "logits at init", "max attention logit"  # reported, not judged: their own size, not a change
STARTS = {"mup": -0.5, "standard": 0.0}  # expected slope of START for a readout drawn at init
WIDTHS, SEEDS, STEPS = 4, 3, 5  # the fewest that a slope is read from


@dataclass(frozen=True)
class Row:
    """One number: the rms change of a tensor since init, over all layers, rows and tokens (START and PEAK: its size)."""

    width: int
    seed: int
    step: int  # optimizer steps taken
    tensor: str
    change: float


def coordinates(
    recipe: Recipe, widths: Sequence[int], seeds: Sequence[int], steps: int, lr: float, device: str = "cpu", batch: Tensor | None = None
) -> list[Row]:
    """Train the recipe at every width from every seed.  batch: int [B, T+1]; None: `tokens(recipe)`.

    optim.lr becomes `lr` at every step: no warm-up, no decay of the rate.  Raises UserError for too few widths, seeds or
    steps to read a slope from, and for a width that is not a whole number of heads.
    """
    for name, given, least in (("widths", len(set(widths)), WIDTHS), ("seeds", len(set(seeds)), SEEDS), ("steps", steps, STEPS)):
        if given < least:
            raise UserError(f"the coordinate check needs at least {least} {name}, not {given}; fewer tell no slope from noise")
    block = tokens(recipe) if batch is None else batch
    budget, optim = Budget(steps * recipe.tokens_per_step), replace(recipe.optim, lr=lr)
    steady = replace(recipe, schedule=Constant(), budget=budget, optim=optim)
    sized = [check(replace(steady, model=replace(recipe.model, width=width))) for width in sorted(set(widths))]
    return [row for one in sized for seed in seeds for row in _train(replace(one, seed=seed), steps, block.to(device))]


def tokens(recipe: Recipe, seed: int = 0) -> Tensor:
    """A batch of random tokens whose frequencies fall as 1/rank, like those of words: int64 [B, T+1]."""
    odds = 1 / torch.arange(1, recipe.data.vocab + 1, dtype=torch.float64)
    drawn = torch.multinomial(odds, recipe.data.batch * (recipe.data.context + 1), True, generator=generator(seed, "coords"))
    return drawn.view(recipe.data.batch, -1)


def _train(recipe: Recipe, steps: int, block: Tensor) -> Iterator[Row]:
    model = Transformer(recipe)
    initialise(model, recipe)
    optimizer, objective = Optimizer(model.to(block.device), recipe), objective_of(recipe.objective)
    seen, inputs, targets = _listen(model), block[:, :-1], block[:, 1:]
    for step in range(steps + 1):
        loss, _ = objective(model(inputs), targets)
        now = {name: torch.stack(seen.pop(name)).float() for name in list(seen)}
        if step == 0:
            start = now
            yield Row(recipe.model.width, recipe.seed, 0, START, _rms(now["logits"]))
        for name in CHANGES if step else ():
            yield Row(recipe.model.width, recipe.seed, step, name, _rms(now[name] - start[name]))
        yield Row(recipe.model.width, recipe.seed, step, PEAK, now[PEAK].max().item())
        yield Row(recipe.model.width, recipe.seed, step, "loss", loss.item()/targets.numel())
        if step < steps:
            (loss / targets.numel()).backward()
            optimizer.step(step + 1)


def _rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


def _listen(model: Transformer) -> dict[str, list[Tensor]]:
    """Hook the model: each forward pass leaves the activations of every layer in the dict that is returned."""
    seen: dict[str, list[Tensor]] = {}

    def keep(name: str, read: Callable = lambda x: x) -> Callable:
        return lambda module, inputs, output=None: seen.setdefault(name, []).append(read(inputs[0] if output is None else output).detach())

    for block in model.blocks:
        down = [module for module in block.ffn.inner.modules() if isinstance(module, LinearMap)][-1]
        block.attention.out.register_forward_hook(keep("attention out"))
        block.attention.position.register_forward_hook(keep(PEAK, _peak))
        down.register_forward_pre_hook(keep("feed-forward up"))
        block.ffn.inner.register_forward_hook(keep("feed-forward out"))
    model.norm.register_forward_pre_hook(keep("residual"))
    model.register_forward_hook(keep("logits"))
    return seen


def _peak(qk: tuple[Tensor, Tensor]) -> Tensor:
    """max |q k| / sqrt(D) over all heads and the pairs that attention sees.  q: [B,T,H,D], k: [B,T,KV,D]."""
    q, k = qk[0].float(), qk[1].float()
    k = k.repeat_interleave(q.shape[2] // k.shape[2], dim=2)
    return (torch.einsum("bihd,bjhd->bhij", q, k).tril() / q.shape[-1] ** 0.5).abs().max()


def slopes(rows: Iterable[Row]) -> dict[str, float]:
    """Tensor -> least-squares slope of log2(change at its last step, averaged over seeds) on log2(width).

    inf where a change was zero or not finite.
    """
    last: dict[str, dict[int, list[float]]] = {}
    rows = list(rows)
    for row in rows:
        if row.step == max(r.step for r in rows if r.tensor == row.tensor):
            last.setdefault(row.tensor, {}).setdefault(row.width, []).append(row.change)
    out = {}
    for tensor, by_width in last.items():
        means = np.array([np.mean(c) for c in by_width.values()])
        out[tensor] = float(np.polyfit(np.log2(list(by_width)), np.log2(means), 1)[0]) if np.isfinite(means).all() and (means > 0).all() else math.inf
    return out
