"""The coordinate check's picture and table, from plain rows."""

import json

import numpy as np
import pytest
from matplotlib.image import imread

from ablab.analysis.pictures import coords
from ablab.core.errors import UserError

WIDTHS = [64, 128, 256, 512]
SEEDS = [0, 1, 2]
STEPS = 6
JUDGED = ["attention out", "logits"]
REPORTED = ["logits at init", "max attention logit"]


def arm(name, slopes, control=False, **more):
    """Power laws with a little noise; a slope of None leaves zeros."""
    draw = np.random.default_rng(0)
    rows = []
    for tensor, slope in slopes.items():
        for step in [0] if tensor == "logits at init" else range(1, STEPS + 1):
            for width in WIDTHS:
                for seed in SEEDS:
                    change = (
                        0.0
                        if slope is None
                        else 0.4
                        * (step + 1)
                        * (width / 64) ** slope
                        * np.exp(draw.normal(0, 0.05))
                    )
                    rows.append(
                        {
                            "width": width,
                            "seed": seed,
                            "step": step,
                            "tensor": tensor,
                            "change": float(change),
                        }
                    )
    failing = [
        tensor for tensor in JUDGED if slopes[tensor] is None or abs(slopes[tensor]) > 0.15
    ]
    return {
        "name": name,
        "control": control,
        "slopes": slopes,
        "failing": failing,
        "rows": rows,
    } | more


def check(*arms):
    return {
        "flat": 0.15,
        "lr": 0.02,
        "steps": STEPS,
        "widths": WIDTHS,
        "seeds": SEEDS,
        "judged": JUDGED,
        "reported": REPORTED,
        "arms": list(arms),
    }


STANDARD = arm(
    "standard",
    dict(zip(JUDGED + REPORTED, (1.96, 0.74, -0.01, 1.63), strict=True)),
    control=True,
)
MUP = arm("mup", dict(zip(JUDGED + REPORTED, (0.06, -0.07, -0.5, 0.14), strict=True)))
ZERO = arm(
    "mup, zero readout", dict(zip(JUDGED + REPORTED, (0.05, 0.01, None, 0.06), strict=True))
)


def shows(picture, colour: str) -> int:
    """How many pixels have exactly this colour."""
    wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return int((np.rint(picture[..., :3] * 255) == wanted).all(-1).sum())


def test_a_row_of_panels_per_arm_blue_where_flat_and_orange_where_not(tmp_path):
    pictures = {
        name: imread(coords.draw(check(*arms), tmp_path / f"{name}.png"))
        for name, arms in {"one": [MUP], "three": [STANDARD, MUP, ZERO]}.items()
    }
    assert shows(pictures["one"], coords.PASS) > 500
    assert not shows(pictures["one"], coords.FAIL)
    assert shows(pictures["three"], coords.PASS) > 1000
    assert shows(pictures["three"], coords.FAIL) > 500
    one, three = (pictures[name].shape for name in ("one", "three"))
    # 200 dots an inch
    assert 1300 <= one[1] <= 1700
    assert abs(one[1] - three[1]) < 60
    assert 600 <= (three[0] - one[0]) / 2 + 300 <= 800


def test_steps_go_from_light_to_dark(tmp_path):
    """Six shades of blue on the lines, the last the colour itself."""
    picture = np.rint(
        imread(coords.draw(check(MUP), tmp_path / "a.png"))[..., :3] * 255
    ).astype(int)
    blue = np.array([int(coords.PASS[i : i + 2], 16) for i in (1, 3, 5)])
    for depth in np.linspace(coords.LIGHTEST, 1, STEPS):
        shade = np.rint(255 - depth * (255 - blue))
        assert (np.abs(picture - shade).max(-1) <= 1).sum() > 30, depth


def test_a_change_that_is_not_finite_or_zero_leaves_a_gap_not_a_crash(tmp_path):
    lost = arm("diverged", dict(zip(JUDGED + REPORTED, (1.0, None, None, 1.0), strict=True)))
    for row in lost["rows"][::7]:
        row["change"] = None
    assert imread(coords.draw(check(lost), tmp_path / "lost.png")).std() > 0.02


def test_the_table_marks_what_is_not_flat_and_says_what_the_control_must_do():
    lines = {line.pop("slope of"): line for line in coords.table(check(STANDARD, MUP, ZERO))}
    assert list(lines) == [*JUDGED, *REPORTED, ""]
    assert lines["logits"] == {
        "standard": "+0.74 x",
        "mup": "−0.07",
        "mup, zero readout": "+0.01",
    }
    assert lines["logits at init"] == {
        "standard": "−0.01",
        "mup": "−0.50",
        "mup, zero readout": "none",
    }
    assert lines["max attention logit"]["standard"] == "+1.63"  # reported, not judged
    assert lines[""] == {
        "standard": "FAIL, as it must",
        "mup": "PASS",
        "mup, zero readout": "PASS",
    }


@pytest.mark.parametrize(
    ("slope", "control", "said"),
    [
        (0.15, False, "PASS"),
        (-0.151, False, "FAIL"),
        (None, False, "FAIL"),
        (0.0, True, "PASS, but must not"),
    ],
)
def test_verdicts(slope, control, said):
    one = arm(
        "a",
        {
            "attention out": 0.0,
            "logits": slope,
            "logits at init": 0.0,
            "max attention logit": 0.0,
        },
        control,
    )
    assert coords.verdict(one) == said


def test_what_was_saved_as_json_draws_the_same_picture(tmp_path):
    found = check(STANDARD, ZERO)
    one, other = (
        coords.draw(
            json.loads(json.dumps(found)) if again else found, tmp_path / f"{again}.png"
        ).read_bytes()
        for again in (False, True)
    )
    assert one == other


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        coords.draw(check(MUP), tmp_path / "file" / "coords.png")
