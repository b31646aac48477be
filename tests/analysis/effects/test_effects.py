import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from ablab.analysis.effects import frame
from ablab.analysis.effects.effects import measure, noisy_arms
from ablab.core.errors import UserError


def effects(lab, equivalence=None, looks=None) -> dict:
    runs = frame.load(lab.write(), lab.name)
    found = measure(runs, lab.metric, lab.better, equivalence, looks)
    return {effect.cell: effect for effect in found}


def noisy(lab, normal, arms: int, seeds: int, missing=()) -> np.ndarray:
    """full and `arms` dead arms; the values [arms + 1, seeds].  missing: (arm, seed) that diverged."""
    seed = normal.normal(0, 0.01, seeds)
    values = 3 + seed + normal.normal(0, 0.002, (arms + 1, seeds))
    for arm, own in enumerate(values):
        told = ["diverged" if (arm, at) in missing else value for at, value in enumerate(own)]
        lab.cell(f"- x{arm}" if arm else "full", told, "full" if arm else None)
    return values


# Which method.


@pytest.mark.parametrize(
    ("arms", "seeds", "method"),
    [
        (1, 2, "paired t"),
        (4, 2, "paired t"),
        (1, 3, "paired t"),
        (2, 3, "diffmax"),
        (2, 5, "diffmax"),
        (3, 3, "moderated paired t"),
        (5, 5, "moderated paired t"),
        (1, 6, "paired t"),
        (5, 6, "paired t"),
    ],
)
def test_seeds_and_arms_choose_the_method(lab, normal, arms, seeds, method):
    noisy(lab, normal, arms, seeds)
    assert {arm.method for arm in effects(lab).values() if arm.reference} == {method}


def test_six_seeds_give_scipys_paired_test_whatever_the_correlation(lab, normal):
    full = normal.normal(3, 0.01, 6)
    arm = 6 - full + normal.normal(0, 0.001, 6)
    lab.cell("full", list(full), None)
    lab.cell("- x", list(arm))
    ours = effects(lab)["- x"].interval
    theirs = stats.ttest_rel(arm, full)
    assert (ours.method, ours.degrees) == ("paired t", 5)
    assert (ours.low, ours.high) == pytest.approx(tuple(theirs.confidence_interval(0.95)))
    assert ours.p == pytest.approx(theirs.pvalue)


def test_replicas_on_seeds_of_their_own_are_never_paired(lab, normal):
    """Seeds 1000 k + pair: paired by their place in the list, twelve noises once made one."""
    a = normal.normal(3, 0.01, 8)
    b = a + 0.001 + normal.normal(0, 1e-5, 8)
    lab.cell("A", list(a), None)
    lab.cell("B", list(b), "A", first_seed=1000)
    found = effects(lab)["B"]
    theirs = stats.ttest_ind(b, a, equal_var=False)
    assert (found.method, found.n, found.seeds) == ("Welch", 8, ())
    assert found.verdict == "inconclusive"
    assert found.interval.p == pytest.approx(theirs.pvalue)
    assert found.correlation is None and found.spread is None
    assert len(found.runs) == 16


def test_a_lost_run_leaves_its_seed_to_the_other_arms(lab, normal):
    """statsmodels' least squares of the same model."""
    import pandas as pd
    from statsmodels.formula.api import ols

    missing = {(1, 0), (3, 2), (0, 3)}
    values = noisy(lab, normal, 4, 4, missing)
    rows = [
        {"y": values[arm, seed], "arm": arm, "seed": seed}
        for arm in range(5)
        for seed in range(4)
        if (arm, seed) not in missing
    ]
    fit = ols("y ~ C(arm) + C(seed)", pd.DataFrame(rows)).fit()
    found = effects(lab)
    for arm in range(1, 5):
        effect = found[f"- x{arm}"]
        assert effect.method == "y ~ arm + seed"
        assert effect.delta == pytest.approx(fit.params[f"C(arm)[T.{arm}]"])
        assert effect.interval.p == pytest.approx(fit.pvalues[f"C(arm)[T.{arm}]"])
        low, high = fit.conf_int().loc[f"C(arm)[T.{arm}]"]
        assert (effect.low, effect.high) == pytest.approx((low, high))


def test_six_pairs_that_are_left_need_no_model_of_the_other_arms(lab, normal):
    noisy(lab, normal, 3, 7, {(1, 0)})
    found = effects(lab)["- x1"]
    assert (found.method, found.n) == ("paired t", 6)


def test_arms_without_any_spread_give_a_point_and_a_note(lab):
    lab.cell("full", [3.0] * 3, None)
    lab.cell("- x", [3.125] * 3)
    effect = effects(lab)["- x"]
    assert effect.low == effect.high == 0.125
    assert "no spread between seeds" in effect.note


# One family.


def test_the_verdict_comes_from_holms_p_and_the_interval_from_that_arm_alone(lab, normal):
    from statsmodels.stats.multitest import multipletests

    noisy(lab, normal, 6, 6)
    found = [effect for effect in effects(lab).values() if effect.reference]
    alone = [effect.interval.p for effect in found]
    adjusted = multipletests(alone, method="holm")[1]
    assert [effect.p_adjusted for effect in found] == pytest.approx(list(adjusted))


def test_an_interval_that_misses_zero_is_no_verdict_among_many(lab):
    """One of eleven intervals at 95 % misses zero by chance in two reports of five."""
    steps = np.array([-1.0, 1.0, -0.5, 0.5, -0.2, 0.2])
    lab.cell("full", list(3 + np.array([0.1, 0.2, 0.3, 0.4, 0.5, 0.6])), None)
    full = np.array([3.1, 3.2, 3.3, 3.4, 3.5, 3.6])
    for arm in range(10):
        lab.cell(f"- dead{arm}", list(full + steps * (1 + arm) / 100))
    lab.cell("- lucky", list(full + 0.008 + steps / 100))
    lucky = effects(lab)["- lucky"]
    assert lucky.low > 0
    assert lucky.interval.p < 0.05 < lucky.p_adjusted
    assert lucky.verdict == "inconclusive"


def test_arms_without_a_verdict_are_in_no_family(lab, normal):
    noisy(lab, normal, 1, 6)
    alone = effects(lab)["- x1"].p_adjusted
    lab.cell("- young", [3.2, 3.3])
    lab.cell("- lost", ["diverged"] * 6)
    lab.cell("- inert", ["missing"] * 6, runs=[row.run for row in lab.rows[:6]])
    found = effects(lab)
    assert found["- x1"].p_adjusted == alone
    assert [found[arm].p_adjusted for arm in ("- young", "- lost", "- inert")] == [None] * 3


# Equivalence.


@pytest.mark.parametrize(
    ("shift", "margin", "verdict"),
    [
        (0.0, None, "inconclusive"),
        (0.0, 0.01, "equivalent"),
        (0.0, 0.0005, "inconclusive"),
        (0.004, None, "helps"),
        (0.004, 0.01, "equivalent"),
        (0.02, 0.01, "helps"),
    ],
)
def test_an_arm_surely_nearer_than_the_smallest_effect_of_interest_is_equivalent(
    lab, shift, margin, verdict
):
    noise = np.array([-1, 1, -1, 1, -1, 1]) / 1000
    full = np.linspace(3, 3.1, 6)
    lab.cell("full", list(full), None)
    lab.cell("- x", list(full + shift + noise))
    effect = effects(lab, margin)["- x"]
    assert effect.verdict == verdict
    if margin:
        difference = shift + noise
        above = stats.ttest_1samp(difference, -margin, alternative="greater").pvalue
        below = stats.ttest_1samp(difference, margin, alternative="less").pvalue
        assert effect.p_equivalent == pytest.approx(max(above, below))
    else:
        assert effect.p_equivalent is None


# Too few seeds, and looks.


@pytest.mark.parametrize(("seeds", "more"), [(1, 2), (2, 1), (3, 0)])
def test_below_three_seeds_there_are_numbers_and_no_verdict(lab, seeds, more):
    lab.cell("full", [3.0, 3.1, 3.2][:seeds], None)
    lab.cell("- x", [3.5, 3.6001, 3.7003][:seeds])
    effect = effects(lab)["- x"]
    assert effect.delta == pytest.approx(0.5, abs=1e-3)
    assert (effect.interval is None) == (seeds == 1)
    assert effect.more_seeds == more
    if more:
        assert effect.verdict == "too few seeds"
        assert f"too few seeds (+{more} more)" in effect.sentence
    else:
        assert effect.verdict == "helps"


def test_an_early_look_asks_for_more_than_a_late_one(lab):
    full = np.array([3.0, 3.1, 3.2])
    lab.cell("full", list(full), None)
    lab.cell("- x", list(full + [0.010, 0.011, 0.012]))
    effect = effects(lab)["- x"]
    assert 0.0014 < effect.p_adjusted < 0.05
    assert effect.verdict == "helps"
    assert effects(lab, looks=(3, 5, 8))["- x"].verdict == "inconclusive"
    assert effects(lab, looks=(3,))["- x"].verdict == "helps"


def test_arms_whose_noise_differs_ten_fold_are_named_while_seeds_are_few(lab, normal):
    full = normal.normal(3, 0.01, 3)
    steps = np.array([-1.0, 0.0, 1.0])
    lab.cell("full", list(full), None)
    lab.cell("- quiet", list(full + steps * 0.0005))
    lab.cell("- usual", list(full + steps * 0.002))
    assert noisy_arms(effects(lab).values()) is None
    lab.cell("- loud", list(full + steps * 0.006))
    loud, quiet = noisy_arms(effects(lab).values())
    assert (loud.cell, quiet.cell) == ("- loud", "- quiet")


def test_from_six_seeds_on_each_arm_stands_on_its_own_noise(lab, normal):
    full = normal.normal(3, 0.01, 6)
    steps = np.array([-1.0, 0.0, 1.0, 1.0, 0.0, -1.0])
    lab.cell("full", list(full), None)
    lab.cell("- quiet", list(full + steps * 0.0001))
    lab.cell("- loud", list(full + steps * 0.1))
    assert noisy_arms(effects(lab).values()) is None


# What must not matter.


@settings(max_examples=25, deadline=None)
@given(
    seeds=st.integers(3, 7),
    arms=st.integers(1, 5),
    entropy=st.integers(0, 2**32 - 1),
)
def test_shift_scale_and_the_order_of_seeds_and_arms_change_no_verdict(seeds, arms, entropy):
    random = np.random.default_rng(entropy)
    values = random.normal(3, 0.01, (arms + 1, seeds)) + random.normal(0, 0.05, seeds)
    values[1:] += random.choice([0, 0.02], (arms, 1))
    found = _measured(values)
    moved = _measured(5 + 2 * values)  # powers of two and sums round alike, to 1e-12
    order = random.permutation(seeds)
    shuffled = _measured(values[:, order], order)
    turned = _measured(
        values, np.arange(seeds), [0, *random.permutation(np.arange(1, arms + 1))]
    )
    for arm, one in found.items():
        for other, scale in ((moved[arm], 2), (shuffled[arm], 1), (turned[arm], 1)):
            assert other.delta == pytest.approx(scale * one.delta, abs=1e-9)
            assert other.low == pytest.approx(scale * one.low, abs=1e-9)
            assert other.p_adjusted == pytest.approx(one.p_adjusted, rel=1e-6, abs=1e-12)
            assert other.verdict == one.verdict


def _measured(values, seeds=None, cells=None) -> dict:
    """Effects of a table [arms + 1, seeds], row 0 the reference; its columns and rows in another order."""
    import pandas as pd

    seeds = range(values.shape[1]) if seeds is None else seeds
    cells = range(len(values)) if cells is None else cells
    rows = [
        {
            "cell": f"- {cell}" if cell else "full",
            "reference": "full" if cell else None,
            "seed": int(seed),
            "run": f"{cell}/{seed}",
            "status": "finished",
            "note": "",
            "tokens_per_second": 1e5,
            "val/loss": values[cell, at],
        }
        for cell in cells
        for at, seed in enumerate(seeds)
    ]
    return {one.cell: one for one in measure(pd.DataFrame(rows), "val/loss") if one.reference}


# Signs and words.


@pytest.mark.parametrize(
    ("arm", "shift", "better", "verdict", "words"),
    [
        ("- qk_norm", +0.1, "lower", "helps", "qk_norm helps: without it +"),
        ("- qk_norm", -0.1, "lower", "hurts", "qk_norm hurts: without it -"),
        ("- qk_norm", -0.1, "higher", "helps", "qk_norm helps: without it -"),
        ("+ z_loss", -0.1, "lower", "helps", "z_loss helps: with it -"),
        ("+ z_loss", +0.1, "lower", "hurts", "z_loss hurts: with it +"),
        ("+ z_loss", +0.1, "higher", "helps", "z_loss helps: with it +"),
        ("wide", -0.1, "lower", "helps", "wide is better: -"),
        ("wide", +0.1, "lower", "hurts", "wide is worse: +"),
        (
            "- muon (and normuon)",
            +0.1,
            "lower",
            "helps",
            "muon (and normuon) helps: without it +",
        ),
    ],
)
def test_verdict_and_sentence_are_about_the_ingredient(
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
    assert effect.better == ((effect.delta < 0) == (better == "lower"))


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
    assert effect.seeds == (0, 1)
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


def test_an_arm_that_never_finished_is_inadmissible(lab):
    lab.cell("full", [3.0, 3.1], None)
    lab.cell("- x", ["diverged", "out_of_memory"])
    effect = effects(lab)["- x"]
    assert effect.verdict == "inadmissible"
    assert effect.delta is None
    assert effect.sentence == "x: no pair finished without it (1 diverged, 1 out of memory)"


def test_an_arm_that_has_not_run_yet_lacks_seeds(lab):
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
    lab.cell("full", [3.0, 3.1, 3.2], None)
    lab.cell("- x", [3.0, 3.1, float(np.nextafter(3.2, 4))])
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


def test_a_ratio_of_speeds_has_an_interval_over_seeds(lab):
    """Of a busy machine: log ratios by scipy's paired test."""
    theirs = np.array([1.0e5, 0.9e5, 1.1e5])
    ours = np.array([1.3e5, 0.7e5, 1.5e5])
    for seed in range(3):
        lab.cell("full", [3.0 + seed], None, speed=float(theirs[seed]), first_seed=seed)
        lab.cell("- x", [3.2 + seed], speed=float(ours[seed]), first_seed=seed)
    effect = effects(lab)["- x"]
    expected = stats.ttest_rel(np.log(ours), np.log(theirs)).confidence_interval(0.95)
    assert (effect.speed.low, effect.speed.high) == pytest.approx(tuple(np.exp(expected)))
    assert effect.speed.low < effect.tokens_per_second_ratio < effect.speed.high


def test_an_unmeasured_speed_has_no_ratio(lab):
    lab.cell("full", [3.0], None, speed=0.0)
    lab.cell("- x", [3.2])
    assert effects(lab)["- x"].tokens_per_second_ratio is None


@pytest.mark.parametrize("cell", ["full", "- x"])
def test_runs_that_shared_their_machine_have_a_pace_and_no_ratio(lab, cell):
    shared = {"contended": "2 runs at once"}
    for name, reference in (("full", None), ("- x", "full")):
        lab.cell(name, [3.0, 3.1, 3.3], reference, **(shared if name == cell else {}))
    effect = effects(lab)["- x"]
    assert effect.tokens_per_second_ratio is None and effect.speed is None
    assert effect.tokens_per_second == 1e5


def test_of_the_runs_those_that_had_their_machine_alone_make_the_ratio(lab):
    """The seed on which the arm shared it says 0.25."""
    for seed, (speed, why) in enumerate([(1.5e5, ""), (0.25e5, "less than a core")]):
        lab.cell("full", [3.0 + seed], None, first_seed=seed)
        lab.cell("- x", [3.2 + seed], speed=speed, first_seed=seed, contended=why)
    assert effects(lab)["- x"].tokens_per_second_ratio == pytest.approx(1.5)


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
