"""What ablab itself costs, on this machine: `ablab bench overhead`.

Times of commands are the best of several starts: a busy machine only adds.  The step is compared with a plain
PyTorch loop of the same model in one process, A-B-B-A, by medians over windows.
"""

import multiprocessing
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing.connection import Connection
from statistics import median

import torch

from ablab.core.runtime.runtime import Runtime
from ablab.core.store.result import FINISHED, Result
from ablab.core.store.store import Store
from ablab.experiments.bench.clocks import host_seconds, in_turn
from ablab.experiments.bench.targets import Cost
from ablab.experiments.plan.experiment import Experiment, load
from ablab.experiments.run.messages import Logged
from ablab.experiments.run.progress import Quiet

SEEDS = 834  # with the 12 cells of quickstart: 10,008 runs
STEP = 0.020  # seconds: the step that tracking is measured against
LOG_EVERY = 10
WINDOW = 50  # steps
ROUNDS = 5  # of A-B-B-A
TOKENS = "bench"  # name of the token folder
SCALARS = (
    "tokens",
    "train/loss",
    "train/grad_norm",
    "optim/lr",
    "val/loss",
    "val/bits_per_byte",
)


def overhead() -> list[Cost]:
    """Everything that is paid beside the training itself."""
    with tempfile.TemporaryDirectory() as folder:
        store = Store(folder)
        experiment = _quickstart(store)
        dry = ("run", "quickstart", "--seeds", f"0-{SEEDS - 1}", "--dry-run", "--store", folder)
        tracking = _tracking(store, "tracked", _drain) / STEP
        hung = _tracking(store, "unseen", _drain_to_a_hung_server) / STEP
        runs = f"{12 * SEEDS:,}"
        return [
            Cost("ablab --help", _command("--help"), "s", 0.4),
            Cost("ablab list", _command("list"), "s", 0.4),
            Cost(f"dry run of {runs} runs", _command(*dry, times=3), "s", 3.0),
            Cost(
                f"resume check of {runs} finished runs",
                _resume_check(store, experiment),
                "s",
                3.0,
            ),
            Cost(f"tracking, of a {1000 * STEP:.0f} ms step", 100 * tracking, "%", 1.0),
            Cost("the same, with an MLflow server that hangs", 100 * hung, "%", 1.0),
            Cost(
                "step on the CPU, over a plain PyTorch loop",
                _step_ratio(store, experiment),
                "x",
                1.05,
            ),
        ]


# -- commands and grids ----------------------------------------------------------------------------------
def _command(*words: str, times: int = 5) -> float:
    """Seconds of `ablab WORDS`, the best of `times`."""
    line = [sys.executable, "-m", "ablab.experiments.cli.main", *words]

    def start() -> None:
        subprocess.run(line, check=True, capture_output=True)  # noqa: S603  a list, no shell: ours

    return min(host_seconds(start) for _ in range(times))


def _quickstart(store: Store) -> Experiment:
    """quickstart over the shipped validation text: 88,527 tokens, made in a second."""
    from ablab.ablations.registry import discover
    from ablab.core.data.corpus import CONFIGS, tokenize

    discover()
    text = CONFIGS / "embedded"
    target = store.root / "data" / TOKENS
    source = [text / "val.jsonl.xz"]
    meta = tokenize(source, [], text / "tokenizer.json", target, val_fraction=0.2)
    overrides = {
        "data.name": TOKENS,
        "data.digest": meta.digest,
        "runtime.device": "cpu",
    }
    return load("quickstart", overrides)


def _resume_check(store: Store, experiment: Experiment) -> float:
    """Seconds of a call that finds everything done, reading every result and writing the plan."""
    import msgspec

    from ablab.experiments.run.runner import execute

    runs = experiment.runs(range(SEEDS))
    for run in runs:
        record = store.run(run.id)
        record.folder.mkdir(parents=True)
        result = Result(run.id, FINISHED, 1, 1, {"val/loss": 1.0})
        # not synced to the disk: 10,000 would take minutes
        record.result_path.write_bytes(msgspec.json.encode(result))

    def check() -> None:
        outcome = execute(experiment, store, runs, Quiet(), tracked=())
        assert len(outcome.reused) == len(runs)
        assert not outcome.trained

    return min(host_seconds(check) for _ in range(2))


def _tracking(
    store: Store, run: str, hears: Callable[[Connection, int, Store], None], count: int = 2000
) -> float:
    """Seconds a step of writing the logs and telling the runner, every tenth step.  hears: what the runner does."""
    scalars = dict.fromkeys(SCALARS, 1.2345678)
    pace = {"seconds": 12.345678, "tokens_per_second": 123456.78}
    record = store.run(run)
    record.folder.mkdir(parents=True)
    runner_end, worker_end = multiprocessing.Pipe()
    runner = multiprocessing.get_context("spawn").Process(
        target=hears,
        args=(runner_end, count, store),
        daemon=True,
    )
    runner.start()
    worker_end.recv()

    def log() -> None:
        for step in range(count):
            record.log(step, scalars, pace)
            worker_end.send(Logged(step, scalars | pace, 12.3))

    seconds = host_seconds(log) / count / LOG_EVERY
    runner.join()
    return seconds


def _drain(pipe: Connection, count: int, store: Store) -> None:
    pipe.send("ready")
    for _ in range(count):
        pipe.recv()


def _drain_to_a_hung_server(pipe: Connection, count: int, store: Store) -> None:
    """Passes all on to trackers whose server takes connections and never answers."""
    from ablab.core.store.planned import GridPlan, Planned
    from ablab.experiments.track.chosen import USUAL
    from ablab.experiments.track.trackers import Trackers

    with socket.create_server(("127.0.0.1", 0)) as server:
        os.environ["MLFLOW_TRACKING_URI"] = f"http://127.0.0.1:{server.getsockname()[1]}"
        rows = [Planned("base", 0, 0, "unseen", None)]
        plan = GridPlan("hung", "Who waits?", "val/loss", "lower", "single", rows)
        trackers = Trackers(store, plan, lambda line: None, USUAL)
        pipe.send("ready")
        for _ in range(count):
            logged: Logged = pipe.recv()
            trackers.log("unseen", logged.step, logged.scalars, logged.seconds)


# -- the step --------------------------------------------------------------------------------------------
def _step_ratio(store: Store, experiment: Experiment) -> float:
    """Median step of the trainer over that of the plain loop.

    Both log every tenth step, with one thread each, and memory as in a worker.
    """
    from ablab.core.train.trainer import Trainer
    from ablab.experiments.bench.plain_loop import PlainLoop
    from ablab.experiments.run.worker import keep_freed_memory

    keep_freed_memory()
    recipe = experiment.base
    longer = recipe.tokens_per_step * WINDOW * ROUNDS * 10
    recipe = replace(recipe, budget=replace(recipe.budget, tokens=longer))
    folder = store.root / "data" / TOKENS
    trainer = Trainer(recipe, Runtime(device="cpu", threads=1), folder)
    plain = PlainLoop(folder, recipe.steps)
    assert plain.parameters() == sum(value.numel() for value in trainer.model.parameters())
    record = store.run("stepped")
    record.folder.mkdir(parents=True)

    def ours() -> None:
        norm = trainer.advance()
        if trainer.step % LOG_EVERY == 0:
            scalars = {"train/loss": trainer.close_window(), "train/grad_norm": norm.item()}
            record.log(trainer.step, scalars, {"seconds": time.perf_counter()})

    steps = [ours, plain.step]
    in_turn(steps, WINDOW, 1, torch.device("cpu"))  # warms up
    ours_took, plain_took = in_turn(steps, WINDOW, 2 * ROUNDS, torch.device("cpu"))
    return median(ours_took) / median(plain_took)
