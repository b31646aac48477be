import math

import pytest

from ablab.analysis.effects import frame
from ablab.core.errors import UserError
from ablab.core.store.store import Store


def test_every_planned_run_has_a_row_with_its_status(lab):
    lab.cell(
        "full",
        [3.1, "diverged", "out_of_memory", "failed", "pruned", "missing", "interrupted"],
        None,
        points=4,
    )
    store = lab.write()
    runs = frame.load(store, "loo")
    assert list(runs.status) == [
        "finished",
        "diverged",
        "out_of_memory",
        "failed",
        "pruned",
        "missing",
        "interrupted",
    ]
    assert list(runs.pair) == list(range(7))
    assert list(runs.cell.unique()) == ["full"]


def test_a_finished_row_carries_metrics_speed_code_and_runtime(lab):
    lab.cell("full", [3.1], None, speed=5e4)
    row = frame.load(lab.write(), "loo").iloc[0]
    assert (row["val/loss"], row["raw/val/loss"], row.tokens_per_second, row.seconds) == (
        3.1,
        3.1 + 0.01,
        5e4,
        60.0,
    )
    assert (row.code, row["runtime/dtype"], row["runtime/device"]) == (
        "c0ffee",
        "bfloat16",
        "cuda",
    )


def test_an_unmeasured_speed_is_nan_not_zero(lab):
    lab.cell("full", [3.1], None, speed=0.0)
    assert math.isnan(frame.load(lab.write(), "loo").tokens_per_second[0])


def test_curves_hold_every_logged_line_of_finished_and_lost_runs(lab):
    lab.cell("full", [3.1, "diverged"], None, points=10)
    logged = frame.curves(lab.write(), "loo")
    assert len(logged) == 10 + 4
    assert logged[logged.pair == 1].status.unique() == ["diverged"]
    assert {
        "cell",
        "pair",
        "step",
        "tokens",
        "val/loss",
        "val/bits_per_byte",
        "train/loss",
    } <= set(logged)


def test_curves_of_an_experiment_without_logs_are_empty_but_have_their_columns(lab):
    lab.cell("full", ["missing"], None)
    logged = frame.curves(lab.write(), "loo")
    assert len(logged) == 0
    assert "tokens" in logged


def test_an_unknown_experiment_is_named(tmp_path):
    with pytest.raises(UserError, match="'nowhere'"):
        frame.load(Store(tmp_path), "nowhere")


@pytest.mark.parametrize(
    ("metric", "unit"),
    [
        ("val/loss", "nats/token"),
        ("raw/val/loss", "nats/token"),
        ("val/bits_per_byte", "bits/byte"),
        ("acc", "acc"),
    ],
)
def test_units_follow_the_last_part_of_the_name(metric, unit):
    assert frame.unit(metric) == unit


def test_a_damaged_line_is_named_with_its_cure_and_a_torn_last_one_is_left_out(lab):
    lab.cell("full", [3.1], None, points=3)
    store = lab.write()
    record = store.run(lab.rows[0].run)
    whole = record.metrics_path.read_bytes()
    record.metrics_path.write_bytes(whole + b'{"step": 4, "tok')
    assert len(frame.curves(store, "loo")) == 3
    record.metrics_path.write_bytes(whole.replace(b'{"step":200', b"\0\0\0", 1))
    with pytest.raises(
        UserError,
        match=rf"{record.metrics_path}:2 is damaged \(.*\); delete {record.folder} to train that run again",
    ):
        frame.curves(store, "loo")
