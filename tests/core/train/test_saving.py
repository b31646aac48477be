"""Saving off the hot path: what is written is the state as it was, whatever happens to it meanwhile."""

import threading

import pytest
import torch

from ablab.core.errors import UserError
from ablab.core.runtime.runtime import Runtime
from ablab.core.store.claim import Lost
from ablab.core.store.record import Record
from ablab.core.train import checkpoint
from ablab.core.train.run import run
from ablab.core.train.saving import Saver

CPU = torch.device("cpu")


class Slow:
    """Writes when it is let."""

    def __init__(self) -> None:
        self.may = threading.Event()
        self.wrote: list[dict[str, torch.Tensor]] = []

    def __call__(self, copies: dict[str, torch.Tensor]) -> None:
        assert self.may.wait(60)
        self.wrote.append({name: value.clone() for name, value in copies.items()})


def test_what_is_written_is_the_state_as_it_was_when_it_was_saved():
    state = {"weight": torch.arange(6.0).view(2, 3), "count": torch.tensor(1)}
    slow = Slow()
    saver = Saver(CPU)
    saver.save(state, slow)
    assert not saver.is_idle()
    for value in state.values():
        value += 1
    slow.may.set()
    saver.wait()
    [wrote] = slow.wrote
    assert wrote["weight"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert wrote["count"].item() == 1


def test_the_memory_of_copies_is_used_again_while_shapes_stay():
    saver = Saver(CPU)
    seen = []

    def note(copies: dict[str, torch.Tensor]) -> None:
        seen.append(copies["weight"].data_ptr())

    for shape in ((3, 3), (3, 3), (4, 3)):
        saver.save({"weight": torch.zeros(shape)}, note)
        saver.wait()
    assert seen[0] == seen[1]
    assert saver.host["weight"].shape == (4, 3)


def test_what_writing_raises_is_raised_where_training_looks():
    def refused(copies: dict[str, torch.Tensor]) -> None:
        raise UserError("cannot write there; free space")

    saver = Saver(CPU)
    saver.save({}, refused)
    with pytest.raises(UserError, match="free space"):
        saver.wait()
    assert saver.is_idle()  # said once


def quiet(line: str) -> None:
    """Told of nothing."""


def test_a_disk_that_fills_up_while_a_checkpoint_is_written_ends_the_run_in_a_line(
    tiny, token_folder, tmp_path, monkeypatch
):
    def full(*words, **more):
        raise UserError("cannot write step-1: No space left on device")

    monkeypatch.setattr(checkpoint, "write", full)
    often = Runtime(device="cpu", save_seconds=1e-9)
    with pytest.raises(UserError, match="No space left"):
        run(tiny(), often, token_folder, Record(tmp_path), warn=quiet)


def test_steps_to_keep_are_saved_and_stay_when_the_run_has_ended(tiny, token_folder, tmp_path):
    keeping = Runtime(device="cpu", keep_every=5)
    calm = run(tiny(), Runtime(device="cpu"), token_folder, Record(tmp_path / "calm"))
    kept = run(tiny(), keeping, token_folder, Record(tmp_path / "kept"), warn=quiet)
    files = checkpoint.listed(tmp_path / "kept" / "checkpoints")
    assert [int(path.name.split("-")[1]) for path in files] == [5, 10]
    assert kept.weights == calm.weights


def test_who_has_lost_the_run_writes_nothing_more(tiny, token_folder, tmp_path):
    """The claim goes to another after the fifth log: no log, checkpoint or result comes after it."""
    lost = threading.Event()

    def fence() -> None:
        if lost.is_set():
            raise Lost(tmp_path)

    def log(step: int, scalars, seconds) -> None:
        if step == 5:
            lost.set()

    record = Record(tmp_path, fence=fence)
    often = Runtime(device="cpu", log_every=1, save_seconds=0)
    with pytest.raises(Lost):
        run(tiny(), often, token_folder, record, log=log, warn=quiet)
    assert record.result() is None
    assert [line["step"] for line in record.metrics()] == [1, 2, 3, 4, 5]
    assert checkpoint.newest(tmp_path / "checkpoints", quiet)[0] == 4
