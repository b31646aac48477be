"""Arms that other kernels served than their reference, from hand-written records."""

import pytest

from ablab.analysis.effects import frame
from ablab.analysis.effects.effects import measure
from ablab.analysis.effects.service import in_words

TRITON = {"attention": "triton", "loss": "triton"}
FALLEN = {"attention": "torch: 'half' has no kernel", "loss": "triton"}


def service(lab, ours, theirs) -> dict:
    """What is said of `- x`, which `ours` served, against `full`, which `theirs` served."""
    lab.cell("full", [3.0, 3.1], None, kernels=theirs)
    lab.cell("- x", [3.2, 3.3], kernels=ours)
    return measure(frame.load(lab.write(), "loo"), "val/loss")[1].service


def test_a_place_that_another_kernel_served_is_named_with_both(lab):
    assert service(lab, FALLEN, TRITON) == {
        "attention": ("torch: 'half' has no kernel", "triton"),
    }


def test_the_difference_is_told_from_either_side(lab):
    assert service(lab, TRITON, FALLEN) == {
        "attention": ("triton", "torch: 'half' has no kernel"),
    }


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (TRITON, TRITON),
        ({"attention": "torch: no GPU"}, {"attention": "torch: fp32"}),  # torch is torch
        (TRITON | {"newton_schulz": "triton"}, TRITON),  # no such place in the other
        (TRITON, {}),  # written before places were recorded
        ({}, {}),
    ],
)
def test_arms_that_were_served_alike_or_cannot_be_compared_are_not_marked(lab, ours, theirs):
    assert service(lab, ours, theirs) == {}


def test_seeds_of_one_arm_that_were_served_differently_count_too(lab):
    lab.cell("full", [3.0, 3.1], None, kernels=TRITON)
    lab.cell("- x", [3.2], kernels=TRITON)
    lab.cell("- x", ["diverged", 3.3], kernels=FALLEN, runs=["-x-2", "-x-3"])
    runs = frame.load(lab.write(), "loo").query("run != '-x-2'")
    (found,) = measure(runs, "val/loss")[1].service.values()
    assert found == ("triton and torch: 'half' has no kernel", "triton")


def test_runs_that_did_not_finish_say_nothing_about_speed(lab):
    lab.cell("full", [3.0, 3.1], None, kernels=TRITON)
    lab.cell("- x", [3.2, "diverged"], kernels=TRITON)
    store = lab.write()
    runs = frame.load(store, "loo")
    lost = runs.status == "diverged"
    runs.loc[lost, "kernels/attention"] = "torch: out of shape"
    assert measure(runs, "val/loss")[1].service == {}


def test_in_words_each_place_says_who_served_it_and_why():
    said = in_words({"attention": ("torch: no RoPE", "triton"), "loss": ("triton", "torch")})
    assert said == "attention by torch (no RoPE) against triton; loss by triton against torch"
