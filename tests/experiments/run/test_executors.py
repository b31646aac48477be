"""What every executor of jobs keeps (experiments/run/executor.py).  A new one is a row of EXECUTORS."""

import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import pytest

from ablab.core.recipe.recipe import plain, run_id
from ablab.core.runtime.runtime import Runtime
from ablab.core.store.claim import Watch, place_beside, take
from ablab.core.store.evaluation import path_of
from ablab.core.store.record import Record
from ablab.core.store.result import FAILED, FINISHED, PRUNED, Result
from ablab.core.store.store import Store
from ablab.experiments.evaluate.asking import Request
from ablab.experiments.evaluate.evaluating import evaluate
from ablab.experiments.evaluate.subjects import How, subject_of
from ablab.experiments.run.evaluations import Wanted
from ablab.experiments.run.executor import Executor, Task
from ablab.experiments.run.messages import (
    Asked,
    Began,
    Busy,
    Done,
    Evaluated,
    Found,
    Logged,
    Message,
    Refused,
    Traced,
    TraceJob,
    TrainJob,
)
from ablab.experiments.run.processes import local_processes

LONG = 1000  # steps: never reached
CPU = asdict(Runtime(device="cpu", log_every=1, evaluations=1))


class Kind:
    """An executor whose every run has so many ranks.  Those of several take minutes: `make cluster` asks for them."""

    def __init__(self, ranks: int = 1):
        self.ranks = ranks
        self.runtime = CPU | {"ranks": ranks}

    def __str__(self) -> str:
        return type(self).__name__ + (f"-{self.ranks}-ranks" if self.ranks > 1 else "")

    @property
    def takes_minutes(self) -> bool:
        return self.ranks > 1


class Local(Kind):
    """Processes of this machine."""

    def start(self, store: Store) -> Executor:
        return local_processes(Runtime(**self.runtime), 1, [])

    def end(self) -> None: ...

    def kill_worker(self, executor) -> None:
        os.kill(executor.workers[0].process.pid, signal.SIGKILL)

    def worker_ids(self, executor) -> list[int]:
        return [worker.process.pid for worker in executor.workers]


class OnRay(Kind):
    """A node of a Ray cluster, on this machine."""

    def start(self, store: Store) -> Executor:
        pytest.importorskip("ray", reason="needs ablab[ray]")
        from ray.cluster_utils import Cluster

        from ablab.experiments.launch.ray import RayLauncher

        self.cluster = Cluster(
            initialize_head=True,
            head_node_args={"num_cpus": self.ranks, "include_dashboard": False},
        )
        launcher = RayLauncher(self.cluster.address)
        runtime = launcher.settled(Runtime(**self.runtime), [], [])
        assert launcher.carried(runtime) == 1
        return launcher.start(store, runtime, None, [])

    def end(self) -> None:
        self.cluster.shutdown()

    def kill_worker(self, executor) -> None:
        [worker] = self.worker_ids(executor)
        os.kill(worker, signal.SIGKILL)

    def worker_ids(self, executor) -> list[int]:
        """The processes that the actors have started."""
        return [
            pid
            for pid in map(int, filter(str.isdigit, os.listdir("/proc")))
            if "spawn_main" in words_of(pid) and "ray::Host" in words_of(parent_of(pid))
        ]


class OnSlurm(Kind):
    """Jobs of submitit, whose local executor stands in for SLURM.

    Each starts an interpreter and imports torch, 70 s of a core in all.
    """

    takes_minutes = True

    def start(self, store: Store) -> Executor:
        from ablab.experiments.launch.slurm import SlurmLauncher

        launcher = SlurmLauncher({"cluster": "local"})
        runtime = launcher.settled(Runtime(**self.runtime), [], [])
        started = launcher.start(store, runtime, 1, [])
        started.patience = 1.0
        return started

    def end(self) -> None: ...

    def kill_worker(self, executor) -> None:
        [worker] = self.worker_ids(executor)
        os.kill(worker, signal.SIGKILL)

    def worker_ids(self, executor) -> list[int]:
        """The processes that the jobs have started."""
        controllers = [flight.submitted._process.pid for flight in executor.flights]
        return [
            pid
            for pid in map(int, filter(str.isdigit, os.listdir("/proc")))
            if "spawn_main" in words_of(pid) and parent_of(parent_of(pid)) in controllers
        ]


def words_of(pid: int) -> str:
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_text()
    return ""


def parent_of(pid: int) -> int:
    with suppress(OSError):
        _, _, stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")
        return int(stat.split()[1])
    return 0


EXECUTORS = [Local(), OnRay(), OnSlurm(), Local(2), OnRay(2), OnSlurm(2)]


@pytest.fixture(scope="module", params=EXECUTORS, ids=str)
def kind(request):
    if request.param.takes_minutes and "ABLAB_CLUSTER" not in os.environ:
        pytest.skip("minutes of a core: make cluster")
    return request.param


@pytest.fixture(scope="module")
def executor(kind, tmp_path_factory):
    """One for the file: a worker takes seconds to start."""
    started = kind.start(Store(tmp_path_factory.mktemp("store")))
    yield started
    started.close()
    kind.end()


@pytest.fixture
def job(kind, tiny, token_folder, tmp_path):
    """A TrainJob of a recipe of `steps` steps; keys replace its own."""

    def of(steps: int = 6, **keys) -> TrainJob:
        recipe = tiny(budget__tokens=64 * steps)
        id = run_id(recipe)
        own = {"run": id, "recipe": plain(recipe), "folder": tmp_path / id}
        return TrainJob(**{"runtime": kind.runtime, "data": token_folder, **own, **keys})

    return of


@dataclass
class Listening:
    """Keeps what it hears, and answers what `then` answers."""

    then: Callable[[Message], None | list[Task]] = lambda message: None
    heard: list[Message] = field(default_factory=list)

    def __call__(self, job, message):
        self.heard.append(message)
        return self.then(message) or []

    def of(self, kind: type) -> list[Message]:
        return [message for message in self.heard if isinstance(message, kind)]


def task(job) -> Task:
    return Task(lambda: job)


def execute(executor, job, then=lambda message: None) -> Listening:
    listening = Listening(then)
    executor.execute([task(job)], listening)
    return listening


def test_a_run_is_heard_of_in_order_and_its_last_word_is_its_result(executor, job):
    wanted = job(6)
    listening = execute(executor, wanted)
    first, *logs, last = listening.heard
    assert first == Began()
    assert [message.step for message in logs] == [1, 2, 3, 4, 5, 6]
    assert last.result.status == FINISHED
    assert last.result == Record(wanted.folder).result()


def test_a_run_has_the_bits_of_this_machine(executor, kind, job, tmp_path):
    wanted = job(8)
    there = execute(executor, wanted).heard[-1].result
    here = Local(kind.ranks).start(Store(tmp_path / "here"))
    try:
        alone = execute(here, replace(wanted, folder=tmp_path / "alone")).heard[-1].result
    finally:
        here.close()
    assert there.weights == alone.weights
    assert there.runtime["ranks"] == kind.ranks
    told = Record(wanted.folder), Record(tmp_path / "alone")
    assert told[0].metrics_path.read_bytes() == told[1].metrics_path.read_bytes()


def test_a_run_that_has_a_result_is_found_and_not_trained_again(executor, job):
    wanted = job()
    execute(executor, wanted)
    again = execute(executor, wanted)
    assert again.heard == [Found(Record(wanted.folder).result())]


@pytest.mark.parametrize("shift", [0, 86400, -86400])
def test_a_failure_from_before_it_was_asked_for_is_tried_again(executor, job, shift):
    """However it is dated: the clock of another machine may be ahead."""
    wanted = job()
    record = Record(wanted.folder)
    wanted.folder.mkdir()
    failure = Result(wanted.run, FAILED, 0, 0, error="an earlier one")
    record.finish(failure)
    dated = time.time() + shift
    os.utime(record.result_path, (dated, dated))
    assert execute(executor, wanted).heard == [Found(failure)]
    asked_later = job(before=record.stamp())
    assert execute(executor, asked_later).heard[-1].result.status == FINISHED


def test_what_an_answer_sets_free_is_executed_too(executor, job):
    wanted = job()
    trace = TraceJob(wanted.run, wanted.recipe, wanted.runtime)

    def then(message):
        return [task(wanted)] if isinstance(message, Traced) else None

    listening = execute(executor, trace, then)
    assert isinstance(listening.heard[0], Traced)
    assert isinstance(listening.heard[-1], Done)


def test_tasks_are_made_when_they_are_given_and_each_is_answered(executor, job):
    jobs = [job(steps) for steps in (3, 4, 5)]
    made_after = []
    listening = Listening()

    def making(one):
        made_after.append(len(listening.of(Done)))
        return one

    executor.execute([Task(lambda one=one: making(one)) for one in jobs], listening)
    assert made_after == [0, 1, 2]
    assert [message.result.step for message in listening.of(Done)] == [3, 4, 5]


def test_a_run_that_another_process_holds_is_asked_for_again(executor, job):
    wanted = job()
    wanted.folder.mkdir()
    claim = take(Record(wanted.folder).claim_path, Watch())

    def then(message):
        if isinstance(message, Busy):
            claim.release()

    listening = execute(executor, wanted, then)
    assert listening.heard[:2] == [Busy(), Began()]
    assert listening.heard[-1].result.status == FINISHED


def test_a_run_that_is_stopped_ends_pruned_and_goes_on_when_asked_again(executor, job):
    wanted = job(LONG)

    def then(message):
        if isinstance(message, Logged):
            executor.stop(wanted.run)

    stopped = execute(executor, wanted, then).heard[-1].result
    assert stopped.status == PRUNED
    assert stopped.step < LONG
    executor.stop(wanted.run)  # of a run that has ended: nothing happens
    asked_later = job(LONG, before=Record(wanted.folder).stamp())
    going_on = execute(executor, asked_later, then)
    assert going_on.of(Logged)[0].step == stopped.step + 1


def test_what_a_worker_would_compute_otherwise_than_asked_is_refused(executor, job):
    [refused] = execute(executor, job(run="0123456789abcdef")).heard
    assert isinstance(refused, Refused)
    assert "the file of an intervention changed" in refused.why


# -- evaluations -------------------------------------------------------------------------------------------------------
HOW = How("cpu", batch=1)


@pytest.fixture
def wanted(weights_folder, pairs, tmp_path) -> Wanted:
    """Of five items."""
    store = Store(tmp_path / "store")
    subject = subject_of(str(weights_folder), store)
    request = Request("blimp", bundle=pairs)
    return Wanted.of(subject, request, request.exam(subject, store))


def test_an_evaluation_is_written_once_as_this_process_would_write_it(
    executor, wanted, tmp_path
):
    listening = execute(executor, wanted.job(HOW))
    *asked, last = listening.heard
    assert last == Evaluated()
    assert asked[0] == Asked(0, 5)
    assert asked[-1] == Asked(5, 5)
    written = wanted.standing("fp32")
    here = replace(wanted.subject, folder=tmp_path / "here")
    exam = wanted.request.exam(here, Store(tmp_path / "store"))
    alone = evaluate(here, exam, HOW, ["cpu"])
    assert replace(written, seconds=0) == replace(alone, seconds=0)
    assert execute(executor, wanted.job(HOW)).heard == [Evaluated()]


def test_an_evaluation_that_another_process_holds_is_asked_for_again(executor, wanted):
    path = path_of(wanted.subject.folder, wanted.title)
    claim = take(place_beside(path.with_suffix(".jsonl")), Watch())

    def then(message):
        if isinstance(message, Busy):
            claim.release()

    listening = execute(executor, wanted.job(HOW), then)
    assert listening.heard[0] == Busy()
    assert listening.heard[-1] == Evaluated()


def test_other_questions_or_weights_than_where_they_were_asked_for_are_refused(
    executor, wanted
):
    other = replace(wanted, bundle="0123456789abcdef")
    [refused] = execute(executor, other.job(HOW)).heard
    assert "has other questions there" in refused.why
    other = replace(wanted, subject=replace(wanted.subject, weights="0123456789abcdef"))
    [refused] = execute(executor, other.job(HOW)).heard
    assert "holds other weights" in refused.why


# -- deaths ------------------------------------------------------------------------------------------------------------
def test_a_run_whose_worker_dies_is_a_failure_and_another_worker_takes_the_next(
    executor, job, kind
):
    lost = job(LONG)
    next_one = job(5)
    killed = []

    def then(message):
        if isinstance(message, Logged) and not killed:
            kind.kill_worker(executor)
            killed.append(message)

    listening = Listening(then)
    executor.execute([task(lost), task(next_one)], listening)
    first, second = (message.result for message in listening.of(Done))
    assert first.status == FAILED
    assert "the worker died with exit code -9" in first.error
    assert first == Record(lost.folder).result()
    assert second.status == FINISHED


class Enough(Exception):
    """Ends `execute` in the midst of a run."""


def test_nothing_runs_on_when_it_is_closed(executor, kind, job, alive, wait_until):
    """The last test of the file, for it ends the executor of the others."""
    ids = []

    def then(message):
        if isinstance(message, Logged):
            ids.extend(kind.worker_ids(executor))
            raise Enough

    with pytest.raises(Enough):
        execute(executor, job(LONG), then)
    assert all(map(alive, ids))
    executor.close()
    wait_until(lambda: not any(map(alive, ids)), "a worker outlived its executor")
    assert ids
