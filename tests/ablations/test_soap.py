"""SOAP: Adam in an eigenbasis that follows Shampoo's preconditioners, against the paper's algorithm in fp64."""

import numpy as np
import pytest
import torch

from ablab.core.errors import UserError
from ablab.core.fusion.places import flaw
from ablab.core.language.declare import Param
from ablab.core.runtime.runtime import Runtime
from ablab.core.store.record import Record
from ablab.core.train.banks import Optimizer
from ablab.core.train.run import run

CPU = Runtime(device="cpu", compile=False, log_every=1, evaluations=2)
# No decay, learning rate 1.
BARE = {
    "optim__chains__hidden__steps": ["adam"],
    "optim__lr": 1.0,
    "schedule": "constant",
    "optim__clip": None,
}
DOSE = {"beta1": 0.9, "beta2": 0.8, "shampoo_beta": 0.7, "eps": 0.05, "frequency": 4}


def gradients(rows, columns, count, seed=0):
    """Rows and columns of uneven strength, mixed, with a part that stays: eigenvalues lie well apart."""
    draw = np.random.default_rng(seed)
    left, _ = np.linalg.qr(draw.normal(size=(rows, rows)))
    right, _ = np.linalg.qr(draw.normal(size=(columns, columns)))
    strength = np.logspace(0, -1, rows)[:, None] * np.logspace(0, -1, columns)
    steady = draw.normal(size=(rows, columns))
    noise = draw.normal(size=(count, rows, columns))
    mixed = left @ (strength * (noise + steady)) @ right
    return torch.from_numpy(mixed).float()


def driven(tiny, drive, pieces, dose=DOSE, **declared):
    """The update of each step [T,r,c], in fp64, and the optimizer."""
    recipe = tiny([{"soap": dose}], **BARE)
    shape = tuple(pieces.shape[1:])
    start = {"w": (Param(shape, "hidden", **declared), torch.zeros(shape))}
    seen, optimizer = drive(recipe, start, [{"w": one} for one in pieces])
    weights = torch.stack([one["w"] for one in seen]).double().numpy()
    return weights[:-1] - weights[1:], optimizer


def state_of(optimizer):
    return {
        name: value.double().numpy() for name, value in optimizer.banks[0].state["soap"].items()
    }


class Transcribed:
    """Algorithm 3 of arXiv:2409.11321, the mean in the weights' own space; the first step only measures.

    As the authors' soap.py: bias corrections outside eps, and the axes of V follow the columns of the bases.
    """

    def __init__(self, rows, columns, first_bases=None):
        self.mean = np.zeros((rows, columns))
        self.square = np.zeros((rows, columns))
        self.left = np.zeros((rows, rows))
        self.right = np.zeros((columns, columns))
        self.bases = first_bases
        self.moves = -1

    def step(self, g):
        self.moves += 1
        update = self.direction(g) if self.moves else np.zeros_like(g)
        b = DOSE["shampoo_beta"]
        self.left = b * self.left + (1 - b) * g @ g.T
        self.right = b * self.right + (1 - b) * g.T @ g
        if self.moves == 0:
            own = [np.linalg.eigh(one)[1][:, ::-1] for one in (self.left, self.right)]
            self.bases = self.bases or own
        elif self.moves % DOSE["frequency"] == 0:
            self.follow()
        return update

    def direction(self, g):
        b1, b2 = DOSE["beta1"], DOSE["beta2"]
        q_left, q_right = self.bases
        self.mean = b1 * self.mean + (1 - b1) * g
        self.square = b2 * self.square + (1 - b2) * (q_left.T @ g @ q_right) ** 2
        turned = q_left.T @ self.mean @ q_right / (np.sqrt(self.square) + DOSE["eps"])
        unbias = np.sqrt(1 - b2**self.moves) / (1 - b1**self.moves)
        return unbias * q_left @ turned @ q_right.T

    def follow(self):
        orders, bases = [], []
        for basis, preconditioner in zip(self.bases, (self.left, self.right), strict=True):
            order = np.argsort(-np.diag(basis.T @ preconditioner @ basis))
            orders.append(order)
            bases.append(np.linalg.qr(preconditioner @ basis[:, order])[0])
        self.square = self.square[np.ix_(*orders)]
        self.bases = bases


@pytest.mark.parametrize("shape", [(8, 8), (6, 10), (12, 5)])
def test_soap_equals_an_fp64_transcription_of_the_algorithm_for_25_steps(tiny, drive, shape):
    """Where a matrix is not square, the first gradient leaves a null space, any basis of which is right: ours is taken.

    Measured: 2e-5 apart at first, 3e-6 after six bases, of updates of about 1.
    """
    pieces = gradients(*shape, 25)
    updates, _ = driven(tiny, drive, pieces)
    _, after_one = driven(tiny, drive, pieces[:1])
    first = None if shape[0] == shape[1] else bases_of(after_one)
    by_hand = Transcribed(*shape, first)
    for t, gradient in enumerate(pieces.double().numpy()):
        expected = by_hand.step(gradient)
        assert np.abs(updates[t] - expected).max() < 1e-4, t


def bases_of(optimizer):
    state = state_of(optimizer)
    return [state["left_basis0"][0], state["right_basis0"][0]]


@pytest.mark.parametrize("shape", [(8, 8), (6, 10)])
def test_the_first_step_only_measures_and_leaves_eigenvectors_in_falling_order(
    tiny, drive, shape
):
    pieces = gradients(*shape, 1)
    updates, optimizer = driven(tiny, drive, pieces)
    assert not updates.any()
    state, g = state_of(optimizer), pieces[0].double().numpy()
    for side, gram in (("left", g @ g.T), ("right", g.T @ g)):
        basis = state[f"{side}_basis0"][0]
        assert np.abs(basis.T @ basis - np.eye(len(basis))).max() < 1e-6
        turned = basis.T @ gram @ basis
        assert np.abs(turned - np.diag(np.sort(np.linalg.eigvalsh(gram))[::-1])).max() < 1e-5
        assert np.abs(state[f"{side}0"][0] - 0.3 * gram).max() < 1e-6


def test_bases_stay_orthogonal_and_both_moments_follow_them(tiny, drive):
    """What the mean was in the weights' own space, it is behind a new basis: a running mean of gradients."""
    pieces = gradients(8, 8, 9)
    _, optimizer = driven(tiny, drive, pieces)
    state = state_of(optimizer)
    left, right = bases_of(optimizer)
    mean = np.zeros((8, 8))
    for gradient in pieces[1:].double().numpy():
        mean = 0.9 * mean + 0.1 * gradient
    assert np.abs(left @ state["mean0"][0] @ right.T - mean).max() < 1e-6
    assert np.abs(left.T @ left - np.eye(8)).max() < 1e-6
    assert (state["square0"] >= 0).all()


def test_turning_rows_and_columns_turns_the_update(tiny, drive):
    """U (SOAP of G) V = SOAP of U G V, which Adam has not."""
    pieces = gradients(8, 8, 12)
    draw = torch.Generator().manual_seed(3)
    u, v = (torch.linalg.qr(torch.randn(8, 8, generator=draw))[0] for _ in range(2))
    plain, _ = driven(tiny, drive, pieces)
    turned, _ = driven(tiny, drive, u @ pieces @ v)
    expected = u.double().numpy() @ plain @ v.double().numpy()
    assert np.abs(plain[1:]).max() > 0.5
    assert np.abs(turned - expected).max() < 1e-4


def test_on_diagonal_gradients_it_is_adam_a_step_late(tiny, drive):
    """Their eigenvectors are the axes, in falling order, so nothing is turned."""
    size = torch.linspace(0.5, 2.0, 6)
    pieces = torch.stack([torch.diag(size * (1 + 0.3 * np.cos(t))) for t in range(10)])
    updates, _ = driven(tiny, drive, pieces)
    mean = np.zeros((6, 6))
    square = np.zeros((6, 6))
    for t, g in enumerate(pieces[1:].double().numpy(), 1):
        mean = 0.9 * mean + 0.1 * g
        square = 0.8 * square + 0.2 * g**2
        unbias = np.sqrt(1 - 0.8**t) / (1 - 0.9**t)
        adam = unbias * mean / (np.sqrt(square) + 0.05)
        assert np.abs(updates[t] - adam).max() < 1e-4, t


@pytest.mark.parametrize("blocks", [(8, 4, 4), (8, 8)])
def test_fused_matrices_move_as_they_would_apart(tiny, drive, blocks):
    pieces = gradients(16, 6, 10)
    together, _ = driven(tiny, drive, pieces, blocks=blocks)
    apart = [driven(tiny, drive, one)[0] for one in pieces.split(blocks, dim=1)]
    assert np.abs(together - np.concatenate(apart, axis=1)).max() < 1e-5
    joint, _ = driven(tiny, drive, pieces, {**DOSE, "split": "joint"}, blocks=blocks)
    assert np.abs(together - joint).max() > 0.05


def test_each_matrix_of_a_bank_has_its_own_preconditioners(tiny, build):
    recipe = tiny(["soap"], model__attention__group=2)
    banks = {
        bank.names[0].split(".", 2)[-1]: bank for bank in Optimizer(build(recipe), recipe).banks
    }
    qkv = banks["attention.qkv.weight"].state["soap"]
    assert [tuple(qkv[f"left{i}"].shape) for i in range(3)] == [
        (3, 32, 32),
        (3, 16, 16),
        (3, 16, 16),
    ]
    gate_up = banks["ffn.inner.gate_up.weight"].state["soap"]
    assert tuple(gate_up["left0"].shape) == (6, 64, 64)
    assert tuple(gate_up["right_basis0"].shape) == (6, 32, 32)


def test_a_silent_matrix_stays_where_it_is(tiny, drive):
    """No gradient at all: 0 / eps, eigenvectors of 0 and a power iteration of 0 are all finite."""
    updates, optimizer = driven(tiny, drive, torch.zeros(12, 4, 6))
    assert not updates.any()
    assert all(np.isfinite(value).all() for value in state_of(optimizer).values())


def test_a_matrix_that_wakes_after_the_first_step_moves(tiny, drive):
    """Behind projections that start at zero, the first gradient is 0."""
    pieces = gradients(8, 8, 12)
    pieces[0] = 0
    updates, _ = driven(tiny, drive, pieces)
    assert np.isfinite(updates).all()
    assert all(0.05 < np.abs(update).max() < 20 for update in updates[1:])


# ---- in its place ----


def test_it_stands_where_adam_stood_and_keeps_the_decay(tiny):
    chains = tiny(["soap"]).optim.chains
    assert [step.kind for step in chains["hidden"].steps] == ["soap", "decay"]
    assert all(
        [step.kind for step in chains[role].steps] == ["adam"]
        for role in chains
        if role != "hidden"
    )


def test_under_mup_its_rate_falls_as_adams(tiny, build):
    mup = {"mup": {"base_width": 16}}
    ours, adams = (
        {
            name: bank.lr.item()
            for bank in Optimizer(build(recipe), recipe).banks
            for name in bank.names
        }
        for recipe in (tiny(["soap", mup]), tiny([mup]))
    )
    assert ours == adams
    assert ours["blocks.0.ffn.inner.down.weight"] == 0.5


def test_beside_muon_it_is_refused(tiny):
    with pytest.raises(UserError, match="soap and muon exclude each other"):
        tiny(["soap", "muon"])


def test_the_optimizer_kernel_steps_aside_and_no_other(tiny):
    served = {"model__width": 64, "model__attention__head_dim": 32}
    recipe = tiny(["soap"], **served)
    said = "the chain of hidden is soap, decay, which the kernel does not know"
    assert flaw("optimizer", recipe, "bf16") == said
    assert {flaw(place, recipe, "bf16") for place in ("attention", "ffn", "loss")} == {""}


def test_a_run_learns_the_frequencies_and_differs_from_adams(tiny, token_folder, tmp_path):
    losses = {}
    for name in ("soap", "adam"):
        recipe = tiny([name] if name == "soap" else [], budget__tokens=60 * 64, optim__lr=0.01)
        record = Record(tmp_path / name)
        run(recipe, CPU, token_folder, record)
        losses[name] = [line["train/loss"] for line in record.metrics()]
    assert sum(losses["soap"][-10:]) / 10 < 3.7
    assert losses["soap"][0] == losses["adam"][0]  # the first step is taken behind the loss
    assert losses["soap"][5:] != losses["adam"][5:]
