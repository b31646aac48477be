"""A trunk in pieces: longer budgets and other cooldowns share them, to the bits of the run that was never cut."""

import pytest

from ablab.core.errors import UserError
from ablab.core.runtime.runtime import Runtime
from ablab.core.store.record import Record
from ablab.core.train.run import run
from ablab.experiments.plan.experiment import load

PIECE = 5 * 64
ARMS = ["muon", "normuon", {"wsd": {"decay_fraction": 0.25}}]


@pytest.fixture
def read(lab):
    """(overrides, keys of the sheet) -> cell -> its runs."""

    def chains(overrides={}, **keys):
        keys = {"arms": ARMS, "design": "single", "seeds": [0], "trunk": PIECE} | keys
        path = lab.root / lab.sheet("trunk", **keys)
        return {one.cell: one.chain for one in load(str(path), overrides).runs()}

    return chains


def ids(chain):
    return [one.id for one in chain]


def test_a_run_is_cut_into_pieces_and_what_is_left(read):
    """20 steps, 5 of them the cooldown: three pieces of five, and the last five."""
    (chain,) = read().values()
    assert [one.stage for one in chain] == ["trunk 1", "trunk 2", "trunk 3", "cooldown"]
    assert [one.recipe.steps for one in chain] == [5, 5, 5, 5]
    assert [one.recipe.before.steps for one in chain] == [0, 5, 10, 15]
    assert [one.recipe.before.windows for one in chain] == [0, 20, 40, 60]
    assert chain[-1].recipe.schedule.decay_fraction == 1.0
    assert [one.repeats for one in chain] == [False, True, True, False]


def test_a_raised_budget_goes_on_from_the_trunk(read):
    """28 steps: 21 before the cooldown, four pieces; the last run begins with the one step that is left over."""
    short, long = read()["full"], read({"budget.tokens": 28 * 64})["full"]
    assert ids(long)[:3] == ids(short)[:3]
    assert [one.recipe.steps for one in long] == [5, 5, 5, 5, 8]
    assert ids(long)[-1] not in ids(short)


def test_cooldowns_share_their_trunk(read):
    runs = [read({"with.wsd.shape": shape})["full"] for shape in ("1-sqrt", "linear")]
    assert ids(runs[0])[:3] == ids(runs[1])[:3] and runs[0][3].id != runs[1][3].id
    later = read({"with.wsd.decay_fraction": 0.5})["full"]
    assert ids(later)[:2] == ids(runs[0])[:2] and len(later) == 3


def test_arms_that_read_out_otherwise_share_it_too(read):
    runs = read(design="leave_one_out", arms=[*ARMS, "ema"])
    assert ids(runs["- ema"])[:3] == ids(runs["full"])[:3]


@pytest.mark.parametrize(
    "average", [[], [{"ema": {"mode": "posthoc", "span": 0.2, "checkpoints": 3}}]]
)
def test_the_bits_are_those_of_the_run_that_was_never_cut(lab, read, tmp_path, average):
    def train(one, **how):
        runtime = Runtime(device="cpu", evaluations=1, **how)
        record = Record(tmp_path / one.id, one.id)
        return run(
            one.recipe, runtime, lab.store / "data" / "tiny", record, warn=lambda line: None
        )

    arms = [*ARMS, *average]
    for overrides in ({}, {"budget.tokens": 28 * 64}):
        for one in read(overrides, arms=arms)["full"]:
            ended = train(one, keep_state=True)
        (whole,) = read(overrides, arms=arms, trunk=None)["full"]
        never_cut = train(whole)
        assert (ended.weights, ended.evaluated) == (never_cut.weights, never_cut.evaluated)


def test_a_run_without_a_whole_piece_is_the_run_itself(read):
    (whole,) = read(trunk=None)["full"]
    (same,) = read(trunk=64 * 64)["full"]
    assert same.id == whole.id and same.title == "full"


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"arms": []}, "trunk needs the schedule wsd, not cosine"),
        (
            {"trunk": 100},
            r"trunk=100 is 1 steps, and the warm-up takes 3; use at least 192 tokens",
        ),
        (
            {"arms": ["wsd", "batch_ramp"]},
            "data.shape=batch_ramp follows the length of the run",
        ),
        (
            {"arms": ARMS, "stages": [{"name": "a"}, {"name": "b"}]},
            "trunk cuts one run, and there are",
        ),
    ],
)
def test_what_cannot_be_cut_is_one_line(read, keys, said):
    with pytest.raises(UserError, match=said):
        read(**keys)
