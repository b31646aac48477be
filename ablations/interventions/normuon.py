"""NorMuon: after orthogonalisation, each neuron's row gets its own step size.

    v <- b2 v + (1-b2) mean(O^2) over a row;   O' = O / (sqrt(v) + eps);   O' <- O' |O|_F / |O'|_F

One number per output row, always (`row`, the authors' code); `shape_rule` normalises along the longer side instead, as
modded-nanogpt and nanochat do.  The last factor keeps the Frobenius norm of each separate matrix, so no bias
correction is needed and the shape factor that Muon already applied survives.
"""

from typing import Literal

from ablab.core.language.numbers import Memory, Positive
from ablab.core.language.offers import RowScale, offers
from ablab.core.parts.transforms import Orthogonalize, Transform, join_blocks, split_blocks
from ablab.core.recipe.edit import after, edit
from ablab.core.recipe.intervention import register


@register(
    "normuon",
    order=31,
    neutral_at_init=True,
    slots=("optim.chains.hidden.steps",),
    requires=("muon",),
    off="plain Muon: rows of the orthogonal update keep their norms",
    source="Li et al., arXiv:2510.05491 (github.com/zichongli5/NorMuon, normuon.py)",
)
class NorMuon(Transform):
    """Normalise each row of Muon's update by a running second moment."""

    beta2: Memory = 0.95
    axis: Literal["row", "shape_rule"] = "row"
    eps: Positive = 1e-8

    def apply(self, recipe):
        return edit(recipe, "optim.chains.hidden.steps", after(Orthogonalize, self))

    def state(self, weight, bank):
        return {
            f"square{i}": self._energy(piece).zero_()
            for i, piece in enumerate(split_blocks(weight, bank.blocks))
        }

    def _energy(self, piece):
        """[N,o,i] -> mean square over each row [N,o,1], or over each column [N,1,i] where the shape rule says so."""
        along_columns = self.axis == "shape_rule" and piece.shape[-2] < piece.shape[-1]
        return piece.square().mean(-2 if along_columns else -1, keepdim=True)

    @offers(lambda normuon: RowScale(normuon.axis, normuon.beta2, normuon.eps))
    def update(self, update, weight, state, bank, now):
        normed = []
        new = {}
        for i, piece in enumerate(split_blocks(update, bank.blocks)):
            square = state[f"square{i}"].lerp(self._energy(piece), 1 - self.beta2)
            new[f"square{i}"] = square
            row = piece / (square.sqrt() + self.eps)
            normed.append(row * (_frobenius(piece) / (_frobenius(row) + self.eps)))
        return join_blocks(normed, update, bank.blocks), new


def _frobenius(matrices):
    return matrices.norm(dim=(-2, -1), keepdim=True)
