"""Whether bytecode is kept, in a process of its own: what Python would do by itself is left to it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import os, sys
from ablab.experiments.run.bytecode import keep_bytecode
keep_bytecode()
import torch
print(sys.pycache_prefix, sys.dont_write_bytecode, os.environ.get("PYTHONDONTWRITEBYTECODE"))
"""


@pytest.fixture
def packages(tmp_path):
    """A folder with a package of torch's name."""
    torch = tmp_path / "packages" / "torch"
    torch.mkdir(parents=True)
    (torch / "__init__.py").write_text("answer = 42\n")
    return torch.parent


@pytest.fixture
def told(tmp_path, packages):
    """told(forbidden): the prefix, and what forbids, after an import of torch."""

    def run(forbidden: bool = False) -> list[str]:
        given = {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": f"{packages}:{os.pathsep.join(sys.path)}",
            "XDG_CACHE_HOME": str(tmp_path / "cache"),
        }
        if forbidden:
            given["PYTHONDONTWRITEBYTECODE"] = "1"
        ended = subprocess.run(
            [sys.executable, "-c", SCRIPT],
            env=given,
            capture_output=True,
            text=True,
            check=True,
        )
        return ended.stdout.split()

    return run


def compiled(folder: Path) -> list[str]:
    return [path.name.split(".")[0] for path in folder.rglob("torch/**/*.pyc")]


def test_what_python_keeps_by_itself_is_left_to_it(told, packages, tmp_path):
    assert told() == ["None", "False", "None"]
    assert compiled(packages) == ["__init__"]
    assert told(forbidden=True) == ["None", "True", "1"], "torch is compiled already"
    assert not (tmp_path / "cache").exists()


def test_where_it_is_forbidden_it_is_kept_in_the_users_cache(told, packages, tmp_path):
    folder = tmp_path / "cache" / "ablab" / "bytecode"
    assert told(forbidden=True) == [str(folder), "False", "None"]
    assert compiled(packages) == []
    assert compiled(folder) == ["__init__"]


def test_where_it_cannot_be_written_beside_torch_likewise(told, packages, tmp_path):
    # A file in the place of the folder stops root too.
    (packages / "torch" / "__pycache__").touch()
    folder = tmp_path / "cache" / "ablab" / "bytecode"
    assert told() == [str(folder), "False", "None"]
    assert compiled(folder) == ["__init__"]
