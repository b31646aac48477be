"""Stopped in time: the first signal and the deadline save what trains, the second signal ends at once."""

import os
import signal
from dataclasses import dataclass, field

import pytest

from ablab.core.errors import Halted, UserError
from ablab.core.runtime.runtime import Runtime
from ablab.core.store.inventory import held_runs
from ablab.core.store.record import Record
from ablab.core.store.result import FINISHED, INTERRUPTED, Result
from ablab.core.store.store import Store
from ablab.core.train import checkpoint
from ablab.core.train.run import run
from ablab.experiments.cli.in_time import ends_in_time
from ablab.experiments.run import halting
from ablab.experiments.run.halting import SIGNALS, Interrupted, halted_by_it, stopped_in_time
from ablab.experiments.run.messages import Done, Logged
from ablab.experiments.run.messages import Halted as HaltedAnswer
from ablab.experiments.run.pool import Pool
from ablab.experiments.run.progress import Quiet

CPU = Runtime(device="cpu", log_every=3, evaluations=2)


def quiet(line: str) -> None:
    """Told of nothing."""


# -- one run -----------------------------------------------------------------------------------------------------------
@dataclass
class AfterSteps:
    """Halts a run after so many questions."""

    steps: int

    def __call__(self) -> bool:
        self.steps -= 1
        return self.steps < 0


def test_a_run_halted_after_any_step_goes_on_to_the_same_bits(tiny, token_folder, tmp_path):
    recipe = tiny(["ema"])
    calm = Record(tmp_path / "calm")
    run(recipe, CPU, token_folder, calm, warn=quiet)
    halted = Record(tmp_path / "halted")
    came_to = []
    for steps in (0, 1, 3, 0):
        with pytest.raises(Halted) as end:
            run(recipe, CPU, token_folder, halted, warn=quiet, halts=AfterSteps(steps))
        came_to.append(end.value.step)
        assert halted.mark().step == end.value.step
        assert halted.result() is None
    assert came_to == [0, 1, 4, 4]
    run(recipe, CPU, token_folder, halted, warn=quiet)
    assert halted.metrics_path.read_bytes() == calm.metrics_path.read_bytes()
    assert halted.result().weights == calm.result().weights
    assert {path.name for path in halted.folder.iterdir()} == {
        path.name for path in calm.folder.iterdir()
    }


def test_the_store_says_how_far_a_halted_run_came(tiny, token_folder, tmp_path):
    folder = tmp_path / "runs" / "0123456789abcdef"
    with pytest.raises(Halted):
        run(tiny(), CPU, token_folder, Record(folder), warn=quiet, halts=AfterSteps(5))
    [held] = held_runs(Store(tmp_path))
    assert (held.status, held.step, held.tokens) == (INTERRUPTED, 5, 5 * 64)


def test_a_broken_state_is_not_saved_when_a_run_is_halted(tiny, token_folder, tmp_path):
    record = Record(tmp_path)
    broken = tiny(optim__lr=1e30)
    unlogged = Runtime(device="cpu", log_every=100, evaluations=1)
    with pytest.raises(Halted):
        run(broken, unlogged, token_folder, record, warn=quiet, halts=AfterSteps(5))
    assert checkpoint.listed(tmp_path / "checkpoints") == []


# -- signals -----------------------------------------------------------------------------------------------------------
@pytest.fixture(autouse=True)
def nothing_ignored():
    """A shell ignores SIGINT in what it runs in the background."""
    before = {sign: signal.signal(sign, signal.default_int_handler) for sign in SIGNALS}
    yield
    for sign, handler in before.items():
        signal.signal(sign, handler)


@dataclass
class Told:
    halted: int = 0

    def halt(self) -> None:
        self.halted += 1


@pytest.mark.parametrize("sign", SIGNALS)
def test_the_first_signal_tells_who_trains_and_the_second_ends_at_once(sign, capfd):
    told = Told()
    before = signal.getsignal(sign)
    with stopped_in_time(), halted_by_it(told):
        os.kill(os.getpid(), sign)
        assert told.halted == 1
        assert halting.is_halted()
        with pytest.raises(KeyboardInterrupt) as second:
            os.kill(os.getpid(), signal.SIGTERM)
        assert not isinstance(second.value, Interrupted)
    assert told.halted == 1
    assert signal.getsignal(sign) == before
    assert (
        capfd.readouterr().err
        == f"{sign.name}: saving what runs, then ending; again to end at once\n"
    )


def test_where_nobody_trains_a_signal_ends_the_command_with_75():
    import typer

    @ends_in_time
    def plans() -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(typer.Exit) as end:
        plans()
    assert end.value.exit_code == 75


def test_what_is_ignored_stays_so():
    """`nohup` ignores SIGHUP."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stopped_in_time(), halted_by_it(Told()):
            os.kill(os.getpid(), signal.SIGHUP)
            assert not halting.is_halted()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_deadline_comes_as_a_signal_does(wait_until, capfd):
    told = Told()
    with stopped_in_time(0.02), halted_by_it(told):
        wait_until(lambda: told.halted, "the deadline passed")
    assert capfd.readouterr().err == "--deadline: saving what runs, then ending\n"


def test_what_keeps_a_halted_command_is_cut_off_in_the_end(monkeypatch, wait_until):
    monkeypatch.setattr(halting, "LAST", 0.02)
    with stopped_in_time(), halted_by_it(Told()):
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(Interrupted):
            wait_until(lambda: False, "nothing")


@pytest.mark.parametrize("text", ["9", "0m", "soon", "-3m"])
def test_a_deadline_is_a_time(text):
    @ends_in_time
    def trains(deadline: str | None = None) -> None: ...

    with pytest.raises(UserError, match=r"--deadline '.*' must be a time above 0, such as 9m"):
        trains(deadline=text)


# -- a grid and its deadline -------------------------------------------------------------------------------------------
@dataclass
class Acted:
    """An executor that plays a part: each run logs half of its steps after so many seconds, then ends, or is halted."""

    seconds: float
    halts_after: int = 99
    begun: list[str] = field(default_factory=list)

    def execute(self, tasks, heard) -> None:
        for task in tasks:
            if job := task.make():
                self.begun.append(job.run)
                heard(job, Logged(10, {}, self.seconds / 2))
                late = len(self.begun) > self.halts_after
                done = Done(Result(job.run, FINISHED, 20, 1280, seconds=self.seconds))
                heard(job, HaltedAnswer(10) if late else done)

    def halt(self) -> None: ...

    def stop(self, run: str) -> None: ...

    def close(self) -> None: ...


@dataclass
class Heard(Quiet):
    said: list[str] = field(default_factory=list)

    def say(self, line: str) -> None:
        self.said.append(line)


@pytest.fixture(scope="module")
def grid(lab):
    from ablab.core.data.corpus import load_meta
    from ablab.experiments.plan.experiment import load

    lab.sheet("deadline", seeds=[0, 1])

    def digest_of(data: str) -> str:
        return load_meta(lab.store / "data" / data).digest

    return load(str(lab.root / "deadline.yaml"), {}, digest_of)


def train(lab, grid, executor: Acted, heard: Heard):
    with Pool(grid, Store(lab.store), heard, jobs=1) as pool:
        pool.executor = executor
        return pool.train(grid.runs())


def test_what_is_predicted_to_end_too_late_is_not_begun(lab, grid):
    """The first run is begun, for nothing has been measured; it would take twelve minutes of eight."""
    executor = Acted(seconds=600)
    heard = Heard()
    with stopped_in_time(540), pytest.raises(Interrupted):
        train(lab, grid, executor, heard)
    assert len(executor.begun) == 1
    [said] = heard.said
    assert said.startswith(
        "--deadline: 7 runs are not begun: each takes 12 min or more, and 8 min"
    )


def test_what_fits_is_begun(lab, grid):
    executor = Acted(seconds=6)
    with stopped_in_time(540):
        outcome = train(lab, grid, executor, Heard())
    assert executor.begun == outcome.trained
    assert len(outcome.trained) == 8


def test_a_run_that_was_begun_before_goes_on_whatever_it_takes(lab, grid):
    late = grid.runs()[5]
    folder = Store(lab.store).run(late.id).folder / "checkpoints"
    folder.mkdir(parents=True)
    (folder / "step-00000010-00000000.safetensors").touch()
    executor = Acted(seconds=600)
    with stopped_in_time(540), pytest.raises(Interrupted):
        train(lab, grid, executor, Heard())
    assert executor.begun == [grid.runs()[0].id, late.id]


def test_a_command_of_which_a_run_was_saved_is_interrupted(lab, grid):
    heard = Heard()
    with stopped_in_time(), pytest.raises(Interrupted):
        train(lab, grid, Acted(seconds=1, halts_after=7), heard)
    assert heard.said == [f"{grid.runs()[-1].title}, seed 1: saved at step 10"]


def test_time_is_left_until_saving_begins():
    with stopped_in_time(540):
        assert halting.time_left() == pytest.approx(510, abs=5)
    with stopped_in_time(10):
        assert halting.time_left() == pytest.approx(9, abs=0.9)
    assert halting.time_left() is None
