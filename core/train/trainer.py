"""One run, from recipe to result.  No toggle in sight: what is off was never built."""

import gc
import hashlib
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ablab.core.data.tokens import Tokens
from ablab.core.errors import Diverged, Pruned
from ablab.core.fusion.places import places, plan_with, served
from ablab.core.model.init import initialise
from ablab.core.model.objective import heads_of
from ablab.core.model.transformer import Transformer
from ablab.core.recipe.load import dump
from ablab.core.recipe.recipe import Recipe, plain, run_id, structure
from ablab.core.runtime.compilation import compile_kernels, compiled
from ablab.core.runtime.replay import use_recordable_stream
from ablab.core.runtime.runtime import (
    Runtime,
    code_fingerprint,
    environment,
    repeat_bits,
    settle,
)
from ablab.core.store.files import write_atomically
from ablab.core.store.record import Record
from ablab.core.store.result import DIVERGED, FINISHED, OUT_OF_MEMORY, PRUNED, Result
from ablab.core.train import checkpoint
from ablab.core.train.banks import Optimizer
from ablab.core.train.evaluate import held_out_loss
from ablab.core.train.step import TrainingStep
from ablab.core.train.stopwatch import Stopwatch
from ablab.core.train.tracker import NullTracker, Tracker

os.environ.setdefault(
    "CUBLAS_WORKSPACE_CONFIG", ":4096:8"
)  # cuBLAS repeats its bits only with a fixed workspace, and reads this once

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Trainer:
    """Model, optimizer, data and counters of one run.

    A trainer can `restart` with another recipe of the same structure (`structure` says which): another seed, learning
    rate, schedule, budget or parametrization.  Compiled graphs survive, and nothing else does.
    """

    def __init__(self, recipe: Recipe, runtime: Runtime, data_folder: Path):
        self.runtime = settle(runtime, recipe.data.batch)
        torch.set_num_threads(runtime.threads)
        repeat_bits(self.runtime["deterministic"])
        self.device = torch.device(self.runtime["device"])
        use_recordable_stream(self.device)
        kernels = served(recipe, self.runtime)
        plan = plan_with(kernels, recipe)
        dtype = DTYPES[self.runtime["dtype"]]
        self.model = Transformer(recipe, dtype, runtime.recompute, plan).to(self.device)
        replay = (
            self.runtime["replay"],
            torch.cuda.graph_pool_handle() if self.device.type == "cuda" else None,
        )
        self.optimizer = Optimizer(
            self.model, recipe, bool(self.runtime["compile"]), kernels, *replay
        )
        heads = heads_of(self.model)
        compile_kernels(
            self.model,
            heads,
            self.optimizer,
            kernels,
            recipe.data.context,
            self.runtime["compile"],
        )
        loss, self.nats = compiled(self.model, heads, self.runtime["compile"])
        self.training_step = TrainingStep(
            loss, self.optimizer, recipe, recipe.tokens_per_step, *replay
        )
        self.replayed = (self.training_step.descend, self.optimizer.move)
        self.restart(recipe, data_folder)

    def restart(self, recipe: Recipe, data_folder: Path) -> None:
        """Step 0 of a run: fresh weights, optimizer state, data order and counters."""
        self.recipe, self.tokens = recipe, Tokens(recipe, data_folder)
        self.step, self.watch = 0, Stopwatch()
        initialise(self.model, recipe)
        self.training_step.restart(recipe)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()  # else a run reports the peak of every run before it in this process

    def rehearse(self) -> None:
        """Compile what a step and an evaluation run, then start over; nothing else stays of it."""
        torch.no_grad()(self.nats)(
            self.tokens.rows(0, 0, self.runtime["micro_batch"]).to(self.device)
        )  # first: a recorded step holds memory
        self.advance()
        self.restart(self.recipe, self.tokens.folder)

    # -- one step --------------------------------------------------------------------------------------------------
    def advance(self) -> Tensor:
        """One optimizer step.  Returns the gradient norm before clipping, 0-D; nothing waits for the device."""
        blocks = self._micro_batches(self.step)
        self.step += 1
        return self.training_step.take(self.step, blocks)

    def _micro_batches(self, step: int) -> Iterator[Tensor]:
        rows = self.runtime["micro_batch"]
        for first in range(0, self.recipe.data.batch, rows):
            yield self.tokens.rows(step, first, rows)

    def peak_memory(self) -> int:
        """Bytes on the GPU; 0 without one."""
        recorded = max(one.height for one in self.replayed)
        return (
            max(torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated() + recorded)
            if self.device.type == "cuda"
            else 0
        )

    # -- reading ---------------------------------------------------------------------------------------------------
    def evaluate(self) -> dict[str, float]:
        """Held-out metrics; where a readout such as EMA replaces the weights, also those of the raw weights."""
        scores = {f"val/{name}": value for name, value in self._held_out().items()}
        for part, state in self.training_step.after:
            scores = {
                f"raw/{name}": value
                for name, value in scores.items()
                if name.startswith("val/")
            } | scores
            with self._weights_of(part.readout(state, self.training_step.weights)):
                scores |= {f"val/{name}": value for name, value in self._held_out().items()}
        return scores

    def _held_out(self) -> dict[str, float]:
        try:
            return self._held_out_loss()
        except torch.OutOfMemoryError:
            if not any(one.graph for one in self.replayed):
                raise
        for one in self.replayed:
            one.stop_replaying()  # a graph keeps its memory while others work
        return self._held_out_loss()

    def _held_out_loss(self) -> dict[str, float]:
        return held_out_loss(self.nats, self.tokens, self.runtime["micro_batch"], self.device)

    @contextmanager
    def _weights_of(self, readout: list[Tensor]):
        weights = self.training_step.weights
        kept = [weight.clone() for weight in weights]
        for weight, value in zip(weights, readout, strict=True):
            weight.copy_(value)
        yield
        for weight, value in zip(weights, kept, strict=True):
            weight.copy_(value)

    def close_window(self) -> float:
        """Mean training loss since the last log, nats/token.  Waits for the device."""
        nats, tokens = self.training_step.window.tolist()
        self.training_step.window.zero_()
        return nats / tokens

    # -- saving ----------------------------------------------------------------------------------------------------
    def tensors(self) -> dict[str, Tensor]:
        """Everything that a resumed run needs, by name."""
        weights = {f"model/{name}": value for name, value in self.model.named_parameters()}
        return weights | self.training_step.tensors()

    def save(self, folder: Path) -> None:
        watch = torch.tensor([self.watch.seconds, self.watch.steps], dtype=torch.float64)
        checkpoint.write(folder, self.step, self.tensors() | {"watch": watch})

    @torch.no_grad()
    def restore(self, folder: Path, warn: Callable[[str], None]) -> None:
        """Continue from the newest whole checkpoint, if there is one and it is of this model."""
        if found := checkpoint.newest(folder, warn):
            step, saved = found
            watch, own = Stopwatch(*saved.pop("watch").tolist()), self.tensors()
            if {name: value.shape for name, value in own.items()} != {
                name: value.shape for name, value in saved.items()
            }:
                return warn(
                    f"the checkpoint of step {step} in {folder} was written by other code; starting from step 0"
                )
            self.step, self.watch = step, watch
            for name, value in own.items():
                value.copy_(saved[name])

    def digest(self) -> str:
        """sha256 of the weights' bits, 16 hex digits."""
        total = hashlib.sha256()
        for name, value in self.model.named_parameters():
            total.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
        return total.hexdigest()[:16]


class Warm:
    """Keeps the last trainer, and gives it to the next run of the same structure.  rehearse: compile before the run begins."""

    def __init__(self, rehearse: bool = False) -> None:
        self.key, self.trainer, self.rehearse = "", None, rehearse

    def trainer_for(self, recipe: Recipe, runtime: Runtime, data_folder: Path) -> Trainer:
        if self.key == (key := structure(recipe, runtime)):
            self.trainer.restart(recipe, data_folder)
        else:
            self.key, self.trainer = "", None
            gc.collect()  # its memory goes before the next one's comes
            torch.compiler.reset()  # graphs of another structure would fill dynamo's cache, 8 deep, and then run eagerly
            trainer = Trainer(recipe, runtime, data_folder)
            if self.rehearse:
                trainer.rehearse()
            self.key, self.trainer = key, trainer
        return self.trainer


def run(
    recipe: Recipe,
    runtime: Runtime,
    data_folder: Path,
    record: Record,
    tracker: Tracker = NullTracker(),
    about: Mapping[str, Any] = {},
    warn: Callable[[str], None] = print,
    warm: Warm | None = None,
    turn: AbstractContextManager = nullcontext(),
) -> Result:
    """Train to the end, from the last checkpoint if there is one, and leave a result.

    Divergence and lack of memory are results too.  warm: shared by the runs of one process.  turn: held from the first
    step to the last; whoever shares the device waits for it.  about: what run.json should say besides runtime and versions.
    Raises UserError for data that does not fit the recipe and for a folder that cannot be written.
    """
    status, error, trainer, metrics = FINISHED, "", None, {}
    settled = settle(runtime, recipe.data.batch)
    service = places(recipe, settled)
    kernels = {place: one.why for place, one in service.items()}
    record.begin(
        dump(plain(recipe)),
        {
            **about,
            "runtime": settled,
            "kernels": kernels,
            "environment": environment(),
        },
    )
    for place, one in service.items():
        if one.flaw:
            warn(f"the {place} kernel cannot serve this recipe: {one.why}")
    try:
        trainer = (warm or Warm()).trainer_for(recipe, runtime, data_folder)
        trainer.restore(record.folder / "checkpoints", warn)
        record.rewind(trainer.step)
        with turn:
            metrics = _loop(trainer, record, tracker)
    except Diverged as end:
        status, error = DIVERGED, str(end)
    except Pruned:
        status, error = PRUNED, f"pruned at step {trainer.step}"
        trainer.save(
            record.folder / "checkpoints"
        )  # asked for again, the run goes on from here
    except torch.OutOfMemoryError:
        status, error = OUT_OF_MEMORY, _memory_advice(recipe, runtime)
    result = _result(recipe, trainer, settled, kernels, status, error, metrics)
    if status == FINISHED and runtime.keep_weights:
        _keep_weights(trainer, record.folder)
    record.finish(result)
    if status != PRUNED:
        checkpoint.clear(record.folder / "checkpoints")
    return result


def _loop(trainer: Trainer, record: Record, tracker: Tracker) -> dict[str, float]:
    """Train, log, evaluate and save until the last step; returns the last metrics.  Raises Diverged."""
    recipe, runtime, steps = trainer.recipe, trainer.runtime, trainer.recipe.steps
    evaluations = {
        math.ceil(steps * (i + 1) / runtime["evaluations"])
        for i in range(runtime["evaluations"])
    }
    folder, last_good, scalars = record.folder / "checkpoints", math.log(recipe.data.vocab), {}
    watch, saved = trainer.watch, time.perf_counter()
    while trainer.step < steps:
        watch.step(norm := trainer.advance())
        t = trainer.step
        if t % runtime["log_every"] == 0 or t in evaluations:
            scalars = {
                "tokens": t * recipe.tokens_per_step,
                "train/loss": trainer.close_window(),
                "train/grad_norm": norm.item(),
            }
            scalars["optim/lr"] = recipe.optim.lr * recipe.schedule.multiplier(t, steps)
            watch.stop()
            if math.isfinite(scalars["train/loss"]):
                last_good = scalars["train/loss"]
                scalars |= trainer.evaluate() if t in evaluations else {}
            if not all(
                map(math.isfinite, scalars.values())
            ):  # this very step may have broken the weights: its own loss is older
                raise Diverged(t, last_good)
            pace = {
                "seconds": watch.seconds,
                "tokens_per_second": watch.rate(recipe.tokens_per_step),
            }
            record.log(t, scalars, pace)
            tracker.log(
                t, scalars | {"tokens_per_second": pace["tokens_per_second"]}, watch.seconds
            )
            watch.go_on()
        if (
            t < steps
            and time.perf_counter() - saved >= runtime["save_seconds"]
            and trainer.training_step.window.isfinite().all()
        ):
            watch.stop()
            trainer.save(folder)
            watch.go_on()
            saved = time.perf_counter()
    return {name: value for name, value in scalars.items() if name != "tokens"}


def _result(
    recipe: Recipe,
    trainer: Trainer | None,
    runtime: dict[str, Any],
    kernels: dict[str, str],
    status: str,
    error: str,
    metrics: dict[str, float],
) -> Result:
    step = trainer.step if trainer else 0
    watch = trainer.watch if trainer else Stopwatch()
    return Result(
        run_id(recipe),
        status,
        step,
        step * recipe.tokens_per_step,
        metrics,
        watch.seconds,
        watch.rate(recipe.tokens_per_step),
        trainer.peak_memory() if trainer else 0,
        error,
        code_fingerprint(),
        runtime,
        trainer.digest() if status == FINISHED else "",
        kernels,
    )


def _memory_advice(recipe: Recipe, runtime: Runtime) -> str:
    rows = runtime.micro_batch or recipe.data.batch
    half = max((n for n in range(1, rows // 2 + 1) if recipe.data.batch % n == 0), default=1)
    return f"out of memory: {_memory_in_use()} at data.batch={recipe.data.batch} in micro-batches of {rows}; try runtime.micro_batch={half}"


def _memory_in_use() -> str:
    try:
        total = torch.cuda.get_device_properties(0).total_memory
    except (
        AssertionError,
        RuntimeError,
    ):  # no card: the host's memory, or a plugin that says so
        return "on the host"
    others = max(
        total - torch.cuda.mem_get_info()[0] - torch.cuda.memory_reserved(), 0
    )  # other processes, and some hundred MiB of libraries
    return f"{torch.cuda.max_memory_reserved() / 2**30:.1f} GiB of {total / 2**30:.1f} in use, {others / 2**30:.1f} by others,"


def _keep_weights(trainer: Trainer, folder: Path) -> None:
    from safetensors.torch import save

    weights = {
        name: value.detach().cpu().contiguous()
        for name, value in trainer.model.named_parameters()
    }
    write_atomically(folder / "weights.safetensors", save(weights))
