"""How a run is executed: recorded with the run, never part of its identity."""

import glob
import os
from dataclasses import asdict, dataclass
from typing import Any, Literal

from ablab.core.errors import UserError
from ablab.core.language.numbers import Natural, NonNegative, Whole

KernelPlace = Literal[
    "attention",
    "attention_fp8",
    "ffn",
    "ffn_fp8",
    "ffn_epilogue",
    "residual",
    "loss",
    "newton_schulz",
    "optimizer",
]


PEAKS = {  # FLOP/s, dense bf16, by NVIDIA's data sheets of the SXM boards
    "A100": 312e12,
    "H100": 989e12,
    "H200": 989e12,
    "B200": 2250e12,
}


@dataclass(frozen=True)
class Runtime:
    """What a person may ask for; `settle` turns it into what a machine does."""

    # auto: a CUDA GPU where torch sees one, else the CPU; mps, a GPU of Apple's, has to be named
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    # of activations; weights and optimizer state are always fp32
    dtype: Literal["auto", "fp32", "bf16"] = "auto"
    # auto: ours where they measured faster (see `ablab show`); triton: ours in every place, or a refusal;
    # same: as auto, at the places where all cells of an experiment can have them;
    # a list: ours at these places, or a refusal, and at no other
    kernels: Literal["auto", "triton", "torch", "same"] | tuple[KernelPlace, ...] = "auto"
    # true: one graph of the model; blocks: equal blocks share one; null: blocks on CUDA, false elsewhere
    compile: bool | Literal["blocks"] | None = None
    # record a step as CUDA graphs and replay them; null: on CUDA only
    replay: bool | None = None
    # rows a forward pass, of all ranks together; null: the whole batch
    micro_batch: Whole | None = None
    ranks: Whole = (
        1  # GPUs (on a CPU processes) that train one run; they divide each micro-batch
    )
    # what ranks share besides rows: the optimizer's state; or weights and gradients too, for models that no GPU holds
    shard: Literal["state", "weights"] = "state"
    recompute: Natural = 0  # first blocks that keep no activations
    # the same bits every time on the same GPU; null: on CUDA, and a CPU repeats its bits anyway
    deterministic: bool | None = None
    # jobs that share a GPU train one at a time, each at its full pace; false: at once;
    # null: at once where small, eager arms train for less than the rest of a run takes, and no pace is judged
    turns: bool | None = None
    threads: Whole = (
        1  # of the CPU; fixed, because the number changes the order of sums and so the bits
    )
    log_every: Whole = 10  # optimizer steps; the log is the only host sync
    evaluations: Whole = (
        10  # on held-out tokens, evenly spaced; the last one after the last step
    )
    # optimizer steps between looks into the layers, a multiple of log_every; 0: none
    dynamics: Natural = 0
    # between checkpoints: a kill loses at most this much work, and what a write takes; 0: after every step, and each
    # is waited for
    save_seconds: NonNegative = 60.0
    keep_last: Whole = 2  # checkpoints: the newest, and some to fall back to when it is damaged
    keep_every: Natural = 0  # optimizer steps: these are saved, and kept for good; 0: none
    mirror: str = ""  # URL of a second copy of run folders, such as s3://bucket/place; "": none
    keep_weights: bool = False  # leave weights.safetensors behind
    keep_state: bool = False  # leave the whole last state behind, for runs that go on from it


@dataclass(frozen=True, kw_only=True)
class Settled(Runtime):
    """A runtime that leaves nothing to choose.  Settling it again changes nothing."""

    device: Literal["cpu", "cuda", "mps"]
    dtype: Literal["fp32", "bf16"]
    compile: bool | Literal["blocks"]
    replay: bool
    micro_batch: int
    deterministic: bool
    turns: bool


NO_GPU = (
    "runtime.device=cuda, but torch sees no GPU here; "
    "use runtime.device=cpu or install a CUDA build of torch"
)


NO_MPS = (
    "runtime.device=mps, but torch sees no GPU of Apple's here; "
    "use runtime.device=cpu, or macOS on Apple silicon"
)


NO_NCCL = (
    "this build of torch has no NCCL, by which the GPUs of one run add up their gradients; "
    "install a CUDA build of torch, or drop --gpus-per-run"
)


def settle(runtime: Runtime, rows: int) -> Settled:
    """Replace every `auto` by what this machine has.  rows: the recipe's batch.  Raises UserError."""
    import torch

    device = runtime.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    _refuse_missing(device, runtime.ranks)
    _refuse_looks_without_a_log(runtime)
    check_shard(runtime)
    on_gpu = device == "cuda"
    chosen: dict[str, Any] = {"device": device, "micro_batch": rows_at_once(runtime, rows)}
    if runtime.dtype == "auto":
        chosen["dtype"] = "bf16" if on_gpu else "fp32"
    if runtime.compile is None:
        chosen["compile"] = "blocks" if on_gpu and runtime.shard == "state" else False
    if runtime.replay is None:
        chosen["replay"] = on_gpu and runtime.shard == "state"
    if runtime.turns is None:
        chosen["turns"] = True  # of one run alone
    if runtime.deterministic is None:
        chosen["deterministic"] = on_gpu
    return Settled(**asdict(runtime) | chosen)


def _refuse_looks_without_a_log(runtime: Runtime) -> None:
    every, log = runtime.dynamics, runtime.log_every
    if every % log:
        below, above = every // log * log, -(-every // log) * log
        nearest = f"{below}, {above}" if below else f"{above}"
        raise UserError(
            f"runtime.dynamics={every} is no multiple of runtime.log_every={log}, and the log is the only wait "
            f"for the device; nearest: {nearest}"
        )


def check_shard(runtime: Runtime) -> None:
    """Raises UserError for settings that do not go with weights of which each rank has a part."""
    if runtime.shard == "state":
        return
    if runtime.ranks == 1:
        raise UserError(
            "runtime.shard=weights cuts the weights of a run over its GPUs, and runtime.ranks=1 is one; "
            "add --gpus-per-run 2, or drop it"
        )
    asked = {
        "compile": runtime.compile is True,
        "replay": runtime.replay,
        "dynamics": runtime.dynamics,
    }
    for name, value in asked.items():
        if value:
            shown = str(value).lower()
            raise UserError(
                f"runtime.{name}={shown} needs whole weights, and runtime.shard=weights leaves a part of them "
                "on each GPU; drop one of the two"
            )


def _refuse_missing(device: str, ranks: int) -> None:
    """Raises UserError for a device that torch does not see here."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise UserError(NO_GPU)
    if device == "mps" and not torch.backends.mps.is_available():
        raise UserError(NO_MPS)
    if device == "mps" and ranks > 1:
        raise UserError(
            f"runtime.ranks={ranks}, but runtime.device=mps is one GPU, and torch joins no more of them; "
            "use runtime.ranks=1"
        )


def rows_at_once(runtime: Runtime, rows: int) -> int:
    """The micro-batch.  Raises UserError where it does not divide the batch of `rows`."""
    asked = min(runtime.micro_batch or rows, rows)
    if rows % asked:
        divisors = [n for n in range(1, rows + 1) if rows % n == 0]
        nearest = sorted(divisors, key=lambda n: abs(n - asked))[:2]
        raise UserError(
            f"runtime.micro_batch={asked} does not divide data.batch={rows}; "
            f"nearest: {min(nearest)}, {max(nearest)}"
        )
    check_ranks(runtime, asked, rows)
    return asked


def check_ranks(runtime: Runtime, micro_batch: int, rows: int) -> None:
    """Raises UserError where the ranks cannot divide a micro-batch.  rows: the recipe's batch."""
    ranks = runtime.ranks
    if ranks > micro_batch:
        of_batch = (
            f"runtime.micro_batch={micro_batch}" if micro_batch < rows else f"data.batch={rows}"
        )
        raise UserError(
            f"{ranks} GPUs a run (runtime.ranks) are more than the rows of a micro-batch, "
            f"{of_batch}; use at most {micro_batch}, each with a row"
        )
    if micro_batch % ranks:
        fit = [n for n in range(1, micro_batch + 1) if micro_batch % n == 0]
        low = max(n for n in fit if n < ranks)
        high = min(n for n in fit if n > ranks)
        raise UserError(
            f"{ranks} GPUs a run (runtime.ranks) do not divide a micro-batch of {micro_batch} rows "
            f"(data.batch={rows}); nearest: {low}, {high}"
        )


def repeat_bits(asked: bool) -> None:
    """PyTorch's algorithms from here on: those that repeat their bits on one GPU, or any."""
    import torch

    # Asked only on a change, else the call costs 2 s: it imports the compiler.
    if torch.are_deterministic_algorithms_enabled() != asked:
        from torch._inductor import config as compiler

        torch.use_deterministic_algorithms(asked)
        # The compiler would time blocks of a reduction, and whether to pad a product: two processes find differently,
        # and differ in their bits.  By rule the 70M step takes no longer (91.7 ms on an H100, 91.9 by the clock).
        compiler.deterministic = asked
    # Nothing here reads what was not written: tests/kernels look for it.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def visible_gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES may name one by one, counted without importing torch.

    The list ends at the first -1, as CUDA reads it.
    """
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if listed is None:
        return [str(index) for index in range(len(glob.glob("/dev/nvidia[0-9]*")))]
    names = [name.strip() for name in listed.split(",")]
    if "-1" in names:
        names = names[: names.index("-1")]
    return [name for name in names if name]


def peak_flops(runtime: Settled) -> float | None:
    """FLOP/s of this GPU's dense products in bf16; None where that is not known, or the run's precision is another."""
    import torch

    if runtime.device != "cuda" or runtime.dtype != "bf16":
        return None
    name = torch.cuda.get_device_name()
    return next((peak for card, peak in PEAKS.items() if card in name), None)


def environment() -> dict[str, str]:
    """Package and hardware versions, for run.json."""
    import platform

    import numpy
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    if torch.backends.mps.is_available():
        gpu = "Apple MPS"
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": numpy.__version__,
        "machine": platform.machine(),
        "gpu": gpu,
        "cuda": str(torch.version.cuda),
    }
