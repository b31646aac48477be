"""Search spaces and bad input, and proposals: a function of the study and its finished generations alone."""

import math
import subprocess
import sys
from itertools import pairwise, product

import pytest
from optuna.trial import TrialState, create_trial

from ablab.core.errors import UserError, without_password
from ablab.experiments.tune.importance import importance
from ablab.experiments.tune.proposals import Memory, Proposer, spread_of
from ablab.experiments.tune.space import (
    Axis,
    StudySheet,
    axes_of,
    corners,
    size_of,
    total_trials,
)

LR = {"optim.lr": {"log": [1e-3, 1e-1]}}
DECAY = {"schedule.decay": {"uniform": [0.0, 1.0]}}
BOTH = LR | {"model.width": {"choices": [16, 32, 64]}}
SAMPLERS = ("gp", "tpe", "qmc", "random", "grid")


def sheet(space=BOTH, **keys) -> StudySheet:
    return StudySheet(space=space, **keys)


def bowl(point) -> float:
    """Least at a rate of 0.01."""
    return math.log2(point["optim.lr"] / 0.01) ** 2


def ended(axes, points, value=bowl, state="complete"):
    """Frozen trials of these points."""
    spaces = {axis.path: axis.distribution() for axis in axes}
    states = {"complete": TrialState.COMPLETE, "pruned": TrialState.PRUNED}
    return [
        create_trial(
            state=states.get(state, TrialState.FAIL),
            params=point,
            value=value(point) if state == "complete" else None,
            distributions=spaces,
            user_attrs={"state": state},
        )
        for point in points
    ]


def propose(axes, asked, study, better, before, count, spread=None):
    """`count` points after the trials `before`."""
    spread = spread_of(axes, asked) if spread is None else spread
    return Proposer(axes, asked, study, better, spread).points(before, count)


def searched(asked: StudySheet, study="valley/base", better="lower"):
    """All points of a study whose trials all end."""
    axes, points = axes_of(asked.space), []
    total = total_trials(axes, asked)
    size = total if asked.sampler in ("grid", "qmc") else asked.generation
    while len(points) < total:
        count = min(size, total - len(points))
        points += propose(axes, asked, study, better, ended(axes, points), count)
    return points


# -- the space ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("space", "said"),
    [
        ({}, "study.space is empty"),
        (
            {"optim.lr": {"log": [0.1, 0.001]}},
            r"optim.lr: \[0.1, 0.001\] is empty or inverted; write the lower bound first, above 0",
        ),
        ({"optim.lr": {"log": [0.0, 0.1]}}, "empty or inverted.*above 0"),
        (
            {"optim.lr": {"uniform": [0.1, 0.1]}},
            "empty or inverted; write the lower bound first$",
        ),
        ({"optim.lr": {"log": [0.1]}}, "needs two numbers"),
        ({"optim.lr": {"log": ["small", "large"]}}, "needs two numbers"),
        ({"optim.lr": {"log": [0.001, math.inf]}}, "two finite numbers"),
        ({"optim.lr": {"log": 0.1}}, "needs a list with something in it, not 0.1"),
        ({"model.width": {"choices": []}}, "needs a list with something in it"),
        ({"model.width": {"choices": [16, 32, 16]}}, "each named once"),
        ({"model.width": {"choices": [[16], [32]]}}, "numbers or words"),
        ({"model.width": {"int": [1.5, 3]}}, "two whole numbers"),
        ({"optim.lr": {"logg": [0.1, 1]}}, "must be one of log, uniform, int"),
        ({"optim.lr": {"log": [0.1, 1], "uniform": [0.1, 1]}}, "must be one of"),
        (
            {"optim.lr": [0.1, 1]},
            r"optim.lr must be one of log, uniform, int: .*; it says \[0.1, 1\]$",
        ),
        (
            {"optim.lr": {"log": [0.1, 1], "points": 0}},
            "points=0 must be a whole number from 1 to 100,000",
        ),
        (
            {"optim.lr": {"log": [0.1, 1], "points": 1_000_000_000}},
            "points=1000000000 must be a whole number from 1 to 100,000",
        ),
    ],
)
def test_a_space_that_cannot_be_searched_is_refused_in_one_line(space, said):
    with pytest.raises(UserError, match=said) as refusal:
        axes_of(space)
    assert "\n" not in str(refusal.value)


def test_corners_are_all_combinations_of_the_ends():
    axes = axes_of(BOTH | {"model.layers": {"int": [2, 4]}})
    found = [
        (one["optim.lr"], one["model.width"], one["model.layers"]) for one in corners(axes)
    ]
    assert set(found) == set(product((1e-3, 1e-1), (16, 32, 64), (2, 4)))
    assert len(found) == 12


def test_a_grid_is_every_combination_the_last_path_fastest():
    space = {
        "optim.lr": {"log": [0.001, 0.1], "points": 3},
        "model.width": {"choices": [16, 64]},
    }
    points = searched(sheet(space, sampler="grid", trials_per_cell=1))
    assert [tuple(point.values()) for point in points] == [
        (lr, width) for lr in (0.001, 0.01, 0.1) for width in (16, 64)
    ]


def test_an_integer_axis_of_a_grid_names_no_value_twice():
    layers = Axis("model.layers", "int", (2, 4), points=7)
    assert layers.grid() == [2, 3, 4]


def test_a_space_has_as_many_points_as_its_choices_and_whole_numbers_make():
    words = Axis("with.gating.per", "choices", ("head", "elementwise", "none"))
    layers = Axis("model.layers", "int", (2, 5))
    assert size_of([words]) == 3
    assert size_of([words, layers]) == 12
    assert size_of([words, Axis("optim.lr", "log", (1e-3, 1e-1))]) == math.inf


def test_every_share_of_an_axis_lies_within_its_range():
    for axis in axes_of(
        {
            "a": {"log": [0.00123456, 0.0654321]},
            "b": {"uniform": [-0.123456, 0.333333]},
            "c": {"int": [3, 9]},
        }
    ):
        values = [axis.at(i / 50) for i in range(51)]
        assert axis.values[0] <= min(values) and max(values) <= axis.values[1]
        assert [min(values), max(values)] == pytest.approx([*axis.values], rel=1e-3)
        assert values == sorted(values)


# -- proposals ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_proposals_are_a_function_of_the_study_and_its_finished_generations(sampler):
    asked = sheet(sampler=sampler, trials_per_cell=8)
    once = searched(asked)
    assert searched(asked) == once
    axes = axes_of(asked.space)
    if sampler not in ("grid", "qmc"):  # any generation can be asked alone, as after a kill
        before = ended(axes, once[:4])
        assert propose(axes, asked, "valley/base", "lower", before, 4) == once[4:]


@pytest.mark.parametrize("sampler", [one for one in SAMPLERS if one != "grid"])
def test_another_seed_or_another_cell_is_another_search(sampler):
    zero, one = (sheet(sampler=sampler, sampler_seed=seed) for seed in (0, 1))
    assert searched(zero) != searched(one)
    assert searched(one) != searched(one, study="valley/+ mup")


@pytest.mark.parametrize("sampler", ["gp", "tpe"])
def test_one_dimension_starts_on_an_even_log_grid_with_both_ends(sampler):
    points = searched(sheet(LR, sampler=sampler, trials_per_cell=12))
    even = [point["optim.lr"] for point in points[:6]]
    steps = [math.log(after / before) for before, after in pairwise(even)]
    assert (even[0], even[-1]) == (1e-3, 1e-1)
    assert steps == pytest.approx([math.log(100) / 5] * 5, rel=1e-3)


def test_more_dimensions_start_on_a_sobol_sequence():
    """One in each sixteenth of each axis: a net, not chance."""
    points = searched(sheet(LR | DECAY, sampler="qmc", trials_per_cell=16))
    rates = [math.log(point["optim.lr"] / 1e-3) / math.log(100) for point in points]
    decays = [point["schedule.decay"] for point in points]
    for shares in (rates, decays):
        assert sorted(int(share * 16) for share in shares) == list(range(16))


def test_a_larger_budget_goes_on_from_the_same_start():
    axes = axes_of(LR)
    small, large = (sheet(LR, trials_per_cell=count) for count in (8, 32))
    points = searched(small)
    before, spread = ended(axes, points), spread_of(axes, small)
    more = propose(axes, large, "valley/base", "lower", before, 4, spread)
    rates = {point["optim.lr"] for point in more}
    assert len(rates) == 4
    assert not rates & {point["optim.lr"] for point in points}
    assert (
        min(map(bowl, more)) < 1
    )  # within an octave: asked of the sampler, not of a longer grid


def distinct(points) -> int:
    return len({tuple(point.items()) for point in points})


@pytest.mark.parametrize(
    ("sampler", "space"),
    [
        ("gp", LR),
        ("tpe", LR),
        ("tpe", BOTH),
        ("random", BOTH),
        ("qmc", LR),
        ("qmc", LR | {"model.layers": {"int": [1, 3]}}),
    ],
)
def test_no_point_is_proposed_twice(sampler, space):
    points = searched(sheet(space, sampler=sampler, trials_per_cell=20))
    assert len(points) == 20
    assert distinct(points) == 20


@pytest.mark.parametrize("sampler", ["gp", "tpe", "random", "qmc"])
def test_a_small_space_is_exhausted_before_anything_repeats(sampler):
    space = {
        "optim.lr": {"choices": [0.001, 0.01, 0.1]},
        "model.layers": {"int": [1, 2]},
    }
    assert size_of(axes_of(space)) == 6
    points = searched(sheet(space, sampler=sampler, trials_per_cell=8, generation=3))
    assert len(points) == 8
    assert distinct(points[:6]) == 6


@pytest.mark.parametrize("sampler", ["gp", "tpe", "random"])
def test_choices_that_are_words_are_searched_like_any_other(sampler):
    space = LR | {"with.gating.per": {"choices": ["head", "elementwise"]}}
    points = searched(sheet(space, sampler=sampler, trials_per_cell=12))
    assert distinct(points) == 12
    assert {point["with.gating.per"] for point in points} == {"head", "elementwise"}


@pytest.mark.parametrize("sampler", ["gp", "tpe"])
def test_what_diverged_counts_as_the_worst_so_far_and_what_crashed_teaches_nothing(sampler):
    axes = axes_of(LR)
    fine = ended(axes, [{"optim.lr": lr} for lr in (0.001, 0.003, 0.01)])
    gone = []
    for lr, state in (
        (0.05, "diverged"),
        (0.1, "out_of_memory"),
        (0.07, "pruned"),
        (0.02, "failed"),
    ):
        gone += ended(axes, [{"optim.lr": lr}], state=state)
    memory = Memory(axes, "lower", fine + gone)
    values = memory.values
    told = {trial.params["optim.lr"]: trial.value for trial in memory.study.trials}
    assert len(values) == 3
    assert told[0.001] == max(values)
    assert [told[lr] for lr in (0.05, 0.07, 0.1)] == [max(values)] * 3
    assert 0.02 not in told
    asked = sheet(LR, sampler=sampler, trials_per_cell=12)
    points = propose(axes, asked, "s", "lower", fine + gone, 4, spread=4)
    assert max(point["optim.lr"] for point in points) < 0.1


def test_a_study_whose_every_trial_diverged_still_proposes():
    axes = axes_of(LR)
    points = [{"optim.lr": 0.01 * i} for i in range(1, 5)]
    dead = ended(axes, points, state="diverged")
    asked = sheet(LR, trials_per_cell=8)
    assert len(propose(axes, asked, "s", "lower", dead, 4)) == 4


@pytest.mark.parametrize("better", ["lower", "higher"])
def test_a_sampler_goes_where_it_is_better(better):
    axes, asked = axes_of(LR), sheet(LR, sampler="gp", trials_per_cell=12)
    before = ended(
        axes,
        [{"optim.lr": 0.003 * 10 ** (i / 7)} for i in range(8)],
        value=lambda point: math.log(point["optim.lr"]),
    )
    (point,) = propose(axes, asked, "s", better, before, 1)
    assert point["optim.lr"] < 0.003 if better == "lower" else point["optim.lr"] > 0.03


def test_a_proposal_prints_nothing(tmp_path):
    code = """if True:
        import optuna, warnings
        from optuna.trial import create_trial
        from ablab.experiments.tune.proposals import Proposer
        from ablab.experiments.tune.space import StudySheet, axes_of
        optuna.logging.set_verbosity(optuna.logging.WARNING)  # as open_storage does
        for sampler in ("gp", "tpe"):
            sheet = StudySheet({"optim.lr": {"log": [1e-3, 1e-1]}}, sampler=sampler)
            axes = axes_of(sheet.space)
            spaces = {axis.path: axis.distribution() for axis in axes}
            proposer = Proposer(axes, sheet, "s", "lower", spread=4)
            points = proposer.points([], 4)
            told = {"distributions": spaces, "user_attrs": {"state": "complete"}}
            before = [create_trial(params=point, value=float(i), **told) for i, point in enumerate(points)]
            proposer.points(before, 2)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


# -- what is read from a search ----------------------------------------------------------------------------------------
def test_importance_falls_to_the_path_that_matters_and_survives_a_widened_range():
    axes = axes_of(LR | DECAY)
    points = searched(sheet(LR | DECAY, sampler="random", trials_per_cell=32))
    trials = ended(axes, points)
    shares = importance(axes, "lower", trials)
    assert shares["optim.lr"] > 0.8
    assert sum(shares.values()) == pytest.approx(1)
    wide = [Axis("optim.lr", "log", (1e-3, 0.5)), axes[1]]
    beyond = ended(wide, [{"optim.lr": 0.4, "schedule.decay": 0.5}])
    assert importance(axes, "lower", trials + beyond) == shares


def test_three_trials_or_one_axis_have_no_importance():
    axes = axes_of(LR | DECAY)
    points = searched(sheet(LR | DECAY, sampler="random", trials_per_cell=32))
    trials = ended(axes, points)
    assert importance(axes, "lower", trials[:3]) == {}
    assert importance(axes[:1], "lower", trials) == {}


def test_a_password_is_not_repeated():
    assert without_password("postgresql://me:secret@host/db") == "postgresql://host/db"
    assert without_password("sqlite:////tmp/a.db") == "sqlite:////tmp/a.db"
