import math
import re
from dataclasses import replace

import pytest

from ablab.analysis.effects import frame
from ablab.analysis.pages import report
from ablab.core.errors import UserError
from ablab.core.store.record import digest_of
from ablab.core.store.store import Store

METRIC = "val/loss"


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


def test_a_curve_has_the_clock_and_the_flops_of_its_steps(lab):
    lab.cell("full", [3.1, 3.2], None, points=4, speed=5e4)
    store = lab.write()
    known, unknown = (store.run(row.run) for row in lab.rows)
    known.about_path.write_text('{"size": {"flops_per_token": 6e6}}')
    unknown.about_path.write_text('{"size": 7}')
    logged = frame.curves(store, "loo")
    assert list(logged.seconds) == [0.25, 0.5, 0.75, 1.0] * 2
    assert set(logged.tokens_per_second) == {5e4}
    first = logged[logged.pair == 0]
    assert list(first.flops) == [6e6 * tokens for tokens in first.tokens]
    assert logged[logged.pair == 1].flops.isna().all()


def test_a_line_whose_clock_is_not_written_yet_has_no_seconds(lab):
    lab.cell("full", ["interrupted"], None, points=10)
    store = lab.write()
    pace = store.run(lab.rows[0].run).pace_path
    pace.write_bytes(pace.read_bytes()[:-5])
    logged = frame.curves(store, "loo")
    assert list(logged.seconds.isna()) == [False, False, False, True]


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
    said = rf"{record.metrics_path}:2 is damaged \(.*\); delete {record.folder} to train that run again"
    with pytest.raises(UserError, match=said):
        list(record.metrics())
    assert re.fullmatch(said, frame.load(store, "loo").hole[0])


RECORDS = {
    "half of it": lambda text: text[: len(text) // 2],
    "not UTF-8": lambda text: text.replace(b"c0ffee", b"c0ff\xff"),
    "a list": lambda text: b"[]",
    "another run's": lambda text: text.replace(b"loo-full-1", b"loo-full-0"),
    "no such status": lambda text: text.replace(b'"finished"', b'"banana"'),
    "deep": lambda text: b"[" * 100_000,
}


@pytest.mark.parametrize("damage", RECORDS)
def test_a_damaged_foreign_or_impossible_result_costs_one_run(lab, damage):
    lab.cell("full", [3.1, 3.2, 3.3], None, points=3)
    store = lab.write()
    record = store.run(lab.rows[1].run)
    record.result_path.write_bytes(RECORDS[damage](record.result_path.read_bytes()))
    runs = frame.load(store, "loo")
    assert list(runs.status) == ["finished", "damaged", "finished"]
    assert str(record.result_path) in runs.error[1] and len(runs.error[1]) < 400


LOGS = {
    "cut": lambda lines: lines[:2],
    "doubled": lambda lines: lines + lines,
    "not UTF-8": lambda lines: [lines[0].replace(b"val", b"\xff"), *lines[1:]],
    "no step": lambda lines: [lines[0].replace(b"step", b"stop"), *lines[1:]],
    "a list": lambda lines: [b"[]\n", *lines[1:]],
}


@pytest.mark.parametrize("damage", LOGS)
def test_a_log_with_a_hole_costs_one_curve_and_is_named(lab, damage):
    lab.cell("full", [3.1, 3.2], None, points=3)
    store = lab.write()
    first, second = (store.run(row.run) for row in lab.rows)
    first.finish(replace(first.result(), log=digest_of(first.logged())))
    lines = first.metrics_path.read_bytes().splitlines(keepends=True)
    first.metrics_path.write_bytes(b"".join(LOGS[damage](lines)))
    runs = frame.load(store, "loo")
    assert str(first.metrics_path) in runs.hole[0] and runs.hole[1] == ""
    assert list(runs[METRIC]) == [3.1, 3.2]
    assert set(frame.curves(store, "loo").run) == {second.folder.name}
    assert any(runs.hole[0] in line for line in report.read(store, "loo").warnings)
