"""Files that are written in one step, and what a killed writer leaves of them."""

import os
import subprocess
import time

import pytest

from ablab.core.store.files import write_atomically

MINUTE, DAY = 60, 86400


@pytest.fixture(scope="module")
def dead() -> int:
    """The id of a process that has ended."""
    ended = subprocess.Popen(["true"])
    ended.wait()
    return ended.pid


def left(folder, name: str, age: float) -> None:
    (folder / name).write_text("half")
    os.utime(folder / name, (time.time() - age,) * 2)


def test_a_write_sweeps_what_killed_writers_left_in_its_folder_and_nothing_else(tmp_path, dead):
    alive, other = os.getpid(), 1  # 1: alive, and perhaps another user's
    left(tmp_path, f".plan.json.{dead}.partial", 2 * MINUTE)
    left(tmp_path, f".report.md.{2**70}-0a1b2c3d.partial", 2 * MINUTE)
    left(tmp_path, f".of.{alive}.partial", 2 * DAY)  # the id was given again
    stay = {
        f".plan.{alive}.partial": 2 * MINUTE,
        f".page.{other}.partial": 2 * MINUTE,
        f".young.{dead}.partial": 1,  # perhaps of another machine
        f"no.{dead}.partial": 2 * DAY,
        ".web.partial": 2 * DAY,
        f".web.{dead}.partial.json": 2 * DAY,
    }
    for name, age in stay.items():
        left(tmp_path, name, age)
    folder = tmp_path / f".out.{dead}.partial"
    folder.mkdir()
    os.utime(folder, (0, 0))
    write_atomically(tmp_path / "plan.json", b"{}")
    assert {path.name for path in tmp_path.iterdir()} == {*stay, folder.name, "plan.json"}
