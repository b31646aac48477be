"""A coordinator without training: a study whose pool answers with a formula, for tests that need hundreds of trials."""

import json
import math
import random
import time
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace

from ablab.core.errors import UserError  # noqa: F401  (for the tests)
from ablab.core.store.result import DIVERGED, FAILED, FINISHED, OUT_OF_MEMORY, PRUNED, Result
from ablab.core.store.store import Store
from ablab.experiments.plan.experiment import Experiment, load
from ablab.experiments.tune import study

CONFIG = """\
model: {width: 16, layers: 2, attention: {head_dim: 8}}
data: {name: tiny, vocab: 64, context: 16, batch: 4, held_out: 320, digest: 00000000deadbeef}
schedule: {warmup_steps: 3}
budget: {tokens: 1280}   # 20 steps of 64 tokens
"""
SPACE = {
    "optim.lr": {"log": [1e-3, 1e-1]},
    "model.width": {"choices": [16, 32, 64]},
}
SHEET = {
    "question": "Which?",
    "base": ["base", "mini"],
    "with": [],
    "design": "add_one",
    "seeds": [],
    "metric": {"name": "val/loss"},
    "runtime": {"device": "cpu", "evaluations": 4, "log_every": 5},
}
TWO_CELLS = {"with": ["qk_norm"]}
# Of width 16, and the loss there; every doubling of the width halves the one and lowers the other by 0.05.
OPTIMUM, BEST = 0.012, 3.0


def valley(recipe) -> float:
    """The loss of a recipe: a parabola in log2 lr, 0.05 an octave^2; qk_norm doubles the best rate."""
    doublings = math.log2(recipe.model.width / 16)
    best = OPTIMUM / 2**doublings
    if recipe.model.attention.on_qk:
        best *= 2
    octaves = math.log2(recipe.optim.lr / best)
    return BEST - 0.05 * doublings + 0.05 * octaves**2


def status_of(recipe) -> str:
    """Above 0.09 it diverges, width 64 below 0.002 is out of memory, some between crash: the recipe alone decides."""
    if recipe.optim.lr > 0.09:
        return DIVERGED
    if recipe.model.width == 64 and recipe.optim.lr < 0.002:
        return OUT_OF_MEMORY
    return FAILED if int(recipe.optim.lr * 1e6) % 17 == 0 else FINISHED


class Formula:
    """Stands for runner.Pool: the same records, no training.  A run logs four evaluations, 5 steps apart."""

    seconds, trained = 0.0, []

    def __init__(self, experiment, store, watcher, jobs=None, plugins=(), launcher=None):
        self.experiment = experiment
        self.store = store
        self.watcher = watcher
        self.jobs = jobs or 1
        self.trackers = None

    def train(self, runs, stops=lambda run, step, scalars: False):
        """In their order, or with more jobs in another."""
        order = list(runs)
        if self.jobs > 1:
            order = random.Random(self.jobs).sample(order, len(order))
        for run in order:
            self._train(run, stops)
            self.trained.append(run.id)

    def _train(self, run, stops):
        record = self.store.run(run.id)
        value = valley(run.recipe)
        status = status_of(run.recipe)
        record.folder.mkdir(parents=True, exist_ok=True)
        about = {"started": 1.76e9, "params": self.experiment.params(run)}
        (record.folder / "run.json").write_text(json.dumps(about))
        done = {int(line["step"]) for line in record.metrics()}
        for step in (5, 10, 15, 20) if status == FINISHED else (5,):
            time.sleep(self.seconds / 4)
            above = value + (20 - step) * 0.02
            scalars = {"tokens": step * 64, "val/loss": above, "train/grad_norm": above}
            if step not in done:
                record.log(step, scalars, {"seconds": step * 0.1, "tokens_per_second": 640.0})
            if stops(run, step, scalars):
                status = PRUNED
                break
        result = Result(
            run=run.id,
            status=status,
            step=step,
            tokens=step * 64,
            metrics={"val/loss": value, "train/grad_norm": value} if status == FINISHED else {},
            seconds=1.0,
            tokens_per_second=640.0,
        )
        record.finish(result)
        self.watcher.finished(run, result)

    def close(self): ...


def watcher():
    said, stood = [], []
    quiet = lambda *_: None  # noqa: E731
    arms = lambda lines, metric: stood.append(lines)  # noqa: E731
    return SimpleNamespace(
        planned=quiet,
        started=quiet,
        logged=quiet,
        finished=quiet,
        arms=arms,
        note=quiet,
        say=said.append,
        said=said,
        stood=stood,
    )


def experiment(root: Path, block: dict, name: str = "valley", **keys) -> Experiment:
    """An experiment on mini.yaml in `root`, whose `study:` is SPACE and `block`."""
    root.mkdir(parents=True, exist_ok=True)
    (root / "mini.yaml").write_text(CONFIG)
    sheet = SHEET | {"study": {"space": SPACE} | block} | keys
    path = root / f"{name}.yaml"
    path.write_text(json.dumps(sheet))  # JSON is YAML
    return load(str(path), {}, lambda data: "00000000deadbeef")


def tune(
    root: Path,
    block: dict,
    url: str | None = "",
    jobs: int | None = None,
    seconds: float = 0.0,
    **keys,
):
    """Tune by formula; the store is `root`/store.  Returns the study, its record, and what was said.

    url: "" is a journal file, 1 s faster to make than the tables of the default, None.
    """
    real, study.Pool = study.Pool, Formula
    Formula.seconds = seconds
    Formula.trained = []
    if url == "":
        url = f"journal:{root}/trials.journal"
    try:
        heard = watcher()
        asked = experiment(root, block, **keys)
        held = study.Study(asked, Store(root / "store"), heard, url)
        return held, held.tune(jobs, (), ()), heard.said
    finally:
        study.Pool = real


def content(held) -> list[dict]:
    """All that a study's storage says of its trials, in order; without the clock."""
    return [shown(search, one) for search in held.searches for one in search.stored]


def shown(search, trial) -> dict:
    told = dict(trial.user_attrs["told"])
    del told["seconds"]
    return {
        "arm": search.name,
        "number": trial.number,
        "state": trial.state.name,
        "params": trial.params,
        "value": trial.value,
        "curve": trial.intermediate_values,
        "attrs": {"state": trial.user_attrs["state"], **told},
    }


def heard(method, pipe: Connection):
    """Say so, before and after, and go on when a word comes."""

    def call(*arguments):
        pipe.send("before")
        pipe.recv()
        method(*arguments)
        pipe.send("after")
        pipe.recv()

    return call


def coordinate(pipe: Connection, root: Path, url: str, block: dict, seconds: float) -> None:
    """A coordinator in a process of its own, which goes from word to word; its last one is what its study holds."""
    Formula._train = heard(Formula._train, pipe)
    study.CellSearch.tell = heard(study.CellSearch.tell, pipe)
    held, _, _ = tune(root, block, url, seconds=seconds, **TWO_CELLS)
    pipe.send(json.loads(json.dumps(content(held))))
