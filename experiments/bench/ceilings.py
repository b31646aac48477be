"""What this machine can do at most: its matrix products and copies, its clocks under load, its name."""

import platform
import subprocess
from collections.abc import Callable
from importlib import import_module
from statistics import median
from typing import Any

import torch

from ablab.experiments.bench.clocks import in_turn

PEAK = 989e12  # FLOP/s, dense bf16, H100 SXM: NVIDIA's data sheet
WINDOWS = 6  # of a sustained rate; the first warms up
ASKED_OF_NVIDIA_SMI = {
    "clocks.sm": "sm_mhz",
    "clocks.max.sm": "max_sm_mhz",
    "clocks.mem": "memory_mhz",
    "power.draw": "watts",
    "temperature.gpu": "celsius",
}


def matmul_rate(device: torch.device) -> float:
    """FLOP/s of a large product of random matrices: 8192^3 in bf16 on a GPU, 512^3 in fp32 on a CPU."""
    on_gpu = device.type == "cuda"
    side = 8192 if on_gpu else 512
    dtype = torch.bfloat16 if on_gpu else torch.float32
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    return 2 * side**3 / _sustained(lambda: a @ b, device, repeats=30 if on_gpu else 5)


def copy_rate(device: torch.device) -> float:
    """Bytes a second of a copy within the device, read and written: of 2 GiB on a GPU, 64 MiB on a CPU."""
    on_gpu = device.type == "cuda"
    size = 2 << 30 if on_gpu else 64 << 20
    source = torch.randint(255, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    spent = _sustained(lambda: target.copy_(source), device, repeats=30 if on_gpu else 5)
    return 2 * size / spent


def _sustained(call: Callable[[], Any], device: torch.device, repeats: int) -> float:
    """Seconds of a call among many back to back: the median of all windows but the first."""
    (windows,) = in_turn([call], repeats, WINDOWS, device)
    return median(windows[1:])


def clocks_under(load: Callable[[], Any]) -> dict[str, float]:
    """What nvidia-smi says while `load` runs: MHz, W, degrees C; empty where it says nothing."""
    query = f"--query-gpu={','.join(ASKED_OF_NVIDIA_SMI)}"
    line = ["nvidia-smi", query, "--format=csv,noheader,nounits"]
    try:
        asked = subprocess.Popen(  # noqa: S603  a list, no shell: its words are ours
            line,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
    except OSError:
        return {}
    while asked.poll() is None:
        load()
    told, _ = asked.communicate()
    try:
        numbers = [float(word) for word in told.splitlines()[0].split(",")]
        return dict(zip(ASKED_OF_NVIDIA_SMI.values(), numbers, strict=True))
    except (IndexError, ValueError):
        return {}


def machine(device: torch.device) -> dict[str, Any]:
    """The device by name, and the versions that a time depends on."""
    name = f"cpu, {platform.machine()}, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    return {
        "device": name,
        "torch": str(torch.__version__),
        "triton": _triton(),
        "python": platform.python_version(),
    }


def _triton() -> str | None:
    try:
        return import_module("triton").__version__
    except ImportError:
        return None
