import warnings

import numpy as np
import pandas as pd
import pytest
from matplotlib.image import imread

from ablab.analysis.effects import frame
from ablab.analysis.effects.effects import measure
from ablab.analysis.pictures.curves import curves_of, draw_curves
from ablab.analysis.pictures.forest import draw_forest, forest
from ablab.analysis.pictures.style import BACKGROUND, DISTINCT, VERDICT_COLOUR, label_ends
from ablab.core.errors import UserError


def experiment(lab, normal, arms: int, seeds: int = 3):
    lab.cell("full", list(normal.normal(3, 0.002, seeds)), None, points=8)
    for arm in range(arms):
        lab.cell(f"- part_{arm}", list(normal.normal(3 + 0.002 * arm, 0.002, seeds)), points=8)
    return lab


def draw(lab, folder):
    """Both pictures as arrays [H, W, 4] in [0, 1]."""
    store = lab.write()
    forest = draw_forest(measure(frame.load(store, "loo"), "val/loss"), folder / "forest.png")
    return imread(forest), imread(
        draw_curves(frame.curves(store, "loo"), folder / "curves.png")
    )


def shows(picture, colour: str) -> int:
    """How many pixels have exactly this colour."""
    wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return int((np.rint(picture[..., :3] * 255) == wanted).all(-1).sum())


@pytest.mark.parametrize("arms", [3, 14])
def test_pictures_are_print_size_and_not_blank(lab, normal, tmp_path, arms):
    forest, curves = draw(experiment(lab, normal, arms), tmp_path)
    # 200 dots an inch
    assert 1000 <= forest.shape[1] <= 1500
    assert 60 * arms <= forest.shape[0] <= 60 * arms + 400
    assert 1200 <= curves.shape[1] <= 1600
    assert 1200 <= curves.shape[0] <= 1500
    assert forest.std() > 0.05
    assert curves.std() > 0.05


@pytest.mark.parametrize(("value", "verdict"), [(3.1, "helps"), (2.9, "hurts")])
def test_what_helps_is_blue_and_what_hurts_orange(lab, tmp_path, value, verdict):
    lab.cell("full", [3.0, 3.001, 3.002], None, points=5)
    lab.cell("- a", [value, value + 0.001, value + 0.0021], points=5)
    picture, _ = draw(lab, tmp_path)
    for word, colour in VERDICT_COLOUR.items():
        assert (shows(picture, colour) > 100) == (word == verdict)


def test_above_ten_cells_three_arms_keep_a_colour(lab, normal, tmp_path):
    store = experiment(lab, normal, arms=14).write()
    picture = imread(draw_curves(frame.curves(store, "loo"), tmp_path / "curves.png"))
    assert [bool(shows(picture, colour)) for colour in DISTINCT] == [True] * 3 + [False] * 6
    assert shows(picture, BACKGROUND) > 100


def test_an_experiment_of_lost_single_and_inert_arms_can_be_drawn(lab, tmp_path):
    lab.cell("full", [3.0, 3.1], None, points=10)
    lab.cell("- lost", ["diverged", "interrupted"], points=10)
    lab.cell("- inert", [3.0, 3.1], points=10)
    lab.cell("- single", [3.2, "missing"], points=10)
    forest, curves = draw(lab, tmp_path)
    assert forest.std() > 0.02
    assert curves.std() > 0.02


def test_a_single_evaluation_is_a_dot(lab, tmp_path):
    lab.cell("full", [3.0], None, points=1)
    lab.cell("- a", [3.1], points=1)
    store = lab.write()
    picture = imread(draw_curves(frame.curves(store, "loo"), tmp_path / "curves.png"))
    assert shows(picture, DISTINCT[0]) > 200  # the letters beside it alone: 35


def test_one_evaluation_of_one_seed_draws_without_a_warning(lab, tmp_path):
    lab.cell("only", [3.0], None, points=1)
    logged = frame.curves(lab.write(), "loo")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw_curves(logged, tmp_path / "curves.png")


def test_of_very_many_arms_the_farthest_are_drawn(lab):
    lab.cell("full", [3.0, 3.1], None)
    for arm in range(70):
        lab.cell(f"- part_{arm}", [3.0 + arm / 100, 3.1 + arm / 100])
    effects = measure(frame.load(lab.write(), "loo"), "val/loss")
    (axes,) = forest(effects).axes
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert names == [f"- part_{arm}" for arm in range(69, 9, -1)]
    assert "the 60 of 70 arms that lie farthest from zero" in axes.get_xlabel()


def test_one_cell_alone_has_a_curve(lab, tmp_path):
    lab.cell("only", [3.0], None, points=5)
    store = lab.write()
    assert imread(draw_curves(frame.curves(store, "loo"), tmp_path / "curves.png")).std() > 0.02


def test_differences_are_taken_where_both_runs_have_been():
    def curve(tokens, values):
        rows = {
            "cell": "arm",
            "reference": None,
            "pair": 0,
            "status": "finished",
            "tokens": tokens,
            "val/loss": values,
        }
        return curves_of(pd.DataFrame(rows), "val/loss")["arm"]

    reference = curve([10.0, 20.0, 30.0], [4.0, 3.0, 2.0])
    grid, difference = curve([5.0, 15.0, 25.0, 35.0], [9.0, 3.6, 2.6, 1.0]).minus(reference)
    assert list(grid) == [15, 25]
    assert difference[0] == pytest.approx([0.1, 0.1])
    assert curve([40.0], [1.0]).minus(reference) is None


def test_labels_are_pushed_apart():
    class Axes:
        placed = []

        def get_ylim(self):
            return 0.0, 1.0

        def annotate(self, name, at, **_):
            self.placed.append(at[1])

    label_ends(Axes(), {"a": 0.5, "b": 0.5, "c": 0.51}, dict.fromkeys("abc", "black"))
    assert np.diff(Axes.placed).min() >= 0.06


def test_a_folder_that_cannot_be_written_is_one_line(lab, tmp_path):
    (tmp_path / "file").write_text("")
    lab.cell("only", [3.0], None, points=5)
    store = lab.write()
    with pytest.raises(UserError, match="cannot write"):
        draw_curves(frame.curves(store, "loo"), tmp_path / "file" / "curves.png")
