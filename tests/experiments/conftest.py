"""A bench for the command line: a folder with tokens and experiment files, and two ways to run `ablab` in it."""

import functools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from ablab.core.runtime.runtime import visible_gpus
from ablab.experiments.run import processes
from tests.conftest import build_model, tiny_recipe
from tests.experiments.warmed import Warmed

GPUS = visible_gpus()  # before a test says that there are others
CONFIG = """\
model: {width: 16, layers: 2, attention: {head_dim: 8}}
data: {name: tiny, vocab: 64, context: 16, batch: 4, held_out: 320}
schedule: {warmup_steps: 3}
budget: {tokens: 1280}   # 20 steps of 64 tokens
"""
SHEET = {
    "question": "Does it run?",
    "base": ["base", "mini"],
    "with": ["qk_norm", "value_residual"],
    "design": "leave_one_out",
    "seeds": [0, 1],
    "metric": {"name": "val/loss"},
    "runtime": {"device": "cpu", "evaluations": 2, "log_every": 5},
}


@dataclass
class Ended:
    code: int
    out: str
    err: str

    @property
    def json(self):
        return json.loads(self.out)

    @property
    def trained(self) -> list[str]:
        """Of `ablab run --json`: the ids of the runs that it trained."""
        return self.json["outcome"]["trained"]

    @property
    def reused(self) -> list[str]:
        return self.json["outcome"]["reused"]

    @property
    def failed(self) -> list[str]:
        return self.json["outcome"]["failed"]


class Lab:
    """A folder with STORE/data/tiny, mini.yaml, and what a test writes beside them."""

    def __init__(self, root: Path, write_token_folder, warmed: Warmed):
        self.root = root
        self.warmed = warmed
        self.store = root / "store"
        write_token_folder(self.store / "data" / "tiny", train=4000)
        (root / "mini.yaml").write_text(CONFIG)

    def sheet(self, name: str, **keys) -> str:
        """Write an experiment file; keys replace those of SHEET, `runtime` is added to.

        arms: its `with`.  written: its `arms`.
        """
        if "arms" in keys:
            keys["with"] = keys.pop("arms")
        if "written" in keys:
            keys["arms"] = keys.pop("written")
        runtime = SHEET["runtime"] | keys.pop("runtime", {})
        content = SHEET | keys | {"runtime": runtime}
        (self.root / f"{name}.yaml").write_text(json.dumps(content))  # JSON is YAML
        return f"{name}.yaml"

    @property
    def environment(self) -> dict[str, str]:
        told = {"ABLAB_STORE": str(self.store), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
        return os.environ | told

    def start(self, *words: str, **more) -> subprocess.Popen:
        """`ablab WORDS`, started anew in a process group of its own."""
        return subprocess.Popen(
            [sys.executable, "-m", "ablab.experiments.cli.main", *words],
            cwd=self.root,
            env=self.environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            **more,
        )

    def run(self, *words: str, **more) -> Ended:
        """`ablab WORDS`, to its end.  more: how it is started anew; else it is forked."""
        if more or GPUS:  # CUDA survives no fork
            process = self.start(*words, **more)
            out, err = process.communicate(timeout=240)
            return Ended(process.returncode, out, err)
        return Ended(*self.warmed.run(words, self.root, self.environment))

    def files(self) -> dict[str, tuple[int, int, int]]:
        """Every file of the store: its inode, size and time.  Equal answers: nothing was touched.

        What is known of tokens is kept once they are two seconds old, by whoever reads them.
        """
        found = {}
        for path in sorted(self.store.rglob("*")):
            if path.is_file() and path.name != ".verified.json":
                about = path.stat()
                stamp = (about.st_ino, about.st_size, about.st_mtime_ns)
                found[str(path.relative_to(self.store))] = stamp
        return found

    def plan(self, name: str) -> list[dict]:
        """The rows of an experiment's plan."""
        path = self.store / "experiments" / f"{name}.json"
        return json.loads(path.read_text())["rows"]

    def run_folder(self, id: str) -> Path:
        return self.store / "runs" / id

    def result(self, name: str, cell: str, pair: int = 0) -> dict:
        return self.results(name)[cell, pair]

    def results(self, name: str) -> dict[tuple[str, int], dict]:
        """(cell, pair) -> result.json, for every planned run of an experiment that has one."""
        found = {}
        for row in self.plan(name):
            path = self.run_folder(row["run"]) / "result.json"
            if path.exists():
                found[row["cell"], row["pair"]] = json.loads(path.read_text())
        return found


# -- what an evaluation needs ------------------------------------------------------------------------------------------
PAIRS = [
    ("a cat", "cat a"),
    ("a dog", "dog a"),
    ("dogs", "dog"),
    ("a a cat", "cat"),
    ("dogs a", "a"),
]


@pytest.fixture
def pairs(tmp_path):
    """A folder as BLiMP's, with one paradigm of five items."""
    return write_pairs(tmp_path / "pairs", PAIRS)


@pytest.fixture
def weights_folder(tmp_path):
    """With a tokenizer."""
    return write_model(tmp_path)


def write_pairs(folder: Path, pairs: list[tuple[str, str]]) -> Path:
    folder.mkdir()
    lines = [{"sentence_good": good, "sentence_bad": bad} for good, bad in pairs]
    (folder / "one.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


def write_model(root: Path) -> Path:
    """A folder below `root`."""
    from ablab.core.data import corpus
    from ablab.core.interop.folder import Source
    from ablab.core.interop.weights import write

    (root / "text.txt").write_text("a cat and dogs, a dog and cats. " * 20)
    corpus.train_tokenizer([root / "text.txt"], root / "tokenizer.json", 260)
    recipe = tiny_recipe(["gating"], data__vocab=260)
    model = build_model(recipe, stirred=0.3)
    tensors = {name: value.detach() for name, value in model.named_parameters()}
    write(root / "model", recipe, tensors, Source(), root / "tokenizer.json")
    return root / "model"


# -- processes ---------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="session")
def alive():
    return is_alive


def is_alive(pid: int) -> bool:
    """A process that has ended, and that nobody has asked for its exit code, is not."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


@pytest.fixture(scope="session")
def wait_until():
    return wait_until_true


def wait_until_true(holds: Callable[[], object], what: str, seconds: float = 60) -> None:
    """Look again and again: however busy the machine is, what comes is waited for."""
    until = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < until, f"after {seconds} s: {what}"
        time.sleep(0.01)


@pytest.fixture(scope="session", autouse=True)
def workers_are_forked():
    """Workers of this process come from one that has imported what they import; each would need seconds for that.

    That one is started with the first of them, and with the environment of that moment.
    """
    if GPUS:
        yield
        return
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["ablab.core.train.run", "ablab.ablations.checks.liveness"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(processes, "CONTEXT", context)
        yield


@pytest.fixture(scope="session", autouse=True)
def commands_are_built_once():
    """Four fifths of a call of `ablab` in this process were typer's way from functions to commands, always the same."""
    import typer.main

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(typer.main, "get_command", functools.cache(typer.main.get_command))
        yield


@pytest.fixture(scope="module")
def new_lab(tmp_path_factory, write_token_folder, warmed):
    """A function that makes a lab of its own."""
    return lambda: Lab(tmp_path_factory.mktemp("lab"), write_token_folder, warmed)


@pytest.fixture(scope="module")
def lab(new_lab) -> Lab:
    """One lab for all tests of a file."""
    return new_lab()


@pytest.fixture
def ablab(lab, monkeypatch, capsys):
    """`ablab WORDS` inside this process, in the file's lab: milliseconds instead of a second.

    For what starts no worker.
    """
    from ablab.ablations.design import DESIGNS
    from ablab.core.language.part import Part
    from ablab.core.recipe.intervention import REGISTRY
    from ablab.experiments.cli import main as cli

    handler = signal.getsignal(signal.SIGTERM)
    registries: tuple[dict, ...] = (REGISTRY, DESIGNS, Part.known, Part.foreign)
    before = [dict(registry) for registry in registries]

    def call(*words: str) -> Ended:
        monkeypatch.chdir(lab.root)
        monkeypatch.setenv("ABLAB_STORE", str(lab.store))
        monkeypatch.setattr(sys, "argv", ["ablab", *words])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            cli.main()
        return Ended(end.value.code, *capsys.readouterr())

    yield call
    signal.signal(signal.SIGTERM, handler)
    # no other test shall know this one's plugins
    for registry, kept in zip(registries, before, strict=True):
        registry.clear()
        registry.update(kept)
    for name in list(sys.modules):
        if name.startswith("ablab_plugins."):
            del sys.modules[name]
