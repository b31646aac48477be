"""`ablab bench step`: what it prints is what it measured, and the arithmetic is that of a hand."""

import json
import math
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch

from ablab.core.model.cost import cost_of
from ablab.experiments.bench import step as bench_step
from ablab.experiments.bench import timing
from ablab.experiments.bench.step import Timed, rate_it, show_step

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def sheet(lab):
    return lab.sheet("timed")


def quick(*words):
    return (*words, "--steps", "2", "--windows", "2", "--warm-up", "1", "--out", "step.json")


def found(lab):
    return json.loads((lab.root / "step.json").read_text())


def finite_and_positive(*values):
    return all(math.isfinite(value) and value > 0 for value in values)


def test_a_step_is_measured_printed_and_written(lab, ablab, sheet):
    ended = ablab("bench", "step", *quick(sheet))
    assert ended.code == 0, ended.err
    told = found(lab)
    (one,) = told["subjects"]
    assert one["name"] == "timed, full" and "ratio" not in told
    assert finite_and_positive(
        *(
            one[key]
            for key in (
                "tokens_per_second",
                "ms_per_step",
                "peak_gib",
                "build_seconds",
                "compile_seconds",
                "mfu_measured",
            )
        )
    )
    assert len(one["windows_ms"]) == 2 and one["windows_ms"][0] != one["windows_ms"][1]
    assert one["tokens_per_step"] == 64 and one["tokens_per_second"] == pytest.approx(
        64 / one["ms_per_step"] * 1e3
    )
    if told["device"].startswith("cpu"):
        assert one["mfu"] is None and one["kernels_per_step"] is None
    assert (
        f"{one['tokens_per_second']:,.0f}" in ended.out
        and f"{one['ms_per_step']:.2f}" in ended.out
    )


def test_the_split_adds_up_to_the_step_and_every_phase_takes_time(lab, ablab, sheet):
    assert ablab("bench", "step", *quick(sheet)).code == 0
    split = found(lab)["subjects"][0]["split_ms"]
    assert list(split) == ["data", "forward", "backward", "optimizer", "gaps"]
    assert sum(split.values()) == pytest.approx(found(lab)["subjects"][0]["ms_per_step"])
    assert finite_and_positive(*(split[phase] for phase in timing.PHASES))


def test_another_cell_and_another_override_take_turns_with_the_first(lab, ablab, sheet):
    assert (
        "timed, full / timed, base: "
        in ablab("bench", "step", *quick(sheet, "--against", "base")).out
    )
    first, second = found(lab)["subjects"]
    assert found(lab)["ratio"] == pytest.approx(
        first["tokens_per_second"] / second["tokens_per_second"]
    )
    assert first["flops_per_token"] > 0 and len(second["windows_ms"]) == 2
    ended = ablab(
        "bench", "step", *quick(sheet, "data.batch=8", "--against", "runtime.micro_batch=2")
    )
    assert ended.code == 0 and "micro_batch=8" in ended.out and "micro_batch=2" in ended.out
    assert [one["tokens_per_step"] for one in found(lab)["subjects"]] == [128, 128]


def test_hugging_face_llama_of_the_same_shape_takes_turns(lab, ablab, sheet):
    pytest.importorskip("transformers")
    ended = ablab("bench", "step", *quick(sheet, "--cell", "base", "--against", "hf"))
    assert ended.code == 0, ended.err
    ours, peer = found(lab)["subjects"]
    assert peer["flops_per_token"] == ours["flops_per_token"] and "fused AdamW" in peer["about"]
    assert finite_and_positive(
        found(lab)["ratio"],
        peer["tokens_per_second"],
        *(peer["split_ms"][phase] for phase in timing.PHASES),
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_on_a_gpu_kernels_and_launches_are_counted_and_every_phase_keeps_the_device_busy(
    lab, ablab, sheet
):
    assert (
        ablab(
            "bench",
            "step",
            *quick(
                sheet, "runtime.device=cuda", "model.attention.head_dim=16", "model.width=64"
            ),
        ).code
        == 0
    )
    (one,) = found(lab)["subjects"]
    assert finite_and_positive(
        one["mfu"],
        one["kernels_per_step"],
        one["launches_per_step"],
        *(one["split_ms"][phase] for phase in timing.PHASES),
    )
    assert (
        one["mfu"] / one["mfu_measured"] == pytest.approx(found(lab)["matmul_tflops"] / 989)
        and one["peak_gib"] < 5
    )


@pytest.mark.parametrize(
    "paths",
    [{}, {"model__tied": True, "model__attention__group": 2}],
    ids=["plain", "tied, grouped"],
)
def test_the_peer_has_the_recipes_shape_and_accumulates_the_mean_gradient(
    tiny, token_folder, paths
):
    pytest.importorskip("transformers")
    from ablab.experiments.bench.hugging_face import HuggingFace

    recipe = tiny(**paths)
    weights = []
    for rows in (4, 2):
        peer = HuggingFace(
            recipe,
            {"micro_batch": rows, "device": "cpu", "dtype": "fp32", "compile": False},
            token_folder,
            timing.Marks(),
        )
        assert peer.flops_per_token == cost_of(recipe).flops_per_token
        assert (
            sum(value.numel() for value in peer.model.parameters())
            == cost_of(recipe).parameters
        )
        peer.step()
        weights.append(
            torch.cat([value.detach().flatten() for value in peer.model.parameters()])
        )
    assert (weights[0] - weights[1]).abs().max() < 1e-5


def test_mfu_is_tokens_a_second_times_flops_a_token_over_the_peak():
    """989,000 tokens/s of 501.4 MFLOP are 495.9 TFLOP/s: half of 989 TFLOP/s, 62 % of 800."""
    timed = Timed("hand", tokens_per_step=98_900, flops_per_token=501_400_000)
    rate_it(timed, [0.2, 0.1, 0.05], rate=800e12, device_type="cuda")
    assert timed.ms_per_step == pytest.approx(100) and timed.tokens_per_second == pytest.approx(
        989_000
    )
    assert timed.mfu == pytest.approx(0.5014) and timed.mfu_measured == pytest.approx(
        0.61985, rel=1e-4
    )


def test_two_subjects_take_turns_a_b_b_a():
    order = []
    times = timing.in_turn([lambda: order.append("A"), lambda: order.append("B")], 1, 4, CPU)
    assert "".join(order) == "ABBAABBA" and [len(one) for one in times] == [4, 4]


def event(category, ts, dur, correlation=None, name=""):
    return {
        "cat": category,
        "ts": ts,
        "dur": dur,
        "name": name,
        "args": {} if correlation is None else {"correlation": correlation},
    }


def test_a_trace_gives_each_phase_its_busy_time_and_counts_overlap_once():
    """Microseconds.  Kernels run long after they are launched; 3 overlaps 2 by 10; 4 is replayed by one launch of a graph, twice."""
    phases = [
        event("user_annotation", start, 10, name=f"bench/{phase}")
        for phase, start in zip(timing.PHASES, (0, 10, 20, 30), strict=True)
    ]
    calls = [
        event("cuda_runtime", 5, 1, 1, "cudaMemcpyAsync"),
        event("cuda_driver", 12, 1, 2, "cuLaunchKernelEx"),
    ]
    calls += [
        event("cuda_runtime", 22, 1, 3, "cudaLaunchKernel"),
        event("cuda_runtime", 33, 1, 4, "cudaGraphLaunch"),
        event("cpu_op", 33, 1),
    ]
    work = [
        event("gpu_memcpy", 100, 5, 1),
        event("kernel", 110, 50, 2),
        event("kernel", 150, 30, 3),
    ]
    work += [event("kernel", 200, 7, 4, "move"), event("kernel", 210, 8, 4, "move")]
    told = timing.busy(
        [*calls, *reversed(work), *phases, {"cat": "kernel", "name": "no duration"}], count=2
    )
    assert told["split"] == pytest.approx(
        {"data": 2.5e-6, "forward": 25e-6, "backward": 10e-6, "optimizer": 7.5e-6}
    )
    assert told["kernels"] == 2 and told["launches"] == 1.5
    assert [(one["phase"], one["ms"]) for one in told["longest"]] == [
        ("forward", 0.025),
        ("backward", 0.015),
        ("optimizer", 0.0075),
        ("data", 0.0025),
    ]
    assert told["longest"][2]["kernel"] == "move" and told["longest"][2]["times"] == 1


def test_gaps_are_what_no_kernel_covers_between_the_first_and_the_last(monkeypatch):
    work = [
        event("kernel", 100, 50),
        event("kernel", 140, 20),
        event("gpu_memcpy", 180, 20),
        event("cpu_op", 0, 900),
    ]
    monkeypatch.setattr(
        timing,
        "_trace",
        lambda *given, **more: [*reversed(work), {"cat": "kernel", "name": "no duration"}],
    )
    assert timing.busy_share(lambda: None, CPU) == pytest.approx(80 / 100)
    monkeypatch.setattr(timing, "_trace", lambda *given, **more: [])
    assert timing.busy_share(lambda: None, CPU) is None


def test_phases_told_apart_at_another_clock_are_scaled_to_the_busy_part_of_the_timed_step(
    monkeypatch,
):
    shown, timed = [], Timed("hand", ms_per_step=100)
    one = SimpleNamespace(step=lambda: None, show_phases=lambda: shown.append(True))
    found = {
        "split": dict.fromkeys(timing.PHASES, 0.02),
        "kernels": 9,
        "launches": 9,
        "longest": [{"phase": "forward", "kernel": "k", "ms": 8, "times": 1}],
    }
    monkeypatch.setattr(timing, "busy_share", lambda *given: None if shown else 0.96)
    monkeypatch.setattr(timing, "device_split", lambda *given: found)
    bench_step._split_device(timed, one, None, CPU)
    assert timed.split_ms == pytest.approx(
        dict.fromkeys(timing.PHASES, 24.0) | {"gaps": 4.0}
    ) and shown == [True]
    assert timed.longest[0]["ms"] == pytest.approx(9.6) and timed.kernels_per_step == 9
    blind = Timed("blind", ms_per_step=100)
    bench_step._split_device(blind, one, None, CPU)
    assert not blind.split_ms and blind.kernels_per_step is None


def test_what_only_a_gpu_measures_is_shown_where_it_was_measured(capsys):
    kernel = {"phase": "forward", "kernel": "flash_fwd", "ms": 1.25, "times": 8}
    split = dict.fromkeys((*timing.PHASES, "gaps"), 9.0)
    one = Timed(
        "70m, full",
        tokens_per_second=985_432,
        mfu=0.5,
        mfu_measured=0.625,
        kernels_per_step=412,
        launches_per_step=3,
        split_ms=split,
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
    }
    show_step(found | {"subjects": [asdict(one)]})
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
    assert ["forward", "1.250", "8", "flash_fwd"] in [
        line.split() for line in told.splitlines()
    ]


def test_clocks_are_read_while_the_load_runs_and_absence_is_no_error(tmp_path, monkeypatch):
    steps = []
    monkeypatch.setenv("PATH", str(tmp_path))
    assert timing.clocks(lambda: steps.append(1)) == {} and not steps
    (tmp_path / "nvidia-smi").write_text(
        "#!/bin/sh\n/bin/sleep 0.1\necho '1755, 1980, 2619, 610.5, 51'\n"
    )
    (tmp_path / "nvidia-smi").chmod(0o755)
    told = timing.clocks(lambda: steps.append(1))
    assert (
        told
        == {
            "sm_mhz": 1755,
            "max_sm_mhz": 1980,
            "memory_mhz": 2619,
            "watts": 610.5,
            "celsius": 51,
        }
        and steps
    )


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
    assert ended.code == 2 and said in ended.err and len(ended.err.strip().splitlines()) == 1


def test_a_size_alone_can_be_timed(tmp_path):
    from ablab.experiments.bench.random_tokens import experiment_on_random_tokens

    experiment = experiment_on_random_tokens("70m", {"data.vocab": 512}, tmp_path)
    assert list(experiment.recipes) == ["base"] and experiment.base.model.width == 768
    import numpy

    ids = numpy.fromfile(tmp_path / "data/random/train.bin", "uint16")
    assert len(ids) >= 4_000_000 and set(numpy.unique(ids)) == set(range(512))
