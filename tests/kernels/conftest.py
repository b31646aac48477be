"""What tests of kernels share."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="module", autouse=True)
def unset_memory_is_nan():
    """Whatever a kernel forgets to write shows."""
    torch.utils.deterministic.fill_uninitialized_memory = True  # a trainer turned it off
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.ones(3).new_empty(5).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def for_an_h100(tmp_path):
    """A script of this folder -> the words of each line that it prints.

    In a process of its own, because Triton's interpreter is chosen at import; compile caches are empty, and no GPU
    is needed.
    """
    pytest.importorskip("triton.backends.nvidia")
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)

    def lines_of(script):
        told = subprocess.run(
            [sys.executable, Path(__file__).with_name(script)],
            env=environment,
            capture_output=True,
            text=True,
        )
        assert told.returncode == 0, told.stderr
        return [line.split() for line in told.stdout.splitlines()]

    return lines_of
