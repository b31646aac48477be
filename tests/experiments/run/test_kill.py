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
from ablab.core.store.record import FAILED, FINISHED, Record

CPU = Runtime(device="cpu", log_every=3, evaluations=3, save_seconds=0)


# -- one process, killed at chosen instants ----------------------------------------------------------------------------
def train(recipe, data: Path, folder: Path) -> None:
    from ablab.core.train.trainer import run

    run(recipe, CPU, data, Record(folder), warn=lambda line: None)


def train_and_die(recipe, data: Path, folder: Path, events: int, told) -> None:
    """Train, and kill this process at the `events`-th instant: in a step, in half a write, before a rename, in half a line."""
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

    def half_a_line(record, step, scalars, pace):
        with open(record.metrics_path, "ab") as file:
            file.write(b'{"step":%d,"tok' % step)

    from ablab.core.train import trainer

    at(trainer.Trainer, "advance", "step")
    at(os, "fsync", "write", lambda file: os.ftruncate(file, os.fstat(file).st_size // 2))
    at(os, "replace", "rename")
    at(Record, "log", "line", half_a_line)
    train(recipe, data, folder)
    told.send("end")


def test_a_run_killed_at_any_instant_ends_in_the_same_bytes(tiny, token_folder, tmp_path):
    """Again and again, with momentum, an average of weights and a window of losses to lose."""
    recipe, fork, draw = (
        tiny(["muon", "ema"]),
        multiprocessing.get_context("fork"),
        random.Random(0),
    )
    train(recipe, token_folder, tmp_path / "calm")
    deaths = []
    while not deaths or deaths[-1] != "end":
        ours, theirs = fork.Pipe()
        child = fork.Process(
            target=train_and_die,
            args=(recipe, token_folder, tmp_path / "killed", draw.randint(1, 16), theirs),
        )
        child.start()
        child.join(timeout=60)
        deaths.append(ours.recv())
    assert {"step", "write", "rename", "line"} <= set(deaths) and len(deaths) > 12
    calm, killed = Record(tmp_path / "calm"), Record(tmp_path / "killed")
    assert killed.metrics_path.read_bytes() == calm.metrics_path.read_bytes()
    assert (
        killed.result().weights == calm.result().weights
        and killed.result().metrics == calm.result().metrics
    )
    assert {path.name for path in killed.folder.iterdir()} == {
        path.name for path in calm.folder.iterdir()
    }  # and no litter


# -- the real thing: a runner, its worker, and signals -----------------------------------------------------------------
@pytest.fixture(scope="module")
def grid(lab):
    """A (seed 0) and B (seed 1000) of 300 steps, saved every 50 ms; and A as it is when nobody stops it."""
    lab.sheet(
        "long",
        **{
            "with": ["muon"],
            "design": "replicate",
            "seeds": [0],
            "set": {"budget.tokens": 64 * 300},
            "runtime": {"log_every": 1, "save_seconds": 0.05},
        },
    )
    from ablab.core.data.corpus import load_meta
    from ablab.experiments.plan.experiment import load

    runs = load(
        str(lab.root / "long.yaml"),
        {},
        lambda name: load_meta(lab.store / "data" / name).digest,
    ).runs()
    return lab, runs


WORDS = ("run", "long.yaml", "--no-mlflow", "--jobs", "1", "--run-inert")


def start_and_wait_for(lab, run, lines: int):
    """Start the grid; returns once `run` has logged so many lines.  And the worker's process id."""
    process = lab.start(*WORDS)
    wait_for(lab, process, run, lines)
    return process, worker_of(process.pid)


def wait_for(lab, process, run, lines: int) -> None:
    path, until = lab.store / "runs" / run.id / "metrics.jsonl", time.monotonic() + 60
    while not path.exists() or path.read_bytes().count(b"\n") < lines:
        assert process.poll() is None and time.monotonic() < until, process.communicate()[1]
        time.sleep(0.005)


def worker_of(runner: int) -> int:
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == runner and b"spawn_main" in (folder / "cmdline").read_bytes():
                return int(folder.name)
        except OSError:  # it ended while we looked
            continue
    raise AssertionError("no worker")


def alive(pid: int) -> bool:
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def test_signals_to_the_runner_the_worker_and_both_lose_nothing(grid):
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
    began = time.monotonic()
    while alive(worker):  # nobody tells it, it must notice
        assert time.monotonic() < began + 5
        time.sleep(0.02)

    newest = max((record.folder / "checkpoints").glob("step-*.safetensors"))
    newest.write_bytes(newest.read_bytes()[:-1])
    process, worker = start_and_wait_for(lab, a, 120)
    os.kill(process.pid, signal.SIGINT)
    began = time.monotonic()
    out, err = process.communicate()
    assert (
        process.returncode == 130
        and time.monotonic() - began < 5
        and "interrupted" in err
        and "Traceback" not in err
    )
    assert f"A, seed 0: checkpoint {newest} is damaged (its checksum differs); set aside" in err
    assert not alive(worker) and record.result() is None

    process, worker = start_and_wait_for(lab, a, 160)
    os.kill(worker, signal.SIGKILL)
    out, err = process.communicate()
    results = lab.results("long")
    assert (
        process.returncode == 1
        and results["A", 0]["status"] == FAILED
        and "exit code -9" in results["A", 0]["error"]
    )
    assert results["B", 0]["status"] == FINISHED  # another worker took its place

    before = lab.files()
    ended = lab.run(*WORDS, "--json")
    assert (
        ended.code == 0
        and ended.json["outcome"]["trained"] == [a.id]
        and ended.json["outcome"]["reused"] == [b.id]
    )
    changed = {
        name.split("/")[1]
        for name, stat in lab.files().items()
        if name.startswith("runs/") and before.get(name) != stat
    }
    assert changed == {a.id}

    train_calm(a.recipe, lab.store / "data" / "tiny", lab.root / "calm")
    calm = Record(lab.root / "calm")
    assert record.metrics_path.read_bytes() == calm.metrics_path.read_bytes()
    assert (
        record.result().weights == calm.result().weights and record.result().status == FINISHED
    )
    steps = [json.loads(line)["step"] for line in record.pace_path.read_text().splitlines()]
    assert steps == list(range(1, 301))


def train_calm(recipe, data: Path, folder: Path) -> None:
    from ablab.core.train.trainer import run

    run(recipe, Runtime(device="cpu", log_every=1, evaluations=2), data, Record(folder))
