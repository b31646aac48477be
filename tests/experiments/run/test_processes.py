"""Worker processes: who is given what.  What they keep as an executor stands in test_executors.py."""

import os
import subprocess
import sys
import time

from ablab.experiments.run.executor import Task
from ablab.experiments.run.processes import Waiting


def tasks(*names: str, affinity=lambda name: name[0]) -> list[Task]:
    return [Task(lambda name=name: name, affinity(name)) for name in names]


def test_a_worker_keeps_to_the_kind_it_is_warm_for_and_others_find_another():
    """Two workers, three kinds: b must not wait for the worker of a, and no kind is compiled twice without need."""
    waiting = Waiting(tasks("a0", "a1", "b0", "a2", "b1", "c0"))
    affinity = {"one": "", "two": ""}
    given = []
    for worker in ("one", "two", "one", "two", "one", "two"):
        task = waiting.take(affinity[worker], affinity.values())
        affinity[worker] = task.affinity
        given.append((worker, task.make()))
    assert given == [
        ("one", "a0"),
        ("two", "b0"),
        ("one", "a1"),
        ("two", "b1"),
        ("one", "a2"),
        ("two", "c0"),
    ]
    assert not waiting


def test_where_all_are_alike_the_first_comes_first():
    waiting = Waiting(tasks("0", "1", "2", affinity=lambda name: ""))
    for name in ("0", "1", "2"):
        assert waiting.take("", {""}).make() == name


def test_a_job_that_another_process_holds_is_due_a_second_later_and_lets_others_pass(
    monkeypatch,
):
    clock = "ablab.experiments.run.processes.time.monotonic"
    now = 100.0
    monkeypatch.setattr(clock, lambda: now)
    waiting = Waiting([])
    waiting.postpone("held", "a")
    assert waiting
    assert not waiting.is_due
    waiting.tasks.extend(tasks("b0"))
    now = 101.5
    assert waiting.take("a", {"a"}).make() == "b0"
    assert waiting.take("a", {"a"}).make() == "held"
    assert not waiting
    waiting.postpone("held", "a")
    now = 102.6
    assert waiting.is_due


def test_a_killed_runner_leaves_nothing_in_the_temporary_folder(tmp_path):
    code = (
        "import time; from ablab.experiments.run.processes import LocalProcesses\n"
        "if __name__ == '__main__':\n"
        "    pool = LocalProcesses(1, share=['0'])\n"
        "    pool._start_missing(1); pool.workers[0].pipe.recv(); print(flush=True); time.sleep(99)\n"
    )
    (tmp_path / "runner.py").write_text(code)
    places = tmp_path / "temporary"
    places.mkdir()
    runner = subprocess.Popen(
        [sys.executable, tmp_path / "runner.py"],
        env=os.environ | {"TMPDIR": str(places)},
        stdout=subprocess.PIPE,
    )
    runner.stdout.readline()
    assert [path.name for path in places.glob("ablab-*")]
    runner.kill()
    runner.communicate()
    until = time.monotonic() + 20
    while list(places.glob("ablab-*")) and time.monotonic() < until:
        time.sleep(0.05)
    assert list(places.glob("ablab-*")) == []
