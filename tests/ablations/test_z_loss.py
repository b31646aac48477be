"""z-loss: it moves the weights and never the number that is reported."""

import math

import pytest
import torch

from ablab.core.model.objective import losses
from ablab.core.runtime.runtime import Runtime
from ablab.core.train.trainer import Trainer

CPU = Runtime(device="cpu", compile=False)


def descend(model, logits, targets):
    """(loss to descend, cross-entropy to report) of given logits; z-loss reads nothing else."""
    return losses(logits, logits, targets, model.logits, model.objective.values())


def weighted(weight):
    return [{"z_loss": {"weight": weight}}]


def trainers(tiny, folder, *weights, **paths):
    return [
        Trainer(tiny(weighted(w) if w is not None else [], **paths), CPU, folder)
        for w in weights
    ]


def test_the_default_weight_is_palms(tiny):
    assert [part.weight for part in tiny(["z_loss"]).objective] == [1e-4]
    assert tiny().objective == ()


def test_the_penalty_is_the_weighted_mean_square_of_the_log_normaliser(tiny, build, batch):
    recipe = tiny(weighted(0.25))
    model = build(recipe)
    block = batch(recipe)
    logits = model(block[:, :-1]).detach()
    loss, nats = descend(model, logits, block[:, 1:])
    expected = 0.25 * sum(
        math.log(sum(math.exp(z) for z in row)) ** 2
        for row in logits.double().flatten(0, 1).tolist()
    )
    assert abs((loss - nats).item() / expected - 1) < 1e-5


def test_the_gradient_agrees_with_autograd_in_fp64(tiny, build, batch):
    recipe = tiny(weighted(0.3))
    model = build(recipe, stirred=0.2)
    block = batch(recipe)
    logits = model(block[:, :-1]).detach()
    targets = block[:, 1:]
    fp32 = logits.clone().requires_grad_()
    fp64 = logits.double().requires_grad_()
    descend(model, fp32, targets)[0].backward()
    lse = fp64.logsumexp(-1)
    (lse - fp64.gather(-1, targets[..., None])[..., 0] + 0.3 * lse * lse).sum().backward()
    assert (fp32.grad - fp64.grad).abs().max() < 1e-6 * max(1, fp64.grad.abs().max())


def test_weight_zero_is_the_baseline_bit_for_bit(tiny, token_folder):
    plain, zero = trainers(tiny, token_folder, None, 0.0)
    for _ in range(6):
        assert torch.equal(plain.advance(), zero.advance())
    assert plain.digest() == zero.digest()


def test_the_first_reported_loss_is_that_of_the_baseline_whatever_the_weight(
    tiny, token_folder
):
    """The forward of step 1 is shared; only the descent differs."""
    runs = trainers(tiny, token_folder, None, 1e-4, 10.0)
    norms = [trainer.advance().item() for trainer in runs]
    assert len({trainer.close_window() for trainer in runs}) == 1
    assert norms[2] > 3 * norms[0]
    assert abs(norms[1] / norms[0] - 1) < 0.01
    scores = [trainer.evaluate() for trainer in runs]
    assert len({trainer.digest() for trainer in runs}) == 3
    assert all(4 < score["val/loss"] < 5 for score in scores)


def test_the_gradient_is_linear_in_the_weight(tiny, token_folder):
    """A weight that is read nowhere, or a hard-coded one, has no slope."""
    grads = []
    for trainer in trainers(tiny, token_folder, 0.0, 0.5, 1.0):
        block = trainer.tokens.rows(0, 0, 4)
        trainer.training_step.loss(block)[0].backward()
        grads.append(torch.cat([value.grad.flatten() for value in trainer.model.parameters()]))
    slope = grads[2] - grads[0]
    assert slope.abs().max() > 1e-2 * grads[0].abs().max()
    torch.testing.assert_close(
        grads[1] - grads[0], slope / 2, rtol=0, atol=1e-5 * grads[2].abs().max().item()
    )


def test_a_heavy_weight_pulls_the_normaliser_to_one(tiny, token_folder):
    """log Z starts near log 64 = 4.2."""
    plain, heavy = trainers(
        tiny, token_folder, None, 1.0, budget__tokens=40 * 64, optim__lr=0.01
    )
    for _ in range(40):
        plain.advance(), heavy.advance()
    block = plain.tokens.rows(50, 0, 4)[:, :-1]
    sizes = [
        trainer.model(block).logsumexp(-1).abs().mean().item() for trainer in (plain, heavy)
    ]
    assert sizes[1] < 0.5 * sizes[0]


@pytest.mark.parametrize("weight", [-1e-4, float("inf")])
def test_a_negative_or_infinite_weight_is_refused(tiny, weight):
    from ablab.core.errors import UserError

    with pytest.raises(UserError, match="z_loss.weight"):
        tiny(weighted(weight))
