"""Initial values: one name, one draw, whatever else is switched on."""

from contextlib import suppress

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ablab.core.errors import UserError
from ablab.core.model import init
from ablab.core.model.init import generator, initialise
from ablab.core.recipe.intervention import REGISTRY

DOSES = {
    "mup": {"mup": {"base_width": 32, "base_layers": 3}},
    "relu2": {"relu2": {"expansion": 2.6667}},
}  # equal shapes, m = 1
SHARED = (
    2 + 3 * 6 + 1
)  # embedding, readout; two norms, qkv, out, gate_up, down in each block; the final norm


def test_many_threads_draw_what_one_draws(tiny, build, monkeypatch):
    recipe = tiny(["truncated_init"])
    one = weights(build(recipe))
    monkeypatch.setattr(init, "MANY", 0)
    assert agree(one, weights(build(recipe))) == len(one)


def weights(model) -> dict[str, torch.Tensor]:
    return {name: value.detach().clone() for name, value in model.named_parameters()}


def agree(one: dict, other: dict) -> int:
    """How many parameters two models share by name; all of them must be the same bits."""
    shared = [name for name in one if name in other]
    assert all(torch.equal(one[name], other[name]) for name in shared)
    return len(shared)


def company(tiny, toggled: list, names: list[str]) -> list[str]:
    """As many of the names as go together, with what is toggled and without, the first ones first."""
    kept: list[str] = []
    for name in names:
        more = [*kept, name]
        with suppress(UserError):
            tiny(more)
            tiny(more + [one for one in toggled if one not in more])
            kept = more
    return kept


# truncated_init draws some of the weights again: tests/ablations/test_truncated_init.py
@pytest.mark.parametrize("name", sorted(set(REGISTRY) - {"truncated_init"}))
def test_toggling_one_intervention_leaves_every_shared_parameter_bit_identical(
    tiny, build, name
):
    """At the base width muP is no exception; elsewhere it rescales the same draws (below)."""
    toggled = [*REGISTRY[name].about.requires, DOSES.get(name, name)]
    left = (name, "mup", "relu2", "normuon", "truncated_init", "micro_steps", "tied_head")
    others = company(tiny, toggled, [one for one in sorted(REGISTRY) if one not in left])
    # relu2: gate_up is another matrix; zero_init_projections: two matrices of each of three layers start at 0.
    # tied_head: the readout is no matrix of its own.
    lost = {"relu2": 3, "zero_init_projections": 6, "tied_head": 1}.get(name, 0)
    assert len(others) > 9
    for rest in ([], others):
        off = weights(build(tiny(rest)))
        on = weights(build(tiny(rest + [one for one in toggled if one not in rest])))
        zeroed = {one for one in on if one in off and off[one].any() and not on[one].any()}
        assert len(zeroed) == (lost if name == "zero_init_projections" else 0)
        assert agree(off, {one: on[one] for one in on if one not in zeroed}) >= SHARED - lost


def test_mup_rescales_the_same_draws(tiny, build):
    standard, scaled = (
        weights(build(tiny())),
        weights(build(tiny([{"mup": {"base_width": 8}}]))),
    )  # m = 4
    torch.testing.assert_close(
        scaled["readout.weight"], standard["readout.weight"] / 2, rtol=1e-6, atol=0
    )
    del standard["readout.weight"]
    assert agree(standard, scaled) == SHARED - 1


def test_std_follows_the_role(tiny, build):
    recipe = tiny(
        ["gating", "qk_norm", "value_residual"],
        model__width=128,
        data__vocab=512,
        parametrization__gain=0.7,
    )
    expected = {
        "embedding": lambda shape: 0.02,
        "hidden": lambda shape: 0.7 / shape[1] ** 0.5,
        "readout": lambda shape: 0.7 / 128**0.5,
    }
    seen = set()
    for name, value in build(recipe).named_parameters():
        role = value.declared.role
        seen.add(role)
        if role in expected:
            std = expected[role](value.shape)
            count = value.numel()
            # four standard errors of a sample's std, and of its mean
            assert abs(value.std().item() / std - 1) < 4 / (2 * count) ** 0.5, name
            assert abs(value.mean().item() / std) < 4 / count**0.5, name
        else:
            start = 0.0 if role == "gate" or name.endswith("value_residual.first") else 1.0
            assert (value == start).all(), name
    assert seen == {"embedding", "hidden", "readout", "gate", "vector"}


def test_a_gate_that_is_not_filled_is_drawn_by_its_fan_in(tiny, build):
    recipe = tiny([{"gating": {"per": "elementwise", "init": "normal"}}], model__width=128)
    gate = build(recipe).blocks[1].attention.on_heads.gating.project.weight
    assert gate.shape == (128, 128)
    assert abs(gate.std().item() * 128**0.5 - 1) < 0.03


def test_the_global_generator_is_neither_read_nor_moved(tiny, build):
    torch.manual_seed(1)
    once = weights(build(tiny()))
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert agree(once, weights(build(tiny()))) == SHARED
    assert torch.equal(state, torch.get_rng_state())


def test_the_order_of_parameters_does_not_matter(tiny, build):
    recipe = tiny()
    forward, backward = build(recipe), build(tiny(seed=9))

    class Reversed:
        def named_parameters(self):
            return reversed(list(backward.named_parameters()))

    initialise(Reversed(), recipe)
    assert agree(weights(forward), weights(backward)) == SHARED


def test_no_two_names_and_no_two_seeds_share_draws(tiny, build):
    firsts = set()
    for seed in (0, 1):
        model = build(tiny([{"gating": {"init": "normal"}}], seed=seed))
        drawn = [value for value in model.parameters() if value.std() > 0]
        for value in drawn:
            declared = value.declared
            std = 0.02 if declared.role == "embedding" else declared.shape[-1] ** -0.5
            unit = value.flatten()[:16] / std
            firsts.add(tuple(round(x, 3) for x in unit.tolist()))
    assert len(firsts) == 2 * len(drawn) == 2 * (2 + 3 * 5)


def test_equal_matrices_of_two_layers_are_uncorrelated(tiny, build):
    model = build(tiny())
    matrices = [model.blocks[layer].ffn.inner.gate_up.weight for layer in (0, 1)]
    pair = torch.stack([matrix.flatten() for matrix in matrices])
    correlation = torch.corrcoef(pair)[0, 1].item()
    assert abs(correlation) < 4 / pair.shape[1] ** 0.5


SEED_AND_NAME = st.tuples(st.integers(0, 2**32), st.text(max_size=20))


@settings(max_examples=50)
@given(SEED_AND_NAME, SEED_AND_NAME)
def test_a_generator_is_named_by_seed_and_name(one, other):
    same = generator(*one).initial_seed() == generator(*other).initial_seed()
    assert same == (one == other)
    assert generator(*one).initial_seed() == generator(*one).initial_seed()
