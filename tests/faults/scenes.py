"""What is asked of ablab, in folders of its own, and what it must have left however it was disturbed."""

import importlib.util
import json
import os
import shutil
import sqlite3
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import processes
from processes import Ended, Running, nothing

TESTS = Path(__file__).parents[1]
MINI = """\
model: {width: 16, layers: 2, attention: {head_dim: 8}}
data: {name: tiny, vocab: 64, context: 16, batch: 4, held_out: 320}
schedule: {warmup_steps: 3}
budget: {tokens: 1280}   # 20 steps of 64 tokens
"""
GRID = {
    "question": "Does it last?",
    "base": ["base", "mini"],
    "with": ["muon", "ema"],
    "design": "add_one",
    "seeds": [0],
    "metric": {"name": "val/loss"},
    "runtime": {
        "device": "cpu",
        "evaluations": 2,
        "log_every": 1,
        "save_seconds": 0.02,
        "keep_weights": True,
    },
}
STUDY = GRID | {
    "with": [],
    "runtime": {"device": "cpu", "evaluations": 2, "log_every": 5, "save_seconds": 0.02},
    "study": {
        "space": {"optim.lr": {"log": [1e-3, 1e-1]}},
        "sampler": "tpe",
        "trials_per_cell": 4,
        "generation": 2,
    },
}
PLUGIN = '''\
"""Halve what each head adds."""

from ablab.core.language.declare import Stage
from ablab.core.language.part import Part
from ablab.core.recipe.edit import append, edit
from ablab.core.recipe.intervention import register


@register("halved", slots=("model.attention.on_heads",), off="whole heads", source="a test")
class Halved(Part):
    """A test."""

    def apply(self, recipe):
        return edit(recipe, "model.attention.on_heads", append(self))

    def build(self, where):
        return Stage(stage)


def stage(y, x):
    return y * 0.5
'''
# The clock decides these, or the folder that a store stands in.
OF_THE_CLOCK = (
    "seconds",
    "tokens_per_second",
    "tokens_per_second_ratio",
    "speed",
    "peak_bytes",
    "contended",  # whether other programs took its cores
    "seal",  # of all that a result says
    "provenance",  # when the ledger heard of it
    "sheet",  # where its file lies
)
PASSING = (
    ".lock",
    ".claim",
    ".damaged",
    ".partial",
    ".verified.json",
    "-journal",
    "-wal",
    "-shm",
)
Left = dict[str, Any]  # what is compared -> what it is


class Lab:
    """A folder with tokens, sheets and a store, in which commands are given."""

    def __init__(self, root: Path):
        self.root = root
        self.store = root / "store"
        self.temporary = root / "temporary"
        self.logs = 0

    def start(
        self,
        words: Sequence[str],
        before: Callable[[], None] = nothing,
        anew: bool = False,
        environment: dict[str, str] = {},
    ) -> Running:
        self.temporary.mkdir(exist_ok=True)
        told = {
            "ABLAB_STORE": str(self.store),
            "TMPDIR": str(self.temporary),
            "OMP_NUM_THREADS": "1",
            "COLUMNS": "200",
        }
        self.logs += 1
        log = self.root / f"log{self.logs}"
        if anew:
            return processes.start(words, self.root, told | environment, log)
        return processes.fork(words, self.root, told | environment, log, before)

    def run(self, words: Sequence[str], **how) -> Ended:
        return self.start(words, **how).end()

    def files(self, pattern: str) -> list[Path]:
        return sorted(path for path in self.store.glob(pattern) if path.is_file())

    def copy(self, root: Path) -> "Lab":
        shutil.copytree(self.root, root, symlinks=True)
        return Lab(root)


@dataclass(frozen=True)
class Scene:
    """A command and what it leaves."""

    name: str
    words: tuple[str, ...]
    left: Callable[[Lab], Left]
    environment: dict[str, str] = field(default_factory=dict)
    once: str = ""  # what it makes and refuses to make again

    def start(self, lab: Lab, **how) -> Running:
        environment = self.environment | how.pop("environment", {})
        return lab.start(self.words, environment=environment, **how)

    def run(self, lab: Lab, **how) -> Ended:
        return self.start(lab, **how).end()


def furnish(root: Path) -> Lab:
    """A lab in which nothing has been asked yet."""
    lab = Lab(root)
    root.mkdir(parents=True)
    spec = importlib.util.spec_from_file_location("for_all_tests", TESTS / "conftest.py")
    assert spec and spec.loader
    for_all = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(for_all)
    for_all.write_tokens(lab.store / "data" / "tiny", train=4000)
    (root / "mini.yaml").write_text(MINI)
    for name, sheet in {
        "grid": GRID,
        "study": STUDY,
        "own": GRID | {"with": ["halved"]},
    }.items():
        (root / f"{name}.yaml").write_text(json.dumps(sheet))  # JSON is YAML
    (root / "plugins").mkdir()
    (root / "plugins" / "halved.py").write_text(PLUGIN)
    (root / "text").mkdir()
    for part in range(3):
        documents = [
            json.dumps({"text": f"Of {part} and {i}: " + "words and more words. " * (i % 40)})
            for i in range(400)
        ]
        (root / "text" / f"{part}.jsonl").write_text("\n".join(documents))
    shipped = TESTS.parent / "configs" / "data" / "embedded" / "tokenizer.json"
    shutil.copy(shipped, root / "tokenizer.json")
    return lab


# -- what it left ------------------------------------------------------------------------------------------------------
def of_runs(lab: Lab) -> Left:
    """Plans, reports, studies, and every run to the last bit; the names of all files."""
    from ablab.core.store.store import Store

    store = Store(lab.store)
    left: Left = {f"there is {name}": True for name in names(lab)}
    for name in store.experiments():
        plan = store.read_plan(name)
        left[f"plan of {name}"] = sorted(
            (row.cell, row.pair, row.seed, row.run, row.reference or "", row.note)
            for row in plan.rows
        )
        if plan.design != "study":
            told = report_of(store, name)
            _split(told, "warnings", "shared their machine")  # as the clock has it
            left[f"report of {name}: lost pace"] = _split(told, "warnings", "pace.jsonl")
            left[f"report of {name}"] = told
        for row in plan.rows:
            left |= run_of(lab.store / "runs" / row.run)
    for path in lab.files("studies/*.json"):
        left[path.name] = without_clock(json.loads(path.read_text()))
    return left


def run_of(folder: Path) -> Iterator[tuple[str, Any]] | Left:
    from ablab.core.recipe.load import read_yaml
    from ablab.core.store.record import Record

    result = json.loads((folder / "result.json").read_text())
    left = {
        f"{folder.name}: result": without_clock(result),
        f"{folder.name}: recipe": read_yaml(folder / "recipe.yaml"),
        f"{folder.name}: log": (folder / "metrics.jsonl").read_bytes(),
        f"{folder.name}: pace": [line["step"] for line in Record(folder).pace()],
    }
    for weights in folder.glob("*.safetensors"):
        left[f"{folder.name}: {weights.name}"] = hash(weights.read_bytes())
    return left


def report_of(store: Any, name: str) -> Any:
    from ablab.analysis.pages import report

    return without_clock(report.as_json(report.read(store, name)))


def _split(told: dict[str, Any], key: str, about: str) -> list[str]:
    """Take the lines about something out of a list of lines, and return them."""
    lines = told[key]
    told[key] = [line for line in lines if about not in line]
    return [line for line in lines if about in line]


def without_clock(told: Any) -> Any:
    if isinstance(told, dict):
        return {key: without_clock(one) for key, one in told.items() if key not in OF_THE_CLOCK}
    if isinstance(told, list):
        return [without_clock(one) for one in told]
    return told


def names(lab: Lab) -> list[str]:
    """Of all files in the store that are there to stay."""
    found = []
    for folder, _, files in os.walk(lab.store):
        inside = Path(folder).relative_to(lab.store)
        if inside.parts[:1] == ("mlartifacts",):
            continue
        found += [str(inside / file) for file in files]
    return sorted(name for name in found if not any(part in name for part in PASSING))


def of_runs_and_mlflow(lab: Lab) -> Left:
    return of_runs(lab) | of_mlflow(lab.store / "mlflow.db")


def of_mlflow(database: Path) -> Left:
    """Its runs by name: status, tags, parameters, and every point of their curves.

    Twins are among them, but for those that were retired: a server that stood still creates a run twice.
    """
    left: Left = {}
    with closing(sqlite3.connect(database)) as base:
        ask = base.execute
        runs = ask(
            "select run_uuid, name, status, lifecycle_stage from runs where run_uuid not in "
            "(select run_uuid from tags where key = 'ablab.planned' and value = 'no') "
            "order by name"
        ).fetchall()
        left["MLflow: runs"] = [shown[1:] for shown in runs]
        for id, name, *_ in runs:
            mine = (id,)
            tags = ask("select key, value from tags where run_uuid = ?", mine).fetchall()
            params = ask("select key, value from params where run_uuid = ?", mine).fetchall()
            points = ask(
                "select key, step, value from metrics where run_uuid = ?", mine
            ).fetchall()
            left[f"MLflow: {name}"] = {
                "tags": sorted(tag for tag in tags if tag[0] != "ablab.result"),
                "params": sorted(params),
                "points": sorted(point for point in points if point[0] not in OF_THE_CLOCK),
            }
    return left


def of_tokens(lab: Lab) -> Left:
    """The token folder, byte for byte."""
    folder = lab.store / "data" / "web"
    kept = [path for path in folder.iterdir() if path.name != ".verified.json"]
    left: Left = {f"data/web/{path.name}": hash(path.read_bytes()) for path in kept}
    return left | {"beside": sorted(os.listdir(lab.store / "data"))}


def differences(one: Left, other: Left, forgiven: str = "") -> list[str]:
    """All in which they differ, a line each and whole.  forgiven: what says so may differ."""
    compared = [key for key in one | other if not (forgiven and forgiven in key)]
    differing = [key for key in compared if one.get(key) != other.get(key)]
    return [f"{key}{told_apart(one.get(key), other.get(key))}" for key in differing]


def told_apart(one: Any, other: Any) -> str:
    """Where two values differ, and what stands there."""
    if isinstance(one, bytes) and isinstance(other, bytes):
        return told_apart(one.splitlines(keepends=True), other.splitlines(keepends=True))
    if isinstance(one, dict) and isinstance(other, dict):
        parts = [
            f".{key}{told_apart(one.get(key), other.get(key))}"
            for key in one | other
            if one.get(key) != other.get(key)
        ]
        return ", ".join(parts)
    if isinstance(one, list) and isinstance(other, list):
        only = _without(one, other)
        surplus = _without(other, one)
        if len(only) == len(surplus) == 1:
            return f"[]{told_apart(only[0], surplus[0])}"
        return f": {len(one)} and {len(other)} long; lacks {only}, has besides {surplus}"
    return f": {one} != {other}"


def _without(these: list[Any], others: list[Any]) -> list[Any]:
    """What is left of these when each of the others has taken one that equals it."""
    left = list(these)
    for value in others:
        if value in left:
            left.remove(value)
    return left


QUICK = ("--no-mlflow", "--json", "--jobs", "1")  # --json draws no pictures, which take longest
TOKENIZE = (
    *("data", "tokenize", "text", "--tokenizer", "tokenizer.json"),
    *("--name", "web", "--store", "store"),
)
SCENES = {
    scene.name: scene
    for scene in (
        Scene("grid", ("run", "grid.yaml", "--run-inert", *QUICK), of_runs),
        Scene("checked", ("run", "grid.yaml", "--quiet", "--no-mlflow"), of_runs),
        Scene("two", ("run", "grid.yaml", "--run-inert", *QUICK[:2], "--jobs", "2"), of_runs),
        Scene(
            "own", ("run", "own.yaml", "--plugins", "plugins", "--run-inert", *QUICK), of_runs
        ),
        Scene(
            "shown",
            ("run", "grid.yaml", "--run-inert", "--json", "--jobs", "1"),
            of_runs_and_mlflow,
        ),
        Scene("study", ("study", "study.yaml", *QUICK), of_runs),
        Scene(
            "journal",
            ("study", "study.yaml", *QUICK),
            of_runs,
            {"ABLAB_STORAGE": "journal:trials.journal"},
        ),
        Scene(
            "tokens",
            TOKENIZE,
            of_tokens,
            once="data/web",
        ),
    )
}
