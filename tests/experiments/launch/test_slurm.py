"""Jobs of submitit: what crosses a mailbox, a preempted job, a store that moved."""

import math
import os
import shutil
import signal
from dataclasses import asdict
from pathlib import Path

import pytest

from ablab.core.recipe.recipe import plain, run_id
from ablab.core.runtime.runtime import Runtime
from ablab.core.store.record import Record
from ablab.core.store.result import FINISHED, Result
from ablab.core.store.store import Store
from ablab.core.train.run import run
from ablab.experiments.launch.base import Site
from ablab.experiments.launch.slurm import ArrayTask, Mailbox, SlurmLauncher
from ablab.experiments.run.executor import Task
from ablab.experiments.run.messages import (
    Began,
    Done,
    Logged,
    Lost,
    Refused,
    Stop,
    TrainJob,
    Warned,
)

CPU = Runtime(device="cpu", log_every=1, evaluations=1)


def train_job(recipe, store: Store, data: Path, runtime: Runtime = CPU) -> TrainJob:
    id = run_id(recipe)
    return TrainJob(id, plain(recipe), asdict(runtime), store.run(id).folder, data)


# -- mailboxes ---------------------------------------------------------------------------------------------------------
def test_messages_cross_a_mailbox_unchanged_and_half_a_line_waits_for_its_end(tmp_path):
    box = Mailbox(tmp_path / "said")
    assert box.after(0) == ([], 0)
    result = Result("0123", FINISHED, 6, 384, {"val/loss": 2.5}, seconds=1.5)
    said = [Began(), Logged(3, {"train/loss": 0.1 + 0.2}, 0.25), Warned("ä"), Done(result)]
    for message in said:
        box.put(message)
    whole = box.path.read_bytes()
    heard, at = box.after(0)
    assert heard == said
    assert at == len(whole)
    box.path.write_bytes(whole[:-9])
    before, at = box.after(0)
    assert before == said[:3]
    box.path.write_bytes(whole)
    assert box.after(at)[0] == said[3:]


def test_a_loss_that_is_no_number_crosses_too(tmp_path):
    box = Mailbox(tmp_path / "said")
    box.put(Logged(1, {"train/loss": math.nan, "grad": math.inf}, 0.5))
    [heard], _ = box.after(0)
    assert math.isnan(heard.scalars["train/loss"])
    assert heard.scalars["grad"] == math.inf


# -- a job -------------------------------------------------------------------------------------------------------------
def test_a_requeued_job_whose_store_moved_ends_with_one_line(
    tiny, token_folder, tmp_path, monkeypatch
):
    monkeypatch.setattr("ablab.core.store.store.SECONDS_TO_APPEAR", 0.0)
    store = Store(tmp_path / "store")
    job = train_job(tiny(), store, token_folder)
    task = ArrayTask(Site.of(store, []), job, 0.0, store.root / "said", store.root / "told")
    store.root.rename(tmp_path / "moved")
    with pytest.raises(SystemExit) as end:
        task()
    assert str(store.root) in end.value.code
    assert not store.root.exists()  # nothing was begun at the old place
    store.root.mkdir()
    with pytest.raises(SystemExit):
        task()
    [said], _ = task.said.after(0)  # whoever waits there hears of it
    assert isinstance(said, Refused)


def children(pid: int) -> list[int]:
    return [*map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())]


@pytest.mark.timeout(280)
def test_a_preempted_job_is_requeued_and_ends_in_the_bits_of_one_that_was_not(
    tiny, token_folder, tmp_path, monkeypatch
):
    """submitit's local executor requeues as SLURM does: the job saves, ends, and begins again."""
    # of a run of 150 steps its first is heard in time to be preempted
    monkeypatch.setattr("ablab.experiments.launch.slurm.LOOKING", 0.1)
    recipe = tiny(["muon", "ema"], budget__tokens=64 * 150)
    calm = Record(tmp_path / "calm")
    run(recipe, CPU, token_folder, calm, warn=lambda line: None)
    store = Store(tmp_path / "store")
    job = train_job(recipe, store, token_folder)
    executor = SlurmLauncher({"cluster": "local"}).start(store, CPU, None, [])
    heard = []

    def hear(job, message):
        heard.append(message)
        if isinstance(message, Logged) and not any(isinstance(one, Stop) for one in heard):
            heard.append(Stop(job.run))  # a mark
            [flight] = executor.flights
            [submitted] = children(flight.submitted._process.pid)
            os.kill(submitted, signal.SIGUSR2)
        return []

    try:
        executor.execute([Task(lambda: job)], hear)
    finally:
        executor.close()
    [warned] = [one.line for one in heard if isinstance(one, Warned)]
    assert "saved and requeued" in warned
    assert [type(one) for one in heard].count(Began) == 2
    logged = [one.step for one in heard if isinstance(one, Logged)]
    assert logged == [*range(1, 151)]  # no step twice
    assert heard[-1].result.weights == calm.result().weights
    assert store.run(job.run).metrics_path.read_bytes() == calm.metrics_path.read_bytes()


# -- a job that ends without a word ------------------------------------------------------------------------------------
class Ended:
    """A job of SLURM that is over.  state: how."""

    job_id = "12_3"

    def __init__(self, state: str, folder: Path):
        self.state = state
        self.paths = type("Paths", (), {"stderr": folder / "12_3_0_log.err"})
        self.cancelled = False

    def done(self) -> bool:
        return True

    def cancel(self, check: bool) -> None:
        self.cancelled = True


class FakeExecutor:
    """Every job ends at once, in the next of these states."""

    def __init__(self, states: list[str], folder: Path):
        self.states = states
        self.folder = folder

    def submit_array(self, calls):
        return [Ended(self.states.pop(0), self.folder) for _ in calls]


@pytest.fixture
def silent(tiny, token_folder, tmp_path, monkeypatch):
    """states -> what is heard of a job that ends in each of them, without a word."""
    monkeypatch.setattr("ablab.experiments.launch.slurm.LOOKING", 0.01)
    monkeypatch.setattr("ablab.experiments.launch.slurm.SILENCE", 0.0)

    def of(*states: str) -> list:
        store = Store(tmp_path / "store")
        shutil.rmtree(store.root, ignore_errors=True)
        executor = SlurmLauncher({"cluster": "local"}).start(store, CPU, None, [])
        executor.executor = FakeExecutor([*states], tmp_path)
        executor.patience = 0.0
        job = train_job(tiny(), store, token_folder)
        heard = []
        executor.execute([Task(lambda: job)], lambda job, said: heard.append(said) or [])
        return heard

    return of


def test_a_job_that_slurm_ended_is_submitted_again_a_few_times(silent):
    heard = silent(*["NODE_FAIL"] * 4)
    assert [type(one) for one in heard] == [Lost, Lost, Lost, Done]
    assert "NODE_FAIL" in heard[0].why
    assert heard[-1].result.status == "failed"


def test_a_job_that_ended_by_itself_is_a_failure_that_says_where_to_look(silent):
    [ended] = silent("FAILED")
    assert ended.result.status == "failed"
    assert "12_3 ended as FAILED without an answer: see" in ended.result.error
    assert "12_3_0_log.err" in ended.result.error
