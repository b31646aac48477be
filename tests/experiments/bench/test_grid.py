"""`ablab bench grid`: a small grid through the real runner, and the arithmetic of its seconds."""

import json
import math
import os

import msgspec
import pytest

from ablab.core.errors import UserError
from ablab.core.store.result import FINISHED, OUT_OF_MEMORY, Result
from ablab.core.store.store import Store
from ablab.experiments.bench.grid import Observer
from ablab.experiments.plan.experiment import load

SECONDS = (
    "wall_seconds",
    "training_seconds",
    "cold_start_seconds",
    "first_cell_seconds",
    "second_cell_seconds",
)


def test_a_grid_is_timed_printed_and_written_and_leaves_nothing_behind(lab, ablab):
    before = dict(os.environ)
    asked = ("--cells", "3", "--seconds", "0.3", "--out", "grid.json")
    ended = ablab("bench", "grid", lab.sheet("grid"), *asked)
    assert ended.code == 0, ended.err
    told = json.loads((lab.root / "grid.json").read_text())
    times = told["times"]
    assert [one["cell"] for one in times] == ["full", "base", "- qk_norm"]
    assert not told["mlflow"]
    for name in SECONDS:
        assert math.isfinite(told[name]) and told[name] > 0
    share = told["training_seconds"] / told["wall_seconds"]
    assert told["training_over_wall"] == pytest.approx(share)
    assert share < 1
    accounted = sum(one["before"] + one["training"] + one["rest"] for one in times)
    assert accounted <= told["wall_seconds"]
    # A worker starts in seconds, a cell of this size in milliseconds.
    assert told["second_cell_seconds"] < told["first_cell_seconds"]
    assert f"{100 * told['training_over_wall']:.1f} %" in ended.out
    assert not (lab.store / "experiments").exists()
    assert {key: os.environ.get(key) for key in before} == before


def test_seconds_before_a_cell_are_read_off_its_records(tmp_path, monkeypatch):
    """Called at 100; first logs at 107 and 121 after 2 and 1 s of training; ends at 117 and 130.

    Before the first steps: 7 - 2 = 5 s, then 21 - 1 - 17 = 3 s.
    """
    clock = iter([100.0, 107.0, 117.0, 121.0, 130.0])
    monkeypatch.setattr("ablab.experiments.bench.grid.time.perf_counter", lambda: next(clock))
    store = Store(tmp_path)
    watcher = Observer()
    runs = load("quickstart").runs([0])
    end_after_one_log(store, watcher, runs[0], pace=2.0, trained=9.0)
    end_after_one_log(store, watcher, runs[1], pace=1.0, trained=8.0)
    times = [(one.before, one.training, one.rest) for one in watcher.times(store)]
    assert times == [pytest.approx((5, 9, 3)), pytest.approx((3, 8, 2))]


def end_after_one_log(store, watcher, run, pace, trained):
    """pace: training seconds at the log; trained: at the end."""
    record = store.run(run.id)
    record.folder.mkdir(parents=True)
    line = msgspec.json.encode({"step": 10, "seconds": pace})
    record.pace_path.write_bytes(line + b"\n")
    watcher.logged(run, 10, {})
    watcher.finished(run, Result(run.id, FINISHED, 20, 20, seconds=trained))


def test_a_cell_that_does_not_finish_ends_the_benchmark_with_its_reason():
    run = load("quickstart").runs([0])[0]
    result = Result(run.id, OUT_OF_MEMORY, 3, 3, error="try less")
    said = (
        "cell 'full' of the grid ended out_of_memory: try less; a benchmark needs all of them"
    )
    with pytest.raises(UserError, match=said):
        Observer().finished(run, result)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["quickstar"], "Did you mean 'quickstart'?"),
        (["quickstart", "--cells", "1"], "greater than or equal to 2"),
    ],
)
def test_a_mistake_is_one_line(ablab, words, said):
    ended = ablab("bench", "grid", *words)
    assert ended.code == 2
    assert said in ended.err
    assert len(ended.err.strip().splitlines()) == 1
