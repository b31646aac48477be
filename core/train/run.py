"""One run, from recipe to result: train to the end, log, evaluate, save, and leave a record."""

import math
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ablab.core.errors import Diverged, Halted, ParentDiverged, Pruned
from ablab.core.fusion.places import places
from ablab.core.language.written import dump
from ablab.core.model.cost import cost_of, facts_of
from ablab.core.recipe.recipe import Recipe, plain, run_id
from ablab.core.runtime.fingerprint import code_fingerprint
from ablab.core.runtime.runtime import Runtime, Settled, environment, peak_flops, settle
from ablab.core.store.files import unfenced, write_atomically
from ablab.core.store.record import Record, digest_of
from ablab.core.store.result import DIVERGED, FINISHED, OUT_OF_MEMORY, PRUNED, Result
from ablab.core.train import checkpoint, handover
from ablab.core.train.checkpoint import Kept
from ablab.core.train.dynamics import looks_into
from ablab.core.train.trainer import Trainer, Warm

QUIET = 0.9  # of a core: with less, something else ran there

# Whoever watches a run is told (step, scalars, seconds of training); it may raise Pruned.
Log = Callable[[int, Mapping[str, float], float], None]
Warn = Callable[[str], None]
Halts = Callable[[], bool]  # asked after every step whether the run is to be saved and left
# Scores of a run that has trained to its end, by its recipe, the weights that were evaluated, and how it runs.
Judge = Callable[[Recipe, Mapping[str, Tensor], Settled], dict[str, float]]


def watched_by_nobody(step: int, scalars: Mapping[str, float], seconds: float) -> None:
    """The log of a run that only its record keeps."""


def never() -> bool:
    """The run goes on to its end."""
    return False


def run(
    recipe: Recipe,
    runtime: Runtime,
    data_folder: Path,
    record: Record,
    log: Log = watched_by_nobody,
    about: Mapping[str, Any] = {},
    warn: Warn = print,
    warm: Warm | None = None,
    turn: AbstractContextManager = nullcontext(),
    parent: Path | None = None,
    halts: Halts = never,
    judge: Judge | None = None,
    saved: Callable[[], None] = unfenced,
    shared: str = "",
) -> Result:
    """Train to the end, from the last checkpoint if there is one, and leave a result.

    Divergence and lack of memory are results too.
    about: what run.json should say besides runtime and versions.  warm: shared by the runs of one process.
    turn: held from the first step to the last; whoever shares the device waits for it.
    parent: folder of what the recipe's `init` begins with; None: the run folder beside ours that it names.
    judge: asked at the end for more scores, which stand in the result like any other.
    halts: asked after every step whether to save and leave.  saved: called when a checkpoint is on the disk.
    shared: who else trains on the device, in words; then its pace compares with none.
    Raises UserError for data that does not fit the recipe and for a folder that cannot be written; Halted.
    """
    settled = settle(runtime, recipe.batches.largest_micro_batch)
    service = places(recipe, settled)
    kernels: dict[str, str] = {place: one.why for place, one in service.items()}
    how = {"runtime": asdict(settled), "kernels": kernels, "environment": environment()}
    told = {**about, **how, **facts_of(recipe)}
    record.begin(dump(plain(recipe)), told, warn)
    for place, one in service.items():
        if one.flaw:
            warn(f"the {place} kernel cannot serve this recipe: {one.why}")
    checkpoints = record.folder / "checkpoints"
    trainer = None
    metrics: dict[str, float] = {}
    status, error = FINISHED, ""
    try:
        trainer = (warm or Warm()).trainer_for(recipe, settled, data_folder)
        trainer.restore(checkpoints, warn, record.logged())
        if recipe.init and trainer.step == 0:
            source = parent or record.folder.parent / recipe.init.run
            handover.take_over(trainer, source, warn)
        record.rewind(trainer.step)
        if lost := record.lost_pace():
            warn(lost)
        with turn:
            metrics = Loop(trainer, record, log, warn, halts, saved).train()
            if trainer.agreed(judge is not None):
                metrics |= _judged(trainer, judge)
    except (Diverged, ParentDiverged) as end:
        status, error = DIVERGED, str(end)
    except Pruned:
        assert trainer, "only a log raises it"
        status, error = PRUNED, f"pruned at step {trainer.step}"
        # Asked for again, the run goes on from here.
        trainer.save(checkpoints, record.sync(warn), record.fence)
        trainer.saver.wait()
    except torch.OutOfMemoryError:
        status, error = OUT_OF_MEMORY, _memory_advice(recipe, settled)
    finally:
        if trainer:
            trainer.saver.settle()
    result = _result(recipe, settled, kernels, trainer, status, error, metrics)
    if trainer:
        result = replace(result, contended=_contended(trainer, shared))
    record.sync(warn)
    result = replace(result, log=digest_of(record.logged()), dynamics=record.digest_of_looks())
    if trainer and status == FINISHED:
        result = replace(result, held_out=record.keep(trainer.held_out()))
    if trainer and status == FINISHED and settled.keep_weights:
        _keep_weights(trainer, record.folder)
    if trainer and status == FINISHED and settled.keep_state:
        handover.keep(trainer, record.folder)
    record.finish(result)
    if status != PRUNED:
        checkpoint.clear(checkpoints, Kept(settled.keep_last, settled.keep_every))
    return result


class Loop:
    """Train, log, evaluate and save until the last step."""

    def __init__(
        self,
        trainer: Trainer,
        record: Record,
        log: Log,
        warn: Warn,
        halts: Halts = never,
        then: Callable[[], None] = unfenced,
    ):
        self.trainer = trainer
        self.record = record
        self.log = log
        self.warn = warn
        self.halts = halts
        self.then = then
        self.recipe = trainer.recipe
        self.runtime = trainer.runtime
        self.steps = self.recipe.steps
        count = self.runtime.evaluations
        self.evaluations = {math.ceil(self.steps * (i + 1) / count) for i in range(count)}
        self.last_good = math.log(self.recipe.data.vocab)  # of a uniform guess, nats/token
        self.saved = time.perf_counter()
        self.saved_step = trainer.step
        self.looks = looks_into(trainer, warn)
        self.utilization = Utilization(self.recipe, trainer.runtime)

    def train(self) -> dict[str, float]:
        """Returns the last metrics.  Raises Diverged, Halted."""
        trainer = self.trainer
        scalars: dict[str, float] = {}
        while trainer.step < self.steps:
            if trainer.agreed(self.halts()):
                self._halt()
            norm = self.looks.advance()
            t = trainer.step
            trainer.watch.step(norm, self._tokens_of(t))
            if self._ends_a_window(t) or t in self.evaluations:
                scalars = self._report(t, norm)
            if t < self.steps and self._is_due():
                self.save()
        return {name: value for name, value in scalars.items() if name != "tokens"}

    def _ends_a_window(self, t: int) -> bool:
        """Whether train/loss is read after step `t`: windows are even, and the last one takes in a short rest.

        An evaluation between two such steps closes none: its line has no train/loss.
        """
        left = self.steps - t
        every = self.runtime.log_every
        return left == 0 or (t % every == 0 and 2 * left >= every)

    def _report(self, t: int, norm: Tensor) -> dict[str, float]:
        """Read what the device has counted since the last report; the only wait for it."""
        trainer, watch = self.trainer, self.trainer.watch
        loss = trainer.window_loss()
        scalars: dict[str, float] = {"tokens": self.recipe.tokens_after(t)}
        if self._ends_a_window(t):
            scalars["train/loss"] = trainer.close_window()
        scalars["train/grad_norm"] = norm.item()
        scalars["optim/lr"] = self._lr(t)
        watch.stop()
        sound = math.isfinite(loss)
        if sound:
            self.last_good = loss
            if t in self.evaluations:
                scalars |= trainer.evaluate()
        if not (sound and all(math.isfinite(value) for value in scalars.values())):
            # This very step may have broken the weights: its own loss is older.
            raise Diverged(t, self.last_good)
        pace = {"tokens_per_second": watch.rate} | self.utilization.of(watch.rate)
        self.record.log(t, scalars, {"seconds": watch.seconds} | pace)
        looked = self.looks.look()
        self.record.note_look(t, looked)
        self.log(t, scalars | pace | looked, watch.seconds)
        watch.go_on()
        return scalars

    def _lr(self, t: int) -> float:
        return self.recipe.optim.lr * self.recipe.schedule.multiplier(t, self.steps)

    def _tokens_of(self, t: int) -> int:
        return self.recipe.tokens_after(t) - self.recipe.tokens_after(t - 1)

    def _halt(self) -> None:
        """Save, say so in the folder, and leave.  What was broken by its last steps goes back to an older state."""
        step = self.trainer.step
        if step != self.saved_step:
            self.save()
        self.trainer.saver.wait()
        self.record.interrupted(
            step, self.recipe.tokens_after(step), self.trainer.watch.seconds
        )
        raise Halted(step)

    def _is_due(self) -> bool:
        """Whether a step is to be saved; none is while another is still being written, but for those to keep."""
        every = self.runtime.keep_every
        if every and self.trainer.step % every == 0:
            return True
        seconds = self.runtime.save_seconds
        late = time.perf_counter() - self.saved >= seconds
        return self.trainer.agreed(late and (seconds == 0 or self.trainer.saver.is_idle()))

    def save(self) -> None:
        """A checkpoint of this step, unless the last ones have broken it."""
        if not self.trainer.training_step.window.isfinite().all():
            return
        self.trainer.watch.stop()
        logged = self.record.sync(self.warn)
        folder = self.record.folder / "checkpoints"
        self.trainer.save(folder, logged, self.record.fence, self.then)
        if self.runtime.save_seconds == 0:
            self.trainer.saver.wait()
        self.trainer.watch.go_on()
        self.saved = time.perf_counter()
        self.saved_step = self.trainer.step


class Utilization:
    """MFU: the model's FLOPs, forward and backward, over what its GPUs could do in bf16; none where that is unknown."""

    def __init__(self, recipe: Recipe, runtime: Settled):
        peak = peak_flops(runtime)
        per_token = cost_of(recipe).flops_per_token
        self.share = per_token / (peak * runtime.ranks) if peak else None

    def of(self, rate: float) -> dict[str, float]:
        """rate: tokens a second."""
        return {} if self.share is None else {"mfu": self.share * rate}


def _judged(trainer: Trainer, judge: Judge | None) -> dict[str, float]:
    """judge: None on ranks that only give what they have of the weights."""
    with trainer.as_evaluated():
        weights = trainer.weights()
        return judge(trainer.recipe, weights, trainer.runtime) if judge else {}


def _result(
    recipe: Recipe,
    settled: Settled,
    kernels: dict[str, str],
    trainer: Trainer | None,
    status: str,
    error: str,
    metrics: dict[str, float],
) -> Result:
    ended = Result(
        run=run_id(recipe),
        status=status,
        step=0,
        tokens=0,
        metrics=metrics,
        error=error,
        code=code_fingerprint(),
        runtime=asdict(settled),
        kernels=kernels,
    )
    if not trainer:
        return ended
    return replace(
        ended,
        step=trainer.step,
        tokens=recipe.tokens_after(trainer.step),
        seconds=trainer.watch.seconds,
        tokens_per_second=trainer.watch.rate,
        peak_bytes=trainer.peak_memory(),
        segments=trainer.segments if len(trainer.segments) > 1 else [],
        weights=trainer.digest() if status == FINISHED else "",
        evaluated=_evaluated(trainer) if status == FINISHED else "",
    )


def _contended(trainer: Trainer, shared: str) -> str:
    """Why the pace is that of a shared machine; empty where nothing was seen to share it.

    One thread on a core of its own has all of it but 1 %.
    """
    seen = [shared] if shared else []
    runtime, share = trainer.runtime, trainer.watch.share
    if runtime.device == "cpu" and runtime.threads == 1 and share < QUIET:
        seen.append("less than a core")
    return " and ".join(seen)


def _memory_advice(recipe: Recipe, settled: Settled) -> str:
    batch, rows = recipe.data.batch, settled.micro_batch
    whole = recipe.batches.largest_micro_batch
    ranks = settled.ranks
    smaller = [n for n in range(ranks, rows // 2 + 1, ranks) if whole % n == 0]
    return (
        f"out of memory: {_memory_in_use()} at data.batch={batch} in micro-batches of {rows}; "
        f"try runtime.micro_batch={max(smaller, default=ranks)}"
    )


def _memory_in_use() -> str:
    try:
        total = torch.cuda.get_device_properties(0).total_memory
    except (
        AssertionError,
        RuntimeError,
    ):  # no card: the host's memory, or a plugin that says so
        return "on the host"
    ours = torch.cuda.memory_reserved()
    # other processes, and some hundred MiB of libraries
    others = max(total - torch.cuda.mem_get_info()[0] - ours, 0)
    most = torch.cuda.max_memory_reserved()
    return (
        f"{most / 2**30:.1f} GiB of {total / 2**30:.1f} in use, {others / 2**30:.1f} by others,"
    )


def _evaluated(trainer: Trainer) -> str:
    """Digest of the weights that were evaluated; empty where these are the trained ones."""
    if not trainer.averages:
        return ""
    with trainer.as_evaluated():
        return trainer.digest()


def _keep_weights(trainer: Trainer, folder: Path) -> None:
    """weights.safetensors holds what was evaluated; where that is an average, the trained weights stand beside it."""
    if trainer.averages:
        _write_weights(trainer, folder / "weights.raw.safetensors")
    with trainer.as_evaluated():
        _write_weights(trainer, folder / "weights.safetensors")


def _write_weights(trainer: Trainer, path: Path) -> None:
    from safetensors.torch import save

    weights = {
        name: value.detach().cpu().contiguous() for name, value in trainer.weights().items()
    }
    write_atomically(path, save(weights, metadata={"digest": trainer.digest()}))
