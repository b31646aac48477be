"""The ledger: appended and never changed, whoever else writes and wherever a crash strikes."""

import multiprocessing
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ablab.core.errors import UserError
from ablab.core.store.ledger import Ledger


def silent(line: str) -> None:
    """Nobody listens."""


def filled(root: Path, entries: int = 3) -> Ledger:
    ledger = Ledger(root)
    for number in range(entries):
        ledger.append("registered", f"exp{number}", {"seeds": [number]}, silent)
    return ledger


def lines(ledger: Ledger) -> list[bytes]:
    return ledger.path.read_bytes().splitlines(keepends=True)


def rewrite(ledger: Ledger, content: list[bytes]) -> None:
    ledger.path.write_bytes(b"".join(content))


def test_what_was_appended_is_read_in_order_and_each_entry_names_the_one_before(tmp_path):
    entries = filled(tmp_path).entries()
    assert [entry.experiment for entry in entries] == ["exp0", "exp1", "exp2"]
    assert [entry.before for entry in entries] == ["", entries[0].hash, entries[1].hash]
    assert [entry.content for entry in entries] == [
        {"seeds": [0]},
        {"seeds": [1]},
        {"seeds": [2]},
    ]
    assert Ledger(tmp_path).entries("exp1") == entries[1:2]
    assert Ledger(tmp_path).entries(kind="verdicts") == []


def test_a_store_without_a_ledger_has_no_entries_and_gets_no_file_by_being_asked(tmp_path):
    ledger = Ledger(tmp_path / "old")
    assert ledger.entries() == []
    assert not ledger.exists
    assert not (tmp_path / "old").exists()


def test_the_same_content_of_a_kind_and_an_experiment_is_noted_once(tmp_path):
    ledger = Ledger(tmp_path)
    first = ledger.note("verdicts", "exp", {"n": 1}, silent)
    second = ledger.note("verdicts", "exp", {"n": 2}, silent)
    assert ledger.note("verdicts", "exp", {"n": 1}, silent) == first
    assert ledger.note("verdicts", "exp", {"n": 2}, silent) == second
    assert ledger.note("verdicts", "other", {"n": 1}, silent) != first
    assert ledger.note("challenge", "exp", {"n": 1}, silent) != first
    assert len(ledger.entries()) == 4


TOUCHED = {
    "a number": lambda content: content.replace(b'"seeds":[1]', b'"seeds":[7]'),
    "its hash too": lambda content: content[:-8] + b'0000"}\n',
    "garbage": lambda content: b"\xff\n",
    "an empty line": lambda content: b"\n",
}


@pytest.mark.parametrize("how", TOUCHED)
def test_a_line_that_was_edited_is_named_with_the_cure_by_readers_and_writers(tmp_path, how):
    ledger = filled(tmp_path)
    content = lines(ledger)
    content[1] = TOUCHED[how](content[1])
    rewrite(ledger, content)
    for act in (ledger.entries, lambda: ledger.append("registered", "exp", {}, silent)):
        with pytest.raises(
            UserError, match=r"ledger\.jsonl:2 .*; put the file back from a copy, or"
        ):
            act()
    assert lines(ledger) == content


@pytest.mark.parametrize("gone", [0, 1])
def test_a_line_that_was_removed_is_missed_at_the_next(tmp_path, gone):
    ledger = filled(tmp_path)
    content = lines(ledger)
    del content[gone]
    rewrite(ledger, content)
    with pytest.raises(
        UserError, match=rf"ledger\.jsonl:{gone + 1} does not follow the line above"
    ):
        ledger.entries()


def test_lines_that_were_exchanged_are_named(tmp_path):
    ledger = filled(tmp_path)
    first, second, third = lines(ledger)
    rewrite(ledger, [first, third, second])
    with pytest.raises(UserError, match=r"ledger\.jsonl:2 does not follow"):
        ledger.entries()


@settings(max_examples=40)
@given(st.integers(0, 10_000), st.integers(1, 255))
def test_any_byte_of_a_whole_line_that_is_changed_is_seen(tmp_path_factory, place, change):
    ledger = filled(tmp_path_factory.mktemp("ledger"), entries=2)
    content = bytearray(ledger.path.read_bytes())
    content[place % len(lines(ledger)[0])] ^= change
    before = ledger.entries()
    ledger.path.write_bytes(content)
    try:
        assert ledger.entries() == before, "another spelling of the same entry"
    except UserError as said:
        assert "ledger.jsonl:" in str(said)


@settings(max_examples=30)
@given(st.integers(0, 10_000))
def test_a_crash_anywhere_in_a_line_loses_that_line_alone_and_the_next_writer_says_so(
    tmp_path_factory, cut
):
    ledger = filled(tmp_path_factory.mktemp("ledger"))
    *kept, last = lines(ledger)
    torn = last[: cut % (len(last) - 1) + 1]
    rewrite(ledger, [*kept, torn])
    assert [entry.experiment for entry in ledger.entries()] == ["exp0", "exp1"]
    said: list[str] = []
    ledger.append("registered", "exp3", {}, said.append)
    assert [entry.experiment for entry in ledger.entries()] == ["exp0", "exp1", "exp3"]
    assert len(said) == 1
    assert "half a line" in said[0]


def _append_many(root: str, who: str) -> None:
    ledger = Ledger(Path(root))
    for number in range(20):
        ledger.append("registered", who, {"number": number}, silent)


def test_processes_that_append_at_once_leave_one_whole_chain(tmp_path):
    context = multiprocessing.get_context("spawn")
    writers = [
        context.Process(target=_append_many, args=(str(tmp_path), who)) for who in ("a", "b")
    ]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(timeout=120)
    assert [writer.exitcode for writer in writers] == [0, 0]
    for who in ("a", "b"):
        numbers = [entry.content["number"] for entry in Ledger(tmp_path).entries(who)]
        assert numbers == list(range(20))


def test_a_ledger_that_cannot_be_read_is_named(tmp_path):
    (tmp_path / "ledger.jsonl").mkdir()
    with pytest.raises(UserError, match=r"cannot read .*ledger\.jsonl: Is a directory"):
        Ledger(tmp_path).entries()
