"""How many seeds a question needs, from the noise that a store has measured."""

import json
import math

import numpy as np
import pytest

from ablab.analysis.effects.power import seeds_needed, smallest_effect
from ablab.core.errors import UserError
from ablab.core.store.store import Store
from ablab.experiments.plan.experiment import load
from ablab.experiments.run.noise import by_family, measured, setting_of, tree_of
from ablab.experiments.run.planner import seed_plan
from tests.experiments.run.grids import SEED_SD, Drawn

ARMS = ["qk_norm", "ema", "muon"]


@pytest.fixture
def read(lab):
    def of(name: str = "asked", **keys):
        sheet = lab.sheet(name, **{"arms": ARMS} | keys)
        return load(str(lab.root / sheet), {}, lambda data: "0" * 16)

    return of


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path)


def noise_of(store: Store, experiment):
    setting = setting_of(tree_of(experiment.base))
    return measured(store, experiment.sheet.metric.name, setting)


def test_the_noise_of_an_arm_is_the_sd_of_its_differences_and_names_its_optimizer(read, store):
    experiment = read(seeds=list(range(40)))
    Drawn(store, noise=0.002)(experiment, experiment.runs())
    found = {arm.cell: arm for arm in noise_of(store, experiment)}
    assert {cell: arm.family for cell, arm in found.items()} == {
        "base": "adamw",
        "- muon": "adamw",
        "- qk_norm": "muon",
        "- ema": "muon",
    }
    for arm in found.values():
        assert arm.spread == pytest.approx(0.002 * math.sqrt(2), rel=0.3)
        assert arm.sd == pytest.approx(SEED_SD, rel=0.3)
        assert arm.correlation > 0.99
        assert not arm.replica


def test_an_a_a_arm_knows_its_seeds_and_no_pairing(read, store):
    twins = read("twins", arms=[], design="replicate", seeds=list(range(40)))
    Drawn(store)(twins, twins.runs())
    (arm,) = noise_of(store, twins)
    assert arm.replica
    assert arm.spread == pytest.approx(SEED_SD * math.sqrt(2), rel=0.3)
    assert arm.correlation is None


def test_a_family_pools_its_arms_by_their_degrees_of_freedom(read, store):
    few = read("few", seeds=[0, 1, 2])
    many = read("many", seeds=list(range(3, 12)), set={"optim.lr": 0.01})
    drawn = Drawn(store, noise=0.002)
    drawn(few, few.runs())
    drawn(many, many.runs())
    arms = [arm for arm in noise_of(store, few) if arm.family == "adamw"]
    pooled = by_family(arms)["adamw"]
    squares = sum((arm.seeds - 1) * arm.spread**2 for arm in arms)
    degrees = sum(arm.seeds - 1 for arm in arms)
    assert len(arms) == 4
    assert pooled.spread == pytest.approx(np.sqrt(squares / degrees))
    assert pooled.quietest == min(arm.spread for arm in arms)


@pytest.mark.parametrize(
    "other", [{"set": {"budget.tokens": 2560}}, {"set": {"model.width": 32}}, {"metric": {}}]
)
def test_arms_of_another_setting_or_metric_say_nothing(read, store, other):
    Drawn(store)(read("other", **other), read("other", **other).runs([0, 1, 2]))
    asked = read()
    assert noise_of(store, asked) == []
    with pytest.raises(
        UserError,
        match=r"no noise is measured: .* at width 16, 2 layers, 1,280 tokens of tiny; run first: .*--seeds 0-2",
    ):
        seed_plan(asked, store, 0.01)


def test_the_plan_says_seeds_for_each_arm_by_its_own_noise_and_what_they_cost(read, store):
    experiment = read(seeds=list(range(8)))
    Drawn(store, noise=0.002)(experiment, experiment.runs())
    found = seed_plan(experiment, store, 0.002)
    spread = {arm.cell: arm.spread for arm in noise_of(store, experiment)}
    for arm in found.arms:
        assert arm.spread == spread[arm.cell]
        assert arm.source == "itself, 8 seeds"
        assert arm.seeds == seeds_needed(0.002, arm.spread, 4, 0.8)
    assert found.seeds == max(arm.seeds for arm in found.arms)
    assert found.runs == 5 * found.seeds
    assert found.missing == found.runs - 40
    # 60 s a run, as those that are there took; arms differ by what they compute.
    assert found.hours == pytest.approx(found.missing / 60, rel=0.2)
    assert found.rate == "measured"
    assert found.present == 8


def test_an_arm_that_few_seeds_have_measured_goes_by_its_family(read, store):
    experiment = read(seeds=[0, 1, 2])
    Drawn(store)(experiment, experiment.runs())
    found = seed_plan(experiment, store, 0.01)
    families = {noise.family: noise.spread for noise in found.noise}
    assert {arm.cell: arm.spread for arm in found.arms} == {
        "base": families["adamw"],
        "- muon": families["adamw"],
        "- qk_norm": families["muon"],
        "- ema": families["muon"],
    }
    assert found.arms[0].source == "adamw, 2 arms"


def test_an_optimizer_that_nobody_has_measured_goes_by_the_noisiest_and_says_so(read, store):
    known = read("known", arms=["qk_norm", "ema"], seeds=[0, 1, 2])
    Drawn(store)(known, known.runs())
    found = seed_plan(read(arms=["soap", "qk_norm"]), store, 0.01)
    sources = {arm.cell: arm.source for arm in found.arms}
    assert sources["- qk_norm"] == "adamw: no soap arm is measured"
    assert sources["- soap"] == "adamw, 3 arms"


def test_an_effect_beyond_reach_says_so_instead_of_a_number(read, store):
    experiment = read(seeds=[0, 1, 2])
    Drawn(store, noise=0.002)(experiment, experiment.runs())
    found = seed_plan(experiment, store, 1e-5)
    assert found.seeds is None
    assert found.arms[0].seeds is None


def test_a_spread_that_a_person_expects_needs_no_store_and_stands_for_every_arm(read, store):
    found = seed_plan(read(seeds=list(range(5))), store, 0.002, spread=0.001)
    assert found.noise == []
    assert {arm.spread for arm in found.arms} == {0.001}
    assert found.seeds == seeds_needed(0.002, 0.001, 4, 0.8)
    assert found.arms[0].smallest == pytest.approx(smallest_effect(0.001, 5, 4))
    assert found.on_a_gpu is None


def test_a_grid_that_a_cpu_would_take_days_for_is_told_in_hours_of_a_gpu_too(store):
    grid = load("fp8_70m", {"runtime.device": "cpu"}, lambda data: "0" * 16)
    found = seed_plan(grid, store, None, spread=0.001)
    assert (found.effect, found.seeds, found.runs) == (0.002, 5, 20)
    assert found.hours > 1000
    assert 0.2 < found.on_a_gpu < 0.6


def test_the_smallest_effect_of_the_sheet_is_what_is_asked_for(read, store):
    experiment = read(seeds=[0, 1, 2], equivalence=0.02)
    Drawn(store)(experiment, experiment.runs())
    assert seed_plan(experiment, store, None).effect == 0.02


def test_the_command_prints_a_table_or_json_and_refuses_what_is_no_question(lab, ablab, read):
    experiment = read(seeds=[0, 1, 2])
    digest = json.loads((lab.store / "data" / "tiny" / "meta.json").read_text())["digest"]
    experiment = load(str(lab.root / "asked.yaml"), {}, lambda data: digest)
    Drawn(Store(lab.store))(experiment, experiment.runs())
    said = ablab("plan", "asked.yaml", "--effect", "0.003").out
    assert "To tell 0.003 with power 80% in a family of 4 arms" in said
    assert "smallest effect at 3 seeds" in said
    expected = ablab("plan", "asked.yaml", "--effect", "0.003", "--spread", "0.001").out
    assert expected.startswith("To tell 0.003")
    assert "as asked" in expected
    found = ablab("plan", "asked.yaml", "--effect", "0.003", "--json").json
    assert found["power"] == 0.8
    assert len(found["arms"]) == 4
    refused = {
        "--effect 0": "--effect 0 must be a number above 0",
        "--effect 1 --spread 0": "--spread 0 must be a number above 0",
        "--effect 1 --power 1": "--power 1 must lie between 0 and 1",
        "": "which difference in val/loss must be told? give --effect 0.003, or",
        "--effect 1 design=single": "has no arm to compare: design 'single'",
    }
    for words, why in refused.items():
        ended = ablab("plan", "asked.yaml", *words.split())
        assert ended.code == 2
        assert why in ended.err
        assert len(ended.err.splitlines()) == 1
