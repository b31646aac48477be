"""What a person sees while a grid runs."""

import io
from dataclasses import replace

import pytest

from ablab.core.recipe.recipe import Budget
from ablab.core.store.result import FAILED, FINISHED, Result
from ablab.experiments.plan.experiment import PlannedRun
from ablab.experiments.run.progress import ArmProgress, Live, watcher


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def runs(tiny):
    recipe = tiny()
    return [PlannedRun(cell, 0, recipe, f"id of {cell}") for cell in ("base", "+ ema")]


@pytest.fixture
def on_a_terminal(monkeypatch):
    """A function that turns stderr into a terminal, from the test itself: pytest sets it anew before each test."""

    def begin() -> Terminal:
        terminal = Terminal()
        monkeypatch.setattr("sys.stderr", terminal)
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.setenv("COLUMNS", "120")
        return terminal

    return begin


FAILURE = Result("1", FAILED, 0, 0, error="[bold]index [3]")  # looks like markup
SUCCESS = Result(
    "0",
    FINISHED,
    step=12,
    tokens=768,
    metrics={"val/loss": 3.9},
    seconds=1.5,
    tokens_per_second=512.0,
)


def play(watching, runs) -> None:
    """Two runs, one of which fails."""
    good, bad = runs
    watching.planned(3, 1, 2, 24)
    watching.started(good)
    watching.started(bad)
    watching.logged(good, 6, {"train/loss": 4.1, "tokens_per_second": 1234.0})
    watching.note("a note")
    watching.finished(bad, FAILURE)
    watching.logged(good, 12, {"train/loss": 4.0, "tokens_per_second": 1234.0})
    watching.finished(good, SUCCESS)


def test_a_terminal_gets_bars_that_leave_and_lines_that_stay(runs, on_a_terminal):
    terminal = on_a_terminal()
    watching = watcher("val/loss", quiet=False)
    assert isinstance(watching, Live)
    play(watching, runs)
    [grid] = watching.bars.tasks
    assert grid.completed == grid.total == 24
    watching.close()
    said = terminal.getvalue()
    assert "[2/3] + ema, seed 0: FAILED: [bold]index [3]" in said
    assert "[3/3] base, seed 0: val/loss 3.9000, 512 tokens/s, 2 s" in said
    assert "\x1b[?25h" in said  # the cursor is back


def test_a_grid_that_is_done_already_is_a_full_bar_and_none_that_waits(on_a_terminal):
    on_a_terminal()
    watching = Live("val/loss")
    watching.planned(6, 6, 0, 0)
    assert watching.bars.tasks[0].total == 0
    watching.close()


def test_a_grid_whose_stages_differ_in_length_is_a_bar_of_all_their_steps(runs, on_a_terminal):
    """Counted by its first run, a chain of 12 and 40 steps would be full after 24."""
    on_a_terminal()
    watching = Live("val/loss")
    first, second = runs
    longer = replace(second.recipe, budget=Budget(40 * 64))
    second = replace(second, recipe=longer)
    watching.planned(2, 0, 1, first.recipe.steps + longer.steps)
    grid = watching.bars.tasks[0]
    watching.started(first)
    watching.logged(first, 12, {"train/loss": 3.0})
    assert (grid.completed, grid.total) == (12, 52)
    watching.started(second)
    watching.logged(second, 40, {"train/loss": 2.0})
    assert grid.finished
    watching.close()


def test_a_pipe_gets_plain_lines_and_quiet_only_what_must_not_be_missed(runs, capsys):
    play(watcher("val/loss", quiet=False), runs)
    lines = [line.split("s  ", 1)[1] for line in capsys.readouterr().err.splitlines()]
    assert lines == [
        "3 runs: 1 done already, 2 to train, 2 at a time",
        "a note",
        "[2/3] + ema, seed 0: FAILED: [bold]index [3]",
        "[3/3] base, seed 0: val/loss 3.9000, 512 tokens/s, 2 s",
    ]
    play(watcher("val/loss", quiet=True), runs)
    assert capsys.readouterr().err == "+ ema, seed 0: FAILED: [bold]index [3]\n"


def test_a_study_on_a_terminal_shows_its_arms_their_best_so_far_and_the_time_left(
    on_a_terminal, monkeypatch
):
    terminal = on_a_terminal()
    watching = watcher("val/loss", quiet=False)

    def shown_at(now: float, done: int, best: float | None, at: dict) -> None:
        clock = "ablab.experiments.run.progress.time.monotonic"
        monkeypatch.setattr(clock, lambda: now)
        base = ArmProgress("base", done, 8, best, at, {})
        ema = ArmProgress("+ ema", 1, 8, None, {}, {"diverged": 1})
        watching.arms([base, ema], "val/loss")

    shown_at(100.0, done=2, best=None, at={})
    shown_at(160.0, done=5, best=3.25, at={"optim.lr": 0.01})
    watching.bars.refresh()
    watching.close()
    said = terminal.getvalue()
    for word in ("best val/loss", "5/8", "3.2500", "optim.lr=0.01", "1/8, 1 diverged"):
        assert word in said
    assert "6 of 16 trials, about 3 min left" in said  # 3 trials took a minute, and 10 are left


@pytest.fixture
def clock(monkeypatch):
    """A clock that a test sets by hand."""
    now = [100.0]
    monkeypatch.setattr("ablab.experiments.run.progress.time.monotonic", lambda: now[0])
    return now


def test_off_a_terminal_a_run_says_its_step_and_the_time_left_at_a_cadence(runs, clock, capsys):
    """12 steps; 3 of them in 45 s: nine more take 135 s."""
    watching = watcher("val/loss", quiet=False)
    watching.planned(2, 0, 1, 24)
    watching.started(runs[0])
    pace = {"tokens_per_second": 1234.0}
    for seconds, step in ((10, 1), (20, 2), (45, 3), (50, 4), (110, 11), (200, 12)):
        clock[0] = 100.0 + seconds
        scalars = {"val/loss": 3.0} if step == 3 else {"train/loss": 5.0 - step / 10}
        watching.logged(runs[0], step, scalars | pace)
    said = [line for line in capsys.readouterr().err.splitlines() if "step" in line]
    assert said == [
        "    45s  base, seed 0: step 3/12, loss 4.800  1,234 tokens/s, about 2 min left",
        "   110s  base, seed 0: step 11/12, loss 3.900  1,234 tokens/s, about 8 s left",
    ]


def test_off_a_terminal_a_study_says_each_trial_its_point_and_the_best(clock, capsys):
    watching = watcher("val/loss", quiet=False)
    first = ArmProgress("full", 1, 8, None, {}, {"diverged": 1}, {"optim.lr": 0.5}, "diverged")
    second = ArmProgress(
        "full", 2, 8, 3.25, {"optim.lr": 0.0123456}, {}, {"optim.lr": 0.0123456}, "3.2500"
    )
    for arm in (first, first, second):
        watching.arms([arm], "val/loss")
    assert capsys.readouterr().err.splitlines() == [
        "     0s  trial 1 of 8 of full: optim.lr=0.5 -> diverged; none has finished",
        "     0s  trial 2 of 8 of full: optim.lr=0.01235 -> 3.2500; "
        "best val/loss 3.2500 at optim.lr=0.01235",
    ]
