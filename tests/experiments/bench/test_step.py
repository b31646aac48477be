"""`ablab bench step`: what it prints is what it measured, and the arithmetic is that of a hand."""

import json
import math
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch

from ablab.experiments.bench import phases
from ablab.experiments.bench.phases import PHASES
from ablab.experiments.bench.step import Timed, rate_it, split_device
from ablab.experiments.bench.step_table import show_step

CPU = torch.device("cpu")
MEASURED = (
    "tokens_per_second",
    "ms_per_step",
    "peak_gib",
    "build_seconds",
    "compile_seconds",
    "mfu_measured",
)


@pytest.fixture(scope="module")
def sheet(lab):
    return lab.sheet("timed")


@pytest.fixture
def timed(lab, ablab, sheet):
    """timed(*words): what a short `ablab bench step` of the sheet printed and wrote."""

    def run(*words):
        counts = ("--steps", "2", "--windows", "2", "--warm-up", "1")
        ended = ablab("bench", "step", sheet, *words, *counts, "--out", "step.json")
        assert ended.code == 0, ended.err
        return ended.out, json.loads((lab.root / "step.json").read_text())

    return run


def finite_and_positive(*values):
    return all(math.isfinite(value) and value > 0 for value in values)


def phases_of(one):
    return [one["split_ms"][phase] for phase in PHASES]


def test_a_step_is_measured_printed_and_written(timed):
    out, told = timed()
    (one,) = told["subjects"]
    assert one["name"] == "timed, full"
    assert "ratio" not in told
    assert finite_and_positive(*(one[key] for key in MEASURED))
    first, second = one["windows_ms"]
    assert first != second
    assert one["tokens_per_step"] == 64
    assert one["tokens_per_second"] == pytest.approx(64 / one["ms_per_step"] * 1e3)
    if told["device"].startswith("cpu"):
        assert one["mfu"] is None
        assert one["kernels_per_step"] is None
    assert f"{one['tokens_per_second']:,.0f}" in out
    assert f"{one['ms_per_step']:.2f}" in out


def test_the_split_adds_up_to_the_step_and_every_phase_takes_time(timed):
    _, told = timed()
    (one,) = told["subjects"]
    split = one["split_ms"]
    assert list(split) == ["data", "forward", "backward", "optimizer", "gaps"]
    assert sum(split.values()) == pytest.approx(one["ms_per_step"])
    assert finite_and_positive(*phases_of(one))


def test_another_cell_takes_turns_with_the_first(timed):
    out, told = timed("--against", "base")
    assert "timed, full / timed, base: " in out
    first, second = told["subjects"]
    ratio = first["tokens_per_second"] / second["tokens_per_second"]
    assert told["ratio"] == pytest.approx(ratio)
    assert first["flops_per_token"] > 0
    assert len(second["windows_ms"]) == 2


def test_another_override_takes_turns_with_the_first(timed):
    out, told = timed("data.batch=8", "--against", "runtime.micro_batch=2")
    assert "micro_batch=8" in out
    assert "micro_batch=2" in out
    assert [one["tokens_per_step"] for one in told["subjects"]] == [128, 128]


def test_hugging_face_llama_of_the_same_shape_takes_turns(timed):
    pytest.importorskip("transformers")
    _, told = timed("--cell", "base", "--against", "hf")
    ours, peer = told["subjects"]
    assert peer["flops_per_token"] == ours["flops_per_token"]
    assert "fused AdamW" in peer["about"]
    assert finite_and_positive(told["ratio"], peer["tokens_per_second"], *phases_of(peer))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_on_a_gpu_kernels_and_launches_are_counted_and_every_phase_keeps_the_device_busy(timed):
    _, told = timed("runtime.device=cuda", "model.attention.head_dim=16", "model.width=64")
    (one,) = told["subjects"]
    counted = (one["mfu"], one["kernels_per_step"], one["launches_per_step"])
    assert finite_and_positive(*counted, *phases_of(one))
    of_peak = told["matmul_tflops"] / 989
    assert one["mfu"] / one["mfu_measured"] == pytest.approx(of_peak)
    assert one["peak_gib"] < 5


def test_mfu_is_tokens_a_second_times_flops_a_token_over_the_peak():
    """989,000 tokens/s of 501.4 MFLOP are 495.9 TFLOP/s: half of 989 TFLOP/s, 62 % of 800."""
    one = Timed("hand", tokens_per_step=98_900, flops_per_token=501_400_000)
    rate_it(one, [0.2, 0.1, 0.05], rate=800e12, device_type="cuda")
    assert one.ms_per_step == pytest.approx(100)
    assert one.tokens_per_second == pytest.approx(989_000)
    assert one.mfu == pytest.approx(0.5014)
    assert one.mfu_measured == pytest.approx(0.61985, rel=1e-4)


def test_phases_told_apart_at_another_clock_are_scaled_to_the_busy_part_of_the_timed_step(
    monkeypatch,
):
    """Of 100 ms the device works 96, shared by four phases of 20 ms at a faster clock; a kernel of 8 ms becomes 9.6."""
    shown = []
    stepper = SimpleNamespace(step=lambda: None, show_phases=lambda: shown.append(True))
    found = phases.DeviceSplit(
        seconds=dict.fromkeys(PHASES, 0.02),
        kernels=9,
        launches=9,
        longest=[phases.Kernel("forward", "k", ms=8, times=1)],
    )
    monkeypatch.setattr(phases, "busy_share", lambda *given: None if shown else 0.96)
    monkeypatch.setattr(phases, "device_split", lambda *given: found)
    one = Timed("hand", ms_per_step=100)
    split_device(one, stepper, None, CPU)
    assert one.split_ms == pytest.approx(dict.fromkeys(PHASES, 24.0) | {"gaps": 4.0})
    assert shown == [True]
    assert one.longest[0]["ms"] == pytest.approx(9.6)
    assert one.kernels_per_step == 9
    blind = Timed("blind", ms_per_step=100)
    split_device(blind, stepper, None, CPU)
    assert not blind.split_ms
    assert blind.kernels_per_step is None


def test_what_only_a_gpu_measures_is_shown_where_it_was_measured(capsys):
    kernel = {"phase": "forward", "kernel": "flash_fwd", "ms": 1.25, "times": 8}
    one = Timed(
        "70m, full",
        tokens_per_second=985_432,
        mfu=0.5,
        mfu_measured=0.625,
        kernels_per_step=412,
        launches_per_step=3,
        split_ms=dict.fromkeys((*PHASES, "gaps"), 9.0),
        longest=[kernel],
    )
    found = {
        "device": "H100",
        "windows": 3,
        "steps": 100,
        "warm_up": 50,
        "peak_tflops": 989.0,
        "matmul_tflops": 791.0,
        "clocks": {"sm_mhz": 1755.0},
        "subjects": [asdict(one)],
    }
    show_step(found)
    told = capsys.readouterr().out
    for word in (
        "985,432",
        "50.0 %",
        "62.5 %",
        "412",
        "of 989 TFLOP/s",
        "791 TFLOP/s in this run",
        "sm_mhz 1755",
    ):
        assert word in told
    rows = [line.split() for line in told.splitlines()]
    assert ["forward", "1.250", "8", "flash_fwd"] in rows


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["lo_70m"], "unknown experiment or size 'lo_70m'. Did you mean 'loo_70m'?"),
        (["timed.yaml", "--cell", "ful"], "no cell 'ful'. Did you mean 'full'?"),
        (["timed.yaml", "--against", "bas"], "no cell 'bas'. Did you mean 'base'?"),
        (["timed.yaml", "data.name=docs"], "data.name cannot be chosen here"),
        (["timed.yaml", "model.widht=64"], "Did you mean"),
        (
            ["timed.yaml", "--against", "runtime.micro_batch=3"],
            "runtime.micro_batch=3 does not divide data.batch=4",
        ),
        (["--stepz", "3"], "No such option"),
    ],
)
def test_a_mistake_is_one_line(lab, ablab, sheet, words, said):
    ended = ablab("bench", "step", *words)
    assert ended.code == 2
    assert said in ended.err
    assert len(ended.err.strip().splitlines()) == 1
