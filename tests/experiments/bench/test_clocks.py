"""Whose turn it is, and what the clocks of a GPU say."""

import torch

from ablab.experiments.bench.ceilings import clocks_under
from ablab.experiments.bench.clocks import in_turn

CPU = torch.device("cpu")


def test_two_subjects_take_turns_a_b_b_a():
    order = []
    steps = [lambda: order.append("A"), lambda: order.append("B")]
    times = in_turn(steps, count=1, windows=4, device=CPU)
    assert "".join(order) == "ABBAABBA"
    assert [len(one) for one in times] == [4, 4]


def test_clocks_are_read_while_the_load_runs_and_absence_is_no_error(tmp_path, monkeypatch):
    steps = []

    def load():
        steps.append(1)

    monkeypatch.setenv("PATH", str(tmp_path))
    assert clocks_under(load) == {} and not steps
    script = tmp_path / "nvidia-smi"
    script.write_text("#!/bin/sh\n/bin/sleep 0.1\necho '1755, 1980, 2619, 610.5, 51'\n")
    script.chmod(0o755)
    assert clocks_under(load) == {
        "sm_mhz": 1755,
        "max_sm_mhz": 1980,
        "memory_mhz": 2619,
        "watts": 610.5,
        "celsius": 51,
    }
    assert steps
