"""What looking at a large experiment costs: `ablab bench report`.

A store of synthetic runs, the same for every seed: power laws with noise, logged as a worker logs.  On it `ablab
report` and `ablab watch` run as they are typed, in processes of their own; Chromium, where there is one, says when it
has painted.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import numpy as np

from ablab.core.store.planned import GridPlan, Planned
from ablab.core.store.record import Record, digest_of
from ablab.core.store.result import FINISHED, Result
from ablab.core.store.store import Store
from ablab.experiments.bench.targets import Cost
from ablab.experiments.track.live_page import HOST
from ablab.experiments.track.ports import free_port

NAME = "large"
SEEDS = 5  # of a cell
EVALUATE_EVERY = 10  # lines
TOKENS_A_LINE = 5120
TOKEN_FLOPS = 6_000_000
ABLAB = (sys.executable, "-m", "ablab.experiments.cli")
PATIENCE = 120.0  # seconds


def bench_report(runs: int = 1_000, points: int = 500) -> list[Cost]:
    """Seconds and MiB of a report; seconds until the page of a watched grid is there, and painted."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_store(Store(root), runs, points)
        seconds, busy, mebibytes = measured("report", NAME, "--store", str(root))
        size = (root / "reports" / NAME / "report.html").stat().st_size / 2**20
        what = f"report of {runs:,} runs x {points} points"
        costs = [
            Cost(what, seconds, "s", 15.0),
            Cost(f"{what}, processor", busy, "s", 15.0),
            Cost(f"{what}, memory", mebibytes, "MiB", 1024.0),
            Cost(f"{what}, its page", size, "MiB", 8.0),
        ]
        return costs + _of_watching(root, f"watch of {runs:,} runs")


def write_store(store: Store, runs: int, points: int, seed: int = 0) -> None:
    """An experiment of `runs` finished runs, SEEDS a cell, `points` lines each."""
    draw = np.random.default_rng(seed)
    for run in planned(store, runs):
        write_run(store.run(run), float(draw.normal(3, 0.01)), points, draw)


def planned(store: Store, runs: int) -> list[str]:
    """Write the plan of an experiment of so many runs; their ids."""
    rows = []
    for number in range(runs):
        cell, pair = divmod(number, SEEDS)
        name = f"- idea_{cell}" if cell else "full"
        run = f"{number:016x}"
        reference = "full" if cell else None
        rows.append(Planned(name, pair, seed=pair, run=run, reference=reference))
    question = f"Which of {runs // SEEDS - 1} ideas pay?"
    store.write_plan(GridPlan(NAME, question, "val/loss", "lower", "leave_one_out", rows))
    return [row.run for row in rows]


def write_run(record: Record, final: float, points: int, draw: np.random.Generator) -> Result:
    """As a worker leaves it; its lines are written at once, which spares a minute."""
    run = record.folder.name
    record.folder.mkdir(parents=True, exist_ok=True)
    part = np.arange(1, points + 1) / points
    loss = final + 0.9 * (part**-0.3 - 1) + draw.normal(0, 0.01, points) * (1 - part)
    metrics, pace = [], []
    for line in range(1, points + 1):
        step = 10 * line
        scalars = {
            "step": step,
            "tokens": TOKENS_A_LINE * line,
            "train/loss": float(loss[line - 1]) + 0.02,
            "train/grad_norm": 0.5 + 1 / line,
            "optim/lr": 0.007 * (1 - line / points),
        }
        if line % EVALUATE_EVERY == 0:
            scalars |= {"val/loss": float(loss[line - 1])}
        metrics.append(msgspec.json.encode(scalars))
        clock = {"step": step, "seconds": 0.5 * line, "tokens_per_second": 10_240.0}
        pace.append(msgspec.json.encode(clock))
    logged = b"\n".join([*metrics, b""])
    record.metrics_path.write_bytes(logged)
    record.pace_path.write_bytes(b"\n".join([*pace, b""]))
    tokens = TOKENS_A_LINE * points
    size = {"flops_per_token": TOKEN_FLOPS, "steps": 10 * points, "tokens": tokens}
    record.about_path.write_bytes(msgspec.json.encode({"run": run, "size": size}))
    ended = Result(
        run,
        FINISHED,
        step=10 * points,
        tokens=tokens,
        metrics={"val/loss": final, "train/loss": final + 0.02},
        seconds=0.5 * points,
        tokens_per_second=10_240.0,
        code="c0ffee",
        log=digest_of(logged),
    )
    record.finish(ended)
    return ended


def measured(*words: str) -> tuple[float, float, float]:
    """Seconds of a command by the clock and by the processor, and the MiB that it held at most."""
    began = time.perf_counter()
    process = subprocess.Popen([*ABLAB, *words], stdout=subprocess.DEVNULL)  # noqa: S603 (ours)
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0, words
    seconds = time.perf_counter() - began
    return seconds, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024


# -- watching ----------------------------------------------------------------------------------------------------------


def _of_watching(root: Path, what: str) -> list[Cost]:
    port = free_port(HOST)
    address = f"http://{HOST}:{port}"
    began = time.perf_counter()
    with _watching(root, port):
        _fetched(f"{address}/")
        costs = [
            Cost(f"{what}, from the command to the page", time.perf_counter() - began, "s", 5.0)
        ]
        began = time.perf_counter()
        _fetched(f"{address}/state?known=first")
        whole = time.perf_counter() - began
        costs.append(Cost(f"{what}, its curves too", whole, "s", 15.0))
        if (painted := _first_paint(address)) is not None:
            costs.append(Cost(f"{what}, first paint in Chromium", painted, "s", 2.0))
    return costs


@contextmanager
def _watching(root: Path, port: int) -> Iterator[None]:
    words = ("watch", NAME, "--store", str(root), "--port", str(port))
    server = subprocess.Popen([*ABLAB, *words], stdout=subprocess.DEVNULL)  # noqa: S603 (ours)
    try:
        yield
    finally:
        server.terminate()
        server.wait()


def _fetched(address: str) -> bytes:
    """What is answered there, as soon as somebody answers."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            with urllib.request.urlopen(address, timeout=PATIENCE) as answer:  # noqa: S310 (our own, http)
                return answer.read()
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)


def _first_paint(address: str) -> float | None:
    """Seconds from asking for the page to its first contentful paint; None without a browser to ask."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        return None
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if not chromium:
        return None
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page()
        page.goto(address)
        page.wait_for_function(f"{PAINTS}.length > 0")
        painted = page.evaluate(f"{PAINTS}[0].startTime")
        browser.close()
    return painted / 1000


PAINTS = "performance.getEntriesByName('first-contentful-paint')"
