"""One GPU and several of a host on the same run: `ablab bench scale`.

Whole optimizer steps, as in `ablab bench step`; the batch is the same for one GPU and for all of them together.
    one              each GPU by itself, all at once, before and after: cards of one host differ by a few percent, warm
                     ones from cool ones too; several keep the pace of the slowest, so the ratio is that of their mean
    with, without    the same step with and without its messages between ranks, in turn, A B B A; without them the
                     weights of the ranks part, and nothing else changes
    share            of a step that messages add to it, beside the slowest GPU without them: what is not hidden behind
                     the backward pass and the optimizer
    alone            the same messages with nothing beside them
    agreement        the first steps of both: losses, and whether several ranks repeat their bits
"""

import gc
import json
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import fmean, median
from typing import Any, TypeVar

import torch
import typer
from torch import Tensor

from ablab.ablations.registry import discover
from ablab.core.errors import UserError
from ablab.core.language.parse import parse
from ablab.core.recipe.load import read_yaml
from ablab.core.recipe.recipe import Budget, Recipe, plain
from ablab.core.runtime.runtime import Runtime, visible_gpus
from ablab.core.runtime.world import Handle, World, join, leave
from ablab.core.train.sharded import Reduction, ShardedOptimizer, ShardedStep, ShardedTrainer
from ablab.core.train.trainer import Trainer
from ablab.experiments.bench import ceilings
from ablab.experiments.bench.clocks import in_turn, seconds, settled
from ablab.experiments.bench.random_tokens import NAME, experiment_on_random_tokens
from ablab.experiments.plan.sheets import catalog
from ablab.experiments.run.ranks import RankDied, end_when_told, launch, local_rank
from ablab.experiments.text import table

LIKE = "loo_70m"  # its treatment: Newton-Schulz, and everything that has a kernel
ENOUGH_STEPS = 10_000  # of the budget: a schedule that does not end while we look
FIRST = 20  # steps whose losses are compared
MESSAGES = 20  # of a kind, timed alone

T = TypeVar("T")


@dataclass(frozen=True)
class Size:
    """batch: rows of a step, of all GPUs together.  rows: that one GPU takes at once."""

    name: str
    config: str
    batch: int
    rows: int


SIZES = (Size("70M", "size/70m", 192, 96), Size("430M", "size/430m", 96, 48))
TINY = (Size("tiny", "size/tiny", 8, 4),)  # where there is no GPU


@dataclass(frozen=True)
class Asked:
    """What is timed in the ranks: plain values, for they cross a pipe."""

    size: Size
    recipe: dict[str, Any]
    folder: Path  # of tokens
    device: str
    steps: int  # of a window
    windows: int
    warm_up: int


def bench_scale(
    gpus: int,
    only: str | None,
    steps: int | None,
    windows: int,
    warm_up: int | None,
    device: str,
) -> dict[str, Any]:
    """Raises UserError: fewer GPUs than asked for, an unknown size, a batch that they do not divide."""
    discover()
    on_cpu = device == "cpu" or (device == "auto" and not visible_gpus())
    if not on_cpu and gpus > len(visible_gpus()):
        raise UserError(
            f"--gpus {gpus}, and this machine has {len(visible_gpus())}; "
            "ask for as many, or for --device cpu"
        )
    known = TINY if on_cpu else SIZES
    chosen = [size for size in known if only in (None, size.name)]
    if not chosen:
        names = ", ".join(size.name for size in known)
        raise UserError(f"no size {only!r} here; there are: {names}")
    with tempfile.TemporaryDirectory() as folder:
        asked = [
            _asked(size, Path(folder) / size.name, on_cpu, steps, windows, warm_up)
            for size in chosen
        ]
        try:
            found: dict[str, Any] = launch(gpus, measured, asked)[0]
        except RankDied as death:
            raise UserError(f"the bench ended early: {death}") from None
    return found


def _asked(
    size: Size, folder: Path, on_cpu: bool, steps: int | None, windows: int, warm_up: int | None
) -> Asked:
    sheet = {
        "question": "How does it scale?",
        "base": ["base", size.config],
        "with": read_yaml(catalog()[LIKE])["with"],
        "design": "single",
        "set": {"data.name": NAME, "data.batch": size.batch},
    }
    folder.mkdir(parents=True)
    path = folder / "scale.yaml"
    path.write_text(json.dumps(sheet))  # JSON is YAML
    experiment = experiment_on_random_tokens(str(path), {}, folder)
    (recipe,) = experiment.recipes.values()
    recipe = replace(recipe, budget=Budget(ENOUGH_STEPS * recipe.tokens_per_step))
    return Asked(
        size=size,
        recipe=plain(recipe),
        folder=folder / "data" / NAME,
        device="cpu" if on_cpu else "cuda",
        steps=steps or (3 if on_cpu else 40),
        windows=windows,
        warm_up=(2 if on_cpu else 30) if warm_up is None else warm_up,
    )


# -- in every rank -----------------------------------------------------------------------------------------------------
def measured(asked: list[Asked]) -> dict[str, Any]:
    end_when_told()
    discover()
    world = join(asked[0].device, local_rank())
    device = torch.device(asked[0].device)
    sizes = [_sized(one, world) for one in asked]
    told = ceilings.machine(device) | {"gpus": world.size, "sizes": sizes}
    told["nccl"] = ".".join(map(str, torch.cuda.nccl.version())) if _on_gpu(device) else None
    leave()
    return told


def _on_gpu(device: torch.device) -> bool:
    return device.type == "cuda"


def _sized(asked: Asked, world: World) -> dict[str, Any]:
    recipe = parse(Recipe, asked.recipe, "")
    losses, before = _alone(asked, recipe)
    _clear_away()
    found = asdict(asked.size) | {"tokens_per_step": recipe.tokens_per_step}
    found |= Together(asked, recipe, world).numbers()
    _clear_away()
    _, after = _alone(asked, recipe)
    _clear_away()
    ones = _of_ranks(1e3 * (before + after) / 2, world, asked.device)
    one = fmean(ones)
    found |= {"ones_ms": ones, "one_ms": one, "ratio": one / found["many_ms"]}
    pairs = zip(losses, found["losses"], strict=True)
    found["loss_apart"] = max(abs(one - many) / one for one, many in pairs)
    return found


def _of_ranks(value: float, world: World, device: str) -> list[float]:
    """What each rank found, in their order."""
    found = torch.zeros(world.size, dtype=torch.float64, device=device)
    found[world.rank] = value
    world.all_reduce(found).wait()
    values: list[float] = found.tolist()
    return values


def _alone(asked: Asked, recipe: Recipe) -> tuple[list[float], float]:
    """The losses of the first steps, and the seconds of a step, of our GPU by itself."""
    runtime = Runtime(device=asked.device, micro_batch=asked.size.rows)  # type: ignore[arg-type]
    trainer = Trainer(recipe, runtime, asked.folder)
    losses = _first_losses(trainer)
    _steps(trainer, asked.warm_up)
    (spans,) = in_turn([trainer.advance], asked.steps, asked.windows, trainer.device)
    return losses, median(spans)


def _clear_away() -> None:
    """The memory of the last trainer goes before the next one's comes."""
    gc.collect()
    torch.compiler.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _recorded(trainer: Trainer) -> bool:
    """Whether the messages of a step are replayed with it."""
    called = [one for one in trainer.training_step.replayed if one.calls]
    return bool(called) and all(one.recordings for one in called)


def _first_losses(trainer: Trainer) -> list[float]:
    losses = []
    for _ in range(FIRST):
        trainer.advance()
        losses.append(trainer.close_window())
    return losses


def _steps(trainer: Trainer, count: int) -> None:
    for _ in range(count):
        trainer.advance()
    settled(trainer.device)


class Silenced:
    """A World whose messages about tensors can be left out."""

    def __init__(self, world: World):
        self.world = world
        self.rank = world.rank
        self.size = world.size
        self.recordable = world.recordable
        self.silent = False

    def all_reduce(self, tensor: Tensor) -> Handle:
        return self._begun(self.world.all_reduce, tensor)

    def reduce(self, tensor: Tensor, owner: int) -> Handle:
        return self._begun(self.world.reduce, tensor, owner)

    def broadcast(self, tensor: Tensor, owner: int) -> Handle:
        return self._begun(self.world.broadcast, tensor, owner)

    def all_gather(self, whole: Tensor, own: Tensor) -> Handle:
        return self._begun(self.world.all_gather, whole, own)

    def reduce_scatter(self, whole: Tensor, own: Tensor) -> Handle:
        return self._begun(self.world.reduce_scatter, whole, own)

    def told(self, word: T) -> T:
        return self.world.told(word)

    def agreed(self, wish: bool) -> bool:
        return self.world.agreed(wish)

    def _begun(self, message: Callable[..., Handle], *given: Any) -> Handle:
        return Nothing() if self.silent else message(*given)


class Nothing:
    """A Handle."""

    def wait(self) -> None:
        return None


class Together:
    """A trainer of all ranks."""

    def __init__(self, asked: Asked, recipe: Recipe, world: World):
        self.asked = asked
        self.recipe = recipe
        self.world = Silenced(world)
        rows = min(asked.size.batch, asked.size.rows * world.size)
        runtime = Runtime(
            device=asked.device,  # type: ignore[arg-type]
            micro_batch=rows,
            ranks=world.size,
        )
        self.trainer = ShardedTrainer(recipe, runtime, asked.folder, self.world)

    def numbers(self) -> dict[str, Any]:
        trainer = self.trainer
        losses = _first_losses(trainer)
        bits = trainer.digest()
        trainer.restart(self.recipe, self.asked.folder)
        again = _first_losses(trainer)
        repeated = losses == again and bits == trainer.digest()
        recorded = _recorded(trainer)
        peak = trainer.peak_memory()
        spoken, unspoken = self._in_turn()
        step = median(spoken)
        silent = _of_ranks(1e3 * median(unspoken), self.world.world, self.asked.device)
        return {
            "losses": losses,
            "repeats_bits": repeated,
            "recorded": recorded,
            "many_ms": 1e3 * step,
            "silent_ms": silent,
            "share": 1 - max(silent) / (1e3 * step),
            "tokens_per_second": self.recipe.tokens_per_step / step,
            "peak_gib": peak / 2**30,
            "messages": self._messages(),
        }

    def _in_turn(self) -> tuple[list[float], list[float]]:
        """Seconds a step in windows with and without messages: A B B A."""
        spans: dict[bool, list[float]] = {False: [], True: []}
        for number in range(2 * self.asked.windows):
            silent = number % 4 in (1, 2)
            self._hush(silent)
            _steps(self.trainer, self.asked.warm_up)
            (spent,) = in_turn([self.trainer.advance], self.asked.steps, 1, self.trainer.device)
            spans[silent] += spent
        self._hush(False)
        return spans[False], spans[True]

    def _hush(self, silent: bool) -> None:
        """From here on steps are recorded anew, with messages or without."""
        settled(self.trainer.device)
        self.world.silent = silent
        for one in self.trainer.training_step.replayed:
            one.recordings.clear()

    def _messages(self) -> dict[str, float]:
        """Milliseconds of each kind alone, and what an all-reduce of all gradients would take."""
        step, optimizer = self.trainer.training_step, self.trainer.optimizer
        assert isinstance(step, ShardedStep)
        assert isinstance(step.reduction, Reduction)
        assert isinstance(optimizer, ShardedOptimizer)
        grads = [bank.grad for bank in optimizer.banks]
        size = sum(grad.numel() * grad.element_size() for grad in grads)
        kinds: Mapping[str, Callable[[], None]] = {
            "reduce": step.reduction.send_all,
            "hand_on": optimizer.hand_on,
            "all_reduce": partial(_all_reduced, self.world, grads),
        }
        device = self.trainer.device
        found = {f"{name}_ms": 1e3 * _mean(kind, device) for name, kind in kinds.items()}
        ranks = self.world.size
        moved = 2 * (ranks - 1) / ranks * size  # by each rank, in the best of orders
        found["megabytes"] = size / 1e6
        found["bus_gb_per_second"] = moved / found["all_reduce_ms"] / 1e6
        return found


def _all_reduced(world: World, grads: list[Tensor]) -> None:
    for handle in [world.all_reduce(grad) for grad in grads]:
        handle.wait()


def _mean(call: Callable[[], None], device: torch.device) -> float:
    def many() -> None:
        for _ in range(MESSAGES):
            call()

    many()
    settled(device)
    return seconds(many, device) / MESSAGES


# -- what is printed ---------------------------------------------------------------------------------------------------
def show_scale(found: dict[str, Any]) -> None:
    beside = f", NCCL {found['nccl']}" if found["nccl"] else ", gloo"
    typer.echo(f"{found['gpus']} x {found['device']}, torch {found['torch']}{beside}")
    table([_row(one, found["gpus"]) for one in found["sizes"]])
    typer.echo("")
    table([_messages_row(one) for one in found["sizes"]])
    for one in found["sizes"]:
        graphs = "in recorded graphs" if one["recorded"] else "eagerly"
        bits = "repeat their bits" if one["repeats_bits"] else "DO NOT repeat their bits"
        typer.echo(
            f"{one['name']}: messages go {graphs}; over {FIRST} steps losses are within "
            f"{one['loss_apart']:.1e} of one rank's, and all ranks {bits}"
        )


def _row(one: dict[str, Any], gpus: int) -> dict[str, str]:
    tokens = one["tokens_per_step"]
    return {
        "what": f"{one['name']}, {one['batch']} rows a step",
        "tokens/s on 1": f"{1e3 * tokens / one['one_ms']:,.0f}",
        f"on {gpus}": f"{one['tokens_per_second']:,.0f}",
        "ratio": f"{one['ratio']:.3f}",
        "ms/step on 1": _span(one["ones_ms"]),
        f"ms/step on {gpus}": f"{one['many_ms']:.2f}",
        "without messages": _span(one["silent_ms"]),
        "their share": f"{100 * one['share']:.1f} %",
        "peak GiB": f"{one['peak_gib']:.2f}",
    }


def _span(values: list[float]) -> str:
    """Of the fastest GPU and the slowest."""
    return f"{min(values):.2f} .. {max(values):.2f}"


def _messages_row(one: dict[str, Any]) -> dict[str, str]:
    said = one["messages"]
    return {
        "alone": one["name"],
        "MB of gradients": f"{said['megabytes']:.0f}",
        "to their owners ms": f"{said['reduce_ms']:.2f}",
        "weights handed on ms": f"{said['hand_on_ms']:.2f}",
        "an all-reduce ms": f"{said['all_reduce_ms']:.2f}",
        "bus GB/s": f"{said['bus_gb_per_second']:.0f}",
    }
