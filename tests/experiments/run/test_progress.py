"""What a person sees while a grid runs."""

import io

import pytest

from ablab.core.store.record import FAILED, FINISHED, Result
from ablab.experiments.plan.experiment import PlannedRun
from ablab.experiments.run.progress import ArmProgress, Live, watcher


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def runs(tiny):
    return [PlannedRun(cell, 0, tiny(), f"id of {cell}") for cell in ("base", "+ ema")]


def play(watching, runs) -> None:
    """Two runs, one of which fails with words that look like markup."""
    watching.planned(3, 1, 2)
    for run in runs:
        watching.started(run)
    watching.logged(runs[0], 6, {"train/loss": 4.1, "tokens_per_second": 1234.0})
    watching.note("a note")
    watching.finished(runs[1], Result("1", FAILED, 0, 0, error="[bold]index [3]"))
    watching.logged(runs[0], 12, {"train/loss": 4.0, "tokens_per_second": 1234.0})
    watching.finished(runs[0], Result("0", FINISHED, 12, 768, {"val/loss": 3.9}, 1.5, 512.0))


def test_a_terminal_gets_bars_that_leave_and_lines_that_stay(runs, monkeypatch):
    monkeypatch.setattr("sys.stderr", terminal := Terminal())
    monkeypatch.setenv("TERM", "xterm")
    watching = watcher("val/loss", quiet=False)
    assert isinstance(watching, Live)
    play(watching, runs)
    assert (
        watching.bars.tasks[0].completed == watching.bars.tasks[0].total == 24
        and len(watching.bars.tasks) == 1
    )
    watching.close()
    said = terminal.getvalue()
    assert (
        "[2/3] + ema, seed 0: FAILED: [bold]index [3]" in said
        and "[3/3] base, seed 0: val/loss 3.9000, 512 tokens/s, 2 s" in said
    )
    assert "\x1b[?25h" in said  # the cursor is back


def test_a_grid_that_is_done_already_is_a_full_bar_and_none_that_waits(monkeypatch):
    monkeypatch.setattr("sys.stderr", Terminal())
    watching = Live("val/loss")
    watching.planned(6, 6, 0)
    assert watching.bars.tasks[0].total == 0
    watching.planned(6, 4, 2)
    assert watching.bars.tasks[0].total is None  # until the first run says how long it is
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
    runs, monkeypatch
):
    monkeypatch.setattr("sys.stderr", terminal := Terminal())
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    watching = watcher("val/loss", quiet=False)
    for now, done, best in ((100.0, 2, None), (160.0, 5, 3.25)):
        monkeypatch.setattr(
            "ablab.experiments.run.progress.time.monotonic", lambda now=now: now
        )
        watching.arms(
            [
                ArmProgress("base", done, 8, best, {"optim.lr": 0.01} if best else {}, {}),
                ArmProgress("+ ema", 1, 8, None, {}, {"diverged": 1}),
            ],
            "val/loss",
        )
    watching.bars.refresh()
    watching.close()
    said = terminal.getvalue()
    assert all(
        word in said
        for word in ("best val/loss", "5/8", "3.2500", "optim.lr=0.01", "1/8, 1 diverged")
    )
    assert "6 of 16 trials, about 3 min left" in said  # 3 trials took a minute, and 10 are left
