"""How a run is executed: recorded with the run, never part of its identity."""

import glob
import hashlib
import os
from dataclasses import asdict, dataclass
from functools import cache
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal

from ablab.core.errors import UserError
from ablab.core.language.numbers import Natural, NonNegative, Whole


@dataclass(frozen=True)
class Runtime:
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "fp32", "bf16"] = (
        "auto"  # of activations; weights and optimizer state are always fp32
    )
    kernels: Literal["auto", "triton", "torch"] = (
        "auto"  # auto: ours where they measured faster (see `ablab show`); triton: ours in every place, or a refusal
    )
    compile: bool | Literal["blocks"] | None = (
        None  # true: one graph of the model; blocks: equal blocks share one; null: blocks on CUDA, false elsewhere
    )
    replay: bool | None = (
        None  # record a step as CUDA graphs and replay them; null: on CUDA only
    )
    micro_batch: Whole | None = None  # rows a forward pass; null: the whole batch
    recompute: Natural = 0  # first blocks that keep no activations
    deterministic: bool | None = (
        None  # the same bits every time on the same GPU; null: on CUDA, and a CPU repeats its bits anyway
    )
    turns: bool = True  # jobs that share a GPU train one at a time; false: at once, for models too small to fill it
    threads: Whole = (
        1  # of the CPU; fixed, because the number changes the order of sums and so the bits
    )
    log_every: Whole = 10  # optimizer steps; the log is the only host sync
    evaluations: Whole = (
        10  # on held-out tokens, evenly spaced; the last one after the last step
    )
    save_seconds: NonNegative = 60.0  # a kill loses at most this much work
    keep_weights: bool = False  # leave weights.safetensors behind


NO_GPU = "runtime.device=cuda, but torch sees no GPU here; use runtime.device=cpu or install a CUDA build of torch"


def settle(runtime: Runtime, rows: int) -> dict[str, Any]:
    """Replace every `auto` by what this machine has.  rows: the recipe's batch.  Raises UserError."""
    import torch

    settled = asdict(runtime)
    if runtime.device == "auto":
        settled["device"] = "cuda" if torch.cuda.is_available() else "cpu"
    if settled["device"] == "cuda" and not torch.cuda.is_available():
        raise UserError(NO_GPU)
    if runtime.dtype == "auto":
        settled["dtype"] = "bf16" if settled["device"] == "cuda" else "fp32"
    if runtime.compile is None:
        settled["compile"] = "blocks" if settled["device"] == "cuda" else False
    for name in ("replay", "deterministic"):
        if settled[name] is None:
            settled[name] = settled["device"] == "cuda"
    settled["micro_batch"] = rows_at_once(runtime, rows)
    return settled


def rows_at_once(runtime: Runtime, rows: int) -> int:
    """The micro-batch.  Raises UserError where it does not divide the batch of `rows`."""
    asked = min(runtime.micro_batch or rows, rows)
    if rows % asked:
        near = sorted(
            (n for n in range(1, rows + 1) if rows % n == 0), key=lambda n: abs(n - asked)
        )[:2]
        raise UserError(
            f"runtime.micro_batch={asked} does not divide data.batch={rows}; nearest: {min(near)}, {max(near)}"
        )
    return asked


def repeat_bits(asked: bool) -> None:
    """PyTorch's algorithms from here on: those that repeat their bits on one GPU, or any."""
    import torch

    if (
        torch.are_deterministic_algorithms_enabled() != asked
    ):  # else the call costs 2 s: it imports the compiler
        torch.use_deterministic_algorithms(asked)
    torch.utils.deterministic.fill_uninitialized_memory = (
        False  # tests/kernels look for what is read without being written
    )


def visible_gpus() -> list[str]:
    """What CUDA_VISIBLE_DEVICES may name one by one, counted without importing torch; it ends at the first -1, as CUDA reads it."""
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if listed is not None:
        return [
            one
            for one in takewhile(lambda one: one != "-1", map(str.strip, listed.split(",")))
            if one
        ]
    return [str(index) for index in range(len(glob.glob("/dev/nvidia[0-9]*")))]


@cache
def code_fingerprint() -> str:
    """sha256 over every source file that can change a number, 12 hex digits."""
    root = Path(__file__).parents[2]
    digest = hashlib.sha256()
    for folder in ("core", "kernels", "ablations"):
        for path in sorted((root / folder).rglob("*.py")):
            digest.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def environment() -> dict[str, str]:
    """Package and hardware versions, for run.json."""
    import platform

    import numpy
    import torch

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    return {
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "numpy": numpy.__version__,
        "machine": platform.machine(),
        "gpu": gpu,
        "cuda": str(torch.version.cuda),
    }
