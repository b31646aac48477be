"""A run on ranks that are processes: one job of the pool, whose ranks end together.  `make ranks` takes longer.

What ranks compute is held by tests/core/train/test_sharded.py.
"""

import os
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import pytest

from ablab.core.errors import UserError
from ablab.core.recipe.recipe import plain, run_id
from ablab.core.runtime.runtime import Runtime
from ablab.core.store.claim import this_process
from ablab.core.store.record import Record
from ablab.core.store.result import FAILED, FINISHED
from ablab.core.train.run import run
from ablab.experiments.run import capacity, this_machine, torchrun
from ablab.experiments.run.capacity import default_jobs, seats_for
from ablab.experiments.run.executor import Task
from ablab.experiments.run.messages import Done, Logged, TrainJob
from ablab.experiments.run.processes import local_processes
from ablab.experiments.run.ranks import RankDied
from ablab.experiments.run.this_machine import ThisMachine
from ablab.experiments.run.torchrun import Neighbours, name_the_dead, record_lost_leader

TWO = Runtime(device="cpu", ranks=2, log_every=1, evaluations=1, save_seconds=0.0)
ONE = Runtime(device="cpu", log_every=1, evaluations=1, save_seconds=0.0)


def ranks_of(agent: int) -> list[int]:
    """Process ids, rank 0 first."""
    children = Path(f"/proc/{agent}/task/{agent}/children").read_text().split()
    started = [
        pid for pid in children if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]
    return sorted(map(int, started))


@dataclass
class Killing:
    """Hears of jobs; kills rank 1 once the run `wanted` has logged its third step."""

    executor: object
    wanted: str
    ended: dict = field(default_factory=dict)

    def __call__(self, job, message):
        if isinstance(message, Logged) and (job.run, message.step) == (self.wanted, 3):
            _, second = ranks_of(self.executor.workers[0].process.pid)
            os.kill(second, signal.SIGKILL)
        if isinstance(message, Done):
            self.ended[job.run] = message.result
        return ()


@pytest.fixture(scope="module")
def told(tiny, token_folder, tmp_path_factory):
    """Two runs on two ranks, of which the second loses one: their folders, and the results that were told."""
    root = tmp_path_factory.mktemp("runs")
    recipes = {"whole": tiny(["muon"]), "lost": tiny(["muon"], budget__tokens=64 * 1000)}
    executor = local_processes(TWO, 1, [])
    jobs = {
        name: TrainJob(run_id(one), plain(one), asdict(TWO), root / name, token_folder)
        for name, one in recipes.items()
    }
    heard = Killing(executor, jobs["lost"].run)
    try:
        executor.execute([Task(lambda job=job: job) for job in jobs.values()], heard)
    finally:
        executor.close()
    return {name: (root / name, heard.ended[job.run]) for name, job in jobs.items()}


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds processes in /proc")
def test_two_ranks_train_a_run_as_one_does(told, tiny, token_folder, tmp_path):
    folder, result = told["whole"]
    assert result == Record(folder).result()
    assert result.status == FINISHED
    assert result.runtime["ranks"] == 2
    assert result.segments == []
    assert Record(folder).about()["world"]["backend"] == "gloo"
    alone = run(tiny(["muon"]), ONE, token_folder, Record(tmp_path / "alone"))
    assert result.run == alone.run
    assert result.metrics["val/loss"] == pytest.approx(alone.metrics["val/loss"], rel=1e-4)
    losses, others = (
        [line["train/loss"] for line in Record(one).metrics() if "train/loss" in line]
        for one in (folder, tmp_path / "alone")
    )
    assert losses == pytest.approx(others, rel=1e-4)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="finds processes in /proc")
def test_a_rank_that_is_killed_ends_the_run_with_its_cause_and_one_rank_goes_on(
    told, tiny, token_folder
):
    folder, result = told["lost"]
    assert result == Record(folder).result()
    assert result.status == FAILED
    assert "rank 1 of 2 was killed (SIGKILL" in result.error
    assert "run again to resume from its last checkpoint" in result.error
    steps = []

    def log(step, scalars, seconds):
        steps.append(step)
        if len(steps) == 3:
            raise KeyboardInterrupt

    recipe = tiny(["muon"], budget__tokens=64 * 1000)
    with pytest.raises(KeyboardInterrupt):
        run(recipe, ONE, token_folder, Record(folder), log, warn=pytest.fail)
    assert steps[0] > 1, "it began anew"


# -- what is handed out ----------------------------------------------------------------------------------------------
@pytest.fixture
def gpus(monkeypatch):
    def are(names):
        for module in (capacity, this_machine):
            monkeypatch.setattr(module, "gpus_for", lambda runtime: names)

    return are


def test_gpus_are_handed_out_as_many_at_a_time_as_a_run_takes(gpus):
    gpus(["4", "5", "6", "7", "9"])
    assert seats_for(Runtime(ranks=2)) == ["4,5", "6,7"]
    assert seats_for(Runtime()) == ["4", "5", "6", "7", "9"]
    assert default_jobs(Runtime(ranks=2)) == 2
    assert seats_for(Runtime(ranks=8)) == []


@pytest.mark.parametrize(
    ("there", "runtime", "said"),
    [
        ([], Runtime(ranks=2), "torch sees no GPU here; drop it, or add runtime.device=cpu"),
        (["0", "1"], Runtime(ranks=4), "there are 2 GPUs here; ask for at most 2"),
        (["0", "1", "2"], Runtime(ranks=3), "nearest: 2, 4"),
        (["0"], Runtime(shard="weights"), "runtime.ranks=1 is one; add --gpus-per-run 2"),
    ],
)
def test_more_than_there_is_is_refused_before_anything_starts(gpus, tiny, there, runtime, said):
    gpus(there)
    with pytest.raises(UserError) as refusal:
        ThisMachine().settled(runtime, [tiny()], [])
    assert said in str(refusal.value)


def test_ranks_that_torchrun_started_are_those_of_every_run(monkeypatch, tiny):
    places = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "4", "MASTER_ADDR": "a"}
    for name, value in (places | {"MASTER_PORT": "1"}).items():
        monkeypatch.setenv(name, value)
    assert ThisMachine().settled(ONE, [tiny()], []).ranks == 4
    assert ThisMachine().carried(ONE) == 1
    with pytest.raises(UserError, match="torchrun started 4 ranks; drop the first"):
        ThisMachine().settled(TWO, [tiny()], [])


# -- ranks that torchrun ends ----------------------------------------------------------------------------------------
@pytest.fixture
def neighbours():
    """(our rank, the ranks that have ended, of how many) -> Neighbours; the others are this process."""
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    here = this_process()

    def of(own: int, ended: tuple[int, ...], ranks: int) -> Neighbours:
        processes = [
            replace(here, process=gone.pid) if rank in ended else here for rank in range(ranks)
        ]
        return Neighbours(own, tuple(processes))

    return of


@pytest.fixture
def lost(tiny, token_folder, tmp_path):
    """A job whose run has no result."""
    recipe = tiny()
    folder = tmp_path / "run"
    folder.mkdir()
    return TrainJob(run_id(recipe), plain(recipe), asdict(TWO), folder, token_folder)


def test_rank_0_names_the_rank_that_ended_before_it(neighbours):
    with pytest.raises(RankDied, match=r"rank 2 of 4 ended; .*; run again to resume"):
        name_the_dead(neighbours(0, (2,), 4))


def test_a_fault_while_all_ranks_live_keeps_its_own_words(neighbours, monkeypatch):
    monkeypatch.setattr(torchrun, "SECONDS_TO_BE_ENDED", 0.0)
    name_the_dead(neighbours(0, (), 2))


def test_the_first_rank_that_is_left_writes_the_record_of_rank_0(neighbours, lost):
    record_lost_leader(neighbours(2, (0,), 3), lost)
    assert Record(lost.folder).result() is None
    record_lost_leader(neighbours(1, (0,), 3), lost)
    result = Record(lost.folder).result()
    assert result.status == FAILED
    assert result.error.startswith("rank 0 of 3 ended; torchrun")


def test_a_rank_that_outlives_another_than_rank_0_writes_nothing(neighbours, lost):
    record_lost_leader(neighbours(1, (2,), 3), lost)
    assert Record(lost.folder).result() is None
