import numpy as np
import pytest
from matplotlib.image import imread

from ablab.analysis.pictures.study_rates import _shades, draw_rates, draw_widths
from ablab.analysis.pictures.study_search import draw_history, draw_importance
from ablab.analysis.pictures.style import BACKGROUND, DISTINCT, INK, canvas
from ablab.analysis.pictures.trial_panel import TrialPanel, colours_of
from ablab.core.errors import UserError
from ablab.core.store.study_record import LR, WIDTH, StudyRecord, Trial

LRS = [float(lr) for lr in np.geomspace(0.001, 0.064, 7)]


def study(cells, widths=(64,), loss=None, better="lower", **changed) -> StudyRecord:
    """One trial per cell, width and learning rate.  loss(cell, width, lr): a value, or the state of a lost trial."""
    loss = loss or (
        lambda cell, width, lr: (
            2.4 + 0.02 * cells.index(cell) - width / 1e3 + 0.02 * np.log2(lr / 0.008) ** 2
        )
    )
    trials = [
        Trial(
            cell,
            number,
            {LR: lr, WIDTH: width},
            *((got, None) if isinstance(got, str) else ("complete", float(got))),
        )
        for cell in cells
        for number, (width, lr) in enumerate((width, lr) for width in widths for lr in LRS)
        for got in [loss(cell, width, lr)]
    ]
    usual = {
        "name": "s",
        "question": "?",
        "metric": "val/bits_per_byte",
        "space": {LR: {"log": [0.001, 0.064]}, WIDTH: {"choices": list(widths)}},
        "hard": {},
        "base": {},
        "sampler": "grid",
        "pruner": "none",
        "seeds": [1],
        "trials_per_cell": 7,
    }
    return StudyRecord(better=better, trials=trials, **usual | changed)


def shows(picture, colour: str) -> int:
    """How many pixels have exactly this colour."""
    wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return int((np.rint(picture[..., :3] * 255) == wanted).all(-1).sum())


def test_learning_rate_curves_are_print_size_with_a_colour_per_arm(tmp_path):
    picture = imread(draw_rates(study(["full", "- a", "- b"]), tmp_path / "lr.png"))
    # 200 dots an inch
    assert 1200 <= picture.shape[1] <= 1700
    assert 850 <= picture.shape[0] <= 1300
    assert [shows(picture, colour) > 200 for colour in (INK, *DISTINCT[:3])] == [
        True,
        True,
        True,
        False,
    ]


def test_diverged_trials_are_crosses_above_the_top_edge_and_stacked():
    _, (axes,) = canvas(4, 3)
    panel = TrialPanel(axes, "lower")
    states = [
        (0.01, "complete"),
        (0.02, "diverged"),
        (0.03, "pruned"),
        (0.04, "failed"),
    ]
    for colour in ("#111111", "#222222"):
        panel.lost(states, colour)
    marks = [(line.get_marker(), *line.get_xdata(), *line.get_ydata()) for line in axes.lines]
    assert [(mark, x) for mark, x, _ in marks] == [("x", 0.02), ("|", 0.03)] * 2
    assert all(y > 1 for *_, y in marks)
    assert marks[0][2] < marks[2][2]
    assert panel.room_above == 18


def test_above_ten_arms_the_rest_is_grey(tmp_path):
    cells = [f"arm {i}" for i in range(12)]
    assert [colours_of(study(cells))[cell] for cell in cells] == [
        INK,
        *DISTINCT,
        BACKGROUND,
        BACKGROUND,
    ]
    assert shows(imread(draw_rates(study(cells), tmp_path / "lr.png")), BACKGROUND) > 200


def test_widths_go_from_light_to_dark_in_panels_that_share_their_value_axis(tmp_path):
    shades = _shades([32, 64, 128, 256])
    brightness = [
        sum(int(shade[i : i + 2], 16) for i in (1, 3, 5)) for shade in shades.values()
    ]
    assert brightness == sorted(brightness, reverse=True)
    two, five = (
        imread(
            draw_widths(
                study([f"arm {i}" for i in range(arms)], tuple(shades)), tmp_path / "w.png"
            )
        )
        for arms in (2, 5)
    )
    assert all(shows(two, shade) > 200 for shade in shades.values())
    # 2 panels, and 3 over 2
    assert two.shape[1] < five.shape[1] < 2000
    assert five.shape[0] > 1.6 * two.shape[0]


def test_importance_has_a_bar_as_long_as_its_share(tmp_path):
    shares = {"full": {LR: 0.8, WIDTH: 0.2}, "- a": {LR: 0.4, WIDTH: 0.6}}
    picture = imread(
        draw_importance(study(["full", "- a"], importance=shares), tmp_path / "i.png")
    )
    assert shows(picture, INK) > shows(picture, DISTINCT[0]) * 0.9
    rows = (np.rint(picture[..., :3] * 255) == [0x33, 0x22, 0x88]).all(-1)
    lengths = np.diff(
        np.flatnonzero(np.diff(np.pad(rows[rows.sum(1).argmax()], 1).astype(int)))
    )[::2]
    assert lengths[0] / lengths[1] == pytest.approx(0.4 / 0.6, abs=0.02)


def test_the_history_falls_to_each_arms_best(tmp_path):
    picture = imread(draw_history(study(["full", "- a"]), tmp_path / "h.png"))
    ink, blue = (
        (np.rint(picture[..., :3] * 255) == [int(c[i : i + 2], 16) for i in (1, 3, 5)]).all(-1)
        for c in ("#222222", DISTINCT[0])
    )
    assert shows(picture, DISTINCT[0]) > 500
    assert ink.sum() > 500
    long = np.flatnonzero(blue.sum(1) > 100)  # rows of horizontal line
    # Seven trials, the fourth is the best.
    assert len(np.split(long, np.flatnonzero(np.diff(long) > 1) + 1)) == 4


def test_edges_lost_arms_pruned_trials_and_one_trial_can_be_drawn(tmp_path):
    def odd(cell, width, lr):
        return {
            "full": 0.6 + lr,
            "dead": "diverged",
            "one": 0.5 if lr == LRS[3] else "failed",
            "cut": "pruned" if lr < 0.003 else 0.5 - abs(lr - 0.01),
        }[cell]

    record = study(["full", "dead", "one", "cut"], (64, 128), odd, "higher")
    for number, draw in enumerate((draw_rates, draw_widths, draw_history)):
        assert imread(draw(record, tmp_path / f"{number}.png")).std() > 0.05


def test_a_trial_near_divergence_does_not_flatten_the_rest(tmp_path):
    def steep(cell, width, lr):
        return 400.0 if lr == LRS[-1] else 2.4 + 0.02 * np.log2(lr / 0.008) ** 2

    class Axes:
        def set_ylim(self, low, high):
            self.limits = low, high

    record = study(["full"], loss=steep)
    axes = Axes()
    TrialPanel(axes, "lower").limits([record.trials])
    assert 2.3 < axes.limits[0] < 2.4
    assert 2.5 < axes.limits[1] < 3


@pytest.mark.parametrize(
    ("draw", "space", "words"),
    [
        (
            draw_rates,
            {WIDTH: {"choices": [64]}},
            "a curve needs optim.lr or a log-scaled path in study.space",
        ),
        (draw_widths, {WIDTH: {"choices": [64]}}, "a curve needs"),
        (draw_importance, {}, "has no importances"),
    ],
)
def test_a_picture_without_its_data_is_refused_in_one_line(tmp_path, draw, space, words):
    with pytest.raises(UserError, match=f"study 's' .*{words}"):
        draw(study(["full"], space=space), tmp_path / "x.png")


def test_a_study_without_widths_has_no_picture_of_them(tmp_path):
    trials = [Trial("full", i, {LR: lr}, "complete", 2.0) for i, lr in enumerate(LRS)]
    record = study(["full"], space={LR: {"log": [0.001, 0.064]}})
    with pytest.raises(UserError, match="needs model.width in study.space"):
        draw_widths(StudyRecord(**{**record.__dict__, "trials": trials}), tmp_path / "x.png")


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        draw_history(study(["full"]), tmp_path / "file" / "h.png")
