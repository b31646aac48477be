import numpy as np
import pytest
from scipy import stats

from ablab.analysis.effects import frame
from ablab.analysis.effects.effects import interval, measure
from ablab.core.errors import UserError


def effects(lab) -> dict:
    runs = frame.load(lab.write(), lab.name)
    return {effect.cell: effect for effect in measure(runs, lab.metric, lab.better)}


# The interval.


def test_welch_interval_equals_scipys_unpaired_test(normal):
    a = normal.normal(3.2, 0.002, 5)
    b = normal.normal(3.1, 0.004, 5)
    ours = interval(a, b)
    theirs = stats.ttest_ind(a, b, equal_var=False)
    assert ours.method == "Welch"
    assert ours.degrees == pytest.approx(theirs.df)
    assert (ours.low, ours.high) == pytest.approx(tuple(theirs.confidence_interval(0.95)))


def test_paired_interval_equals_scipys_paired_test(normal):
    seed = normal.normal(0, 0.01, 8)
    a = 3.2 + seed + normal.normal(0, 0.001, 8)
    b = 3.1 + seed
    ours = interval(a, b)
    theirs = stats.ttest_rel(a, b)
    assert ours.method == "paired t"
    assert ours.degrees == 7
    assert (ours.low, ours.high) == pytest.approx(tuple(theirs.confidence_interval(0.95)))


def test_interval_by_hand():
    # Both variances are 1, so se = sqrt(2/3) and df = 4: t(0.975, 4) = 2.776445; 2.776445 * 0.816497 = 2.266958.
    ours = interval(np.array([11.0, 12.0, 13.0]), np.array([1.0, 3.0, 2.0]))
    assert (ours.low, ours.high) == pytest.approx((10 - 2.266958, 10 + 2.266958), abs=1e-6)


def test_pairing_needs_six_pairs_and_a_positive_correlation():
    rising = np.arange(6.0)
    noisy = np.array([0.0, 1.5, 1.8, 3.3, 3.9, 5.2])
    assert interval(rising, noisy).method == "paired t"
    assert interval(rising[:5], noisy[:5]).method == "Welch"
    assert interval(rising, -noisy).method == "Welch"


def test_the_interval_turns_round_with_its_arms(normal):
    a = normal.normal(0, 1, 7)
    b = normal.normal(1, 2, 7)
    there = interval(a, b)
    back = interval(b, a)
    assert (there.low, there.high) == pytest.approx((-back.high, -back.low))


def test_arms_without_any_spread_give_a_point_and_a_note(lab):
    lab.cell("full", [3.0] * 3, None)
    lab.cell("- x", [3.1] * 3)
    effect = effects(lab)["- x"]
    assert effect.low == effect.high == pytest.approx(0.1)
    assert "no spread between seeds" in effect.note


@pytest.mark.parametrize(
    ("pairs", "correlation"),
    [
        (3, 0.0),
        (5, 0.0),
        (8, 0.6),
        (12, 0.9),
    ],
)
def test_intervals_of_an_experiment_without_effect_cover_zero_at_95_percent(
    normal, pairs, correlation
):
    # One-sided: Welch on correlated pairs may cover more, never less.  Bounds: the binomial's 1-in-1000 tail.
    experiments = 1500
    covered = coverage(normal, pairs, correlation, experiments)
    assert covered >= stats.binom.ppf(0.001, experiments, 0.95)
    if pairs >= 6:
        assert covered <= stats.binom.ppf(0.999, experiments, 0.95)


def test_choosing_the_method_by_the_data_costs_less_than_two_points_of_coverage(normal):
    assert coverage(normal, 6, 0.0, 1500) >= stats.binom.ppf(0.001, 1500, 0.93)


def coverage(normal, pairs: int, correlation: float, experiments: int) -> int:
    draws = normal.multivariate_normal(
        [0, 0], [[1, correlation], [correlation, 1]], (experiments, pairs)
    )
    intervals = [interval(draw[:, 0], draw[:, 1]) for draw in draws]
    return sum(ci.low <= 0 <= ci.high for ci in intervals)


# Signs and words.


@pytest.mark.parametrize(
    ("arm", "shift", "better", "verdict", "words"),
    [
        ("- qk_norm", +0.1, "lower", "worse", "qk_norm helps: without it +"),
        ("- qk_norm", -0.1, "lower", "better", "qk_norm hurts: without it -"),
        ("- qk_norm", -0.1, "higher", "worse", "qk_norm helps: without it -"),
        ("+ z_loss", -0.1, "lower", "better", "z_loss helps: with it -"),
        ("+ z_loss", +0.1, "lower", "worse", "z_loss hurts: with it +"),
        ("+ z_loss", +0.1, "higher", "better", "z_loss helps: with it +"),
        ("wide", -0.1, "lower", "better", "wide is better: -"),
        (
            "- muon (and normuon)",
            +0.1,
            "lower",
            "worse",
            "muon (and normuon) helps: without it +",
        ),
    ],
)
def test_verdict_is_about_the_cell_and_the_sentence_about_the_ingredient(
    lab, normal, arm, shift, better, verdict, words
):
    lab.better = better
    full = list(normal.normal(3, 0.001, 4))
    lab.cell("full", full, None)
    lab.cell(arm, list(normal.normal(3 + shift, 0.001, 4)))
    effect = effects(lab)[arm]
    assert np.sign(effect.delta) == np.sign(shift)
    assert effect.delta == pytest.approx(effect.mean - effect.reference_mean)
    assert effect.verdict == verdict
    assert effect.sentence.startswith(words)


def test_a_difference_inside_the_noise_is_inconclusive(lab):
    lab.cell("full", [3.00, 3.01, 3.02], None)
    lab.cell("- x", [3.005, 3.00, 3.025])
    effect = effects(lab)["- x"]
    assert effect.verdict == "inconclusive"
    assert effect.sentence.startswith("x: inconclusive, without it +0.0000 [")


def test_one_pair_has_a_delta_but_no_interval(lab):
    lab.cell("full", [3.0], None)
    lab.cell("- x", [3.2])
    effect = effects(lab)["- x"]
    assert (effect.verdict, effect.interval, effect.low, effect.method, effect.sd) == (
        "too few seeds",
        None,
        None,
        "",
        None,
    )
    assert effect.delta == pytest.approx(0.2)


def test_each_cell_is_measured_against_its_own_reference(lab):
    lab.cell("base", [3.0, 3.01], None)
    lab.cell("+ a", [2.9, 2.91], "base")
    lab.cell("+ b", [2.7, 2.71], "+ a")
    assert effects(lab)["+ b"].delta == pytest.approx(-0.2)


# Which pairs count.


def test_a_lost_run_leaves_the_delta_but_is_counted_and_told(lab):
    lab.cell("full", [3.0, 3.1, 9.0], None)
    lab.cell("- x", [3.2, 3.3, "diverged"])
    effect = effects(lab)["- x"]
    assert effect.pairs == (0, 1)
    assert effect.delta == pytest.approx(0.2)
    assert effect.statuses == {"finished": 2, "diverged": 1}
    assert "1 of 3 runs ended badly (1 diverged)" in effect.note
    assert "survivors" in effect.note


def test_a_pair_whose_reference_is_absent_is_told(lab):
    lab.cell("full", [3.0, 3.1, "missing"], None)
    lab.cell("- x", [3.2, 3.3, 3.4])
    effect = effects(lab)["- x"]
    assert effect.n == 2
    assert "no reference for 1 of 3 pairs (1 missing)" in effect.note


def test_a_cell_without_any_reference_shows_its_own_mean_and_speed_and_no_delta(lab):
    lab.cell("full", ["missing", "missing"], None)
    lab.cell("base", [3.2, 3.4], speed=5e4)
    effect = effects(lab)["base"]
    assert (effect.mean, effect.tokens_per_second, effect.delta, effect.n) == (
        pytest.approx(3.3),
        5e4,
        None,
        0,
    )


def test_an_arm_that_never_finished_has_failed(lab):
    lab.cell("full", [3.0, 3.1], None)
    lab.cell("- x", ["diverged", "out_of_memory"])
    effect = effects(lab)["- x"]
    assert effect.verdict == "failed"
    assert effect.delta is None
    assert effect.sentence == "x: no pair finished without it (1 diverged, 1 out of memory)"


def test_an_arm_that_has_not_run_yet_has_not_failed(lab):
    lab.cell("full", [3.0], None)
    lab.cell("- x", ["missing"])
    assert effects(lab)["- x"].verdict == "too few seeds"


def test_a_run_listed_twice_is_one_observation(lab):
    lab.cell("full", [3.0, 3.0], None, runs=["f", "f"])
    lab.cell("- x", [3.2, 3.2], runs=["x", "x"])
    assert effects(lab)["- x"].n == 1


# Inert toggles.


def test_arms_that_end_in_the_same_bits_are_inert(lab):
    lab.cell("full", [3.0, 3.1], None)
    lab.cell("- x", [3.0, 3.1])
    effect = effects(lab)["- x"]
    assert effect.verdict == "inert"
    assert effect.interval is None
    assert "changes nothing" in effect.sentence


def test_one_differing_bit_in_one_pair_is_not_inert(lab):
    lab.cell("full", [3.0, 3.1], None)
    lab.cell("- x", [3.0, float(np.nextafter(3.1, 4))])
    effect = effects(lab)["- x"]
    assert effect.verdict == "inconclusive"


def test_arms_that_share_their_runs_are_inert_before_anything_has_run(lab):
    lab.cell("full", ["missing"] * 2, None, runs=["a", "b"])
    lab.cell("- x", ["missing"] * 2, runs=["a", "b"])
    assert effects(lab)["- x"].verdict == "inert"


# Speed and refusals.


def test_speed_is_a_ratio_to_the_reference_over_the_same_pairs(lab):
    lab.cell("full", [3.0, 3.1], None, speed=1e5)
    lab.cell("- x", [3.2, 3.3], speed=1.25e5)
    effect = effects(lab)["- x"]
    assert effect.tokens_per_second_ratio == pytest.approx(1.25)


def test_an_unmeasured_speed_has_no_ratio(lab):
    lab.cell("full", [3.0], None, speed=0.0)
    lab.cell("- x", [3.2])
    assert effects(lab)["- x"].tokens_per_second_ratio is None


def test_a_finished_run_without_the_metric_is_named_with_what_it_has(lab):
    lab.cell("full", [3.0], None)
    runs = frame.load(lab.write(), "loo")
    with pytest.raises(
        UserError, match=r"loo-full-0 finished without the metric 'val/los'.*'val/loss'"
    ):
        measure(runs, "val/los")


def test_a_reference_outside_the_experiment_is_named(lab):
    with pytest.raises(UserError, match="'nobody'"):
        lab.cell("- x", [3.0], reference="nobody")
        effects(lab)


def test_better_must_be_lower_or_higher(lab):
    lab.better = "smaller"
    with pytest.raises(UserError, match="smaller"):
        lab.cell("full", [3.0], None)
        effects(lab)
