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


def test_a_grid_is_timed_printed_and_written_and_leaves_nothing_behind(lab, ablab):
    before, sheet = dict(os.environ), lab.sheet("grid")
    ended = ablab(
        "bench", "grid", sheet, "--cells", "3", "--seconds", "0.3", "--out", "grid.json"
    )
    assert ended.code == 0, ended.err
    told = json.loads((lab.root / "grid.json").read_text())
    assert [one["cell"] for one in told["times"]] == ["full", "base", "- qk_norm"] and not told[
        "mlflow"
    ]
    numbers = [
        told[key]
        for key in (
            "wall_seconds",
            "training_seconds",
            "cold_start_seconds",
            "first_cell_seconds",
            "second_cell_seconds",
        )
    ]
    assert all(math.isfinite(number) and number > 0 for number in numbers)
    assert (
        told["training_over_wall"]
        == pytest.approx(told["training_seconds"] / told["wall_seconds"])
        and told["training_over_wall"] < 1
    )
    accounted = sum(one["before"] + one["training"] + one["rest"] for one in told["times"])
    assert accounted <= told["wall_seconds"]
    assert (
        told["second_cell_seconds"] < told["first_cell_seconds"]
    )  # a worker starts in seconds, a cell of this size in milliseconds
    assert f"{100 * told['training_over_wall']:.1f} %" in ended.out
    assert (
        not (lab.store / "experiments").exists()
        and {key: os.environ.get(key) for key in before} == before
    )


def test_seconds_before_a_cell_are_read_off_its_records(tmp_path, monkeypatch):
    """Called at 100; first logs at 107 and 121 after 2 and 1 s of training; ends at 117 and 130: 5, then 121 - 1 - 117 + 100 = 3 s."""
    clock = iter([100.0, 107.0, 117.0, 121.0, 130.0])
    monkeypatch.setattr("ablab.experiments.bench.grid.time.perf_counter", lambda: next(clock))
    experiment, store, watcher = load("quickstart"), Store(tmp_path), Observer()
    for run, first, trained in zip(
        experiment.runs([0])[:2], (2.0, 1.0), (9.0, 8.0), strict=True
    ):
        record = store.run(run.id)
        record.folder.mkdir(parents=True)
        record.pace_path.write_bytes(
            msgspec.json.encode({"step": 10, "seconds": first}) + b"\n"
        )
        watcher.logged(run, 10, {})
        watcher.finished(run, Result(run.id, FINISHED, 20, 20, seconds=trained))
    first, second = watcher.times(store)
    assert (first.before, first.training, first.rest) == pytest.approx((5, 9, 3))
    assert (second.before, second.training, second.rest) == pytest.approx((3, 8, 2))


def test_a_cell_that_does_not_finish_ends_the_benchmark_with_its_reason():
    run = load("quickstart").runs([0])[0]
    with pytest.raises(
        UserError,
        match="cell 'full' of the grid ended out_of_memory: try less; a benchmark needs all of them",
    ):
        Observer().finished(run, Result(run.id, OUT_OF_MEMORY, 3, 3, error="try less"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["quickstar"], "Did you mean 'quickstart'?"),
        (["quickstart", "--cells", "1"], "greater than or equal to 2"),
    ],
)
def test_a_mistake_is_one_line(ablab, words, said):
    ended = ablab("bench", "grid", *words)
    assert ended.code == 2 and said in ended.err and len(ended.err.strip().splitlines()) == 1
