"""A grid on three nodes of a Ray cluster, of which one is killed half-way and another joins: `make cluster`.

    python tests/faults/cluster.py [--seeds 6] [--steps 200] [--items 3000]

The nodes are real ones (ray.cluster_utils.Cluster), all on this machine, a CPU each.  The grid runs once without Ray
and once with it: the same runs, each finished once, with the same bits.  Then a model is asked so many items on a node
that is killed half-way, and another goes on: the same answers.  Exit code 1: something differs.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # the order of sums depends on it
sys.path.insert(0, str(Path(__file__).parents[2]))
from tests.conftest import write_tokens  # noqa: E402
from tests.experiments.conftest import PAIRS, write_model, write_pairs  # noqa: E402

PATIENCE = 600.0  # seconds, on a busy machine
CONFIG = """\
model: {width: 16, layers: 2, attention: {head_dim: 8}}
data: {name: tiny, vocab: 64, context: 16, batch: 4, held_out: 320}
schedule: {warmup_steps: 3}
"""


def sheet(seeds: int, steps: int) -> str:
    content = {
        "question": "Does a cluster compute what one machine computes?",
        "base": ["base", "mini"],
        "with": ["qk_norm", "muon"],
        "design": "leave_one_out",
        "seeds": list(range(seeds)),
        "set": {"budget.tokens": 64 * steps},
        "metric": {"name": "val/loss"},
        "runtime": {"device": "cpu", "log_every": 5, "save_seconds": 0.1, "evaluations": 2},
    }
    return json.dumps(content)  # JSON is YAML


class Grid:
    """A folder with an experiment, which one command runs."""

    def __init__(self, root: Path, seeds: int, steps: int):
        self.root = root
        self.store = root / "store"
        write_tokens(self.store / "data" / "tiny", train=4000)
        (root / "mini.yaml").write_text(CONFIG)
        (root / "grid.yaml").write_text(sheet(seeds, steps))

    def start(self, *words: str) -> subprocess.Popen:
        command = ("run", "grid.yaml", "--json", "--no-mlflow", "--run-inert", *words)
        return subprocess.Popen(
            [sys.executable, "-m", "ablab.experiments.cli", *command],
            cwd=self.root,
            env=os.environ | {"ABLAB_STORE": str(self.store)},
            stdout=subprocess.PIPE,
            stderr=open(self.root / "said", "wb"),
            text=True,
        )

    def said(self) -> str:
        return (self.root / "said").read_text()

    def ended(self) -> list[Path]:
        return sorted((self.store / "runs").glob("*/result.json"))

    def bits(self) -> dict[str, tuple[str, bytes]]:
        """Run -> digest of its weights, and its metrics line by line."""
        found = {}
        for path in self.ended():
            told = json.loads(path.read_text())
            assert told["status"] == "finished", told
            metrics = path.with_name("metrics.jsonl").read_bytes()
            found[path.parent.name] = (told["weights"], metrics)
        return found


def wait_for(holds: Callable[[], object], what: str, running: subprocess.Popen) -> None:
    until = time.monotonic() + PATIENCE
    while not holds():
        assert running.poll() is None, f"the command ended before {what}"
        assert time.monotonic() < until, f"after {PATIENCE:.0f} s not: {what}"
        time.sleep(0.05)


def done(running: subprocess.Popen) -> dict:
    """Its outcome, as `--json` says it."""
    out, _ = running.communicate(timeout=PATIENCE)
    assert running.returncode == 0 and out.startswith("{"), (running.returncode, out[:2000])
    return json.loads(out)["outcome"]


def on_nodes(grid: Grid, runs: int) -> dict:
    """Run it on three nodes, and change them meanwhile."""
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 0, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    running = None
    try:
        nodes = [cluster.add_node(num_cpus=1) for _ in range(3)]
        running = grid.start("--launcher", "ray", "--address", cluster.address)
        wait_for(lambda: len(grid.ended()) >= runs // 3, "a third has ended", running)
        say(f"{len(grid.ended())} of {runs} runs have ended: a node is killed")
        cluster.remove_node(nodes[0], allow_graceful=False)
        wait_for(lambda: len(grid.ended()) >= runs // 2, "half has ended", running)
        say(f"{len(grid.ended())} of {runs} runs have ended: a node joins")
        cluster.add_node(num_cpus=1)
        return done(running)
    finally:
        if running and running.poll() is None:
            running.send_signal(signal.SIGKILL)
            running.wait()
        cluster.shutdown()


class Exam:
    """A model and items, which `ablab eval` asks it in a store of its own."""

    def __init__(self, root: Path, items: int):
        self.root = root
        self.items = items
        self.model = write_model(root)
        self.pairs = write_pairs(root / "pairs", [PAIRS[n % len(PAIRS)] for n in range(items)])

    def start(self, store: str, *words: str) -> subprocess.Popen:
        command = ("eval", str(self.model), "--suite", "blimp", "--bundle", str(self.pairs))
        how = ("--device", "cpu", "--batch", "1", "--json", "--track", "none")
        return subprocess.Popen(
            [sys.executable, "-m", "ablab.experiments.cli", *command, *how, *words],
            cwd=self.root,
            env=os.environ | {"ABLAB_STORE": str(self.root / store)},
            stdout=subprocess.PIPE,
            stderr=open(self.root / f"{store}.said", "wb"),
            text=True,
        )

    def answered(self, store: str) -> int:
        paths = (self.root / store).glob("evaluations/*/evaluations/*.jsonl")
        return sum(len(path.read_bytes().splitlines()) for path in paths)


def asked_on_nodes(exam: Exam) -> str:
    """Of its first node another takes the work over."""
    from ray.cluster_utils import Cluster

    head = {"num_cpus": 0, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    running = None
    try:
        first = cluster.add_node(num_cpus=1)
        running = exam.start("there", "--launcher", "ray", "--address", cluster.address)
        few = exam.items // 10
        wait_for(lambda: exam.answered("there") > few, "some are answered", running)
        cluster.add_node(num_cpus=1)
        cluster.remove_node(first, allow_graceful=False)
        say(f"{exam.answered('there')} of {exam.items} items are answered: the node is killed")
        out, _ = running.communicate(timeout=PATIENCE)
        assert running.returncode == 0, out
        return out
    finally:
        if running and running.poll() is None:
            running.send_signal(signal.SIGKILL)
            running.wait()
        cluster.shutdown()


def told(out: str) -> list[dict]:
    return [one | {"seconds": 0} for one in json.loads(out)]


BEGAN = time.monotonic()


def say(line: str) -> None:
    print(f"{time.monotonic() - BEGAN:5.0f}s  {line}", flush=True)


def main() -> None:
    words = argparse.ArgumentParser(description=__doc__)
    words.add_argument("--seeds", type=int, default=6, help="of each of four arms")
    words.add_argument("--steps", type=int, default=200)
    words.add_argument("--items", type=int, default=3000, help="of the evaluation")
    asked = words.parse_args()
    runs = 4 * asked.seeds
    with tempfile.TemporaryDirectory(prefix="ablab-cluster-") as folder:
        alone = Grid(Path(folder) / "alone", asked.seeds, asked.steps)
        trained = done(alone.start("--jobs", "1"))["trained"]
        assert len(trained) == runs, trained
        say(f"{runs} runs without Ray")
        there = Grid(Path(folder) / "there", asked.seeds, asked.steps)
        outcome = on_nodes(there, runs)
        print(there.said())
        assert sorted(outcome["trained"]) == sorted(trained), "each once, the same ids"
        assert "lost with its node" in there.said(), "the kill came between two runs"
        assert there.bits() == alone.bits(), "the same weights, and every line of the metrics"
        say(f"{runs} runs with Ray: each finished once, the same ids and bits")
        exam = Exam(Path(folder), asked.items)
        out, _ = exam.start("here").communicate(timeout=PATIENCE)
        assert told(asked_on_nodes(exam)) == told(out), "the same answers"
        assert "lost with its node" in (exam.root / "there.said").read_text()
        say(f"{asked.items} items with Ray, whose node was killed: the same answers")


if __name__ == "__main__":
    main()
