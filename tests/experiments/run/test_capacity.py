"""What shares a device with a run, as far as this machine can tell."""

import pytest

from ablab.core.runtime.runtime import Runtime
from ablab.experiments.run import capacity

CPU = Runtime(device="cpu")


@pytest.fixture
def nvidia_smi(tmp_path, monkeypatch):
    """A stand-in on the PATH: nvidia_smi(what it prints), which keeps the words it was called with."""
    called = tmp_path / "called"

    def prints(text: str, code: int = 0):
        program = tmp_path / "nvidia-smi"
        program.write_text(f"#!/bin/sh\necho \"$@\" > {called}\nprintf '{text}'\nexit {code}\n")
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
        return called

    return prints


def test_processes_on_the_gpus_of_a_run_are_counted(nvidia_smi):
    called = nvidia_smi(r"123\n456\n")
    assert capacity.strangers_on(["0", "3"]) == 2
    assert "--id=0,3 --query-compute-apps=pid" in called.read_text()


@pytest.mark.parametrize("said", ["", "No devices were found", "[N/A]"])
def test_what_is_no_process_does_not_count(nvidia_smi, said):
    nvidia_smi(said, code=9)
    assert capacity.strangers_on(["0"]) == 0


def test_without_a_gpu_or_without_the_program_nobody_is_seen(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert capacity.strangers_on([]) == capacity.strangers_on(["0"]) == 0


@pytest.mark.parametrize(
    ("jobs", "strangers", "said"),
    [
        (1, 0, ""),
        (3, 0, "3 runs at once"),
        (1, 2, "another process on the card"),
        (2, 1, "2 runs at once and another process on the card"),
    ],
)
def test_who_shares_a_device_is_told_in_words(jobs, strangers, said):
    assert capacity.shared_by(CPU, jobs, strangers) == said


def test_jobs_that_take_turns_on_a_gpu_share_nothing(monkeypatch):
    monkeypatch.setattr(capacity, "visible_gpus", lambda: ["0", "1"])
    assert capacity.shared_by(Runtime(turns=True), 6, 0) == ""
    assert capacity.shared_by(Runtime(turns=False), 6, 0) == "3 runs at once"
