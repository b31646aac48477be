"""Every arm under two optimizers."""

from ablab.ablations.design import layout_of
from ablab.core.recipe.intervention import treatment_of


def twice(optimizers, *names, **options):
    written = {"twice": {"optimizers": optimizers} | options}
    return layout_of(written, treatment_of(names))


def test_each_arm_stands_under_either_optimizer_beside_the_reference_under_the_same():
    layout = twice(["base", "muon"], "gating", "muon", "normuon")
    assert [(cell.name, cell.reference) for cell in layout.cells] == [
        ("full (under base)", None),
        ("- gating (under base)", "full (under base)"),
        ("full (under muon)", "full (under base)"),
        ("- gating (under muon)", "full (under muon)"),
    ]
    assert [set(cell.treatment) for cell in layout.cells] == [
        {"gating"},
        set(),
        {"gating", "muon", "normuon"},  # what builds on an optimizer comes and goes with it
        {"muon", "normuon"},
    ]


def test_the_optimizer_is_a_factor_and_its_interactions_are_what_the_design_tells():
    factors = twice(["muon", "soap"], "gating", "ema", "muon", "soap").factors
    assert factors.names == {
        "gating": ["off", "on"],
        "ema": ["off", "on"],
        "optimizer": ["muon", "soap"],
    }
    assert factors.levels["- ema (under soap)"] == {"gating": 1, "ema": -1, "optimizer": 1}
    assert factors.interactions == [["gating", "optimizer"], ["ema", "optimizer"]]


def test_the_arms_may_be_added_one_at_a_time_instead():
    layout = twice(["base", "muon"], "ema", "muon", arms="add_one")
    assert [cell.name for cell in layout.cells] == [
        "base (under base)",
        "+ ema (under base)",
        "base (under muon)",
        "+ ema (under muon)",
    ]
