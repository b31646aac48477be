"""Checkpoints: one self-verifying safetensors file each, written in one step, no pickle.

checkpoints/step-00000120-1a2b3c4d.safetensors: the number is the optimizer step, the tail the file's CRC-32.  Inside,
beside the tensors: whose state it is, `Origin`.  What is damaged, renamed or another's is set aside and never taken.
"""

import re
import shutil
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from ablab.core.store.files import FLAWS, set_aside, write_atomically

Tensors = dict[str, torch.Tensor]

NAME = re.compile(r"step-(\d+)-([0-9a-f]{8})\.safetensors")
KEEP = 2  # the newest, and one to fall back to when it is damaged


@dataclass(frozen=True)
class Origin:
    """Who wrote a checkpoint, and how.  A run goes on from a state of its own alone, computed as it computes now."""

    run: str = ""
    code: str = ""  # fingerprint
    runtime: dict[str, Any] = field(default_factory=dict)  # settings that can change a bit
    kernels: list[str] = field(default_factory=list)  # the places that they serve
    environment: dict[str, str] = field(default_factory=dict)  # versions, hardware
    log: str = ""  # what metrics.jsonl held: `extent`

    def differs(self, now: "Origin") -> str:
        """Where a run that goes on as `now` would be of two kinds, in words; empty where it would not."""
        if self.run != now.run:
            return f"is of run {self.run or 'unknown'}"
        if self.code != now.code:
            return f"was written by other code ({self.code}, now {now.code})"
        here = now.environment | now.runtime
        for name, value in (self.environment | self.runtime).items():
            if here.get(name) != value:
                return f"was trained with {name}={value}, now {here.get(name)}"
        if self.kernels != now.kernels:
            return f"was served by kernels at {self.kernels}, now at {now.kernels}"
        return ""


@dataclass(frozen=True)
class _Stamp:
    """What a file says of itself."""

    step: int
    origin: Origin


Refusal = Callable[[Origin, Tensors], str]  # why a whole checkpoint is not taken; empty: it is


def taken(origin: Origin, tensors: Tensors) -> str:
    """Every whole checkpoint is."""
    return ""


def write(folder: Path, step: int, tensors: Tensors, origin: Origin = Origin()) -> Path:
    """Write one file, and keep as many as KEEP says."""
    on_host = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    stamp = msgspec.json.encode(_Stamp(step, origin)).decode()
    content = save(on_host, metadata={"ablab": stamp})
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
    files = [path for path in folder.glob("step-*") if NAME.fullmatch(path.name)]
    return sorted((path for path in files if path.is_file()), key=_step_of)


def _step_of(path: Path) -> int:
    return int(path.name.split("-")[1])


def _checksum_of(path: Path) -> str:
    return path.stem.split("-")[2]


def clear(folder: Path) -> None:
    """The run is over: its checkpoints, damaged and half-written ones too, go."""
    shutil.rmtree(folder, ignore_errors=True)


def newest(
    folder: Path, warn: Callable[[str], None], refusal: Refusal = taken
) -> tuple[int, Tensors] | None:
    """Step and tensors of the newest checkpoint that is whole and not refused; each other is named through `warn`."""
    for path in _foreign(folder):
        warn(f"{path} is no checkpoint; set aside as {set_aside(path).name}")
    for path in reversed(listed(folder)):
        found = _read(path, refusal)
        if not isinstance(found, str):
            return found
        warn(
            f"checkpoint {path} {found}; "
            "set aside, falling back to the one before it or to step 0"
        )
        set_aside(path)
    return None


def _foreign(folder: Path) -> Iterator[Path]:
    """What has the name of a checkpoint, nearly, and is none."""
    known = set(listed(folder))
    for path in sorted(folder.glob("step-*")):
        if path not in known and ".damaged" not in path.name:
            yield path


def _read(path: Path, refusal: Refusal) -> tuple[int, Tensors] | str:
    """Step and tensors, or why they are not taken."""
    try:
        content = path.read_bytes()
        if f"{zlib.crc32(content):08x}" != _checksum_of(path):
            return "is damaged (its checksum differs)"
        stamp, tensors = _stamp_in(content), load(content)
    except (OSError, SafetensorError, *FLAWS) as error:
        return f"is damaged ({error})"
    if stamp is None:
        return "does not say whose it is"
    if stamp.step != _step_of(path):
        return f"is renamed (it holds step {stamp.step})"
    why = refusal(stamp.origin, tensors)
    return why or (stamp.step, tensors)


def _stamp_in(content: bytes) -> _Stamp | None:
    """A safetensors file begins with the length of its header, 8 bytes little-endian, and the header, JSON."""
    length = int.from_bytes(content[:8], "little")
    header = msgspec.json.decode(content[8 : 8 + length], type=dict[str, dict[str, Any]])
    told = header.get("__metadata__", {}).get("ablab")
    return msgspec.json.decode(told, type=_Stamp) if told else None
