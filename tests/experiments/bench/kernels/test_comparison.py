"""`ablab bench kernels`: what is missing is a line, what is wrong shows its error, floors and ratios are arithmetic."""

import json
import math

import pytest
import torch

from ablab.experiments.bench.kernels import attention as bench_attention
from ablab.experiments.bench.kernels import comparison as bench_kernels
from ablab.experiments.bench.kernels.cases import Case, Form
from ablab.experiments.bench.kernels.comparison import KERNELS, Row
from ablab.experiments.bench.kernels.optimizer import schulz_flops

CPU = torch.device("cpu")


def test_every_kernel_is_measured_printed_and_written(lab, ablab):
    ended = ablab("bench", "kernels", "--device", "cpu", "--out", "kernels.json")
    assert ended.code == 0, ended.err
    told = json.loads((lab.root / "kernels.json").read_text())
    timed = [row for row in told["rows"] if not row["note"]]
    assert {row["kernel"] for row in timed} == set(KERNELS)
    for row in timed:
        assert (
            math.isfinite(row["forward_ms"]) and row["forward_ms"] > 0 and row["floor_ms"] > 0
        )
        assert row["backward_ms"] is None or row["backward_ms"] > 0
        assert row["error"] is None or row["error"] < 1e-2
    attention = next(row for row in timed if row["kernel"] == "attention")
    assert attention["backward_ms"] > 0 and attention["gradient_error"] < 1e-2
    assert "no GPU" in ended.out and any(
        row["form"] == "ablab" and row["note"] == "not available: needs a GPU"
        for row in told["rows"]
    )


def test_only_chooses_kernels_and_a_near_miss_is_named(lab, ablab):
    ended = ablab(
        "bench", "kernels", "--only", "newton*", "--device", "cpu", "--out", "kernels.json"
    )
    assert ended.code == 0 and {
        row["kernel"] for row in json.loads((lab.root / "kernels.json").read_text())["rows"]
    } == {"newton_schulz"}
    refused = ablab("bench", "kernels", "--only", "atention")
    assert (
        refused.code == 2
        and "--only 'atention' fits no kernel. Did you mean 'attention'?" in refused.err
    )


def test_a_device_that_is_not_there_is_refused(ablab):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    refused = ablab("bench", "kernels", "--device", "cuda")
    assert refused.code == 2 and "torch sees no GPU here" in refused.err


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_on_a_gpu_every_form_of_attention_is_timed_with_small_errors(tmp_path):
    case = next(iter(bench_attention.attention(torch.device("cuda"), tmp_path)))
    rows = bench_kernels._rows(case, matmul=800e12, copy=3e12, device=torch.device("cuda"))
    assert not [row.note for row in rows if row.note]
    assert all(
        row.error < 5e-3 and row.gradient_error < 1e-2 and row.total_ms > row.floor_ms / 2
        for row in rows
    )


def case_of(**forms):
    x = torch.randn(3, 4, requires_grad=True)
    return Case(
        "square",
        "3x4",
        (x,),
        {name.replace("_", " "): build for name, build in forms.items()},
        lambda x: x.square(),
        flops=1e6,
        bytes=1e6,
    )


def rows_of(case):
    return {
        row.form: row for row in bench_kernels._rows(case, matmul=1e9, copy=2e9, device=CPU)
    }


def test_a_wrong_form_shows_its_error_and_a_form_that_writes_into_its_input_spoils_no_other():
    def in_place(x):
        gradient = x.detach()
        y = gradient.square()
        return y, gradient.mul_(2)

    upstream = bench_kernels.upstream_of(torch.empty(3, 4), case_of())
    rows = rows_of(
        case_of(
            right=lambda: Form(torch.square),
            wrong=lambda: Form(lambda x: 3 * x.square()),
            ablab=lambda: Form(in_place),
        )
    )
    assert rows["right"].error == 0 and rows["right"].gradient_error == 0
    assert rows["wrong"].error == pytest.approx(2) and rows[
        "wrong"
    ].gradient_error == pytest.approx(2)
    assert rows["ablab"].error == 0 and rows["ablab"].backward_ms is None
    assert (
        upstream.unique().numel() == 12
    )  # random, so that a gradient in the wrong place shows


def test_a_nan_in_the_output_is_shown_as_such():
    assert math.isnan(
        rows_of(case_of(torch=lambda: Form(lambda x: x.square() * math.nan)))["torch"].error
    )


def test_what_cannot_run_is_one_line_with_the_reason():
    def missing():
        raise ImportError("No module named 'liger_kernel'\nsecond line")

    def breaks(x):
        raise RuntimeError("CUDA error: no kernel image")

    rows = rows_of(
        case_of(liger=missing, broken=lambda: Form(breaks), torch=lambda: Form(torch.square))
    )
    assert (
        rows["liger"].note == "not available: No module named 'liger_kernel'"
        and rows["liger"].forward_ms is None
    )
    assert rows["broken"].note == "not available: CUDA error: no kernel image"
    assert rows["torch"].vs_best_peer == 1.0


def test_floors_and_ratios_are_those_of_a_hand():
    """1e6 FLOP at 1e9/s is 1 ms and beats 0.5 ms of bytes; at 2 + 2 ms a form reaches a quarter of it, and the peer takes twice as long."""
    case = case_of()
    rows = [
        Row("square", "3x4", form, 1.0, *times)
        for form, times in {"torch": (3.0, 5.0), "ablab": (2.0, 2.0), "flex": ()}.items()
    ]
    bench_kernels._compare(rows, case)
    assert (
        rows[1].of_floor == 0.25 and rows[1].vs_best_peer == 2.0 and rows[0].vs_best_peer == 1.0
    )
    assert (
        rows[1].rate == pytest.approx(1e6 / 4e-3 / 1e12)
        and rows[1].unit == "TFLOP/s"
        and rows[2].rate is None
    )
    assert rows_of(case_of(torch=lambda: Form(torch.square)))[
        "torch"
    ].floor_ms == pytest.approx(1.0)


def test_other_work_is_neither_rated_nor_a_peer():
    rows = rows_of(
        case_of(scale=lambda: Form(torch.square, same=False), ablab=lambda: Form(torch.square))
    )
    assert (
        rows["scale"].rate is None
        and rows["scale"].forward_ms > 0
        and rows["ablab"].vs_best_peer is None
    )


def test_newton_schulz_products_are_counted_in_full_along_the_shorter_side():
    """768x2048, 7 triples: X X^T and the sum times X take 2 * 768^2 * 2048 each, the square of X X^T 2 * 768^3."""
    one = 7 * (2 * 2 * 768 * 768 * 2048 + 2 * 768**3)
    assert (
        schulz_flops((8, 768, 2048), "polar7")
        == schulz_flops((8, 2048, 768), "polar7")
        == 8 * one
    )
    fused = [
        (8, 2304, 768),
        (8, 768, 768),
        (8, 4096, 768),
        (8, 768, 2048),
    ]  # the 32 matrices of the 70M model, none taken apart
    assert sum(schulz_flops(shape, "polar7") for shape in fused) == pytest.approx(
        1.42e12, rel=0.01
    )


def test_all_attention_forms_start_from_the_same_packed_qkv(tmp_path):
    """The fp32 formula against a loop over positions in fp64, for one head of each group."""
    (case,) = bench_attention.attention(CPU, tmp_path)
    with torch.no_grad():
        y = case.reference(*case.inputs)
    h, kv, t, d = 4, 2, 32, 32
    qkv, q_gain, k_gain, gate, cos, sin = (x.detach().double() for x in case.inputs)

    def turned(x, gain):
        x = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * gain
        left, right = x[..., : d // 2], x[..., d // 2 :]
        return torch.cat((left * cos - right * sin, right * cos + left * sin), -1)

    for head in (1, 3):
        shared = head // (h // kv)
        columns = [
            slice(index * d, (index + 1) * d) for index in (head, h + shared, h + kv + shared)
        ]
        q, k, v = (qkv[..., one] for one in columns)
        q, k = turned(q, q_gain), turned(k, k_gain)
        for position in (0, 7, t - 1):
            scores = torch.einsum(
                "bd,btd->bt", q[:, position], k[:, : position + 1]
            ) / math.sqrt(d)
            wanted = (
                torch.einsum("bt,btd->bd", scores.softmax(-1), v[:, : position + 1])
                * gate[:, position, head, None]
            )
            assert (y[:, position, columns[0]].double() - wanted).norm() / wanted.norm() < 1e-5
