"""What a token folder holds: hashed when anything about its files has changed, and not otherwise."""

import json
import os
import shutil

import numpy as np
import pytest

from ablab.core.data import contents
from ablab.core.data.contents import CACHE, digest_of, fresh_digest, known_digest


@pytest.fixture
def folder(write_token_folder, tmp_path):
    return write_token_folder(tmp_path / "tokens")


@pytest.fixture
def later(monkeypatch):
    """As if the files had been written long ago."""
    monkeypatch.setattr(contents, "CLOCK_TICK", -1000.0)


@pytest.fixture
def hashed(monkeypatch):
    """The folders that were hashed, in order."""
    seen = []

    def counted(folder, dtype, bins):
        seen.append(folder)
        return digest_of(folder, dtype, bins)

    monkeypatch.setattr(contents, "digest_of", counted)
    monkeypatch.setattr(contents, "_known", {})
    return seen


def overwrite(folder):
    """Another first token, in place: same size, same inode."""
    with open(folder / "train.bin", "r+b") as file:
        first = file.read(1)[0]
        file.seek(0)
        file.write(bytes([first ^ 1]))


def test_an_unchanged_folder_is_hashed_once_by_all_processes(folder, later, hashed):
    first = known_digest(folder, "uint16")
    for _ in range(3):
        contents._known.clear()  # as in another process
        assert known_digest(folder, "uint16") == first
    assert len(hashed) == 1


def test_a_folder_that_cannot_be_written_is_hashed_once_a_process(folder, later, hashed):
    (folder / CACHE).mkdir()
    assert known_digest(folder, "uint16") == known_digest(folder, "uint16")
    assert len(hashed) == 1


def change_in_place(folder):
    overwrite(folder)


def change_and_set_the_time_back(folder):
    times = (folder / "train.bin").stat()
    overwrite(folder)
    os.utime(folder / "train.bin", ns=(times.st_atime_ns, times.st_mtime_ns))


def replace_by_a_file_of_equal_size_and_time(folder):
    whole = folder / "train.bin"
    kept = shutil.copy2(whole, folder / "kept")
    other = shutil.copy(whole, folder / "other")
    overwrite(folder)
    shutil.copyfile(whole, other)
    shutil.copystat(kept, other)
    os.replace(other, whole)


@pytest.mark.parametrize(
    "change",
    [change_in_place, change_and_set_the_time_back, replace_by_a_file_of_equal_size_and_time],
)
def test_a_changed_file_is_hashed_again(folder, later, hashed, change):
    before = known_digest(folder, "uint16")
    os.utime(folder / "train.bin", ns=(0, 0))
    assert known_digest(folder, "uint16") == before
    change(folder)
    assert known_digest(folder, "uint16") != before
    assert len(hashed) == 3


def test_a_file_just_written_is_not_trusted_for_its_time(folder, hashed):
    """Two writes within one tick of the clock leave one time, so the first digest may not be kept."""
    known_digest(folder, "uint16")
    known_digest(folder, "uint16")
    assert len(hashed) == 2
    assert not (folder / CACHE).exists()


@pytest.mark.parametrize("damage", [b"", b"[]", b"{", b"\xff", b'{"digest": 1}', b"[" * 30_000])
def test_a_damaged_cache_is_as_none(folder, later, hashed, damage):
    (folder / CACHE).write_bytes(damage)
    assert known_digest(folder, "uint16") == digest_of(folder, "uint16")
    assert json.loads((folder / CACHE).read_bytes())["digest"] == digest_of(folder, "uint16")


def test_a_fresh_digest_believes_no_cache(folder, later):
    """A disk that forgets leaves size, times and inode as they were."""
    known_digest(folder, "uint16")
    overwrite(folder)
    forged = json.loads((folder / CACHE).read_bytes()) | {
        "files": contents._marks(folder, contents.BINS)
    }
    (folder / CACHE).write_text(json.dumps(forged))
    contents._known.clear()
    assert known_digest(folder, "uint16") != digest_of(folder, "uint16")
    assert fresh_digest(folder, "uint16") == digest_of(folder, "uint16")
    assert known_digest(folder, "uint16") == digest_of(folder, "uint16")


def test_a_table_of_equal_bytes_and_another_type_has_another_digest(folder):
    before = digest_of(folder, "uint16")
    table = np.load(folder / "token_bytes.npy")
    np.save(folder / "token_bytes.npy", table.view("<f4"))
    assert digest_of(folder, "uint16") != before
