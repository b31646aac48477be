"""Checkpoints: whole or absent, ordered by step, and a damaged one is named and stepped over."""

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from ablab.core.errors import UserError
from ablab.core.store.claim import Lost
from ablab.core.train import checkpoint
from ablab.core.train.checkpoint import Kept


def tensors(value: float) -> dict[str, torch.Tensor]:
    return {
        "a": torch.full((3, 2), value),
        "b": torch.tensor(value, dtype=torch.float64),
        "n": torch.arange(4),
    }


def never(said: str):
    raise AssertionError(f"unexpected warning: {said}")


def test_what_is_written_is_read_back_bit_for_bit(tmp_path):
    saved = tensors(0.1) | {
        "odd": torch.tensor([float("inf"), -0.0, 1e-45]),
        "bf16": torch.ones(2, dtype=torch.bfloat16),
    }
    checkpoint.write(tmp_path, 7, saved)
    step, found = checkpoint.newest(tmp_path, never)
    assert step == 7 and found.keys() == saved.keys()
    assert all(
        found[name].dtype == value.dtype
        and found[name].numpy(force=True).tobytes() == value.numpy(force=True).tobytes()
        for name, value in saved.items()
        if value.dtype != torch.bfloat16
    )
    assert torch.equal(found["bf16"], saved["bf16"])


def test_a_view_of_a_bank_is_saved_as_its_own_values(tmp_path):
    bank = torch.arange(12.0).view(3, 4)
    checkpoint.write(tmp_path, 1, {"row": bank[1], "column": bank[:, 2]})
    _, found = checkpoint.newest(tmp_path, never)
    assert found["row"].tolist() == [4, 5, 6, 7] and found["column"].tolist() == [2, 6, 10]


def test_an_empty_or_absent_folder_holds_no_checkpoint(tmp_path):
    assert (
        checkpoint.newest(tmp_path, never) is None
        and checkpoint.newest(tmp_path / "absent", never) is None
    )


def test_the_two_newest_by_step_are_kept_even_when_time_says_otherwise(tmp_path):
    """Step 100 comes after 99 and 9, in no alphabet and in no order of writing."""
    for step in (9, 100, 99):
        path = checkpoint.write(tmp_path, step, tensors(step))
        os.utime(path, (1e9 - step, 1e9 - step))
    assert [int(path.name.split("-")[1]) for path in checkpoint.listed(tmp_path)] == [99, 100]
    assert checkpoint.newest(tmp_path, never)[0] == 100
    checkpoint.write(tmp_path, 123_456_789, tensors(0.0))
    assert checkpoint.newest(tmp_path, never)[0] == 123_456_789


@pytest.mark.parametrize("damage", ["torn", "empty", "flipped", "header"])
def test_a_damaged_newest_file_falls_back_to_the_one_before_and_is_named(tmp_path, damage):
    checkpoint.write(tmp_path, 10, tensors(10.0))
    path = checkpoint.write(tmp_path, 20, tensors(20.0))
    content = bytearray(path.read_bytes())
    if damage == "flipped":
        content[-1] ^= 1
    if damage == "header":
        content[0] ^= 255
    path.write_bytes(
        {"torn": content[: len(content) // 2], "empty": b""}.get(damage, bytes(content))
    )
    said = []
    step, found = checkpoint.newest(tmp_path, said.append)
    assert step == 10 and torch.equal(found["a"], tensors(10.0)["a"])
    assert (
        len(said) == 1 and str(path) in said[0] and "damaged" in said[0] and "\n" not in said[0]
    )
    assert checkpoint.newest(tmp_path, never)[0] == 10  # set aside: named once
    checkpoint.write(tmp_path, 20, tensors(21.0))
    assert checkpoint.newest(tmp_path, never)[0] == 20


def test_when_every_file_is_damaged_each_is_named_and_the_run_starts_anew(tmp_path):
    for step in (1, 2):
        checkpoint.write(tmp_path, step, tensors(step)).write_bytes(b"nothing")
    said = []
    assert checkpoint.newest(tmp_path, said.append) is None and len(said) == 2


def test_a_kill_before_the_rename_leaves_the_old_checkpoint_and_no_litter(
    tmp_path, monkeypatch
):
    checkpoint.write(tmp_path, 1, tensors(1.0))
    before = sorted(tmp_path.iterdir())

    def refuse(*_):
        raise OSError(28, "No space left on device")

    for name in ("fsync", "replace"):
        with (
            monkeypatch.context() as patch,
            pytest.raises(UserError, match="cannot write .*step-00000002.*No space left"),
        ):
            patch.setattr(os, name, refuse)
            checkpoint.write(tmp_path, 2, tensors(2.0))
        assert sorted(tmp_path.iterdir()) == before
    assert checkpoint.newest(tmp_path, never)[0] == 1


def test_a_partial_file_of_a_killed_writer_is_never_read_and_goes_with_the_next_write(tmp_path):
    path = checkpoint.write(tmp_path, 1, tensors(1.0))
    half = tmp_path / f".{path.name.replace('01-', '02-')}.123.partial"
    half.write_bytes(b"half")
    assert checkpoint.newest(tmp_path, never)[0] == 1
    checkpoint.write(tmp_path, 3, tensors(3.0))
    assert not half.exists() and len(list(tmp_path.iterdir())) == 2


# -- what stays --------------------------------------------------------------------------------------------------------
def steps_in(folder) -> list[int]:
    return [int(path.name.split("-")[1]) for path in checkpoint.listed(folder)]


@pytest.mark.parametrize(
    ("kept", "left"),
    [
        (Kept(), [11, 12]),
        (Kept(last=1), [12]),
        (Kept(last=4), [9, 10, 11, 12]),
        (Kept(last=1, every=5), [5, 10, 12]),
        (Kept(last=3, every=4), [4, 8, 10, 11, 12]),
    ],
)
def test_the_last_and_every_so_many_stay(tmp_path, kept, left):
    for step in range(1, 13):
        checkpoint.write(tmp_path, step, tensors(step), kept=kept)
    assert steps_in(tmp_path) == left
    (tmp_path / "step-00000003-00000000.safetensors.damaged").touch()
    checkpoint.clear(tmp_path, kept)
    for_good = [step for step in left if kept.every and step % kept.every == 0]
    assert steps_in(tmp_path) == for_good
    assert len(list(tmp_path.iterdir()) if tmp_path.exists() else []) == len(for_good)


# -- the file ----------------------------------------------------------------------------------------------------------
DTYPES = st.sampled_from(list(checkpoint.DTYPES))


@settings(max_examples=25)
@given(st.lists(st.tuples(DTYPES, st.lists(st.integers(0, 5), max_size=3)), max_size=6))
def test_a_file_is_one_that_safetensors_reads(tmp_path_factory, shapes):
    """Of any types and shapes, scalars and empty ones too."""
    folder = tmp_path_factory.mktemp("any")
    draw = torch.Generator().manual_seed(len(shapes))
    saved = {
        f"t{i}": (torch.rand(shape, generator=draw) * 100).to(dtype)
        for i, (dtype, shape) in enumerate(shapes)
    }
    path = checkpoint.write(folder, 1, saved)
    found = load_file(path)
    assert found.keys() == saved.keys()
    for name, value in saved.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value)


def test_the_name_says_how_many_bytes_there_must_be(tmp_path):
    """A file of which a shared file system shows a part is not read at all."""
    checkpoint.write(tmp_path, 10, tensors(10.0))
    path = checkpoint.write(tmp_path, 20, tensors(20.0))
    size = path.stat().st_size
    os.truncate(path, size - 5)
    said = []
    assert checkpoint.newest(tmp_path, said.append)[0] == 10
    assert f"{path} is damaged ({size - 5:,} bytes are there of {size:,}); set aside" in said[0]


def test_a_file_of_an_older_store_that_does_not_say_its_bytes_is_read(tmp_path):
    path = checkpoint.write(tmp_path, 20, tensors(20.0))
    head, _, checksum = path.name.rsplit("-", 2)
    path.rename(tmp_path / f"{head}-{checksum}")
    assert checkpoint.newest(tmp_path, never)[0] == 20


def test_who_lost_the_run_while_it_wrote_leaves_nothing(tmp_path):
    def lost() -> None:
        raise Lost(tmp_path)

    checkpoint.write(tmp_path, 10, tensors(10.0))
    before = sorted(tmp_path.iterdir())
    with pytest.raises(Lost):
        checkpoint.write(tmp_path, 20, tensors(20.0), fence=lost)
    assert sorted(tmp_path.iterdir()) == before
