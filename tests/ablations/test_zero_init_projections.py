"""Zero-init projections: blocks start as the identity, and learn; the parametrization beneath stays in force."""

import math

import numpy as np
import pytest
import torch

from ablab.core.errors import UserError
from ablab.core.language.declare import params
from ablab.core.model.objective import token_losses
from ablab.core.model.plan import plan_of
from ablab.core.parts.parametrize import Standard
from ablab.core.runtime.runtime import Runtime
from ablab.core.store.record import Record
from ablab.core.train.banks import Optimizer
from ablab.core.train.run import run

CPU = Runtime(device="cpu", compile=False, log_every=1, evaluations=2)
ZERO = "zero_init_projections"
PROJECTIONS = {
    f"blocks.{layer}.{one}.weight"
    for layer in range(3)
    for one in ("attention.out", "ffn.inner.down")
}


def fp64(tensor):
    """The tensor as a numpy array, in fp64."""
    return tensor.detach().double().numpy()


def at_zero(model) -> set[str]:
    return {name for name, value in model.named_parameters() if not value.any()}


@pytest.mark.parametrize(
    "treatment", [[], ["relu2"], ["mup"], [{"gating": {"init": "normal"}}]]
)
def test_the_two_projections_of_every_block_start_at_zero_and_nothing_else_moves(
    tiny, build, treatment
):
    ours = build(tiny([*treatment, ZERO]))
    theirs = dict(build(tiny(treatment)).named_parameters())
    assert at_zero(ours) == PROJECTIONS
    for name, value in ours.named_parameters():
        if name not in PROJECTIONS:
            assert torch.equal(value, theirs[name]), name


def test_with_readout_the_first_loss_is_the_logarithm_of_the_vocabulary(tiny, build, batch):
    recipe = tiny([{ZERO: {"readout": True}}])
    model, block = build(recipe), batch(recipe)
    assert at_zero(model) == PROJECTIONS | {"readout.weight"}
    losses = token_losses(model(block[:, :-1]), block[:, 1:])
    assert (losses - math.log(64)).abs().max() < 1e-6


def test_at_the_start_the_stream_is_the_embedding(tiny, build, batch):
    """Logits by hand in fp64: readout * rms_norm(table[tokens])."""
    recipe = tiny([ZERO])
    model, tokens = build(recipe), batch(recipe)[:, :-1]
    assert torch.equal(model.trunk(tokens), model.embed(tokens))
    table, gain, readout = map(
        fp64, (model.embedding.table, model.norm.gain, model.readout.weight)
    )
    x = table[tokens.numpy()]
    power = (x**2).mean(-1, keepdims=True)
    expected = x / np.sqrt(power + 1e-6) * gain @ readout.T
    assert np.abs(fp64(model(tokens)) - expected).max() < 1e-5


def test_the_projections_get_the_first_gradient_and_all_others_the_second(tiny, build, batch):
    recipe = tiny([ZERO], optim__lr=0.01)
    model, block = build(recipe), batch(recipe)
    optimizer = Optimizer(model, recipe)
    of_blocks = {name for name, _ in model.named_parameters() if name.startswith("blocks.")}
    reached = []
    for t in (1, 2):
        token_losses(model(block[:, :-1]), block[:, 1:]).mean().backward()
        reached.append(with_gradient(model))
        optimizer.step(t)
    assert reached[0] & of_blocks == PROJECTIONS
    assert reached[1] >= of_blocks
    assert len(reached[1]) == len(list(model.parameters()))


def with_gradient(model) -> set[str]:
    return {name for name, value in model.named_parameters() if value.grad.any()}


# ---- the parametrization beneath ----


def scales(recipe, rule="adam"):
    declared = params(plan_of(recipe))
    return {
        name: recipe.parametrization.scales(name, one, recipe.model, rule)
        for name, one in declared
    }


MUP = {"mup": {"base_width": 16, "base_layers": 1, "depth": "complete", "alpha_out": 2.0}}


@pytest.mark.parametrize("treatment", [[], [MUP]])
def test_rates_decay_and_multipliers_are_those_of_the_parametrization_found(tiny, treatment):
    off, on = tiny(treatment), tiny([*treatment, ZERO])
    assert on.parametrization.base == off.parametrization
    ours, theirs = scales(on), scales(off)
    for name, one in theirs.items():
        assert ours[name].std == (0.0 if name in PROJECTIONS else one.std)
        assert (ours[name].lr, ours[name].decay) == (one.lr, one.decay)
    multipliers = [recipe.parametrization.multipliers(recipe.model) for recipe in (on, off)]
    assert multipliers[0] == multipliers[1]


def test_it_stands_before_mup_in_either_order(tiny):
    one, other = tiny([MUP, ZERO]), tiny([ZERO, MUP])
    assert one == other
    assert [one.parametrization.kind, one.parametrization.base.kind] == [ZERO, "mup"]


def test_a_base_of_its_own_would_push_mup_out_and_is_a_clash(tiny):
    given = {ZERO: {"base": {"kind": "standard", "gain": 0.5}}}
    assert tiny([given]).parametrization.base == Standard(gain=0.5)
    with pytest.raises(UserError, match=f"mup and {ZERO} both choose parametrization"):
        tiny([MUP, given])


def test_readout_is_refused_where_the_head_is_tied(tiny):
    with pytest.raises(UserError, match=f"{ZERO}.readout=true has no readout to act on"):
        tiny([{ZERO: {"readout": True}}], model__tied=True)


# ---- alive ----


def test_a_run_from_zero_learns_the_frequencies(tiny, token_folder, tmp_path):
    recipe = tiny([{ZERO: {"readout": True}}], budget__tokens=60 * 64, optim__lr=0.01)
    record = Record(tmp_path)
    run(recipe, CPU, token_folder, record)
    losses = [line["train/loss"] for line in record.metrics()]
    assert abs(losses[0] - math.log(64)) < 1e-5
    assert sum(losses[-10:]) / 10 < 3.7


def test_no_kernel_steps_aside_for_it(tiny, refusals):
    served = {"model__width": 64, "model__attention__head_dim": 32}
    recipe = tiny([ZERO], **served)
    assert not refusals(recipe, "bf16")
