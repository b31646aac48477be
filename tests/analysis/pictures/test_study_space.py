"""A study that searches two axes at once, so that no two trials share a value on either."""

import numpy as np
import pytest
from matplotlib.collections import PathCollection

from ablab.analysis.pictures.study_rates import rates
from ablab.analysis.pictures.study_search import importance
from ablab.analysis.pictures.study_space import axes_of, draw_heat, draw_slices, heat, slices
from ablab.core.errors import UserError
from ablab.core.store.study_record import LR, StudyRecord, Trial

DECAY = "optim.decay"
SPACE = {LR: {"log": [1e-3, 1e-1]}, DECAY: {"uniform": [0.0, 0.3]}}


def study(normal, trials: int = 12, lost: int = 0, cells=("full", "- a"), **changed):
    """Points drawn at random from SPACE; the last `lost` of each cell diverged.  Values: a bowl."""
    listed = []
    for cell in cells:
        for number in range(trials):
            lr = float(10 ** normal.uniform(-3, -1))
            decay = float(normal.uniform(0, 0.3))
            value = 2 + (np.log2(lr / 0.01) ** 2 + 100 * (decay - 0.15) ** 2) / 100
            point = {LR: lr, DECAY: decay}
            if number < trials - lost:
                listed.append(Trial(cell, number, point, "complete", float(value)))
            else:
                listed.append(Trial(cell, number, point, "diverged"))
    about = {
        "name": "two",
        "question": "?",
        "metric": "val/loss",
        "better": "lower",
        "space": SPACE,
        "hard": {},
        "base": {},
        "sampler": "tpe",
        "pruner": "none",
        "seeds": [0],
        "trials_per_cell": trials,
    }
    return StudyRecord(**about | changed, trials=listed)


def points_of(axes) -> set[tuple[float, float]]:
    """Of all dots: markers of lines without a line."""
    dots = [line for line in axes.lines if line.get_marker() == "o"]
    return {point for line in dots for point in zip(*line.get_data(), strict=True)}


def test_every_finished_trial_is_a_dot_on_every_axis(normal):
    searched = study(normal, trials=9, lost=2)
    panels = slices(searched).axes
    for axes, axis in zip(panels, axes_of(searched), strict=True):
        path = axis.path
        done = {(trial.params[path], trial.value) for trial in searched.trials if trial.value}
        assert len(done) == 14
        assert done <= points_of(axes)
        assert axes.get_xlabel() == path
    assert [axes.get_xscale() for axes in panels] == ["log", "linear"]


def test_the_rate_picture_shows_the_trials_that_stand_on_no_line(normal):
    searched = study(normal)
    (top, *_) = rates(searched).axes
    done = {(trial.params[LR], trial.value) for trial in searched.trials}
    assert done <= points_of(top)


def test_a_map_is_between_its_trials_what_they_are(normal):
    """Linear between trials on the scales that are drawn: at a trial it has the trial's colour."""
    searched = study(normal, trials=40, cells=("full",))
    axes, *_ = heat(searched).axes
    (dots,) = [one for one in axes.collections if isinstance(one, PathCollection)]
    assert len(dots.get_offsets()) == 40
    assert len(axes.collections) > 1
    assert (axes.get_xscale(), axes.get_yscale()) == ("log", "linear")


def test_few_trials_make_dots_and_no_surface(normal):
    axes, *_ = heat(study(normal, trials=5, cells=("full",))).axes
    assert [type(one) for one in axes.collections] == [PathCollection]


def test_trials_on_one_line_make_no_surface(normal):
    searched = study(normal, trials=8, cells=("full",))
    for number, trial in enumerate(searched.trials):
        trial.params[DECAY] = 0.01 * number
        trial.params[LR] = 0.001 * 2**number
    axes, *_ = heat(searched).axes
    assert [type(one) for one in axes.collections] == [PathCollection]


def test_both_are_written(normal, tmp_path):
    searched = study(normal, lost=1)
    for draw in (draw_slices, draw_heat):
        assert draw(searched, tmp_path / "a.png").stat().st_size > 10_000


def test_one_axis_has_no_map(normal):
    searched = study(normal, space={LR: SPACE[LR]})
    assert [axis.path for axis in axes_of(searched)] == [LR]
    with pytest.raises(UserError, match="'two' searches optim.lr; a map needs two axes"):
        heat(searched)


@pytest.mark.parametrize(("trials", "guess"), [(12, True), (60, False)])
def test_importance_from_few_trials_says_so(normal, trials, guess):
    shares = {cell: {LR: 0.8, DECAY: 0.2} for cell in ("full", "- a")}
    label = importance(study(normal, trials=trials, importance=shares)).get_supxlabel()
    assert f"between {trials} finished trials an arm" in label
    assert ("a guess, not a ranking" in label) == guess
