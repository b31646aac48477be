"""The coordinate check: does a step move every activation as far in a wide model as in a narrow one?

A few optimizer steps on one batch at a deliberately high learning rate, at several widths; then, for each tensor,

    change(width) = rms(activation after the steps - activation at init),   slope = d log2(change) / d log2(width)

Under a maximal update parametrization every slope is near 0.  Under the standard one it is not, and a check that
cannot fail there shows nothing.  Flat slopes are necessary, not sufficient, for a learning rate that transfers.
Yang & Hu, arXiv:2011.14522; Yang et al., arXiv:2203.03466, app. D.1.

The readout decides whether the rule shows at small widths.  A random one starts with logits of size m^-1/2, and
features that move at all replace them by others of that size: a change that shrinks although nothing is wrong.
Widths 64-512, lr 0.02: slope of the logits -0.07 under AdamW at a quarter of the smallest width as base, -0.23 under
Muon, whose features move further; from a zero readout +0.01 and -0.02.  Seeds differ by 0.01 to 0.02.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ablab.core.errors import UserError
from ablab.core.model.init import generator, initialise
from ablab.core.model.layers import LinearMap
from ablab.core.model.objective import losses
from ablab.core.model.transformer import Transformer
from ablab.core.parts.schedule import Constant
from ablab.core.recipe.recipe import Budget, Recipe, check
from ablab.core.train.banks import Optimizer
from ablab.core.train.step import TrainingStep

# each must be flat
CHANGES = ("attention out", "feed-forward up", "feed-forward out", "residual", "logits")
FLAT = 0.15  # |slope| that still passes
# Their own size, not a change; reported, not judged.
START = "logits at init"
PEAK = "max attention logit"
FEWEST = {"widths": 4, "seeds": 3, "steps": 5}


@dataclass(frozen=True)
class Row:
    """RMS change since init of one tensor, over all layers, rows, tokens and channels (START, PEAK: its own size)."""

    width: int
    seed: int
    step: int  # optimizer steps taken
    tensor: str
    change: float


def coordinates(
    recipe: Recipe,
    widths: Sequence[int],
    seeds: Sequence[int],
    steps: int,
    lr: float,
    device: str = "cpu",
    batch: Tensor | None = None,
) -> list[Row]:
    """Train the recipe at every width from every seed, always on the same batch: int [B, T+1]; None: `tokens(recipe)`.

    optim.lr is `lr` at every step, without warm-up; heads grow in number, not in size.  Raises UserError for too few
    widths, seeds or steps to read a slope from, and for a width that is not a whole number of heads.
    """
    given = {"widths": len(set(widths)), "seeds": len(set(seeds)), "steps": steps}
    for name, least in FEWEST.items():
        if given[name] < least:
            raise UserError(
                f"the coordinate check needs at least {least} {name}, not {given[name]}; "
                "fewer cannot tell a slope from noise"
            )
    steady = replace(
        recipe,
        schedule=Constant(),
        budget=Budget(steps * recipe.tokens_per_step),
        optim=replace(recipe.optim, lr=lr),
    )
    sized = [
        check(replace(steady, model=replace(recipe.model, width=width)))
        for width in sorted(set(widths))
    ]
    block = (tokens(recipe) if batch is None else batch).to(device)
    return [
        row
        for one in sized
        for seed in sorted(set(seeds))
        for row in _train(replace(one, seed=seed), steps, block)
    ]


def tokens(recipe: Recipe, seed: int = 0) -> Tensor:
    """A batch of random tokens whose frequencies fall as 1/rank, as those of words do: int64 [B, T+1]."""
    odds = 1 / torch.arange(1, recipe.data.vocab + 1, dtype=torch.float64)
    count = recipe.data.batch * (recipe.data.context + 1)
    drawn = torch.multinomial(
        odds, count, replacement=True, generator=generator(seed, "coords")
    )
    return drawn.view(recipe.data.batch, -1)


def _train(recipe: Recipe, steps: int, block: Tensor) -> Iterator[Row]:
    """Each forward pass shows what the steps before it have changed; the one after the last step trains nothing."""
    model = Transformer(recipe)
    initialise(model, recipe)
    model.to(block.device)
    listener = Listener(model)

    def loss(rows: Tensor) -> tuple[Tensor, Tensor]:
        features = model.features(rows[:, :-1])
        logits = model.logits(features)
        listener.keep("logits", logits)
        return losses(features, logits, rows[:, 1:], model.logits, model.objective.values())

    training = TrainingStep(
        loss=loss,
        optimizer=Optimizer(model, recipe),
        recipe=recipe,
        tokens=block[:, 1:].numel(),
    )
    start: dict[str, Tensor] = {}
    for taken in range(steps + 1):
        if taken < steps:
            training.take(taken + 1, [block])
        else:
            loss(block)
        now = listener.take()
        start = start or now
        sizes = {START: _rms(now["logits"])}
        if taken:
            sizes = {name: _rms(now[name] - start[name]) for name in CHANGES}
        sizes[PEAK] = now[PEAK].max().item()
        for name, size in sizes.items():
            yield Row(recipe.model.width, recipe.seed, taken, name, size)


def _rms(x: Tensor) -> float:
    return x.square().mean().sqrt().item()


class Listener:
    """What a model's forward passes show: after each, `seen` holds the activations of all layers by name."""

    def __init__(self, model: Transformer):
        self.seen: dict[str, list[Tensor]] = {}
        for block in model.blocks:
            attention, ffn = block.get_submodule("attention"), block.get_submodule("ffn")
            self._out_of(attention.get_submodule("position"), PEAK, _peak)
            self._out_of(attention, "attention out", lambda output: output[0])
            maps = [
                one
                for one in ffn.get_submodule("inner").modules()
                if isinstance(one, LinearMap)
            ]
            self._into(maps[-1], "feed-forward up")
            self._out_of(ffn, "feed-forward out")
        self._into(model.norm, "residual")

    def keep(self, name: str, value: Tensor) -> None:
        self.seen.setdefault(name, []).append(value.detach())

    def take(self) -> dict[str, Tensor]:
        """Name -> the activations of the last pass, all layers stacked, in fp32; the next pass starts afresh."""
        taken = {name: torch.stack(values).float() for name, values in self.seen.items()}
        self.seen.clear()
        return taken

    def _into(self, module: nn.Module, name: str) -> None:
        module.register_forward_pre_hook(lambda _, inputs: self.keep(name, inputs[0]))

    def _out_of(
        self,
        module: nn.Module,
        name: str,
        read: Callable[[Any], Tensor] = lambda output: output,
    ) -> None:
        module.register_forward_hook(lambda _, inputs, output: self.keep(name, read(output)))


def _peak(qk: tuple[Tensor, Tensor]) -> Tensor:
    """max |q.k| / sqrt(D) over heads and the pairs that attention sees.  q: [B,T,H,D], k: [B,T,KV,D] -> 0-D."""
    q, k = qk[0].float(), qk[1].float()
    k = k.repeat_interleave(q.shape[2] // k.shape[2], dim=2)
    return torch.einsum("bihd,bjhd->bhij", q, k).tril().abs().max() / q.shape[-1] ** 0.5


def slopes(rows: Iterable[Row]) -> dict[str, float]:
    """Tensor -> least-squares slope of log2(change at its last step, averaged over seeds) on log2(width).

    nan where a change is zero (the logits of a zero readout at init) or not finite.
    """
    sizes: dict[str, dict[int, dict[int, list[float]]]] = {}
    for row in rows:
        sizes.setdefault(row.tensor, {}).setdefault(row.step, {}).setdefault(
            row.width, []
        ).append(row.change)
    return {tensor: _slope(steps[max(steps)]) for tensor, steps in sizes.items()}


def _slope(by_width: dict[int, list[float]]) -> float:
    means = np.array([np.mean(changes) for changes in by_width.values()])
    if not (np.isfinite(means) & (means > 0)).all():
        return math.nan
    return float(np.polyfit(np.log2(list(by_width)), np.log2(means), 1)[0])


def failing(found: dict[str, float]) -> list[str]:
    """The tensors whose change is not flat, the steepest first."""
    return sorted(
        (name for name in CHANGES if not abs(found[name]) <= FLAT),
        key=lambda name: -abs(found[name]),
    )
