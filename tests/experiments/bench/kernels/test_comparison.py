"""`ablab bench kernels`: every kernel has its rows, and what is missing is a line."""

import json
import math

import pytest
import torch

from ablab.experiments.bench.kernels.comparison import KERNELS


@pytest.fixture
def compared(lab, ablab):
    """compared(*words): what `ablab bench kernels` on the CPU printed and wrote."""

    def run(*words):
        ended = ablab("bench", "kernels", *words, "--device", "cpu", "--out", "kernels.json")
        assert ended.code == 0, ended.err
        told = json.loads((lab.root / "kernels.json").read_text())
        return ended.out, told["rows"]

    return run


def test_every_kernel_is_measured_printed_and_written(compared):
    out, rows = compared()
    timed = [row for row in rows if not row["note"]]
    assert {row["kernel"] for row in timed} == set(KERNELS)
    for row in timed:
        assert math.isfinite(row["forward_ms"])
        assert row["forward_ms"] > 0 and row["floor_ms"] > 0
        assert row["backward_ms"] is None or row["backward_ms"] > 0
        in_8_bits = row["kernel"].startswith("fp8") and row["form"] != "bf16"
        assert row["error"] is None or row["error"] < (0.1 if in_8_bits else 1e-2)
    attention = next(row for row in timed if row["kernel"] == "attention")
    assert attention["backward_ms"] > 0
    assert attention["gradient_error"] < 1e-2
    assert "no GPU" in out
    notes = {row["note"] for row in rows if row["form"] == "ablab"}
    assert "not available: needs a GPU" in notes


def test_only_chooses_kernels(compared):
    _, rows = compared("--only", "newton*")
    assert {row["kernel"] for row in rows} == {"newton_schulz"}


def test_a_kernel_that_is_a_near_miss_is_named(ablab):
    refused = ablab("bench", "kernels", "--only", "atention")
    assert refused.code == 2
    assert "--only 'atention' fits no kernel. Did you mean 'attention'?" in refused.err


def test_a_device_that_is_not_there_is_refused(ablab):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    refused = ablab("bench", "kernels", "--device", "cuda")
    assert refused.code == 2
    assert "torch sees no GPU here" in refused.err
