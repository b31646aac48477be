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
DOSE = {
    "beta1": 0.9,
    "beta2": 0.8,
    "shampoo_beta": 0.7,
    "eps": 0.05,
    "frequency": 4,
}


def gradients(rows, columns, count):
    """fp32 [count, rows, columns]: a part that stays and noise, mixed so that eigenvalues lie well apart."""
    draw = np.random.default_rng(0)
    left = orthogonal(rows, draw)
    right = orthogonal(columns, draw)
    strong_rows = np.logspace(0, -1, rows)
    strong_columns = np.logspace(0, -1, columns)
    steady = draw.normal(size=(rows, columns))
    noise = draw.normal(size=(count, rows, columns))
    uneven = (noise + steady) * np.outer(strong_rows, strong_columns)
    return torch.from_numpy(left @ uneven @ right).float()


def orthogonal(size, draw):
    matrix, _ = np.linalg.qr(draw.normal(size=(size, size)))
    return matrix


def fp64(tensor):
    """The tensor as a numpy array, in fp64."""
    return tensor.detach().double().numpy()


def furthest(one, other):
    return np.abs(one - other).max()


def driven(tiny, drive, pieces, dose=DOSE, **declared):
    """The update of each step, fp64 [T,r,c], and the state behind the last."""
    recipe = tiny([{"soap": dose}], **BARE)
    shape = tuple(pieces.shape[1:])
    start = {"w": (Param(shape, "hidden", **declared), torch.zeros(shape))}
    moves = [{"w": one} for one in pieces]
    seen, optimizer = drive(recipe, start, moves)
    weights = np.stack([fp64(one["w"]) for one in seen])
    kept = optimizer.banks[0].state["soap"]
    state = {name: fp64(value) for name, value in kept.items()}
    return weights[:-1] - weights[1:], state


def bases_of(state):
    return state["left_basis0"][0], state["right_basis0"][0]


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
        if self.bases is None:
            self.bases = eigenvectors(self.left), eigenvectors(self.right)
        elif self.moves and self.moves % DOSE["frequency"] == 0:
            self.follow()
        return update

    def direction(self, g):
        b1 = DOSE["beta1"]
        b2 = DOSE["beta2"]
        q_left, q_right = self.bases
        turned = q_left.T @ g @ q_right
        self.mean = b1 * self.mean + (1 - b1) * g
        self.square = b2 * self.square + (1 - b2) * turned**2
        mean = q_left.T @ self.mean @ q_right
        scaled = mean / (np.sqrt(self.square) + DOSE["eps"])
        return unbias(self.moves) * q_left @ scaled @ q_right.T

    def follow(self):
        q_left, q_right = self.bases
        rows = falling(self.left, q_left)
        columns = falling(self.right, q_right)
        self.square = self.square[np.ix_(rows, columns)]
        left, _ = np.linalg.qr(self.left @ q_left[:, rows])
        right, _ = np.linalg.qr(self.right @ q_right[:, columns])
        self.bases = left, right


def eigenvectors(matrix):
    _, rising = np.linalg.eigh(matrix)
    return rising[:, ::-1]


def falling(preconditioner, basis):
    return np.argsort(-np.diag(basis.T @ preconditioner @ basis))


def unbias(t):
    return np.sqrt(1 - DOSE["beta2"] ** t) / (1 - DOSE["beta1"] ** t)


@pytest.mark.parametrize("shape", [(8, 8), (6, 10), (12, 5)])
def test_soap_equals_an_fp64_transcription_of_the_algorithm_for_25_steps(tiny, drive, shape):
    """Where a matrix is not square, the first gradient leaves a null space, any basis of which is right: ours is taken.

    Measured: 2e-5 apart at first, 3e-6 after six bases, of updates of about 1.
    """
    pieces = gradients(*shape, 25)
    updates, _ = driven(tiny, drive, pieces)
    _, after_one = driven(tiny, drive, pieces[:1])
    square = shape[0] == shape[1]
    by_hand = Transcribed(*shape, None if square else bases_of(after_one))
    for t, gradient in enumerate(pieces):
        assert furthest(updates[t], by_hand.step(fp64(gradient))) < 1e-4, t


@pytest.mark.parametrize("shape", [(8, 8), (6, 10)])
def test_the_first_step_only_measures_and_leaves_eigenvectors_in_falling_order(
    tiny, drive, shape
):
    pieces = gradients(*shape, 1)
    updates, state = driven(tiny, drive, pieces)
    assert not updates.any()
    g = fp64(pieces[0])
    grams = {"left": g @ g.T, "right": g.T @ g}
    for side, gram in grams.items():
        basis = state[f"{side}_basis0"][0]
        eigenvalues = np.linalg.eigvalsh(gram)[::-1]
        assert furthest(basis.T @ basis, np.eye(len(basis))) < 1e-6
        assert furthest(basis.T @ gram @ basis, np.diag(eigenvalues)) < 1e-5
        assert furthest(state[f"{side}0"][0], 0.3 * gram) < 1e-6


def test_bases_stay_orthogonal_and_both_moments_follow_them(tiny, drive):
    """What the mean was in the weights' own space, it is behind a new basis: a running mean of gradients."""
    pieces = gradients(8, 8, 9)
    _, state = driven(tiny, drive, pieces)
    left, right = bases_of(state)
    mean = np.zeros((8, 8))
    for gradient in pieces[1:]:
        mean = 0.9 * mean + 0.1 * fp64(gradient)
    assert furthest(left @ state["mean0"][0] @ right.T, mean) < 1e-6
    assert furthest(left.T @ left, np.eye(8)) < 1e-6
    assert (state["square0"] >= 0).all()


def test_turning_rows_and_columns_turns_the_update(tiny, drive):
    """SOAP of U G V = U (SOAP of G) V, which Adam has not."""
    pieces = gradients(8, 8, 12)
    draw = np.random.default_rng(3)
    u = orthogonal(8, draw)
    v = orthogonal(8, draw)
    plain, _ = driven(tiny, drive, pieces)
    turned, _ = driven(tiny, drive, torch.from_numpy(u @ fp64(pieces) @ v).float())
    assert np.abs(plain[1:]).max() > 0.5
    assert furthest(turned, u @ plain @ v) < 1e-4


def test_on_diagonal_gradients_it_is_adam_a_step_late(tiny, drive):
    """Their eigenvectors are the axes, in falling order, so nothing is turned."""
    size = torch.linspace(0.5, 2.0, 6)
    strengths = 1 + 0.3 * torch.arange(10.0).cos()
    pieces = torch.stack([torch.diag(size * strength) for strength in strengths])
    updates, _ = driven(tiny, drive, pieces)
    mean = np.zeros((6, 6))
    square = np.zeros((6, 6))
    for t, gradient in enumerate(pieces[1:], 1):
        g = fp64(gradient)
        mean = 0.9 * mean + 0.1 * g
        square = 0.8 * square + 0.2 * g**2
        adam = unbias(t) * mean / (np.sqrt(square) + 0.05)
        assert furthest(updates[t], adam) < 1e-4, t


@pytest.mark.parametrize("blocks", [(8, 4, 4), (8, 8)])
def test_fused_matrices_move_as_they_would_apart(tiny, drive, blocks):
    pieces = gradients(16, 6, 10)
    together, _ = driven(tiny, drive, pieces, blocks=blocks)
    apart = [driven(tiny, drive, one)[0] for one in pieces.split(blocks, dim=1)]
    assert furthest(together, np.concatenate(apart, axis=1)) < 1e-5
    joint, _ = driven(tiny, drive, pieces, {**DOSE, "split": "joint"}, blocks=blocks)
    assert furthest(together, joint) > 0.05


def test_each_matrix_of_a_bank_has_its_own_preconditioners(tiny, build):
    recipe = tiny(["soap"], model__attention__group=2)
    shapes = {}
    for bank in Optimizer(build(recipe), recipe).banks:
        state = bank.state.get("soap", {})
        for name, value in state.items():
            shapes[bank.names[0], name] = tuple(value.shape)
    qkv = "blocks.0.attention.qkv.weight"
    gate_up = "blocks.0.ffn.inner.gate_up.weight"
    assert shapes[qkv, "left0"] == (3, 32, 32)
    assert shapes[qkv, "left1"] == shapes[qkv, "left2"] == (3, 16, 16)
    assert shapes[gate_up, "left0"] == (6, 64, 64)
    assert shapes[gate_up, "right_basis0"] == (6, 32, 32)


def test_a_silent_matrix_stays_where_it_is(tiny, drive):
    """No gradient at all: 0 / eps, eigenvectors of 0 and a power iteration of 0 are all finite."""
    updates, state = driven(tiny, drive, torch.zeros(12, 4, 6))
    assert not updates.any()
    assert all(np.isfinite(value).all() for value in state.values())


def test_a_matrix_that_wakes_after_the_first_step_moves(tiny, drive):
    """Behind projections that start at zero, the first gradient is 0."""
    pieces = gradients(8, 8, 12)
    pieces[0] = 0
    updates, _ = driven(tiny, drive, pieces)
    largest = np.abs(updates[1:]).max((1, 2))
    assert np.isfinite(updates).all()
    assert largest.min() > 0.05 and largest.max() < 20


# ---- in its place ----


def test_it_stands_where_adam_stood_and_keeps_the_decay(tiny):
    chains = tiny(["soap"]).optim.chains
    kinds = {role: [step.kind for step in chain.steps] for role, chain in chains.items()}
    assert kinds.pop("hidden") == ["soap", "decay"]
    assert all(steps == ["adam"] for steps in kinds.values())


def rates(recipe, build):
    banks = Optimizer(build(recipe), recipe).banks
    return {name: bank.lr.item() for bank in banks for name in bank.names}


def test_under_mup_its_rate_falls_as_adams(tiny, build):
    mup = {"mup": {"base_width": 16}}
    ours = rates(tiny(["soap", mup]), build)
    assert ours == rates(tiny([mup]), build)
    assert ours["blocks.0.ffn.inner.down.weight"] == 0.5


def test_beside_muon_it_is_refused(tiny):
    with pytest.raises(UserError, match="soap and muon exclude each other"):
        tiny(["soap", "muon"])


def test_the_optimizer_kernel_steps_aside_and_no_other(tiny):
    served = {"model__width": 64, "model__attention__head_dim": 32}
    recipe = tiny(["soap"], **served)
    said = "the chain of hidden is soap, decay, which the kernel does not know"
    assert flaw("optimizer", recipe, "bf16") == said
    others = ("attention", "ffn", "loss")
    assert {flaw(place, recipe, "bf16") for place in others} == {""}


def test_a_run_learns_the_frequencies_and_differs_from_adams(tiny, token_folder, tmp_path):
    paths = {"budget__tokens": 60 * 64, "optim__lr": 0.01}
    ours = losses(tiny(["soap"], **paths), token_folder, tmp_path / "soap")
    adams = losses(tiny(**paths), token_folder, tmp_path / "adam")
    assert np.mean(ours[-10:]) < 3.7
    assert ours[0] == adams[0]  # of the weights before the first step
    assert ours[5:] != adams[5:]


def losses(recipe, token_folder, folder):
    record = Record(folder)
    run(recipe, CPU, token_folder, record)
    return [line["train/loss"] for line in record.metrics()]
