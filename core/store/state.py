"""Where a run leaves its last state for runs that go on from it (core/train/handover.py).  No torch here."""

from pathlib import Path


def state_of(folder: Path) -> Path:
    """folder: of the run."""
    return folder / "final"


def left_state(folder: Path) -> bool:
    """Whether there is one, whole or not."""
    return any(state_of(folder).glob("step-*.safetensors"))
