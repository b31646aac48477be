"""Checkpoints: one self-verifying safetensors file each, written in one step, no pickle.

checkpoints/step-00000120-4711-1a2b3c4d.safetensors: optimizer step, bytes, CRC-32.  The name appears last, when all is
on the disk: it is the manifest.  Inside, beside the tensors: whose state it is, `Origin`.  What is not as its name says
is set aside and never taken: damaged, cut, half visible on a shared file system, renamed or another's.
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
from safetensors.torch import load

from ablab.core.store.files import FLAWS, Growing, set_aside, unfenced

Tensors = dict[str, torch.Tensor]

# Files of older stores do not say their bytes.
NAME = re.compile(
    r"step-(?P<step>\d+)(?:-(?P<bytes>\d+))?-(?P<checksum>[0-9a-f]{8})\.safetensors"
)
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@dataclass(frozen=True)
class Kept:
    """Which checkpoints stay when another is written."""

    last: int = 2  # the newest, and one to fall back to when it is damaged
    every: int = 0  # those of steps that this divides, for good; 0: none

    def goes(self, path: Path, listed: list[Path]) -> bool:
        return path not in listed[-self.last :] and not self.is_for_good(path)

    def is_for_good(self, path: Path) -> bool:
        return bool(self.every) and _step_of(path) % self.every == 0


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


def write(
    folder: Path,
    step: int,
    tensors: Tensors,
    origin: Origin = Origin(),
    kept: Kept = Kept(),
    fence: Callable[[], None] = unfenced,
) -> Path:
    """Write one file, and remove those that need not be kept.

    fence: asked when all is on the disk and the name is to appear; it raises where another process holds the run.
    """
    on_host = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    stamp = msgspec.json.encode(_Stamp(step, origin)).decode()
    # Of a process that was killed in here: each as large as a checkpoint.
    for litter in folder.glob(".*.partial"):
        litter.unlink(missing_ok=True)
    size = 0
    checksum = 0
    with Growing(folder / f"step-{step:08d}.safetensors") as file:
        for part in _encoded(on_host, {"ablab": stamp}):
            file.write(part)
            size += len(part)
            checksum = zlib.crc32(part, checksum)
        path = file.appear(f"step-{step:08d}-{size}-{checksum:08x}.safetensors", fence)
    whole = listed(folder)
    for old in whole:
        if kept.goes(old, whole):
            old.unlink(missing_ok=True)
    return path


def _encoded(tensors: Tensors, about: dict[str, str]) -> Iterator[bytes | memoryview]:
    """A safetensors file, piece by piece: the length of the header, the header, each tensor.

    safetensors.torch.save makes one `bytes` of it all, and holds Python's lock while it does: training would wait.
    """
    header: dict[str, Any] = {"__metadata__": about}
    end = 0
    for name, tensor in tensors.items():
        begin = end
        end += tensor.nbytes
        header[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    told = msgspec.json.encode(header)
    told += b" " * (-len(told) % 8)
    yield len(told).to_bytes(8, "little") + told
    for tensor in tensors.values():
        if tensor.numel():
            yield tensor.reshape(-1).view(torch.uint8).numpy().data


def listed(folder: Path) -> list[Path]:
    """Checkpoint files, oldest step first (by step, not by time)."""
    files = [path for path in folder.glob("step-*") if NAME.fullmatch(path.name)]
    return sorted((path for path in files if path.is_file()), key=_step_of)


def _named(path: Path) -> re.Match[str]:
    said = NAME.fullmatch(path.name)
    assert said, f"{path} is no checkpoint"
    return said


def _step_of(path: Path) -> int:
    return int(_named(path)["step"])


def clear(folder: Path, kept: Kept = Kept()) -> None:
    """The run is over: its checkpoints, damaged and half-written ones too, go, but for those that are kept for good."""
    for_good = [path for path in listed(folder) if kept.is_for_good(path)]
    if not for_good:
        return shutil.rmtree(folder, ignore_errors=True)
    for path in folder.iterdir():
        if path not in for_good and path.is_file():
            path.unlink(missing_ok=True)


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
        size = path.stat().st_size
        named = int(_named(path)["bytes"] or size)
        if size != named:
            return f"is damaged ({size:,} bytes are there of {named:,})"
        content = path.read_bytes()
        if f"{zlib.crc32(content):08x}" != _named(path)["checksum"]:
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
