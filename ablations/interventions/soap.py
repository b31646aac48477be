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

from dataclasses import dataclass
from typing import Any, Literal

from ablab.core.language.numbers import Memory, Positive, Whole
from ablab.core.parts.transforms import (
    Adam,
    Now,
    Transform,
    bias_correction,
    join_blocks,
    split_blocks,
)
from ablab.core.recipe.edit import edit, swap
from ablab.core.recipe.intervention import register
from ablab.core.recipe.recipe import Recipe

State = dict[str, Any]  # name -> tensor


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

    def state(self, weight: Any, bank: Any) -> State:
        state: State = {}
        for i, piece in enumerate(split_blocks(weight, bank.blocks)):
            state |= blank(piece, i)
        return state

    def update(
        self, update: Any, weight: Any, state: State, bank: Any, now: Now
    ) -> tuple[Any, State]:
        directions = []
        changed: State = {}
        for i, gradient in enumerate(split_blocks(update, bank.blocks)):
            direction, changes = self._move(gradient, Piece.of(state, i), now)
            directions.append(direction)
            changed |= {f"{name}{i}": value for name, value in changes.items()}
        return join_blocks(directions, update, bank.blocks), changed

    def _move(self, gradient: Any, piece: "Piece", now: Now) -> tuple[Any, State]:
        """gradient [N,r,c] -> the direction, and what changes of the piece's state."""
        turned = piece.turn(gradient)
        mean = piece.mean.lerp(turned, 1 - self.beta1)
        square = piece.square.lerp(turned.square(), 1 - self.beta2)
        scaled = mean / (square.sqrt() + self.eps)
        direction = piece.turn_back(scaled) * self._unbias(now)
        rows_gram = gradient @ gradient.mT
        columns_gram = gradient.mT @ gradient
        fresh = 1 - self.shampoo_beta
        changes = {
            "mean": mean,
            "square": square,
            "left": piece.left.preconditioner.lerp(rows_gram, fresh),
            "right": piece.right.preconditioner.lerp(columns_gram, fresh),
        }
        return direction, changes

    def _unbias(self, now: Now) -> Any:
        """sqrt(1 - b2^t) / (1 - b1^t), t counted without the first step, which does not move."""
        moves = (now.step - 1).clamp(min=1)
        return bias_correction(self.beta2, moves).sqrt() / bias_correction(self.beta1, moves)

    def refresh(self, state: State, bank: Any, t: int) -> None:
        for i in range(len(state) // len(PIECE)):
            piece = Piece.of(state, i)
            if t == 1:
                piece.begin()
            else:
                piece.renew()


# The tensors of a piece, by name and axes.
PIECE = {
    "mean": "rc",
    "square": "rc",
    "left": "rr",
    "right": "cc",
    "left_basis": "rr",
    "right_basis": "cc",
}


def blank(matrices: Any, i: int) -> State:
    """The state of piece i, matrices [N,r,c], before the first step."""
    count, rows, columns = matrices.shape
    length = {"r": rows, "c": columns}
    return {
        f"{name}{i}": matrices.new_zeros(count, *(length[axis] for axis in axes))
        for name, axes in PIECE.items()
    }


@dataclass(frozen=True)
class Side:
    """One side of equal matrices: a symmetric preconditioner and a basis of columns, [N,d,d] each."""

    preconditioner: Any
    basis: Any

    def eigenvectors(self) -> Any:
        """In falling order; in fp64, for a first gradient has many eigenvalues near 0."""
        from torch.linalg import eigh

        _, rising = eigh(self.preconditioner.double())
        return rising.flip(-1)

    def falling(self) -> Any:
        """The order [N,d] of the columns by their estimated eigenvalues, largest first."""
        eigenvalues = (self.basis * (self.preconditioner @ self.basis)).sum(-2)
        return eigenvalues.argsort(dim=-1, descending=True, stable=True)

    def iterated(self, order: Any) -> Any:
        """The basis after one power iteration of its columns in that order."""
        from torch.linalg import qr

        columns = self.basis.take_along_dim(order.unsqueeze(-2), -1)
        orthogonal, _ = qr(self.preconditioner @ columns)
        return orthogonal


@dataclass(frozen=True)
class Piece:
    """The state of equal matrices [N,r,c]: the moments in the bases, [N,r,c], and both sides."""

    mean: Any
    square: Any
    left: Side
    right: Side

    @classmethod
    def of(cls, state: State, i: int) -> "Piece":
        return cls(
            mean=state[f"mean{i}"],
            square=state[f"square{i}"],
            left=Side(state[f"left{i}"], state[f"left_basis{i}"]),
            right=Side(state[f"right{i}"], state[f"right_basis{i}"]),
        )

    def turn(self, matrices: Any) -> Any:
        """Into the bases."""
        return self.left.basis.mT @ matrices @ self.right.basis

    def turn_back(self, matrices: Any) -> Any:
        return self.left.basis @ matrices @ self.right.basis.mT

    def begin(self) -> None:
        """Eigenvectors of what the first gradient left."""
        for side in (self.left, self.right):
            side.basis.copy_(side.eigenvectors())

    def renew(self) -> None:
        """Both bases follow their preconditioners, and both moments the bases."""
        mean = self.turn_back(self.mean)
        rows = self.left.falling()
        columns = self.right.falling()
        square = self.square.take_along_dim(rows.unsqueeze(-1), -2)
        square = square.take_along_dim(columns.unsqueeze(-2), -1)
        self.left.basis.copy_(self.left.iterated(rows))
        self.right.basis.copy_(self.right.iterated(columns))
        self.mean.copy_(self.turn(mean))
        self.square.copy_(square)
