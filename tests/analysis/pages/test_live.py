import json
import os

import pytest

from ablab.analysis.pages.live import RememberedCurves, Watched, duration
from ablab.core.store.result import FINISHED, Result
from ablab.core.store.store import Store

FULL = [3.000, 3.001, 3.002]
WITHOUT = [3.020, 3.022, 3.021]


def sized(lab, tokens: int = 100_000_000) -> Store:
    """Every run that has begun says what it takes."""
    store = lab.write()
    for planned in lab.rows:
        record = store.run(planned.run)
        if record.folder.is_dir():
            size = {"steps": 1000, "tokens": tokens, "flops_per_token": 6}
            record.about_path.write_text(json.dumps({"size": size}))
    return store


@pytest.fixture
def half_done(lab):
    """Two runs have ended, one trains and stands at 40 % of 1e8 tokens at 1e5 tokens/s, one is missing."""
    lab.cell("full", [3.0, 3.1], None, points=10)
    lab.cell("- a", ["interrupted", "missing"], points=10)
    return sized(lab)


def test_what_is_left_is_what_was_planned_over_the_pace_of_what_trains(half_done):
    look = Watched(half_done, "loo").look()
    assert "2 of 4 runs have ended, 1 train now" in look.main
    assert f"about {duration(1.6e8 / 1e5)} of training left" in look.main
    assert "27 min" in look.main
    assert '<progress value="0.6"' in look.main
    assert "400 of 1,000" in look.main


def test_the_verdict_so_far_says_that_it_is_a_look(half_done):
    page = Watched(half_done, "loo").whole()
    assert "A look at " in page
    assert "not the result" in page
    assert "So far:" in page


def test_runs_on_their_way_are_in_the_bands(half_done):
    data = json.loads(Watched(half_done, "loo").look().data)
    assert {line["cell"] for line in data["curves"]["val/loss"]} == {"full", "- a"}
    assert data["lost"] == []


def test_a_grid_without_a_finished_run_has_a_page(lab):
    lab.cell("full", ["interrupted", "missing"], None, points=10)
    look = Watched(sized(lab), "loo").look()
    assert "No run has finished yet." in look.main


def test_nothing_is_sent_again_while_nothing_changes_and_everything_once_it_does(half_done):
    watched = Watched(half_done, "loo")
    first = watched.look()
    watched.rest_until = 0.0
    assert watched.look() is first
    watched.rest_until = 0.0
    record = half_done.run("loo--_a-0")
    record.finish(Result(record.folder.name, FINISHED, 10, 10, {"val/loss": 3.05}))
    second = watched.look()
    assert second.version != first.version
    assert "3 of 4 runs have ended, 0 train now" in second.main


def test_only_runs_that_changed_are_read_again(half_done, monkeypatch):
    remembered = RememberedCurves()
    read = []
    from ablab.analysis.effects import frame

    whole = frame.curve
    monkeypatch.setattr(
        frame, "curve", lambda row, *more: read.append(row.run) or whole(row, *more)
    )
    frame.curves(half_done, "loo", read=remembered)
    assert len(read) == 4
    half_done.run("loo--_a-0").log(900, {"tokens": 5e7, "val/loss": 3.0}, {"seconds": 1.0})
    again = frame.curves(half_done, "loo", read=remembered)
    assert read[4:] == ["loo--_a-0"]
    assert 900 in set(again.step)


@pytest.mark.parametrize("cut", range(1, 40, 6))
def test_a_record_that_is_half_written_is_read_up_to_there(half_done, cut):
    record = half_done.run("loo--_a-0")
    for path in (record.metrics_path, record.pace_path, record.about_path):
        path.write_bytes(path.read_bytes()[:-cut])
    record.result_path.write_bytes(b'{"run": "loo--_a-0", "sta')
    look = Watched(half_done, "loo").look()
    assert "could not be read" not in look.main
    lines = json.loads(look.data)["curves"]["val/loss"]
    assert {line["cell"] for line in lines} >= {"full"}


def test_a_plan_that_is_lost_meanwhile_is_said_on_the_page_and_costs_nothing(half_done):
    watched = Watched(half_done, "loo")
    before = watched.look()
    watched.rest_until = 0.0
    path = half_done.plan_path("loo")
    plan = path.read_bytes()
    path.write_bytes(plan[:50])
    lost = watched.look()
    assert "the records could not be read just now" in lost.main
    assert "3.0500" in before.main
    assert "3.0500" in lost.main
    path.write_bytes(plan)
    watched.rest_until = 0.0
    assert "could not be read" not in watched.look().main


def test_a_grid_that_has_ended_says_that_this_is_the_result(lab):
    lab.cell("full", FULL, None, points=3)
    lab.cell("- a", WITHOUT, points=3)
    assert "this is the result" in Watched(sized(lab), "loo").look().main


def test_a_grid_in_which_nothing_trains_says_how_to_go_on(lab):
    lab.cell("full", FULL, None, points=3)
    lab.cell("- a", ["missing"] * 3)
    store = sized(lab)
    assert "a run has just begun or ended" in Watched(store, "loo").look().main
    for path in (store.root / "runs").glob("*/*.json"):
        os.utime(path, (1e9, 1e9))
    look = Watched(store, "loo").look()
    assert "nothing trains just now; go on with: ablab run loo" in look.main
