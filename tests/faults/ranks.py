"""make ranks: a run on real ranks (gloo on CPU cores), each of them killed in turn, and taken up by others.

    one, two, four     the same rows; losses within the rounding of sums; two repeat their bits
    kill               kill -9 of each of four ranks: a record with its cause, within 30 s
    elastic            2 ranks, killed; 1, stopped; 4 to the end: one run, in three segments
    torchrun           the same command started on every rank: the bits of --gpus-per-run; kill -9 of each of two
                       ranks: a record that names it, within 30 s, and the next call goes on
    weights            2 ranks that share weights, killed; 2 that share states, stopped; 4 that share weights

Words choose some of them: agree kill elastic torchrun weights.  About four minutes of two quiet cores in all.  Exits
with 1 where something does not hold.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from ablab.core.recipe.recipe import plain, run_id  # noqa: E402
from ablab.core.runtime.runtime import Runtime  # noqa: E402
from ablab.core.store.record import Record  # noqa: E402
from ablab.core.store.result import FAILED, FINISHED, PRUNED, Result  # noqa: E402
from ablab.experiments.run.executor import Task  # noqa: E402
from ablab.experiments.run.messages import Done, Logged, TrainJob  # noqa: E402
from ablab.experiments.run.processes import local_processes  # noqa: E402
from tests.conftest import tiny_recipe, write_tokens  # noqa: E402
from tests.experiments.run.test_ranks import ranks_of  # noqa: E402

STEPS = 60
MOST_SECONDS = 30  # from a rank's death to the record of it


@dataclass
class Ranks:
    """One run, at so many ranks; what is done to it at a step."""

    root: Path
    ranks: int
    shard: str = "state"
    kill: int | None = None  # this rank, at step `at`
    stop: bool = False  # at step `at`
    at: int = 8
    died: float = 0.0
    result: Result | None = None
    steps: list[int] = field(default_factory=list)

    def train(self, name: str) -> "Ranks":
        """name: of the folder; one that is there goes on."""
        runtime = Runtime(
            device="cpu", ranks=self.ranks, shard=self.shard, log_every=1, save_seconds=0.0
        )
        recipe = tiny_recipe(["muon"], budget__tokens=64 * STEPS)
        record = Record(self.root / name)
        job = TrainJob(
            run_id(recipe),
            plain(recipe),
            asdict(runtime),
            record.folder,
            self.root / "tiny",
            before=record.stamp(),
        )
        self.executor = local_processes(runtime, 1, [])
        try:
            self.executor.execute([Task(lambda: job)], self._heard)
        finally:
            self.executor.close()
        return self

    def _heard(self, job, message):
        if isinstance(message, Logged):
            self.steps.append(message.step)
            if message.step >= self.at and self.stop:
                self.executor.stop(job.run)
            if message.step == self.at and self.kill is not None:
                pids = ranks_of(self.executor.workers[0].process.pid)
                self.died = time.monotonic()
                os.kill(pids[self.kill], signal.SIGKILL)
        if isinstance(message, Done):
            self.result = message.result
            self.seconds = time.monotonic() - self.died
        return ()

    def losses(self, name: str) -> list[float]:
        lines = Record(self.root / name).metrics()
        return [line["train/loss"] for line in lines]


def apart(losses: list[float], others: list[float]) -> float:
    pairs = zip(losses, others, strict=True)
    return max(abs(one - other) / one for one, other in pairs)


def check(said: str, holds: bool) -> bool:
    print(f"{'ok' if holds else 'FAULT':6}{said}", flush=True)
    return holds


def agree(root: Path) -> bool:
    found = {name: Ranks(root, ranks).train(name) for name, ranks in AGREE.items()}
    one = found["one"].losses("one")
    holds = True
    for name, ranks in found.items():
        distance = apart(one, ranks.losses(name))
        holds &= check(f"{name}: losses within {distance:.1e} of one rank's", distance < 1e-3)
    digests = found["two"].result.weights, found["two_again"].result.weights
    return holds & check(f"two ranks repeat their bits: {digests}", len(set(digests)) == 1)


AGREE = {"one": 1, "two": 2, "two_again": 2, "four": 4}


def kill(root: Path) -> bool:
    holds = True
    for rank in range(4):
        name = f"killed_{rank}"
        lost = Ranks(root, 4, kill=rank).train(name)
        said = f"rank {rank} killed: after {lost.seconds:.1f} s, {lost.result.error}"
        named = lost.result.status == FAILED and f"rank {rank} of 4" in lost.result.error
        holds &= check(said, named and lost.seconds < MOST_SECONDS)
        holds &= check("   its record says so", Record(root / name).result() == lost.result)
    return holds


def elastic(root: Path) -> bool:
    name = "elastic"
    first = Ranks(root, 2, kill=1).train(name)
    second = Ranks(root, 1, stop=True, at=30).train(name)
    third = Ranks(root, 4).train(name)
    states = [one.result.status for one in (first, second, third)]
    holds = check(f"2 -> 1 -> 4: {states}", states == [FAILED, PRUNED, FINISHED])
    went_on = second.steps[0] > 1 and third.steps[0] > second.steps[0]
    holds &= check(f"each went on, at {second.steps[0]} and {third.steps[0]}", went_on)
    ranks = [ranks for _, ranks in third.result.segments]
    holds &= check(f"segments {third.result.segments}", ranks == [2, 1, 4])
    Ranks(root, 1).train("steady")
    distance = apart(third.losses("steady"), third.losses(name))
    return holds & check(f"losses within {distance:.1e} of one rank's", distance < 1e-3)


ABLAB = ["-m", "ablab.experiments.cli"]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *ABLAB]
ONE_RUN = ["run", "quickstart", "runtime.device=cpu", "budget.tokens=10240", "--quiet"]
ONE_RUN += ["runtime.save_seconds=0", "runtime.log_every=1"]
ONE_RUN += ["--only", "base", "--seeds", "0", "--no-mlflow", "--run-inert"]


@dataclass
class Command:
    """A call of ablab for one run, in a store of its own."""

    store: Path

    def start(self, *words: str) -> subprocess.Popen:
        command = [sys.executable, *words, "--store", str(self.store)]
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def result(self) -> Result | None:
        for folder in self.store.glob("runs/*"):
            return Record(folder).result()
        return None

    def steps(self) -> int:
        """That were logged."""
        return sum(len(path.read_bytes().splitlines()) for path in self.store.glob(METRICS))

    def pace(self) -> bytes:
        """Of the first two steps: it has the clock's word, so that no second try repeats it."""
        (path,) = self.store.glob("runs/*/pace.jsonl")
        return b"".join(path.read_bytes().splitlines(keepends=True)[:2])

    def wait_for(self, holds: Callable[[], object]) -> float:
        """Seconds."""
        began = time.monotonic()
        while not holds():
            assert time.monotonic() - began < PATIENCE, f"nothing happens in {self.store}"
            time.sleep(0.02)
        return time.monotonic() - began


METRICS = "runs/*/metrics.jsonl"
PATIENCE = 300.0  # seconds


def torchrun(root: Path) -> bool:
    """Both ways of starting two ranks, and each of them killed where torchrun started it."""
    weights = set()
    for name, way in {"torchrun": TORCHRUN, "gpus_per_run": ABLAB}.items():
        command = Command(root / name)
        ranks = ["--gpus-per-run", "2"] if way is ABLAB else []
        assert command.start(*way, *ONE_RUN, *ranks).wait() == 0
        weights.add(command.result().weights)
    holds = check(f"torchrun and --gpus-per-run: weights {weights}", len(weights) == 1)
    for rank in range(2):
        holds &= killed_under_torchrun(Command(root / f"torchrun_{rank}"), rank)
    return holds


def killed_under_torchrun(command: Command, rank: int) -> bool:
    running = command.start(*TORCHRUN, *ONE_RUN)
    command.wait_for(lambda: command.steps() >= 5)
    os.kill(started_as(rank, running.pid), signal.SIGKILL)
    seconds = command.wait_for(command.result)
    lost = command.result()
    said = f"torchrun's rank {rank} killed: after {seconds:.1f} s, {lost.error}"
    named = lost.status == FAILED and f"rank {rank} of 2 ended" in lost.error
    holds = check(said, named and seconds < MOST_SECONDS)
    assert running.wait() != 0
    first = command.pace()
    assert command.start(*TORCHRUN, *ONE_RUN).wait() == 0
    result = command.result()
    went_on = result.status == FINISHED and command.pace() == first
    return holds & check(f"   the next call goes on: {result.status}", went_on)


def started_as(rank: int, torch_run: int) -> int:
    """The process that torchrun started as this rank."""
    children = Path(f"/proc/{torch_run}/task/{torch_run}/children").read_text().split()
    for child in children:
        if f"\0RANK={rank}\0" in Path(f"/proc/{child}/environ").read_text():
            return int(child)
    raise AssertionError(f"torchrun {torch_run} has no rank {rank}")


def weights(root: Path) -> bool:
    name = "weights"
    first = Ranks(root, 2, "weights", kill=1).train(name)
    second = Ranks(root, 2, stop=True, at=30).train(name)
    third = Ranks(root, 4, "weights").train(name)
    states = [one.result.status for one in (first, second, third)]
    holds = check(f"weights, states, weights: {states}", states == [FAILED, PRUNED, FINISHED])
    went_on = second.steps[0] > 1 and third.steps[0] > second.steps[0]
    holds &= check(f"each went on, at {second.steps[0]} and {third.steps[0]}", went_on)
    Ranks(root, 1).train("alone")
    distance = apart(third.losses("alone"), third.losses(name))
    return holds & check(f"losses within {distance:.1e} of one rank's", distance < 1e-3)


PARTS = {
    "agree": agree,
    "kill": kill,
    "elastic": elastic,
    "torchrun": torchrun,
    "weights": weights,
}


def main() -> None:
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    root = Path(tempfile.mkdtemp(prefix="ablab-ranks-"))
    write_tokens(root / "tiny")
    try:
        held = [PARTS[name](root) for name in sys.argv[1:] or PARTS]
    finally:
        shutil.rmtree(root)
    sys.exit(not all(held))


if __name__ == "__main__":
    main()
