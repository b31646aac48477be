"""SOAP: Adam in the slowly turning eigenbasis of Shampoo's preconditioners.

For each hidden matrix, gradient G [r, c], bases Q_L [r, r] and Q_R [c, c]:

    G' = Q_L^T G Q_R;   M <- b1 M + (1-b1) G';   V <- b2 V + (1-b2) G'^2
    U = Q_L (M^ / (sqrt(V^) + eps)) Q_R^T,   bias-corrected
    L <- b L + (1-b) G G^T;   R <- b R + (1-b) G^T G,   b = shampoo_beta

Every `frequency` steps each basis follows its preconditioner P by one power iteration: columns in falling order of
diag(Q^T P Q), V's axes with them, then Q <- the orthogonal factor of P Q.  M is turned back by the old bases and forth
by the new.  The first step only measures: bases are 0 there, so nothing moves, and become eigenvectors behind it.

Fused matrices (q, k, v; gate, up) are taken apart.  A step costs 3 r c (r + c) multiply-adds a matrix, and the state is
2 r c + 2 r^2 + 2 c^2 numbers where Adam's is 2 r c.
"""

from typing import Any, Literal

from ablab.core.language.numbers import Memory, Positive, Whole
from ablab.core.parts.transforms import Adam, Transform, join_blocks, split_blocks
from ablab.core.recipe.edit import edit, swap
from ablab.core.recipe.intervention import register
from ablab.core.recipe.recipe import Recipe

Tensors = dict[str, Any]  # of one piece, by the names in STATE
STATE = ("mean", "square", "left", "right", "left_basis", "right_basis")


@register(
    "soap",
    order=30,
    neutral_at_init=True,
    slots=("optim.chains.hidden.steps",),
    excludes=("muon",),
    off="AdamW on the hidden matrices, with the same learning rate and decay",
    source="Vyas et al., arXiv:2409.11321, algorithm 3; github.com/nikhilvyas/SOAP, soap.py",
)
class Soap(Transform):
    """Run Adam on hidden matrices in the eigenbasis of Shampoo's preconditioners."""

    beta1: Memory = 0.95
    beta2: Memory = 0.95
    shampoo_beta: Memory = 0.95
    eps: Positive = 1e-8
    frequency: Whole = 10  # optimizer steps from one basis to the next
    split: Literal["joint", "blocks", "heads"] = "blocks"  # as muon's

    width_rule = "adam"  # in its basis it is Adam

    @property
    def refresh_every(self) -> int:
        return self.frequency

    def apply(self, recipe: Recipe) -> Recipe:
        return edit(recipe, "optim.chains.hidden.steps", swap(Adam, self))

    def state(self, weight: Any, bank: Any) -> Tensors:
        return numbered([blank(piece) for piece in split_blocks(weight, bank.blocks)])

    def update(
        self, update: Any, weight: Any, state: Tensors, bank: Any, now: Any
    ) -> tuple[Any, Tensors]:
        gradients = split_blocks(update, bank.blocks)
        taken = [
            self._move(gradient, piece, now)
            for gradient, piece in zip(gradients, pieces_of(state), strict=True)
        ]
        directions = [direction for direction, _ in taken]
        changed = numbered([changes for _, changes in taken])
        return join_blocks(directions, update, bank.blocks), changed

    def _move(self, gradient: Any, piece: Tensors, now: Any) -> tuple[Any, Tensors]:
        """gradient [N,r,c] -> the direction, and what changes of its state."""
        turned = turn(gradient, piece)
        mean = piece["mean"].lerp(turned, 1 - self.beta1)
        square = piece["square"].lerp(turned.square(), 1 - self.beta2)
        count = (now.step - 1).clamp(min=1)  # of steps that moved
        unbias = (1 - self.beta2**count).sqrt() / (1 - self.beta1**count)
        direction = turn_back(mean / (square.sqrt() + self.eps), piece) * unbias
        changes = {
            "mean": mean,
            "square": square,
            "left": piece["left"].lerp(gradient @ gradient.mT, 1 - self.shampoo_beta),
            "right": piece["right"].lerp(gradient.mT @ gradient, 1 - self.shampoo_beta),
        }
        return direction, changes

    def refresh(self, state: Tensors, bank: Any, t: int) -> None:
        follow = begin if t == 1 else renew
        for piece in pieces_of(state):
            follow(piece)


def blank(piece: Any) -> Tensors:
    """piece: matrices [N,r,c] -> their state before the first step."""
    count, rows, columns = piece.shape
    return {
        "mean": piece.new_zeros(piece.shape),
        "square": piece.new_zeros(piece.shape),
        "left": piece.new_zeros(count, rows, rows),
        "right": piece.new_zeros(count, columns, columns),
        "left_basis": piece.new_zeros(count, rows, rows),
        "right_basis": piece.new_zeros(count, columns, columns),
    }


def numbered(pieces: list[Tensors]) -> Tensors:
    """The pieces' tensors in one dict: mean0, mean1, ..."""
    return {
        f"{name}{i}": value for i, piece in enumerate(pieces) for name, value in piece.items()
    }


def pieces_of(state: Tensors) -> list[Tensors]:
    """Undo `numbered`."""
    count = len(state) // len(STATE)
    return [{name: state[f"{name}{i}"] for name in STATE} for i in range(count)]


def turn(matrices: Any, piece: Tensors) -> Any:
    """Into the bases."""
    return piece["left_basis"].mT @ matrices @ piece["right_basis"]


def turn_back(matrices: Any, piece: Tensors) -> Any:
    return piece["left_basis"] @ matrices @ piece["right_basis"].mT


def begin(piece: Tensors) -> None:
    """The bases become the eigenvectors of the preconditioners, in falling order."""
    piece["left_basis"].copy_(eigenvectors(piece["left"]))
    piece["right_basis"].copy_(eigenvectors(piece["right"]))


def eigenvectors(matrices: Any) -> Any:
    """Symmetric [N,d,d] -> columns; in fp64, for a first gradient has many eigenvalues near 0."""
    from torch.linalg import eigh

    _, rising = eigh(matrices.double())
    return rising.flip(-1)


def renew(piece: Tensors) -> None:
    """One power iteration of both bases, and both moments follow."""
    mean = turn_back(piece["mean"], piece)
    square = piece["square"]
    left_order = falling(piece["left"], piece["left_basis"])
    right_order = falling(piece["right"], piece["right_basis"])
    square = square.take_along_dim(left_order.unsqueeze(-1), -2)
    square = square.take_along_dim(right_order.unsqueeze(-2), -1)
    piece["square"].copy_(square)
    piece["left_basis"].copy_(iterated(piece["left"], piece["left_basis"], left_order))
    piece["right_basis"].copy_(iterated(piece["right"], piece["right_basis"], right_order))
    piece["mean"].copy_(turn(mean, piece))


def falling(preconditioner: Any, basis: Any) -> Any:
    """The order [N,d] of a basis' columns by their estimated eigenvalues, largest first."""
    eigenvalues = (basis * (preconditioner @ basis)).sum(-2)
    return eigenvalues.argsort(dim=-1, descending=True, stable=True)


def iterated(preconditioner: Any, basis: Any, order: Any) -> Any:
    from torch.linalg import qr

    ordered = basis.take_along_dim(order.unsqueeze(-2), -1)
    orthogonal, _ = qr(preconditioner @ ordered)
    return orthogonal
