import re

import pytest

from ablab.experiments.cli.check import _flaw


def found(widths, base_width, failing=("logits",)):
    """What `ablab check coords` measured: the control is not flat, and neither is muP."""
    slopes = {"logits": -0.38}
    standard = {"name": "standard", "control": True, "parametrization": "standard"}
    mup = {"name": "mup", "control": False, "parametrization": "mup"}
    arms = [standard | {"failing": ["logits"], "slopes": {"logits": 0.4}}]
    arms.append(mup | {"failing": list(failing), "slopes": slopes})
    return {"flat": 0.15, "widths": widths, "base_width": base_width, "arms": arms}


@pytest.mark.parametrize(
    ("widths", "base_width", "words"),
    [
        ([16, 32, 48, 64], 4, "width 16 is below 64, where its rule does not show yet; try"),
        ([64, 128, 256], 256, "width 64 is below the base width 256, .* give --base-width 64"),
    ],
)
def test_a_failure_at_widths_that_tell_nothing_does_not_blame_mup(widths, base_width, words):
    said = _flaw(found(widths, base_width))
    assert re.search(f"fails: logits .* need not be muP's fault: {words}", said)


def test_a_failure_at_widths_that_tell_is_one():
    said = _flaw(found([64, 128, 256, 512], 16))
    assert said == "arm 'mup' fails: logits changes as width^-0.38, beyond 0.15 either way"
