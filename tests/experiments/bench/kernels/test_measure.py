"""One case, measured: what is wrong shows its error, floors and ratios are those of a hand."""

import math

import pytest
import torch

from ablab.experiments.bench.kernels.case import Case, Form
from ablab.experiments.bench.kernels.measure import Ceilings, Row, compare, measure, upstream_of

CPU = torch.device("cpu")
CEILINGS = Ceilings(matmul=1e9, copy=2e9)


def square(x):
    return x.square()


def case_of(**forms):
    """forms: name -> call; an exception is raised where the form is built."""
    x = torch.randn(3, 4, requires_grad=True)
    builders = {name: builder(form) for name, form in forms.items()}
    return Case("square", "3x4", (x,), builders, square, flops=1e6, bytes=1e6)


def builder(form):
    def build():
        if isinstance(form, Exception):
            raise form
        return form if isinstance(form, Form) else Form(form)

    return build


def rows_of(**forms):
    return {row.form: row for row in measure(case_of(**forms), CEILINGS, CPU)}


def test_a_wrong_form_shows_its_error_and_a_form_that_writes_into_its_input_spoils_no_other():
    def in_place(x):
        gradient = x.detach()
        y = gradient.square()
        return y, gradient.mul_(2)

    rows = rows_of(right=torch.square, wrong=lambda x: 3 * x.square(), ablab=in_place)
    assert rows["right"].error == 0
    assert rows["right"].gradient_error == 0
    assert rows["wrong"].error == pytest.approx(2)
    assert rows["wrong"].gradient_error == pytest.approx(2)
    assert rows["ablab"].error == 0
    assert rows["ablab"].backward_ms is None


def test_the_gradient_from_above_is_random_so_that_one_in_the_wrong_place_shows():
    assert upstream_of(torch.empty(3, 4)).unique().numel() == 12


def test_a_nan_in_the_output_is_shown_as_such():
    rows = rows_of(torch=lambda x: x.square() * math.nan)
    assert math.isnan(rows["torch"].error)


def test_what_cannot_run_is_one_line_with_the_reason():
    def breaks(x):
        raise RuntimeError("CUDA error: no kernel image")

    missing = ImportError("No module named 'liger_kernel'\nsecond line")
    rows = rows_of(liger=missing, broken=breaks, torch=torch.square)
    assert rows["liger"].note == "not available: No module named 'liger_kernel'"
    assert rows["liger"].forward_ms is None
    assert rows["broken"].note == "not available: CUDA error: no kernel image"
    assert rows["torch"].vs_best_peer == 1.0


def test_floors_and_ratios_are_those_of_a_hand():
    """1e6 FLOP at 1e9/s is 1 ms and beats 0.5 ms of bytes.

    At 2 + 2 ms a form reaches a quarter of it, and the peer takes twice as long.
    """
    assert rows_of(torch=torch.square)["torch"].floor_ms == pytest.approx(1.0)
    peer = Row("square", "3x4", "torch", floor_ms=1.0, forward_ms=3.0, backward_ms=5.0)
    own = Row("square", "3x4", "ablab", floor_ms=1.0, forward_ms=2.0, backward_ms=2.0)
    missing = Row("square", "3x4", "flex", floor_ms=1.0)
    compare([peer, own, missing], case_of())
    assert own.of_floor == 0.25
    assert own.vs_best_peer == 2.0
    assert own.rate == pytest.approx(1e6 / 4e-3 / 1e12)
    assert own.unit == "TFLOP/s"
    assert peer.vs_best_peer == 1.0
    assert missing.rate is None


def test_other_work_is_neither_rated_nor_a_peer():
    rows = rows_of(scale=Form(torch.square, same=False), ablab=torch.square)
    assert rows["scale"].rate is None
    assert rows["scale"].forward_ms > 0
    assert rows["ablab"].vs_best_peer is None
