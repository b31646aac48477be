"""Model, optimizer, data and counters of one run.  No toggle in sight: what is off was never built."""

import gc
import hashlib
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ablab.core.data.tokens import Tokens
from ablab.core.errors import UserError
from ablab.core.fusion.places import plan_with, served
from ablab.core.model.init import initialise
from ablab.core.model.objective import Head, heads_of
from ablab.core.model.transformer import Transformer
from ablab.core.recipe.recipe import Recipe, run_id, structure
from ablab.core.runtime.compilation import OfRows, compile_kernels, compiled
from ablab.core.runtime.fingerprint import code_fingerprint
from ablab.core.runtime.replay import CudaGraphs, Recorder, use_recordable_stream
from ablab.core.runtime.runtime import Runtime, environment, repeat_bits, settle
from ablab.core.store.files import unfenced
from ablab.core.store.held_out import HeldOut
from ablab.core.store.record import extent, holds
from ablab.core.train import checkpoint
from ablab.core.train.banks import Optimizer, put
from ablab.core.train.checkpoint import Kept, Origin, Tensors
from ablab.core.train.evaluate import Measured, held_out_loss
from ablab.core.train.saving import Saver, Write
from ablab.core.train.step import Loss, TrainingStep
from ablab.core.train.stopwatch import Stopwatch

# cuBLAS repeats its bits only with a fixed workspace, and reads this once.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

# Settings that a run may go on without: what is looked at and kept; `kernels` stands in an origin by what came of it.
BITS_STAY = (
    "kernels",
    "ranks",  # a run may go on with others: `Trainer.segments`
    "turns",
    "log_every",
    "evaluations",
    "dynamics",
    "save_seconds",
    "keep_last",
    "keep_every",
    "mirror",
    "keep_weights",
    "keep_state",
)
# Settings that go with what ranks share, which a run may change when it goes on.
OF_SHARES = ("shard", "micro_batch", "compile", "replay")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Trainer:
    """Model, optimizer, data and counters of one run.

    A trainer can `restart` with another recipe of the same structure (`structure` says which): another seed, learning
    rate, schedule, budget or parametrization.  Compiled graphs survive, and nothing else does.
    """

    def __init__(self, recipe: Recipe, runtime: Runtime, data_folder: Path):
        self.runtime = settle(runtime, recipe.batches.largest_micro_batch)
        if self.runtime.ranks != self.ranks:
            raise UserError(
                f"runtime.ranks={self.runtime.ranks}, and {self.ranks} take part; "
                "start them with --gpus-per-run, or with torchrun"
            )
        self.device = torch.device(self.runtime.device)
        torch.set_num_threads(self.runtime.threads)
        repeat_bits(self.runtime.deterministic)
        use_recordable_stream(self.device)
        kernels = served(recipe, self.runtime)
        self.kernels: list[str] = sorted(kernels)
        recorder = CudaGraphs() if self._records() else None

        dtype, plan = DTYPES[self.runtime.dtype], plan_with(kernels, recipe)
        model = Transformer(recipe, dtype, self.runtime.recompute, plan)
        self.model = self._placed(model)
        how = self.runtime.compile
        self.optimizer = self._optimizer(recipe, bool(how), kernels, recorder)
        heads = heads_of(self.model)
        compile_kernels(
            self.model, heads, self.optimizer.rehearse, kernels, recipe.data.context, how
        )
        loss, self.nats = self._losses(heads)
        self.training_step = self._training_step(loss, recipe, recorder)
        self.saver = Saver(self.device)
        self.restart(recipe, data_folder)

    # -- what ranks do otherwise (sharded.py) ----------------------------------------------------------------------
    @property
    def ranks(self) -> int:
        """That take part."""
        return 1

    def _placed(self, model: Transformer) -> Transformer:
        """The model, as it was built, on the device."""
        return model.to(self.device)

    def _losses(self, heads: tuple[Head, Head]) -> tuple[Loss, OfRows]:
        """What is descended of rows, and what of them is measured."""
        return compiled(self.model, heads, self.runtime.compile)

    def _initialise(self, recipe: Recipe) -> None:
        initialise(self.model, recipe)

    def weights(self) -> dict[str, Tensor]:
        """The parameters of the model by name, whole; where ranks have parts of them, on the host of rank 0 alone."""
        return dict(self.model.named_parameters())

    def _optimizer(
        self,
        recipe: Recipe,
        compiled: bool,
        kernels: Collection[str],
        recorder: Recorder | None,
    ) -> Optimizer:
        return Optimizer(self.model, recipe, compiled, kernels, recorder)

    def _training_step(
        self, loss: Loss, recipe: Recipe, recorder: Recorder | None
    ) -> TrainingStep:
        return TrainingStep(loss, self.optimizer, recipe, recipe.tokens_per_step, recorder)

    def _rows(self, step: int, first: int) -> Tensor:
        """Of the micro-batch that begins with window `first` of a step: all of them."""
        return self.tokens.rows(step, first, self.runtime.micro_batch)

    def _measured(self) -> Measured:
        return held_out_loss(self.nats, self.tokens, self.runtime.micro_batch, self.device)

    def write(self, folder: Path, tensors: Mapping[str, Tensor], origin: Origin) -> None:
        """A checkpoint of this step, at once."""
        checkpoint.write(folder, self.step, dict(tensors), origin)

    def write_later(self, tensors: Tensors, write: Write) -> None:
        """A checkpoint of this step, off the hot path."""
        self.saver.save(tensors, write)

    def agreed(self, wish: bool) -> bool:
        """Whether what this process wishes, by its clock or a word from outside, is done after this step."""
        return wish

    def _records(self) -> bool:
        return self.runtime.replay and self.device.type == "cuda"

    def restart(self, recipe: Recipe, data_folder: Path) -> None:
        """Step 0 of a run: fresh weights, optimizer state, data order and counters."""
        self.recipe = recipe
        self.tokens = Tokens(recipe, data_folder)
        self.step = 0
        # By how many ranks which steps were taken: [first step, ranks] of each part.
        self.segments = [[0, self.runtime.ranks]]
        # Of the held-out tokens, float16 [rows,T], as the last evaluation found them.
        self.losses: Tensor | None = None
        self.watch = Stopwatch()
        self._initialise(recipe)
        self.training_step.restart(recipe)
        if self.device.type == "cuda":
            # Else a run reports the peak of every run before it in this process.
            torch.cuda.reset_peak_memory_stats()

    def rehearse(self) -> None:
        """Compile what a step and an evaluation run, then start over; nothing else stays of it."""
        rows = self._rows(0, 0)
        # The evaluation first: a recorded step holds memory.
        with torch.no_grad():
            self.nats(rows.to(self.device))
        self.advance()
        self.restart(self.recipe, self.tokens.folder)

    # -- one step --------------------------------------------------------------------------------------------------
    def advance(self) -> Tensor:
        """One optimizer step.  Returns the gradient norm before clipping, 0-D; nothing waits for the device."""
        windows = self.recipe.batches.at(self.step).windows
        blocks = self._micro_batches(self.step, windows)
        self.step += 1
        tokens = windows * self.recipe.data.context
        return self.training_step.take(
            self.step, blocks, tokens, self.saver.before_the_next_move
        )

    def _micro_batches(self, step: int, windows: int) -> Iterator[Tensor]:
        for first in range(0, windows, self.runtime.micro_batch):
            yield self._rows(step, first)

    def peak_memory(self) -> int:
        """Bytes on the GPU; 0 without one."""
        if self.device.type != "cuda":
            return 0
        recorded = max((one.height for one in self.training_step.replayed), default=0)
        replaying = torch.cuda.memory_allocated() + recorded
        return max(torch.cuda.max_memory_allocated(), replaying)

    # -- reading ---------------------------------------------------------------------------------------------------
    def evaluate(self) -> dict[str, float]:
        """Held-out metrics; where a readout such as EMA replaces the weights, also those of the raw weights."""
        scores = {f"val/{name}": value for name, value in self._held_out().items()}
        for part, state in self.training_step.after:
            raw = {f"raw/{name}": scores[name] for name in scores if name.startswith("val/")}
            with self._weights_of(part.readout(state, self.training_step.weights)):
                averaged = self._held_out()
            scores = raw | scores | {f"val/{name}": value for name, value in averaged.items()}
        return scores

    def _held_out(self) -> dict[str, float]:
        try:
            return self._held_out_loss()
        except torch.OutOfMemoryError:
            recorded = self.training_step.replayed
            if not any(one.recordings for one in recorded):
                raise
        for one in recorded:
            one.stop_replaying()  # a graph keeps its memory while others work
        return self._held_out_loss()

    def _held_out_loss(self) -> dict[str, float]:
        measured = self._measured()
        self.losses = measured.nats
        return measured.scores

    def held_out(self) -> HeldOut:
        """What the last evaluation found, token by token: of the weights whose metrics it calls val."""
        assert self.losses is not None, "nothing was evaluated yet"
        sizes, documents = self.tokens.held_out_targets()
        return HeldOut(self.losses.cpu().numpy(), sizes, documents)

    @property
    def averages(self) -> bool:
        """Whether other weights are evaluated than those that are trained."""
        return bool(self.training_step.after)

    @contextmanager
    def as_evaluated(self) -> Iterator[None]:
        """Inside, the model has the weights whose metrics `evaluate` calls val: the last readout's, or its own."""
        if not self.averages:
            yield
            return
        part, state = self.training_step.after[-1]
        with self._weights_of(part.readout(state, self.training_step.weights)):
            yield

    @contextmanager
    def _weights_of(self, readout: Sequence[Tensor]) -> Iterator[None]:
        weights = self.training_step.weights
        kept = [weight.clone() for weight in weights]
        for weight, value in zip(weights, readout, strict=True):
            weight.copy_(value)
        yield
        for weight, value in zip(weights, kept, strict=True):
            weight.copy_(value)

    def window_loss(self) -> float:
        """Mean training loss since the window was opened, nats/token.  Waits for the device."""
        nats, tokens = self.training_step.window.tolist()
        return nats / tokens

    def close_window(self) -> float:
        """As `window_loss`; the next step opens another window."""
        loss = self.window_loss()
        self.training_step.window.zero_()
        return loss

    # -- saving ----------------------------------------------------------------------------------------------------
    def tensors(self) -> dict[str, Tensor]:
        """Everything that a resumed run needs, by name."""
        weights = {f"model/{name}": value for name, value in self.weights().items()}
        return weights | self.training_step.tensors()

    def like(self) -> dict[str, Tensor]:
        """Tensors of the shapes and types of `tensors`, without values."""
        weights = {
            f"model/{name}": value.detach().to("meta")
            for name, value in self.model.named_parameters()
        }
        return weights | self.training_step.like()

    def put(self, saved: Mapping[str, Tensor]) -> None:
        """Take over those of `tensors` that are given, by name."""
        weights = {f"model/{name}": value for name, value in self.model.named_parameters()}
        put(weights, saved)
        self.training_step.put(saved)

    def save(
        self,
        folder: Path,
        logged: bytes = b"",
        fence: Callable[[], None] = unfenced,
        then: Callable[[], None] = unfenced,
    ) -> None:
        """Begin to; `saver.wait` says when it is there.  logged: what metrics.jsonl holds now.  fence: a record's.

        then: called when it is there.
        """
        origin = self.origin(extent(logged))
        step, kept = self.step, self.kept

        def write(copies: Tensors) -> None:
            checkpoint.write(folder, step, copies, origin, kept, fence)
            then()

        self.write_later(self.tensors() | self._beside(), write)

    @property
    def kept(self) -> Kept:
        return Kept(self.runtime.keep_last, self.runtime.keep_every)

    def _beside(self) -> dict[str, Tensor]:
        """What a checkpoint says of the run besides its state."""
        watch = torch.tensor([self.watch.seconds, self.watch.tokens], dtype=torch.float64)
        return {"watch": watch, "segments": torch.tensor(self.segments)}

    def restore(self, folder: Path, warn: Callable[[str], None], logged: bytes = b"") -> None:
        """Continue from the newest checkpoint of this very run and of its log, if there is one."""
        if found := self._newest(folder, warn, logged):
            step, saved = found
            self._go_on(step, saved)
            self.put(saved)

    def _newest(
        self, folder: Path, warn: Callable[[str], None], logged: bytes
    ) -> tuple[int, checkpoint.Tensors] | None:
        return checkpoint.newest(folder, warn, partial(self._refusal, logged))

    def _go_on(self, step: int, beside: Mapping[str, Tensor]) -> None:
        """beside: what `_beside` said when the checkpoint was written."""
        self.step = step
        self.watch = Stopwatch(*beside["watch"].tolist())
        self.segments = continued(beside["segments"].tolist(), step, self.runtime.ranks)

    def begin_with(self, weights: Mapping[str, Tensor]) -> None:
        """Step 0 with these weights, by name, in the place of those of the seed.

        Raises UserError where one is missing or of another shape.
        """
        taken: Tensors = {}
        for name, value in self.model.named_parameters():
            given = weights.get(name)
            if given is None or given.shape != value.shape:
                found = "are missing" if given is None else f"are {list(given.shape)}"
                raise UserError(
                    f"the weights to begin with cannot be used: {name} must be "
                    f"{list(value.shape)}, and they {found}; keep the model as it was"
                )
            taken[f"model/{name}"] = given
        self.put(taken)
        self.training_step.restart(self.recipe)

    def origin(self, log: str = "") -> Origin:
        """Who writes a checkpoint now.  log: `extent` of metrics.jsonl."""
        runtime = asdict(self.runtime)
        return Origin(
            run=run_id(self.recipe),
            code=code_fingerprint(),
            runtime={name: value for name, value in runtime.items() if name not in BITS_STAY},
            kernels=self.kernels,
            environment=environment(),
            log=log,
        )

    def _refusal(self, logged: bytes, origin: Origin, saved: dict[str, Tensor]) -> str:
        """Why a checkpoint is not this run's; empty where it is."""
        now = self.origin(origin.log)
        if "segments" in saved and saved["segments"][-1][1] != self.runtime.ranks:
            # Other ranks add up in another order; how many rows each takes at once is theirs to say.
            rows = {"micro_batch": origin.runtime.get("micro_batch")}
            now = replace(now, runtime=now.runtime | rows)
        if origin.runtime.get("shard", "state") != self.runtime.shard:
            # So do ranks that share otherwise, and these choose what computes.
            theirs = {name: origin.runtime.get(name) for name in OF_SHARES}
            now = replace(now, runtime=now.runtime | theirs, kernels=origin.kernels)
        if why := origin.differs(now):
            return why
        if not holds(logged, origin.log):
            return "is later than metrics.jsonl, of which lines are lost or changed"
        own = _shapes(self.like() | {"watch": torch.empty(2)})
        there = {name: shape for name, shape in _shapes(saved).items() if name != "segments"}
        return "holds other tensors" if own != there else ""

    def digest(self) -> str:
        """sha256 of the weights' bits, 16 hex digits."""
        total = hashlib.sha256()
        for name, value in self.model.named_parameters():
            total.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
        return total.hexdigest()[:16]


def continued(segments: list[list[int]], step: int, ranks: int) -> list[list[int]]:
    """[first step, ranks] of each part of a run that goes on behind `step`."""
    if segments[-1][1] == ranks:
        return segments
    return [*segments, [step, ranks]]


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in tensors.items()}


class Warm:
    """Keeps the last trainer, and gives it to the next run of the same structure.

    rehearse: compile before the run begins.  make: what builds one.
    """

    def __init__(
        self,
        rehearse: bool = False,
        make: Callable[[Recipe, Runtime, Path], Trainer] = Trainer,
    ) -> None:
        self.rehearse = rehearse
        self.make = make
        self.key = ""
        self.trainer: Trainer | None = None

    def trainer_for(self, recipe: Recipe, runtime: Runtime, data_folder: Path) -> Trainer:
        key = structure(recipe, runtime)
        kept = self.trainer
        if kept and key == self.key and kept.optimizer.fits(recipe):
            kept.restart(recipe, data_folder)
            return kept
        del kept
        self._forget()
        trainer = self.make(recipe, runtime, data_folder)
        if self.rehearse:
            trainer.rehearse()
        self.key = key
        self.trainer = trainer
        return trainer

    def _forget(self) -> None:
        self.key = ""
        self.trainer = None
        gc.collect()  # its memory goes before the next one's comes
        # Graphs of another structure would fill dynamo's cache, 8 deep, and then run eagerly.
        torch.compiler.reset()
