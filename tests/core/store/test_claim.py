"""Claims: one owner at a time among processes that share a folder, whatever their clocks say, and however they end."""

import multiprocessing
import os
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ablab.core.errors import UserError
from ablab.core.store import claim
from ablab.core.store.claim import (
    STALE_AFTER,
    Claim,
    Lost,
    State,
    Watch,
    alone_with,
    standing,
    take,
)
from ablab.core.store.store import Store

FORK = multiprocessing.get_context("fork")


@pytest.fixture
def clock(monkeypatch):
    """The observer's own clock, turned by hand."""
    now = [1000.0]
    monkeypatch.setattr(claim.time, "monotonic", lambda: now[0])

    def turn(seconds: float) -> None:
        now[0] += seconds

    return turn


@pytest.fixture
def place(tmp_path) -> Path:
    return tmp_path / "run" / ".claim"


def elsewhere(held: Claim) -> Claim:
    """The same claim as a process of another host would have it."""
    far = replace(held.state, kernel="00000000", host="far")
    os.rename(held.place / held.state.name, held.place / far.name)
    held.state = far
    return held


def looks(place: Path, watch: Watch, clock, count: int) -> list[Claim | None]:
    found = []
    for _ in range(count):
        found.append(take(place, watch))
        clock(claim.BEAT)
    return found


# -- one at a time -----------------------------------------------------------------------------------------------------
def test_a_claim_is_of_one_until_it_is_let_go(place):
    first = take(place, Watch())
    assert take(place, Watch()) is None
    first.release()
    second = take(place, Watch())
    assert second.state.number == first.state.number + 1
    assert len(os.listdir(place)) == 1
    with pytest.raises(Lost):
        first.beat()
    first.release()  # changes nothing
    assert standing(place) == second.state


def nobody_yet(place: Path) -> None:
    """As before the first."""


def let_go(place: Path) -> None:
    take(place, Watch()).release()


def left_by_a_dead_process(place: Path) -> None:
    held = take(place, Watch()).state
    gone = replace(held, process=2**22 + 1)  # beyond the largest process id
    os.rename(place / held.name, place / gone.name)


@pytest.mark.parametrize("begin", [nobody_yet, let_go, left_by_a_dead_process])
def test_of_many_who_take_at_once_one_wins(tmp_path, begin):
    """16 threads at each of 40 places."""
    at_once = threading.Barrier(16)
    places = [tmp_path / f"{number}" / ".claim" for number in range(40)]
    for place in places:
        begin(place)
    won: list[Path] = []

    def try_all() -> None:
        for place in places:
            at_once.wait()
            if take(place, Watch()):
                won.append(place)

    many = [threading.Thread(target=try_all) for _ in range(16)]
    for one in many:
        one.start()
    for one in many:
        one.join()
    assert sorted(won) == sorted(places)


@given(
    number=st.integers(0, 10**9),
    beats=st.integers(0, 10**9),
    process=st.integers(0, 2**22),
    host=st.text("abc.-_9", min_size=1, max_size=100),
)
@settings(max_examples=50)
def test_a_state_is_its_name(number, beats, process, host):
    held = State(number, "0123456789abcdef", beats, process, "a1b2c3d4", host)
    for state in (held, State(number)):
        assert claim._state(state.name) == state
        assert len(state.name) < 200


# -- the dead ----------------------------------------------------------------------------------------------------------
def hold_and_end(place: Path, told) -> None:
    take(place, Watch())
    told.send("held")
    told.recv()


def test_the_claim_of_a_killed_process_of_this_host_is_free_at_once(place):
    ours, theirs = FORK.Pipe()
    owner = FORK.Process(target=hold_and_end, args=(place, theirs))
    owner.start()
    assert ours.recv() == "held"
    assert take(place, Watch()) is None
    os.kill(owner.pid, signal.SIGKILL)
    os.waitid(os.P_PID, owner.pid, os.WEXITED | os.WNOWAIT)  # dead, and not asked for its code
    assert take(place, Watch())
    owner.join()


def test_an_owner_elsewhere_that_does_not_beat_is_dead_after_so_many_looks(place, clock):
    elsewhere(take(place, Watch()))
    found = looks(place, Watch(), clock, STALE_AFTER + 1)
    assert found[:-1] == [None] * STALE_AFTER
    assert found[-1].state.number == 2


def test_an_owner_that_beats_now_and_then_is_alive_however_slow(place, clock):
    held = elsewhere(take(place, Watch()))
    watch = Watch()
    for _ in range(5):
        assert looks(place, watch, clock, STALE_AFTER - 1) == [None] * (STALE_AFTER - 1)
        held.beat()


def test_an_observer_that_slept_does_not_take_its_sleep_for_silence(place, clock):
    """A laptop, or a disk that was away: an hour between two looks is one look."""
    elsewhere(take(place, Watch()))
    watch = Watch()
    assert take(place, watch) is None
    clock(3600)
    assert take(place, watch) is None


def test_looks_that_follow_too_fast_do_not_count(place, clock):
    elsewhere(take(place, Watch()))
    watch = Watch()
    for _ in range(10 * STALE_AFTER):
        assert take(place, watch) is None
        clock(claim.BEAT / 20)


@pytest.mark.parametrize("minutes", [-30, 30])
def test_clocks_that_differ_by_minutes_change_nothing(place, clock, monkeypatch, minutes):
    held = elsewhere(take(place, Watch()))
    ahead = time.time() + 60 * minutes
    monkeypatch.setattr(claim.time, "time", lambda: ahead)
    os.utime(place / held.state.name, (ahead, ahead))
    watch = Watch()
    for _ in range(3):
        assert looks(place, watch, clock, STALE_AFTER) == [None] * STALE_AFTER
        held.beat()
        os.utime(place / held.state.name, (ahead, ahead))


def test_of_two_observers_of_a_dead_owner_one_takes_over(place, clock):
    elsewhere(take(place, Watch()))
    one, other = Watch(), Watch()
    for _ in range(STALE_AFTER):
        assert take(place, one) is None
        assert take(place, other) is None
        clock(claim.BEAT)
    assert take(place, one)
    assert take(place, other) is None


def test_a_listing_that_is_out_of_date_takes_nothing(place, clock, monkeypatch):
    """As NFS may give it: the name of a minute ago."""
    held = elsewhere(take(place, Watch()))
    old = held.state
    held.beat()
    monkeypatch.setattr(claim, "standing", lambda place: old)
    assert looks(place, Watch(), clock, 3 * STALE_AFTER) == [None] * 3 * STALE_AFTER
    held.beat()


# -- who comes back ----------------------------------------------------------------------------------------------------
def test_an_owner_that_slept_too_long_is_told_before_it_writes(place, clock):
    asleep = elsewhere(take(place, Watch()))
    *_, heir = looks(place, Watch(), clock, STALE_AFTER + 1)
    with pytest.raises(Lost):
        asleep.beat()
    asleep.release()
    heir.beat()


def test_an_answer_that_was_lost_on_the_way_is_no_loss(place, monkeypatch):
    """NFS did it, and asked again finds the name gone."""
    held = take(place, Watch())
    real = os.rename

    def twice(old, new):
        real(old, new)
        real(old, new)

    monkeypatch.setattr(claim.os, "rename", twice)
    held.beat()
    monkeypatch.undo()
    held.beat()
    assert held.state.beats == 2


def test_while_it_is_held_it_beats_by_itself(place, monkeypatch):
    monkeypatch.setattr(claim, "BEAT", 0.01)
    held = take(place, Watch())
    until = time.monotonic() + 60
    with held.beating():
        while held.state.beats < 3:
            assert time.monotonic() < until
            time.sleep(0.01)
    assert standing(place) == State(1)


# -- damage ------------------------------------------------------------------------------------------------------------
def emptied(place: Path) -> None:
    for path in place.iterdir():
        path.unlink()


def a_file(place: Path) -> None:
    emptied(place)
    place.rmdir()
    place.write_text("no folder")


def foreign(place: Path) -> None:
    (place / "notes.txt").write_text("mine")
    (place / "folder").mkdir()


def half_made(place: Path) -> None:
    """By a process that was killed before its folder took the place."""
    emptied(place)
    place.rmdir()
    (place.parent / ".claim.0123456789abcdef").mkdir()


@pytest.mark.parametrize("damage", [emptied, a_file, foreign, half_made])
def test_a_damaged_place_can_be_taken_and_is_tidy_then(place, damage):
    take(place, Watch()).release()
    damage(place)
    held = take(place, Watch())
    assert os.listdir(place) == [held.state.name]
    left = {path.name for path in place.parent.iterdir()} - {".claim.damaged"}
    assert left == {".claim"}


# -- files that several change -----------------------------------------------------------------------------------------
def append(path: Path, times: int, host: str) -> None:
    """As a process of that host: no lock of this one holds it back."""
    claim._kernel = lambda: host
    import filelock

    filelock.FileLock.acquire = lambda self: None
    for _ in range(times):
        with alone_with(path):
            content = path.read_text() if path.exists() else ""
            path.write_text(f"{content}{host}\n")


def test_a_file_that_four_hosts_change_loses_nothing(tmp_path):
    path = tmp_path / "ledger.jsonl"
    many = [FORK.Process(target=append, args=(path, 10, f"{host}" * 8)) for host in "abcd"]
    for one in many:
        one.start()
    for one in many:
        one.join()
        assert one.exitcode == 0
    assert len(path.read_text().splitlines()) == 40


def test_a_store_is_shared_with_those_who_see_its_token(tmp_path, monkeypatch):
    monkeypatch.setattr("ablab.core.store.store.SECONDS_TO_APPEAR", 0.2)
    ours = Store(tmp_path / "ours")
    token = ours.leave_token()
    Store(tmp_path / "ours").shared_with(token)
    with pytest.raises(
        UserError, match="is not the one that the runs are planned in; give a --store"
    ):
        Store(tmp_path / "theirs").shared_with(token)
    ours.drop_token(token)
    with pytest.raises(UserError, match="is not the one"):
        ours.shared_with(token)
