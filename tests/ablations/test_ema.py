"""Weight averages against their closed forms in fp64, by step number, and what a run reports of them."""

import numpy as np
import pytest
import torch

from ablab.ablations.interventions.ema import EMA
from ablab.core.runtime.runtime import Runtime
from ablab.core.train.trainer import Trainer

CPU = Runtime(device="cpu", compile=False)


def fp64(tensor):
    """The tensor as a numpy array, in fp64."""
    return tensor.detach().double().numpy()


def apart(ours, theirs):
    """The largest difference."""
    return abs(ours - theirs).max()


def averaged(ema: EMA, sequence, begin=None) -> list[np.ndarray]:
    """Feed W_1, W_2, ... (each a list of tensors); the averages after every step."""
    state = ema.begin(begin or [torch.zeros_like(w) for w in sequence[0]])
    seen = []
    for t, weights in enumerate(sequence, 1):
        ema.advance(state, weights, t, len(sequence))
        seen.append(np.concatenate([fp64(a).ravel() for a in state.values()]))
    return seen


def walk(steps, seed=0):
    """Two banks of weights on a random walk."""
    draw = np.random.default_rng(seed).standard_normal((steps, 10)).cumsum(0)
    return [
        [
            torch.tensor(w[:6], dtype=torch.float32).view(2, 3),
            torch.tensor(w[6:], dtype=torch.float32),
        ]
        for w in draw
    ], draw


def shares(ema: EMA, steps: int) -> np.ndarray:
    """How much each of W_1..W_T weighs in the last average: fed with unit vectors."""
    return averaged(ema, [[torch.eye(steps)[t]] for t in range(steps)])[-1]


# ---- post-hoc ----


def test_posthoc_weights_are_the_closed_form_with_0134_on_the_oldest():
    """K = 10, beta = 0.8: beta^9 = 0.134 on the first snapshot, 0.2 * 0.8^(10-j) on the j-th; none on any between."""
    found = shares(EMA("posthoc", checkpoints=10, beta=0.8, span=0.2), 100)
    expected = np.zeros(100)
    for j, t in enumerate(range(82, 101, 2), 1):
        expected[t - 1] = 0.8**9 if j == 1 else 0.2 * 0.8 ** (10 - j)
    assert apart(found, expected) < 1e-6
    assert abs(found.sum() - 1) < 1e-6
    assert round(found[81], 3) == 0.134


@pytest.mark.parametrize(
    ("checkpoints", "beta", "oldest"),
    [
        (6, 0.8, 0.328),
        (2, 0.5, 0.5),
        (1, 0.8, 1.0),
    ],
)
def test_fewer_snapshots_leave_more_on_the_oldest(checkpoints, beta, oldest):
    found = shares(EMA("posthoc", checkpoints=checkpoints, beta=beta, span=0.3), 60)
    assert round(found[found > 0][0], 3) == oldest
    assert (found > 0).sum() == checkpoints


def test_bias_corrected_weights_are_geometric():
    """(1 - beta) beta^(K-j) / (1 - beta^K)."""
    found = shares(EMA("posthoc", checkpoints=10, beta=0.8, span=0.2, bias_corrected=True), 100)
    expected = 0.2 * 0.8 ** np.arange(9, -1, -1) / (1 - 0.8**10)
    assert apart(found[81::2], expected) < 1e-6
    assert not found[:81].any()
    assert not found[82::2].any()


@pytest.mark.parametrize(
    ("steps", "checkpoints", "span"),
    [
        (100, 10, 0.2),
        (1000, 10, 0.2),
        (37, 5, 0.5),
        (12, 10, 0.2),
        (5, 3, 1.0),
    ],
)
def test_snapshots_are_evenly_spaced_steps_that_end_at_the_last(steps, checkpoints, span):
    """By step number: 98, 99, 100 in this order, not 100, 98, 99.  A short run has fewer of them."""
    found = EMA("posthoc", checkpoints=checkpoints, span=span).snapshots(steps)
    assert found == sorted(set(found))
    assert found[-1] == steps
    assert found[0] >= 1
    assert len(found) <= checkpoints
    spacing = span * steps / checkpoints
    if spacing >= 1:
        assert len(found) == checkpoints
        assert apart(np.diff(found), spacing) < 1
        assert found[0] >= steps * (1 - span)


def test_before_the_first_snapshot_the_average_is_the_weights_themselves():
    sequence, raw = walk(100)
    seen = averaged(EMA("posthoc", span=0.2), sequence)
    assert all(apart(seen[t], raw[t]) < 1e-6 for t in range(82))
    assert apart(seen[85], raw[85]) > 0.1


# ---- online ----


@pytest.mark.parametrize(
    ("horizon", "start"),
    [
        (5, 0.0),
        (5, 0.4),
        (50, 0.0),
        (1, 0.0),
    ],
)
def test_online_is_the_plain_mean_until_the_horizon_and_exponential_after(horizon, start):
    """Shares in closed form: (1 - 1/h)^(T-h) / h for each of the first h, 1/h (1 - 1/h)^(T-t) for later ones."""
    steps = 30
    first = round(30 * start)
    found = shares(EMA("online", horizon=horizon, start=start), steps)
    expected = np.zeros(steps)
    length = steps - first
    full = min(horizon, length)
    expected[first : first + full] = (1 - 1 / horizon) ** max(length - horizon, 0) / full
    for j in range(full, length):
        expected[first + j] = (1 - 1 / horizon) ** (length - 1 - j) / horizon
    assert abs(expected.sum() - 1) < 1e-12
    assert apart(found, expected) < 1e-6


def test_online_follows_the_weights_until_its_start():
    sequence, raw = walk(30)
    seen = averaged(EMA("online", horizon=10, start=0.5), sequence)
    assert all(apart(seen[t], raw[t]) < 1e-6 for t in range(16))
    assert apart(seen[17], raw[17]) > 0.05


# ---- both ----

KINDS = [
    EMA("online", horizon=7),
    EMA("online", horizon=3, start=0.3),
    EMA("posthoc"),
    EMA("posthoc", bias_corrected=True, span=0.9),
]


@pytest.mark.parametrize("ema", KINDS)
def test_every_bank_is_averaged_by_the_same_shares(ema):
    sequence, raw = walk(40)
    assert apart(averaged(ema, sequence)[-1], shares(ema, 40) @ raw) < 1e-5


@pytest.mark.parametrize("ema", KINDS)
def test_constant_weights_are_a_fixed_point(ema):
    constant = [torch.tensor([1.25, -3.0, 1e-7])]
    for begin in (None, [torch.full((3,), 9.0)]):  # wherever it started
        assert all(
            apart(a, fp64(constant[0])) < 1e-12 for a in averaged(ema, [constant] * 40, begin)
        )


@pytest.mark.parametrize(
    "ema",
    [
        EMA("posthoc", beta=0.0),
        EMA("posthoc", beta=0.0, bias_corrected=True),
        EMA("online", horizon=1),
    ],
)
def test_no_memory_gives_the_last_weights(ema):
    sequence, raw = walk(40)
    assert apart(averaged(ema, sequence)[-1], raw[-1]) < 1e-6


@pytest.mark.parametrize("mix", [0.0, 0.6, 1.0])
def test_the_readout_mixes_weights_and_average_and_changes_neither(mix):
    """modded-nanogpt: 0.4 W + 0.6 average."""
    ema = EMA(mix=mix)
    weights = [torch.tensor([1.0, 2.0])]
    state = ema.begin([torch.tensor([5.0, -2.0])])
    out = ema.readout(state, weights)
    expected = (1 - mix) * np.array([1.0, 2.0]) + mix * np.array([5.0, -2.0])
    assert apart(fp64(out[0]), expected) < 1e-6
    assert weights[0].tolist() == [1, 2]
    assert state["average0"].tolist() == [5, -2]


def test_the_average_is_a_copy_of_its_own():
    weights = [torch.zeros(3)]
    state = EMA().begin(weights)
    weights[0] += 1
    assert not state["average0"].any()


# ---- in a run ----


@pytest.mark.parametrize(
    "dose",
    [
        {"horizon": 4},
        {"mode": "posthoc", "checkpoints": 3, "span": 0.5},
        {"mode": "posthoc", "beta": 0.0},
    ],
)
def test_the_average_of_a_run_is_the_shares_of_its_weights(tiny, token_folder, dose):
    """fp64 sum over the weights of every step; fp32 states whatever the activations."""
    trainer = Trainer(tiny([{"ema": dose}], optim__lr=0.02), CPU, token_folder)
    history = []
    for _ in range(12):
        trainer.advance()
        history.append([weight.double().clone() for weight in trainer.training_step.weights])
    (part, state), weights = trainer.training_step.after[0], shares(EMA(**dose), 12)
    for i, average in enumerate(part.readout(state, trainer.training_step.weights)):
        expected = sum(share * one[i] for share, one in zip(weights, history, strict=True))
        assert average.dtype == torch.float32
        assert apart(average, expected) < 1e-6
    moved = max(
        apart(one, other).item()
        for one, other in zip(
            part.readout(state, trainer.training_step.weights),
            trainer.training_step.weights,
            strict=True,
        )
    )
    assert (moved > 1e-3) == (dose.get("beta") != 0.0)


def test_held_out_metrics_are_those_of_a_model_that_holds_the_average(
    tiny, build, token_folder
):
    from ablab.core.model.objective import heads_of, of_rows
    from ablab.core.train.evaluate import held_out_loss

    trainer = Trainer(tiny([{"ema": {"horizon": 6}}], optim__lr=0.02), CPU, token_folder)
    for _ in range(12):
        trainer.advance()
    scores = trainer.evaluate()
    model = build(trainer.recipe)
    (part, state) = trainer.training_step.after[0]
    for bank, average in zip(
        trainer.optimizer.banks, part.readout(state, trainer.training_step.weights), strict=True
    ):
        for name, value in zip(bank.names, average, strict=True):
            model.get_parameter(name).data.copy_(value)
    expected, losses = held_out_loss(
        of_rows(model, heads_of(model)[1]), trainer.tokens, 4, torch.device("cpu")
    )
    assert scores["val/loss"] == pytest.approx(expected["loss"], abs=1e-9)
    assert scores["val/bits_per_byte"] == pytest.approx(expected["bits_per_byte"], abs=1e-9)
    assert abs(scores["raw/val/loss"] - scores["val/loss"]) > 1e-4
    kept = trainer.held_out().nats  # those of the average
    assert np.allclose(kept, losses.numpy(), rtol=2e-3)
    assert abs(kept.mean(dtype=float) - scores["val/loss"]) < 1e-3
