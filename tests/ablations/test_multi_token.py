"""Multi-token prediction: what is descended hears of later tokens, what is reported and decoded never does."""

import math

import numpy as np
import pytest
import torch

from ablab.core.errors import UserError
from ablab.core.fusion.places import flaw
from ablab.core.model.cost import cost_of
from ablab.core.model.objective import heads_of, of_rows
from ablab.core.model.plan import plan_of
from ablab.core.runtime.runtime import Runtime
from ablab.core.train.trainer import Trainer

CPU = Runtime(device="cpu")
CAP = 2.0
MORE = {  # what stands between the readout's matrix and the nats -> its treatment and its formula
    "nothing": ([], lambda logits: logits),
    "a cap": ([{"soft_cap": {"cap": CAP}}], lambda logits: CAP * np.tanh(logits / CAP)),
    "a factor": (
        [{"mup": {"base_width": 16, "readout": "multiplier"}}],
        lambda logits: logits / 2,
    ),
}


def ahead(count=1, **dose):
    return [{"multi_token": {"ahead": count, **dose}}]


def fp64(tensor) -> np.ndarray:
    return tensor.detach().double().numpy()


def descended(model, block):
    """Rows of tokens, int [B,T+1] -> the loss of a step and the cross-entropy that it reports, sums in nats."""
    descend, _ = heads_of(model)
    return of_rows(model, descend)(block)


def added(model, block) -> float:
    """What is descended besides the cross-entropy."""
    loss, reported = descended(model, block)
    return (loss - reported).item()


def projections(model) -> list[torch.Tensor]:
    return [value for name, value in model.named_parameters() if "project_" in name]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("more", MORE)
@pytest.mark.parametrize("count", [1, 3])
def test_it_adds_the_mean_cross_entropy_of_each_later_token_in_fp64(
    tiny, build, batch, count, more, tied
):
    treatment, between = MORE[more]
    if tied and more == "a factor":
        pytest.skip("a tied head takes its multiplier from mup alone")
    recipe = tiny([*ahead(count, weight=0.7), *treatment], model__tied=tied)
    model = build(recipe, stirred=0.1)
    block = batch(recipe)
    features = fp64(model.features(block[:, :-1]))
    readout = fp64(model.embedding.table if tied else model.readout.weight)
    expected = 0.0
    for k, weight in enumerate(projections(model), 1):
        projected = features[:, : 16 - k] @ fp64(weight).T
        z = between(projected @ readout.T)
        targets = block[:, 1 + k :, None].numpy()
        chosen = np.take_along_axis(z, targets, axis=-1)
        expected += np.log(np.exp(z).sum(-1)).sum() - chosen.sum()
    assert len(projections(model)) == count
    assert abs(added(model, block) / (0.7 * expected / count) - 1) < 1e-4


def test_with_projections_of_zero_each_position_that_has_a_target_costs_log_v(
    tiny, build, batch
):
    """15 + 14 + 13 of 16 positions in each of 4 rows."""
    recipe = tiny(ahead(3, weight=0.6))
    model = build(recipe)
    for weight in projections(model):
        weight.data.zero_()
    expected = 0.6 / 3 * 4 * (15 + 14 + 13) * math.log(64)
    assert abs(added(model, batch(recipe)) / expected - 1) < 1e-5


def test_rows_add_up_so_that_micro_batches_do_not_show(tiny, build, batch):
    recipe = tiny(ahead(2))
    model = build(recipe, stirred=0.1)
    block = batch(recipe)
    parts = sum(added(model, rows) for rows in block.split(1))
    assert abs(added(model, block) / parts - 1) < 1e-5


def test_the_report_and_the_logits_are_the_baselines_bit_for_bit(tiny, build, batch):
    plain, more = build(tiny()), build(tiny(ahead(2, weight=5.0)))
    block = batch(tiny())
    _, expected = descended(plain, block)
    loss, reported = descended(more, block)
    assert torch.equal(reported, expected)
    assert loss > 4 * reported
    tokens = block[:, :-1]
    assert torch.equal(plain(tokens), more(tokens))
    assert torch.equal(plain.extend(tokens, None)[0], more.extend(tokens, None)[0])


def test_evaluation_never_runs_it(tiny, token_folder, monkeypatch):
    trainer = Trainer(tiny(ahead()), CPU, token_folder)
    monkeypatch.setattr(trainer.model.objective["multi_token"], "function", pytest.fail)
    assert 3 < trainer.evaluate()["val/loss"] < 6


def gradients(model, block) -> dict[str, torch.Tensor]:
    descended(model, block)[0].backward()
    return {name: value.grad for name, value in model.named_parameters()}


def test_every_parameter_has_a_gradient_and_each_k_its_own(tiny, build, batch):
    recipe = tiny(ahead(3))
    found = gradients(build(recipe), batch(recipe))
    assert all(value.abs().max() > 0 for value in found.values())
    own = [value for name, value in found.items() if "project_" in name]
    assert len(own) == 3
    assert not torch.equal(own[0], own[1])


def test_trunk_and_readout_feel_it_in_proportion_to_the_weight(tiny, build, batch):
    """At weight 0 they have the baseline's gradient; the gradient is linear in the weight."""
    block = batch(tiny())
    plain = gradients(build(tiny()), block)
    none, half, whole = (
        gradients(build(tiny(ahead(weight=weight))), block) for weight in (0.0, 0.5, 1.0)
    )
    for name, value in plain.items():
        torch.testing.assert_close(none[name], value, rtol=1e-5, atol=1e-6, msg=name)
        slope = whole[name] - none[name]
        assert slope.abs().max() > 1e-3 * value.abs().max()
        torch.testing.assert_close(half[name] - none[name], slope / 2, rtol=1e-3, atol=1e-4)


def test_one_more_token_ahead_leaves_the_first_projections_start_alone(tiny, build):
    one, two = (projections(build(tiny(ahead(count)))) for count in (1, 2))
    assert torch.equal(one[0], two[0])
    assert not torch.equal(two[0], two[1])
    assert one[0].declared.role == "hidden"


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("count", [1, 3])
def test_each_k_costs_a_matrix_and_one_more_readout(tiny, count, tied):
    off = cost_of(tiny(model__tied=tied))
    on = cost_of(tiny(ahead(count), model__tied=tied))
    assert on.parameters - off.parameters == count * 32 * 32
    assert on.flops_per_token - off.flops_per_token == 6 * count * (32 * 32 + 64 * 32)


def test_the_head_kernel_steps_aside_and_says_so(tiny):
    """The others serve."""
    recipe = tiny(ahead(), model__width=64, model__attention__head_dim=32)
    said = flaw("loss", recipe, "fp32")
    assert said == "objective holds multi_token, which the kernel does not know"
    assert flaw("attention", recipe, "fp32") == flaw("ffn", recipe, "fp32") == ""


def test_more_tokens_ahead_than_a_row_has_are_refused(tiny):
    assert plan_of(tiny(ahead(15)))
    with pytest.raises(UserError, match=r"multi_token.ahead=16 has no target .* at most 15"):
        plan_of(tiny(ahead(16)))


def test_a_row_shorter_than_the_way_ahead_adds_nothing(tiny, build, batch):
    """Where the shape of the data cuts rows, as `data.shape` may."""
    recipe = tiny(ahead(5))
    model = build(recipe)
    block = batch(recipe)
    assert added(model, block[:, :2]) == 0.0
    assert added(model, block[:, :3]) > 0.0


@pytest.mark.parametrize(
    ("dose", "value"), [("ahead", 0), ("weight", -0.1), ("weight", float("inf"))]
)
def test_no_token_ahead_and_a_negative_or_infinite_weight_are_refused(tiny, dose, value):
    with pytest.raises(UserError, match=f"multi_token.{dose}"):
        tiny([{"multi_token": {dose: value}}])


def test_a_run_learns_both_the_next_token_and_the_one_after(tiny, token_folder):
    recipe = tiny(ahead(), budget__tokens=40 * 64, optim__lr=0.01)
    trainer = Trainer(recipe, CPU, token_folder)
    block = trainer.tokens.rows(0, 0, 4)
    before = trainer.evaluate()["val/loss"], added(trainer.model, block)
    for _ in range(40):
        assert trainer.advance().isfinite()
    assert trainer.evaluate()["val/loss"] < before[0] - 0.3
    assert added(trainer.model, block) < 0.9 * before[1]
