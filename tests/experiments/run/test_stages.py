"""Stages, through the command line: trained in their order, each once, and told in one line where one cannot be."""

import json

import pytest

from ablab.core.store.result import DIVERGED, FINISHED

QUICK = ("--no-mlflow", "--jobs", "1")
STAGES = [
    {"name": "stable", "set": {"budget.tokens": 640}},
    {"name": "decay", "set": {"budget.tokens": 320, "data.context": 8}, "with": ["z_loss"]},
]
KEYS = {"arms": [], "stages": STAGES, "seeds": [0]}


@pytest.fixture(scope="module")
def first(lab):
    ended = lab.run("run", lab.sheet("staged", **KEYS), *QUICK)
    assert ended.code == 0, ended.err
    assert "INERT" not in ended.err  # the check compares every stage, and base differs in one
    return ended


def trunks(lab, name="staged"):
    path = lab.store / "experiments" / f"{name}.json"
    return json.loads(path.read_text())["trunks"]


def test_arms_share_the_trunk_and_end_apart(lab, first):
    (trunk,) = trunks(lab)
    assert (trunk["cell"], len(lab.plan("staged"))) == ("full · stable", 3)
    finals = lab.results("staged")
    assert {one["status"] for one in finals.values()} == {FINISHED}
    assert finals["full", 0]["weights"] != finals["base", 0]["weights"]
    assert finals["base", 0]["run"] == finals["- z_loss", 0]["run"]
    assert "[3/3]" in first.err and "full · stable, seed 0: val/loss" in first.err


def test_a_trunk_keeps_its_state_and_nobody_else_does(lab, first):
    (trunk,) = trunks(lab)
    kept = {path.parent.parent.name for path in lab.store.glob("runs/*/final/*")}
    assert kept == {trunk["run"]}


def test_asked_twice_nothing_is_trained(lab, first):
    before = lab.files()
    again = lab.run("run", "staged.yaml", *QUICK, "--json")
    assert again.trained == [] and len(again.reused) == 2
    changed = {name for name, stat in lab.files().items() if before.get(name) != stat}
    assert not {name for name in changed if name.startswith("runs/")}


def test_a_new_arm_goes_on_from_the_trunk_that_is_there(lab, first):
    words = ("with.z_loss.weight=0.5", "--only", "full")
    weaker = lab.run("run", "staged.yaml", *words, *QUICK, "--json")
    assert len(weaker.trained) == 1


def test_a_dry_run_shows_each_stage_once(lab, first, ablab):
    rows = ablab("run", "staged.yaml", "--seeds", "1", "--dry-run", "--json").json["rows"]
    cells = [row["cell"] for row in rows]
    assert cells == ["full · stable", "full · decay", "base · decay", "- z_loss · decay"]
    assert {row["state"] for row in rows} == {"missing"}
    assert "0 missing" in ablab("run", "staged.yaml", "--dry-run").out


def test_a_removed_state_is_one_line_before_anything_trains(lab, first, ablab):
    (trunk,) = trunks(lab)
    state = lab.run_folder(trunk["run"]) / "final"
    state.rename(state.with_name("elsewhere"))
    before = lab.files()
    refused = ablab("run", "staged.yaml", "with.z_loss.weight=0.7", *QUICK)
    assert lab.files() == before
    state.with_name("elsewhere").rename(state)
    assert refused.code == 2
    (said,) = refused.err.splitlines()
    assert f"goes on from run {trunk['run']}, whose last state is gone; delete" in said


def test_a_trunk_that_diverges_takes_its_stages_with_it(new_lab):
    """Nothing is tried again for it."""
    lab = new_lab()
    wild = {"runtime": {"log_every": 1}, "set": {"optim.lr": 1e30, "optim.clip": None}}
    sheet = lab.sheet("wild", **KEYS, **wild)
    ended = lab.run("run", sheet, "--run-inert", *QUICK, "--json")
    assert len(ended.trained) == 3
    result = lab.result("wild", "full")
    assert (result["status"], result["step"]) == (DIVERGED, 0)
    assert "from which it goes on, diverged: the loss was not finite" in result["error"]
    assert lab.run("run", sheet, "--run-inert", *QUICK, "--json").trained == []


def test_a_trunk_that_fails_leaves_its_stages_for_the_next_call(new_lab):
    lab = new_lab()
    (lab.root / "plugins").mkdir()
    (lab.root / "plugins" / "breaks.py").write_text(BREAKS)
    two = [{"name": "a"}, {"name": "b"}]
    sheet = lab.sheet("broken", arms=["breaks"], stages=two, seeds=[0])
    words = ("run", sheet, "--plugins", "plugins", "--run-inert", "--only", "full", *QUICK)
    ended = lab.run(*words)
    assert ended.code == 1
    assert (
        "full · b, seed 0: not trained, for full · a, seed 0, from which it goes" in ended.err
    )
    (lab.root / "works").touch()
    assert lab.run(*words, "--json").code == 0
    assert lab.result("broken", "full")["status"] == FINISHED


BREAKS = '''
"""Breaks."""
from pathlib import Path

from ablab.core.language.declare import Stage
from ablab.core.language.part import Part
from ablab.core.recipe.edit import append, edit
from ablab.core.recipe.intervention import register


@register("breaks", slots=("model.attention.on_heads",), off="nothing", source="a test")
class Breaks(Part):
    """A test."""

    def apply(self, recipe):
        return edit(recipe, "model.attention.on_heads", append(self))

    def build(self, where):
        return Stage(stage)


def stage(y, x):
    if not Path("works").exists():
        raise RuntimeError("it breaks")
    return y * 0.9
'''
