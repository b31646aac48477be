"""Checkpoints: one self-verifying safetensors file each, written in one step, no pickle.

checkpoints/step-00000120-1a2b3c4d.safetensors: the number is the optimizer step, the tail the file's CRC-32.
"""

import shutil
import zlib
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from ablab.core.store.files import set_aside, write_atomically

KEEP = 2  # the newest, and one to fall back to when it is damaged


def write(folder: Path, step: int, tensors: dict[str, torch.Tensor]) -> Path:
    """Write one file, and keep as many as KEEP says."""
    on_host = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    content = save(on_host)
    path = folder / f"step-{step:08d}-{zlib.crc32(content):08x}.safetensors"
    # Of a process that was killed in here: each as large as a checkpoint.
    for litter in folder.glob(".*.partial"):
        litter.unlink(missing_ok=True)
    write_atomically(path, content)
    for old in listed(folder)[:-KEEP]:
        old.unlink(missing_ok=True)
    return path


def listed(folder: Path) -> list[Path]:
    """Checkpoint files, oldest step first (by step, not by time)."""
    return sorted(folder.glob("step-*-*.safetensors"), key=_step_of)


def _step_of(path: Path) -> int:
    return int(path.name.split("-")[1])


def _checksum_of(path: Path) -> str:
    return path.stem.split("-")[2]


def clear(folder: Path) -> None:
    """The run is over: its checkpoints, damaged and half-written ones too, go."""
    shutil.rmtree(folder, ignore_errors=True)


def newest(
    folder: Path, warn: Callable[[str], None]
) -> tuple[int, dict[str, torch.Tensor]] | None:
    """Step and tensors of the newest checkpoint that is whole; each damaged one is named through `warn`."""
    for path in reversed(listed(folder)):
        try:
            content = path.read_bytes()
            if f"{zlib.crc32(content):08x}" == _checksum_of(path):
                return _step_of(path), load(content)
            flaw = "its checksum differs"
        except (OSError, SafetensorError) as error:
            flaw = str(error)
        warn(
            f"checkpoint {path} is damaged ({flaw}); set aside, falling back to the one before it"
        )
        set_aside(path)
    return None
