import numpy as np
import pandas as pd
import pytest
from scipy import stats

from ablab.analysis.tuning import winners
from ablab.analysis.tuning.fit import fit
from ablab.analysis.tuning.transfer import transfer
from ablab.analysis.tuning.winners import seed_sd, widen, winner
from ablab.core.errors import UserError
from ablab.core.store import study_record
from ablab.core.store.store import Store
from ablab.core.store.study_record import LR, WIDTH, StudyRecord, Trial

SPACE = {LR: {"log": [0.001, 0.064]}}
HARD = {LR: (1e-4, 0.3)}
GRID = [0.001, 0.002, 0.004, 0.008, 0.016, 0.032, 0.064]


def sweep(outcomes: dict, cell="full", **other) -> list[Trial]:
    """One trial per learning rate; an outcome is a value or the state of a trial without one."""
    return [
        Trial(
            cell,
            number,
            {LR: lr} | other,
            *((got, None) if isinstance(got, str) else ("complete", float(got))),
        )
        for number, (lr, got) in enumerate(outcomes.items())
    ]


def bowl(
    lrs, optimum=0.008, floor=2.4, curvature=0.02, noise=lambda: 0.0, **other
) -> list[Trial]:
    return sweep(
        {lr: floor + curvature * np.log2(lr / optimum) ** 2 + noise() for lr in lrs}, **other
    )


def study(trials, **changed) -> StudyRecord:
    space = SPACE | (
        {WIDTH: {"choices": [32, 64, 128, 256]}} if WIDTH in trials[0].params else {}
    )
    usual = {
        "name": "s",
        "question": "?",
        "metric": "val/bits_per_byte",
        "better": "lower",
        "space": space,
        "hard": HARD,
        "base": {LR: 0.007, WIDTH: 64},
        "sampler": "grid",
        "pruner": "none",
        "seeds": [100],
        "trials_per_cell": 7,
    }
    return StudyRecord(**usual | changed, trials=trials)


# The record.


def test_a_record_is_read_as_it_was_written(tmp_path):
    ours = study(bowl(GRID), importance={"full": {LR: 1.0}}, tuned="s@tuned")
    study_record.write(Store(tmp_path), ours)
    assert study_record.read(Store(tmp_path), "s") == ours


@pytest.mark.parametrize(
    ("trials", "words"),
    [
        (
            sweep({0.1: "diverged", 0.2: "diverged"}),
            "study 's' has zero finished trials (2 diverged); lower its optim.lr",
        ),
        (
            sweep({0.1: "failed", 0.2: "running"}),
            "zero finished trials (1 failed, 1 running); continue it with: ablab study s",
        ),
        ([Trial("full", 3, {LR: 0.1}, "complete")], "damaged (trial 3 of 'full' has no value)"),
        ([Trial("full", 3, {}, "failed")], "damaged (trial 3 of 'full' has no optim.lr)"),
    ],
)
def test_a_record_that_carries_no_result_is_refused_in_one_line(tmp_path, trials, words):
    study_record.write(Store(tmp_path), study(trials, space=SPACE))
    with pytest.raises(UserError) as refusal:
        study_record.read(Store(tmp_path), "s")
    assert words in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_missing_and_a_torn_record_are_named_with_their_cure(tmp_path):
    with pytest.raises(UserError, match="study 's' has no trials in .*ablab study s"):
        study_record.read(Store(tmp_path), "s")
    study_record.write(Store(tmp_path), study(bowl(GRID)))
    path = tmp_path / "studies" / "s.json"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match="s.json is damaged .*ablab study s"):
        study_record.read(Store(tmp_path), "s")


# The winner.


def test_a_winner_between_worse_neighbours_is_read():
    won = winner(bowl(GRID), SPACE, HARD)
    assert (won.admissible, won.params, won.value) == (True, {LR: 0.008}, 2.4)
    assert won.reason == "beats lr=0.004 (2.4200) and lr=0.016 (2.4200)"
    assert [side.params[LR] for side in won.neighbours] == [0.004, 0.016]


@pytest.mark.parametrize(("optimum", "edge"), [(0.1, "0.03"), (0.0001, "0.002")])
def test_a_winner_at_either_edge_is_not_read(optimum, edge):
    trials = bowl([0.002, 0.004, 0.008, 0.016, 0.03], optimum)
    space = {LR: {"log": [0.002, 0.03]}}
    won = winner(trials, space, {})
    edge = f"lr={edge} won, but it is the edge of the searched range [0.002, 0.03]"
    assert not won.admissible
    assert None in won.neighbours
    assert won.reason == f"{edge}; widen it before reading the result"
    assert (
        winner(trials, space, HARD).reason
        == f"{edge}; widen it, or raise study.widenings, before reading the result"
    )


def test_a_winner_with_untried_range_beside_it_asks_for_trials_not_for_a_wider_range():
    won = winner(bowl([0.004, 0.008, 0.016], 0.03), SPACE, HARD)
    assert (
        won.reason
        == "lr=0.016 won, but it is the edge of what was tried here, [0.004, 0.016]; "
        "add trials before reading the result"
    )


@pytest.mark.parametrize(
    ("beyond", "admissible"),
    [
        ("diverged", True),
        ("pruned", True),
        ("out_of_memory", False),
        ("failed", False),
        ("running", False),
    ],
)
def test_a_neighbour_that_diverged_is_worse_and_one_that_failed_says_nothing(
    beyond, admissible
):
    won = winner(sweep({0.004: 2.5, 0.008: 2.4, 0.016: beyond}), SPACE, HARD)
    assert won.admissible == admissible
    assert won.reason.endswith(
        f"lr=0.016 ({beyond})" if admissible else f"; lr=0.016: {beyond.replace('_', ' ')}"
    )


def test_a_winner_at_the_hard_bounds_asks_for_other_bounds():
    won = winner(sweep({0.1: 2.5, 0.2: 2.45, 0.3: 2.4}), SPACE, HARD)
    assert (
        won.reason
        == "lr=0.3 won, but it is the edge of the hard bounds [0.0001, 0.3]; move them before reading the result"
    )


def test_a_crowd_of_trials_at_the_edge_does_not_make_an_interior():
    won = winner(
        sweep({0.008: 2.5, 0.0295: 2.41, 0.0298: 2.40, 0.03: 2.41}),
        {LR: {"log": [0.008, 0.03]}},
        HARD,
    )
    assert not won.admissible
    assert "edge of the searched range [0.008, 0.03]" in won.reason


def test_only_trials_that_differ_in_the_learning_rate_alone_are_neighbours():
    wide = bowl([0.008, 0.016, 0.032], 0.001, model_width=256)
    narrow = bowl(GRID, floor=2.9, model_width=64)
    won = winner(wide + narrow, SPACE | {"model_width": {"choices": [64, 256]}}, HARD)
    assert won.params == {LR: 0.008, "model_width": 256}
    assert not won.admissible
    assert len(won.line.trials) == 3
    alone = winner(wide[:1] + narrow, SPACE, HARD)
    assert (
        alone.reason
        == "lr=0.008 won, but no evaluated trial differs from it in lr alone; add some before reading the result"
    )


def test_a_neighbour_that_ends_in_the_same_number_is_not_beaten():
    won = winner(sweep({0.004: 2.5, 0.008: 2.4, 0.016: 2.4, 0.032: 2.5}), SPACE, HARD)
    assert (
        won.reason
        == "lr=0.008 won, but lr=0.016 ends at the same 2.4; check that optim.lr reaches the run"
    )
    assert not won.admissible


def test_higher_is_better_is_the_same_search_upside_down():
    trials = bowl(GRID, optimum=0.006)
    flipped = [Trial(t.cell, t.number, t.params, t.state, -t.value) for t in trials]
    ours = winner(trials, SPACE, HARD)
    theirs = winner(flipped, SPACE, HARD, "higher")
    assert (ours.params, ours.admissible, ours.optimum, ours.fit.value) == (
        theirs.params,
        theirs.admissible,
        theirs.optimum,
        -theirs.fit.value,
    )


def test_a_space_without_a_log_scaled_path_has_a_winner_without_edges():
    trials = [
        Trial("full", i, {"model.layers": n}, "complete", 3.0 - n) for i, n in enumerate((1, 2))
    ]
    won = winner(trials, {"model.layers": {"choices": [1, 2]}}, {})
    assert won.admissible
    assert won.params == {"model.layers": 2}
    assert won.lr is None
    assert won.optimum is None
    assert widen(trials, {"model.layers": {"choices": [1, 2]}}, {}) is None


# The quadratic.


def test_an_exact_quadratic_gives_its_vertex_and_a_point_for_an_interval():
    fit = winner(bowl(GRID, optimum=0.0062), SPACE, HARD).fit
    assert (fit.optimum, fit.low, fit.high, fit.value, fit.curvature) == pytest.approx(
        (0.0062, 0.0062, 0.0062, 2.4, 0.02), rel=1e-6
    )
    assert (fit.n, fit.span) == (5, (0.002, 0.032))
    assert fit.at(0.0124) == pytest.approx(2.42)


def test_the_quadratic_equals_numpys_and_its_interval_the_profile(normal):
    """At the ends of the interval the residuals of the best parabola with that vertex pass the F test's bound."""
    lrs = np.geomspace(0.002, 0.032, 7)
    spread = normal.normal(0, 0.0005, 7)
    values = 2.4 + 0.02 * np.log2(lrs / 0.007) ** 2 + spread
    found = fit(lrs, values, 0.008)
    x = np.log2(lrs / 0.008)
    used = np.abs(x) < 1.5 + 1e-9
    x = x[used]
    y = values[used]
    weight = (1 - (np.abs(x) / (1.3 * np.abs(x).max())) ** 3) ** 3
    c, b, _ = np.polyfit(x, y, 2, w=np.sqrt(weight))
    assert found.kind == "quadratic"
    assert (found.optimum, found.curvature, found.n) == pytest.approx(
        (0.008 * 2 ** (-b / 2 / c), c, 5)
    )

    def residual(design):
        return np.linalg.lstsq(design * np.sqrt(weight)[:, None], y * np.sqrt(weight))[1][0]

    free = residual(np.stack([x**0, x, x**2], 1))
    for end in (found.low, found.high):
        tied = residual(np.stack([x**0, (x - np.log2(end / 0.008)) ** 2], 1))
        assert (tied - free) / (free / 2) == pytest.approx(stats.f.ppf(0.95, 1, 2), rel=1e-5)


# The cubic.


def test_the_cubic_equals_numpys_and_at_its_ends_the_slope_is_t_errors_from_zero(normal):
    lrs = 0.008 * 2 ** np.arange(-2.5, 3, 0.5)
    x = np.log2(lrs / 0.008)
    values = 2.4 + 0.02 * (np.exp(x / 2) - x / 2 - 1) * 8 + normal.normal(0, 0.002, len(x))
    found = fit(lrs, values, 0.008)
    x = np.log2(lrs / found.centre)
    near = np.abs(x) < 2.02
    (d, c, b, a), covariance = np.polyfit(x[near], values[near], 3, cov=True)
    assert (found.kind, found.n) == ("cubic", near.sum())
    assert found.coefficients == pytest.approx((a, b, c, d))
    least = (-c + np.sqrt(c * c - 3 * b * d)) / (3 * d)
    assert np.log2(found.optimum / found.centre) == pytest.approx(least)
    for end in (found.low, found.high):
        at = np.log2(end / found.centre)
        gradient = np.array([3 * at**2, 2 * at, 1, 0])
        error = np.sqrt(gradient @ covariance @ gradient)
        slope = b + 2 * c * at + 3 * d * at**2
        degrees = near.sum() - 4
        assert abs(slope) == pytest.approx(stats.t.ppf(0.975, degrees) * error, rel=1e-6)


@pytest.mark.parametrize(
    ("steps", "kind"),
    [
        (np.arange(-2, 2.1, 0.5), "cubic"),
        (np.arange(-1.5, 2.1, 0.5), "cubic"),
        (np.arange(-1.5, 1.6, 0.5), "quadratic"),  # seven trials
        (np.arange(-4, 5, 1.0), "quadratic"),
        (np.array([-2, -1.5, -1, -0.5, 0, 0.5, 1, 2]), "quadratic"),  # a step of an octave
    ],
)
def test_fine_steps_and_eight_trials_carry_a_cubic(steps, kind):
    lrs = 0.008 * 2.0**steps
    assert fit(lrs, 2.4 + 0.02 * steps**2, 0.008).kind == kind


CURVES = {
    "quadratic": lambda x: x**2,
    "exponential": lambda x: 8 * (np.exp(x / 2) - x / 2 - 1),
    "cosh": lambda x: 2 * (np.cosh(x) - 1),
    "quartic": lambda x: x**2 + x**4 / 4,
}


@pytest.mark.parametrize("curve", CURVES)
def test_the_cubic_covers_the_optimum_of_curves_that_are_steeper_on_one_side(normal, curve):
    """Half octaves, noise of a tenth of the curvature; at least 94 %, to the binomial's 1-in-1000 tail."""
    studies = 150
    covered = 0
    for _ in range(studies):
        x = np.arange(-3, 3.1, 0.5) + normal.uniform(-0.25, 0.25)
        values = 0.02 * CURVES[curve](x) + normal.normal(0, 0.002, len(x))
        found = fit(0.008 * 2**x, values, 0.008 * 2 ** x[np.argmin(values)])
        covered += found.low <= 0.008 <= found.high
    assert covered >= stats.binom.ppf(0.001, studies, 0.94)


# Flat curves.


@pytest.mark.parametrize(("step", "trials"), [(1.0, 7), (0.5, 11)])
def test_a_flat_curve_is_called_flat(normal, step, trials):
    """By luck alone its winner stands inside in most studies; one in ten may be read all the same."""
    lrs = [float(one) for one in 0.008 * 2 ** (step * (np.arange(trials) - trials // 2))]
    won = [
        winner(bowl(lrs, curvature=0, noise=lambda: normal.normal(0, 0.002)), SPACE, HARD)
        for _ in range(200)
    ]
    inside = sum(None not in one.neighbours for one in won)
    assert inside > 120
    assert sum(one.admissible for one in won) <= 0.1 * 200
    flat = next(one for one in won if one.flat)
    assert "but the curve is flat from" in flat.reason
    assert flat.reason.endswith("what it wins by is noise; any of these serves, or add seeds")


def seeded(curvature: float, noise: float, normal) -> list[Trial]:
    """Seven rates an octave apart, three seeds each that share their luck."""
    luck = normal.normal(0, 0.05, 3)
    trials = []
    for number, lr in enumerate(GRID):
        true = 2.4 + curvature * np.log2(lr / 0.008) ** 2
        values = true + luck + normal.normal(0, noise, 3)
        by_seed = {str(seed): float(value) for seed, value in enumerate(values)}
        mean = float(values.mean())
        trials.append(Trial("full", number, {LR: lr}, "complete", mean, by_seed))
    return trials


def test_seeds_that_trials_share_tell_noise_from_a_curve(normal):
    """What a seed does to all trials is no noise between them."""
    curved = [winner(seeded(0.02, 0.005, normal), SPACE, HARD) for _ in range(50)]
    flat = [winner(seeded(0.0, 0.005, normal), SPACE, HARD) for _ in range(50)]
    assert sum(one.admissible for one in curved) >= 48
    assert sum(one.admissible for one in flat) <= 8


def test_a_v_is_not_flat_though_no_parabola_fits_it():
    """Measured: width 256 of a study, bits a byte at octaves from .001, one seed."""
    values = (2.751, 2.682, 2.637, 2.686, 2.737, 2.815, 2.897)
    lrs = [0.001 * 2**octave for octave in range(7)]
    won = winner(sweep(dict(zip(lrs, values, strict=True))), SPACE, HARD)
    assert won.admissible and not won.flat
    shaken = (2.751, 2.682, 2.637, 2.686, 2.685, 2.815, 2.897)  # the same, but for one step
    assert not winners._is_valley(
        winner(sweep(dict(zip(lrs, shaken, strict=True))), SPACE, HARD).line, "lower"
    )
    few = dict(zip(lrs[:5], values[:5], strict=True))  # 16 of 120 orders of noise: 13 %
    assert not winners._is_valley(winner(sweep(few), SPACE, HARD).line, "lower")


def test_a_curve_between_two_cliffs_is_not_flat():
    lost = {0.002: "diverged", 0.032: "diverged"}
    trials = sweep({0.004: 2.402, 0.008: 2.400, 0.011: 2.403, 0.016: 2.401, 0.02: 2.402} | lost)
    won = winner(trials, SPACE, HARD)
    assert won.admissible and not won.flat


@pytest.mark.parametrize(("step", "trials"), [(1.0, 7), (0.5, 11)])
def test_the_interval_covers_the_optimum_at_95_percent(normal, step, trials):
    # Bounds: the binomial's 1-in-1000 tails.
    # The grid lies anywhere about the optimum; the winner is what the noise makes it.
    studies = 250
    covered = 0
    for _ in range(studies):
        lrs = 0.008 * 2 ** (
            step * (np.arange(trials) - trials // 2 + normal.uniform(-0.5, 0.5))
        )
        won = winner(bowl(map(float, lrs), noise=lambda: normal.normal(0, 0.002)), SPACE, HARD)
        covered += won.low <= 0.008 <= won.high
    assert (
        stats.binom.ppf(0.001, studies, 0.95)
        <= covered
        <= stats.binom.ppf(0.999, studies, 0.95)
    )


def test_noise_that_hides_the_curvature_leaves_no_interval(normal):
    fits = [
        winner(
            bowl(GRID, curvature=1e-4, noise=lambda: normal.normal(0, 0.01)), SPACE, HARD
        ).fit
        for _ in range(50)
    ]
    assert sum(fit is None or fit.low is None for fit in fits) > 25


def test_an_interval_stops_at_the_trials_it_rests_on():
    fit = winner(
        sweep(
            {
                0.002: 2.7336,
                0.004: 2.6994,
                0.008: 2.6691,
                0.016: 2.6794,
                0.032: 2.7012,
                0.064: 2.7294,
            }
        ),
        SPACE,
        HARD,
    ).fit
    assert 0.004 < fit.low < fit.optimum < fit.high == pytest.approx(0.032)


@pytest.mark.parametrize(
    "outcomes",
    [
        {0.004: 2.5, 0.008: 2.4, 0.016: 2.5},  # three trials
        {
            0.004: 2.5,
            0.008: 2.4,
            0.016: 2.5,
            0.032: "diverged",
        },  # a lost one has no loss to fit
        {0.004: 2.4, 0.008: 2.5, 0.016: 2.5, 0.032: 2.4},  # a hill
        {0.001: 2.8, 0.002: 2.6, 0.004: 2.5, 0.008: 2.45},  # the vertex lies beyond the trials
        {0.004: 2.4, 0.008: 2.4, 0.016: 2.4, 0.032: 2.4},  # flat to the bit
    ],
)
def test_trials_that_do_not_carry_a_quadratic_have_none(outcomes):
    won = winner(sweep(outcomes), SPACE, HARD)
    assert won.fit is won.optimum is won.low is won.high is None


# Widening.


@pytest.mark.parametrize(("optimum", "further"), [(1.0, 0.032), (1e-5, 0.001)])
def test_widening_goes_one_spacing_beyond_the_edge_that_won(optimum, further):
    assert widen(bowl([0.002, 0.004, 0.008, 0.016], optimum), SPACE, HARD) == further


@pytest.mark.parametrize(
    "hard",
    [
        {},
        {LR: (0.002, 0.016)},
        {LR: (0.0021, 0.0165)},
    ],
)
def test_nothing_is_widened_beyond_the_hard_bounds_or_without_any(hard):
    assert widen(bowl([0.002, 0.004, 0.008, 0.016], 1.0), SPACE, hard) is None


def test_an_interior_winner_and_an_edge_with_a_lost_run_beyond_are_left_alone():
    assert widen(bowl(GRID), SPACE, HARD) is None
    for state in ("failed", "out_of_memory", "running"):
        assert widen(sweep({0.004: 2.5, 0.008: 2.4, 0.016: state}), SPACE, HARD) is None


@pytest.mark.parametrize("optimum", [1e-6, 3e-4, 0.05, 5.0])
@pytest.mark.parametrize(
    "start",
    [
        [0.008],
        [0.004, 0.0041, 0.0042],
        [0.002, 0.003, 0.02],
    ],
)
def test_widening_ends_with_an_interior_winner_or_at_the_hard_bounds(optimum, start):
    lrs = list(start)
    while (further := widen(bowl(lrs, optimum), SPACE, HARD)) is not None:
        assert HARD[LR][0] <= further <= HARD[LR][1]
        assert not min(lrs) <= further <= max(lrs)
        lrs.append(further)
        assert len(lrs) < 60
    won = winner(bowl(lrs, optimum), SPACE, HARD)
    assert (
        won.admissible == (HARD[LR][0] < optimum < HARD[LR][1]) or "hard bounds" in won.reason
    )


# Width.


def grid_of_widths(optimum_at, lrs=GRID, **more) -> list[Trial]:
    return [
        trial
        for width in (32, 64, 128, 256)
        for trial in bowl(
            lrs, optimum_at(width), floor=3 - width / 1e3, **{WIDTH: width}, **more
        )
    ]


def widths_of(record) -> pd.DataFrame:
    """A row per width, for one arm."""
    return pd.DataFrame(transfer(record))


def test_a_rate_that_does_not_move_transfers_at_no_cost():
    moved = widths_of(study(grid_of_widths(lambda width: 0.008)))
    assert list(moved.width) == [32, 64, 128, 256]
    assert set(moved.base_width) == {64}
    assert set(moved.transferred) == {0.008}
    assert (moved.gap == 0).all()
    assert moved.within_one_step.all()
    assert set(moved.how) == {"evaluated"}


def test_a_rate_that_falls_with_width_costs_what_the_curve_says():
    moved = widths_of(study(grid_of_widths(lambda width: 0.016 * 32 / width))).set_index(
        "width"
    )
    assert list(moved.lr) == [0.016, 0.008, 0.004, 0.002]
    assert list(moved.optimum) == pytest.approx([0.016, 0.008, 0.004, 0.002])
    assert list(moved.steps) == [1, 0, -1, -2]
    assert list(moved.within_one_step) == [
        True,
        True,
        True,
        False,
    ]
    assert list(moved.gap) == pytest.approx([0.02, 0, 0.02, 0.08])


def test_the_smallest_width_is_the_base_where_the_experiments_own_was_not_searched():
    assert set(
        widths_of(
            study(grid_of_widths(lambda width: 0.008), base={LR: 0.007, WIDTH: 48})
        ).base_width
    ) == {32}


def test_a_rate_that_was_not_tried_there_is_read_off_the_quadratic_or_the_nearest_trial():
    base = bowl(GRID, 0.008, **{WIDTH: 64})
    between = widths_of(
        study(base + bowl([0.003, 0.006, 0.012, 0.024], 0.008, **{WIDTH: 128}))
    ).iloc[1]
    assert between.how == "quadratic"
    assert between.transferred_loss == pytest.approx(2.4)
    outside = widths_of(study(base + bowl([0.001, 0.002, 0.003], 0.002, **{WIDTH: 128}))).iloc[
        1
    ]
    assert outside.how == "nearest, 0.003"
    assert outside.gap == pytest.approx(0.02 * np.log2(1.5) ** 2)


def test_a_transferred_rate_that_diverges_has_no_loss_there():
    wide = sweep({0.001: 2.5, 0.002: 2.4, 0.004: 2.5, 0.008: "diverged"}, **{WIDTH: 128})
    row = widths_of(study(bowl(GRID, **{WIDTH: 64}) + wide)).iloc[1]
    assert np.isnan(row.gap)
    assert row.how == "evaluated: diverged"


def test_a_study_without_widths_has_no_transfer_table():
    with pytest.raises(
        UserError, match="study 's' searches optim.lr; a transfer table needs model.width"
    ):
        transfer(study(bowl(GRID)))


def test_the_seed_sd_is_pooled_over_trials():
    trials = [
        Trial("full", 0, {LR: 0.1}, "complete", 2.0, {"1": 1.0, "2": 3.0}),
        Trial("full", 1, {LR: 0.2}, "complete", 5.0, {"1": 4.0, "2": 5.0, "3": 6.0}),
    ]
    # Squares 1+1 and 1+0+1, degrees 1 and 2.
    assert seed_sd(trials) == pytest.approx(np.sqrt((2 + 2) / 3))
    assert seed_sd(bowl(GRID)) is None
