"""A run may be stopped anywhere, by anything: it goes on to the very bits of a run that nobody stopped."""

import json
import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest

from ablab.core.runtime.runtime import Runtime
from ablab.core.store.record import Record
from ablab.core.store.result import FAILED, FINISHED

FORK = multiprocessing.get_context("fork")
CPU = Runtime(device="cpu", log_every=3, evaluations=3, save_seconds=0)


# -- one process, killed at chosen instants ----------------------------------------------------------------------------
def train(recipe, data: Path, folder: Path) -> None:
    from ablab.core.train.run import run

    run(recipe, CPU, data, Record(folder), warn=lambda line: None)


def train_and_die(recipe, data: Path, folder: Path, events: int, told) -> None:
    """Train, and kill this process at the `events`-th instant.

    Instants are: in a step, in half a write, before a rename, in half a line of a log.
    """
    left = events

    def instant(name: str, tear=lambda: None):
        nonlocal left
        left -= 1
        if left == 0:
            tear()
            told.send(name)
            os.kill(os.getpid(), signal.SIGKILL)

    def at(holder, attribute: str, name: str, tear=lambda *words: None):
        real = getattr(holder, attribute)

        def watched(*words, **more):
            instant(name, lambda: tear(*words))
            return real(*words, **more)

        setattr(holder, attribute, watched)

    def halve(file: int):
        if os.readlink(f"/proc/self/fd/{file}").endswith(".jsonl"):
            return  # a log is appended to: what the disk holds of it stays
        size = os.fstat(file).st_size
        os.ftruncate(file, size // 2)

    def half_a_line(record, step, scalars, pace):
        with open(record.metrics_path, "ab") as file:
            file.write(b'{"step":%d,"tok' % step)

    from ablab.core.train import trainer

    at(trainer.Trainer, "advance", "step")
    at(os, "fsync", "write", halve)
    at(os, "replace", "rename")
    at(Record, "log", "line", half_a_line)
    train(recipe, data, folder)
    told.send("end")


def test_a_run_killed_at_any_instant_ends_in_the_same_bytes(tiny, token_folder, tmp_path):
    """Again and again, with momentum, an average of weights and a window of losses to lose."""
    recipe = tiny(["muon", "ema"])
    draw = random.Random(0)
    calm = Record(tmp_path / "calm")
    killed = Record(tmp_path / "killed")
    train(recipe, token_folder, calm.folder)
    deaths = []
    while not deaths or deaths[-1] != "end":
        ours, theirs = FORK.Pipe()
        what = (recipe, token_folder, killed.folder)
        events = draw.randint(1, 16)
        child = FORK.Process(target=train_and_die, args=(*what, events, theirs))
        child.start()
        child.join(timeout=60)
        deaths.append(ours.recv())
    assert {"step", "write", "rename", "line"} <= set(deaths)
    assert len(deaths) > 12
    assert_equal(killed, calm)
    assert names_in(killed.folder) == names_in(calm.folder)  # and no litter


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def assert_equal(one: Record, other: Record) -> None:
    """They hold the same numbers, bit for bit."""
    assert one.metrics_path.read_bytes() == other.metrics_path.read_bytes()
    assert one.result().weights == other.result().weights
    assert one.result().metrics == other.result().metrics


# -- the real thing: a runner, its worker, and signals -----------------------------------------------------------------
@pytest.fixture(scope="module")
def grid(lab):
    """A (seed 0) and B (seed 1000) of 300 steps, saved every 50 ms; and A as it is when nobody stops it."""
    from ablab.core.data.corpus import load_meta
    from ablab.experiments.plan.experiment import load

    lab.sheet(
        "long",
        arms=["muon"],
        design="replicate",
        seeds=[0],
        set={"budget.tokens": 64 * 300},
        runtime={"log_every": 1, "save_seconds": 0.05},
    )

    def digest_of(data: str) -> str:
        return load_meta(lab.store / "data" / data).digest

    experiment = load(str(lab.root / "long.yaml"), {}, digest_of)
    return lab, experiment.runs()


WORDS = ("run", "long.yaml", "--no-mlflow", "--jobs", "1", "--run-inert")


def start_and_wait_for(lab, run, lines: int):
    """Start the grid; returns once `run` has logged so many lines.  And the worker's process id."""
    process = lab.start(*WORDS)
    wait_for(lab, process, run, lines)
    return process, worker_of(process.pid)


def wait_for(lab, process, run, lines: int) -> None:
    path = lab.store / "runs" / run.id / "metrics.jsonl"
    until = time.monotonic() + 60
    while not path.exists() or path.read_bytes().count(b"\n") < lines:
        running = process.poll() is None
        assert running and time.monotonic() < until, process.communicate()
        time.sleep(0.005)


def worker_of(runner: int) -> int:
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            _, _, stat = (folder / "stat").read_text().rpartition(")")
            parent = int(stat.split()[1])
            if parent == runner and b"spawn_main" in (folder / "cmdline").read_bytes():
                return int(folder.name)
        except OSError:  # it ended while we looked
            continue
    raise AssertionError("no worker")


def test_signals_to_the_runner_the_worker_and_both_lose_nothing(grid, alive, wait_until):
    lab, (a, b) = grid
    record = Record(lab.store / "runs" / a.id)

    first, worker = start_and_wait_for(lab, a, 40)
    os.kill(worker, signal.SIGSTOP)  # it holds its run, and no longer gets on
    second = lab.start(*WORDS, "--only", "A")
    said = [second.stderr.readline(), second.stderr.readline()]
    assert f"another process holds run {a.id}; waiting for it" in said[1], said
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    assert record.result() is None
    wait_for(lab, second, a, 80)  # who waited takes over

    worker = worker_of(second.pid)
    os.kill(second.pid, signal.SIGKILL)
    second.wait()
    wait_until(lambda: not alive(worker), "nobody told it, and it did not notice")

    newest = max((record.folder / "checkpoints").glob("step-*.safetensors"))
    whole = newest.read_bytes()
    newest.write_bytes(whole[:-1])
    process, worker = start_and_wait_for(lab, a, 120)
    os.kill(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    assert "interrupted" in err
    assert "Traceback" not in err
    flaw = f"is damaged ({len(whole) - 1:,} bytes are there of {len(whole):,}); set aside"
    assert f"A, seed 0: checkpoint {newest} {flaw}" in err
    assert not alive(worker)
    assert record.result() is None

    process, worker = start_and_wait_for(lab, a, 160)
    os.kill(worker, signal.SIGKILL)
    process.communicate()
    lost = lab.result("long", "A")
    other = lab.result("long", "B")
    assert process.returncode == 1
    assert lost["status"] == FAILED
    assert "exit code -9" in lost["error"]
    assert other["status"] == FINISHED  # another worker took its place

    before = lab.files()
    ended = lab.run(*WORDS, "--json")
    assert ended.code == 0
    assert ended.trained == [a.id]
    assert ended.reused == [b.id]
    for name, stat in lab.files().items():
        if name.startswith("runs/") and before.get(name) != stat:
            assert name.split("/")[1] == a.id

    calm = Record(lab.root / "calm")
    train_calm(a.recipe, lab.store / "data" / "tiny", calm.folder)
    assert record.result().status == FINISHED
    assert_equal(record, calm)
    paces = record.pace_path.read_text().splitlines()
    steps = [json.loads(pace)["step"] for pace in paces]
    assert steps == list(range(1, 301))


def train_calm(recipe, data: Path, folder: Path) -> None:
    from ablab.core.train.run import run

    as_the_grid = Runtime(device="cpu", log_every=1, evaluations=2)
    run(recipe, as_the_grid, data, Record(folder))
