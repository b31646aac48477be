"""Records: what is damaged, another's or impossible is never taken for a run's own."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ablab.core.errors import UserError
from ablab.core.store.files import set_aside
from ablab.core.store.held_out import TYPES, HeldOut, decoded, encoded
from ablab.core.store.record import Damaged, Record, digest_of, extent, holds
from ablab.core.store.result import FINISHED, STATUSES, Result
from ablab.core.store.store import Store
from ablab.core.store.study_record import read as read_study
from ablab.core.store.study_record import study_path

PACE = {"seconds": 1.0, "tokens_per_second": 2.0}


def logged(folder, steps=(1, 2, 3)) -> Record:
    record = Record(folder, "mine")
    for step in steps:
        record.log(step, {"tokens": 64 * step, "val/loss": 0.1 * step}, PACE)
    return record


@pytest.mark.parametrize(
    ("run", "status", "flaw"),
    [
        ("other", FINISHED, "it is of run 'other'"),
        ("mine", "banana", "there is no status 'banana'"),
        ("x" * 10_000, FINISHED, "it is of run 'xxx"),
    ],
)
def test_a_result_of_another_run_or_of_no_known_status_is_refused_set_aside_and_said(
    tmp_path, run, status, flaw
):
    record = Store(tmp_path).run("mine")
    record.finish(Result(run, status, step=1, tokens=1))
    with pytest.raises(UserError, match=flaw):
        record.result()
    said = []
    assert record.sound_result(said.append) is None
    assert len(said) == 1 and flaw in said[0] and len(said[0]) < 300 + len(str(tmp_path))
    assert record.result() is None  # it stands aside


@pytest.mark.parametrize("status", STATUSES)
def test_a_result_of_its_own_run_is_taken(tmp_path, status):
    record = Store(tmp_path).run("mine")
    whole = Result("mine", status, step=1, tokens=1)
    record.finish(whole)
    assert record.sound_result(pytest.fail) == whole


@given(st.integers(0), st.binary(min_size=1, max_size=3))
def test_a_result_that_was_changed_anywhere_is_refused_or_says_the_same(
    tmp_path_factory, place, other
):
    record = Record(tmp_path_factory.mktemp("any"), "mine")
    numbers = {"val/loss": 3.744, "val/bits_per_byte": 1e-05, "train/loss": 3.0}
    told = {"weights": "0af3", "runtime": {"dtype": "float32", "seed": 2**60}, "code": "ü"}
    whole = Result("mine", FINISHED, step=1, tokens=64, metrics=numbers, seconds=0.1, **told)
    record.finish(whole)
    content = record.result_path.read_bytes()
    place %= len(content)
    record.result_path.write_bytes(content[:place] + other + content[place + len(other) :])
    try:
        assert record.result() == whole
    except Damaged as damage:
        assert "\n" not in str(damage)


@given(st.binary(max_size=80))
def test_no_bytes_in_a_record_raise_anything_but_one_line(tmp_path_factory, content):
    record = Record(tmp_path_factory.mktemp("any"), "mine")
    logs = (record.metrics_path, record.pace_path, record.dynamics_path)
    for path in (record.result_path, record.about_path, *logs):
        path.write_bytes(content)
    said = []
    assert record.sound_result(said.append) is None
    assert len(said) == 1 and "\n" not in said[0]
    assert isinstance(record.about(), dict)
    assert "\n" not in record.hole(None)
    list(record.pace())
    list(record.looks())
    record.rewind(5)
    assert list(record.dynamics()) == list(record.looks())
    assert record.hole(None) == ""


@pytest.mark.parametrize("about", [b"[]", b'{"run": "other", "started": 1}', b'{"a": "\xff"}'])
def test_run_json_that_is_no_object_or_anothers_says_nothing(tmp_path, about):
    record = Record(tmp_path, "mine")
    record.about_path.write_bytes(about)
    assert record.about() == {}
    record.begin("", {"params": {"a": 1}})
    assert record.about()["run"] == "mine" and record.about()["started"] > 1


@given(st.integers(0, 300), st.integers(1, 3))
def test_a_log_holds_an_extent_exactly_if_it_begins_with_those_bytes(cut, times):
    whole = bytes(range(200))
    assert holds(whole[:cut], extent(whole)) == (cut >= 200)
    assert holds(whole * times, extent(whole))
    assert not holds(whole[::-1], extent(whole[:50]))


def test_a_file_that_cannot_be_read_is_not_taken_for_damaged(tmp_path, monkeypatch):
    """A disk that answers late must not cost a run."""
    record = logged(tmp_path)
    record.finish(Result("mine", FINISHED, 3, 192, log=digest_of(record.logged())))

    def lost(path):
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch, pytest.raises(UserError, match="cannot read .*result"):
        patch.setattr(Path, "read_bytes", lost)
        record.sound_result(pytest.fail)
    assert record.sound_result(pytest.fail)


def test_rewinding_keeps_the_very_bytes_up_to_the_step(tmp_path):
    record = logged(tmp_path)
    lines = record.metrics_path.read_bytes().splitlines(keepends=True)
    doubled = [lines[0], b"[]\n", lines[1], lines[0], lines[2], b'{"step": 4, "to']
    record.metrics_path.write_bytes(b"".join(doubled))
    record.rewind(2)
    assert record.metrics_path.read_bytes() == b"".join(lines[:2])


def test_a_result_whose_log_lost_a_line_is_set_aside_and_said(tmp_path):
    record = logged(tmp_path)
    record.finish(Result("mine", FINISHED, 3, 192, log=digest_of(record.logged())))
    assert record.sound_result(pytest.fail)
    record.metrics_path.write_bytes(record.logged().split(b"\n", 1)[1])
    said = []
    assert record.sound_result(said.append) is None
    assert str(record.metrics_path) in said[0] and "lines are lost or changed" in said[0]


def test_a_dead_link_in_the_place_of_a_log_goes_aside(tmp_path):
    record = Record(tmp_path, "mine")
    record.pace_path.symlink_to("nowhere/at/all")
    said = []
    record.begin("", {}, said.append)
    record.log(1, {"tokens": 64}, PACE)
    assert len(said) == 1 and "dead link" in said[0]
    assert [line["step"] for line in record.pace()] == [1]


def test_a_folder_where_a_file_should_be_goes_aside_and_replaces_nothing(tmp_path):
    for content in ("first", "second"):
        wrong = tmp_path / "run.json"
        wrong.mkdir()
        (wrong / content).touch()
        set_aside(wrong)
    found = sorted(path.name for path in tmp_path.rglob("*") if path.is_file())
    assert found == ["first", "second"] and not (tmp_path / "run.json").exists()


@pytest.mark.parametrize("content", [b'{"name": "\xff"}', b"[]", b"[" * 100_000, None])
def test_a_damaged_plan_or_study_is_one_line_with_its_cure(tmp_path, content):
    store = Store(tmp_path)
    for path, read in (
        (store.plan_path("grid"), store.read_plan),
        (study_path(store, "grid"), lambda name: read_study(store, name)),
    ):
        path.parent.mkdir(parents=True)
        path.mkdir() if content is None else path.write_bytes(content)
        with pytest.raises(
            UserError, match=r"grid\.json is damaged .*ablab (run|study) grid"
        ) as said:
            read("grid")
        assert "\n" not in str(said.value)


# ---- the losses of the last evaluation ----


def losses(rows=4, context=8, seed=0) -> HeldOut:
    draw = np.random.default_rng(seed)
    return HeldOut(
        nats=draw.gamma(1.0, 3.0, (rows, context)).astype(np.float16),
        bytes=draw.integers(0, 9, (rows, context), dtype=np.int32),
        document=np.sort(draw.integers(0, 5, rows * context, dtype=np.int32)).reshape(rows, -1),
    )


def finished(folder, held_out) -> tuple[Record, Result]:
    record = logged(folder)
    kept = record.keep(held_out)
    result = Result("mine", FINISHED, 3, 192, log=digest_of(record.logged()), held_out=kept)
    record.finish(result)
    return record, result


def test_losses_are_read_as_they_were_kept_and_the_same_ones_are_the_same_bytes(tmp_path):
    record, result = finished(tmp_path / "a", losses())
    found = record.held_out(result.held_out)
    for name, kind in TYPES.items():
        array = getattr(found, name)
        assert array.dtype == kind and np.array_equal(array, getattr(losses(), name))
    assert record.sound_result(pytest.fail) == result
    again, _ = finished(tmp_path / "b", losses())
    assert again.held_out_path.read_bytes() == record.held_out_path.read_bytes()


def test_a_run_without_losses_is_whole(tmp_path):
    record = logged(tmp_path)
    result = Result("mine", FINISHED, 3, 192, log=digest_of(record.logged()))
    record.finish(result)
    assert record.sound_result(pytest.fail) == result


DAMAGES = {
    "lost": lambda path: path.unlink(),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "another's": lambda path: path.write_bytes(encoded(losses(seed=1))),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_losses_that_are_not_what_the_run_left_are_said_and_the_run_is_trained_again(
    tmp_path, damage
):
    record, result = finished(tmp_path, losses())
    DAMAGES[damage](record.held_out_path)
    with pytest.raises(Damaged, match="held_out.npz is not what the run left"):
        record.held_out(result.held_out)
    said = []
    assert record.sound_result(said.append) is None
    assert len(said) == 1 and str(record.held_out_path) in said[0]
    record.begin("", {}, said.append)
    assert not record.held_out_path.exists()


@given(st.binary(max_size=200), st.integers(0, 10_000))
def test_no_bytes_but_those_of_losses_are_taken_for_losses(junk, place):
    whole = bytearray(encoded(losses()))
    cut = place % len(whole)
    for content in (junk, bytes(whole[:cut]), bytes(whole[:cut]) + junk):
        with pytest.raises(ValueError, match="archive of losses|its arrays are"):
            decoded(content)


def test_arrays_of_other_kinds_or_shapes_are_refused():
    for wrong in (
        replace(losses(), nats=np.zeros((4, 7), np.float16)),
        replace(losses(), document=np.zeros((3, 8), np.int32)),
    ):
        with pytest.raises(ValueError, match="its arrays are"):
            decoded(encoded(wrong))
