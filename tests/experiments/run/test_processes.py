"""Worker processes: who is given what.  What they keep as an executor stands in test_executors.py."""

import fcntl
import os
import subprocess
import sys

import pytest

from ablab.experiments.run.executor import Task
from ablab.experiments.run.processes import CONTEXT
from ablab.experiments.run.turns import Turn
from ablab.experiments.run.workers import Waiting


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
    clock = "ablab.experiments.run.workers.time.monotonic"
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


RUNNER = """
import time
from ablab.experiments.run.processes import LocalProcesses

if __name__ == "__main__":
    pool = LocalProcesses(1, share=["0"])
    pool._start_missing(1)
    pool.workers[0].pipe.recv()
    print(pool.workers[0].process.pid, flush=True)
    time.sleep(99)
"""


def test_a_killed_runner_leaves_no_worker_and_nothing_in_the_temporary_folder(
    tmp_path, alive, wait_until
):
    """What jobs that share a GPU lock has no name, so there is nothing to leave at any moment."""
    (tmp_path / "runner.py").write_text(RUNNER)
    places = tmp_path / "temporary"
    places.mkdir()
    runner = subprocess.Popen(
        [sys.executable, tmp_path / "runner.py"],
        env=os.environ | {"TMPDIR": str(places)},
        stdout=subprocess.PIPE,
    )
    worker = int(runner.stdout.readline())
    while_it_ran = list(places.iterdir())
    assert alive(worker)
    runner.kill()
    runner.communicate()
    wait_until(lambda: not alive(worker), "the worker of a killed runner lives")
    assert [*while_it_ran, *places.iterdir()] == []


def hold(turn: Turn, pipe) -> None:
    with turn:
        pipe.send("has it")
        pipe.recv()


def holder_of(turn: Turn):
    """A process that takes a turn and keeps it until it is told to end, and the pipe to it."""
    ours, theirs = CONTEXT.Pipe()
    process = CONTEXT.Process(target=hold, args=(turn, theirs), daemon=True)
    process.start()
    theirs.close()
    return process, ours


def test_a_turn_is_of_one_process_at_a_time_and_a_killed_one_gives_it_up():
    turn = Turn()
    first, of_first = holder_of(turn)
    assert of_first.recv() == "has it"
    second, of_second = holder_of(turn)
    with pytest.raises(BlockingIOError):
        fcntl.lockf(turn.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert not of_second.poll(0.2)
    first.kill()
    assert of_second.recv() == "has it"
    of_second.send("end")
    for process in (first, second):
        process.join()
    fcntl.lockf(turn.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    turn.close()
