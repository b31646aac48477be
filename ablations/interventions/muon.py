"""Muon: hidden matrices move along the polar factor of their momentum.

    M <- b M + (1-b) G;  U = (1-b) G + b M (Nesterov);  O = NS(U);  W <- W - lr * s(out, in) * O

Fused matrices (q, k, v; gate, up) are orthogonalised apart.  Everything that is not a hidden matrix keeps AdamW.
`lr` is the hidden learning rate relative to optim.lr: IMU-1's 70M ablations use 0.0235 for matrices, 0.007 for
the rest.
"""

from typing import Literal

from ablab.core.language.numbers import Memory, Natural, Positive, SomeSteps
from ablab.core.language.part import silent
from ablab.core.parts.transforms import Adam, Momentum, Orthogonalize
from ablab.core.recipe.edit import edit, put, swap
from ablab.core.recipe.intervention import register


@register(
    "muon",
    order=30,
    neutral_at_init=True,
    slots=("optim.chains.hidden",),
    off="AdamW on the hidden matrices, at optim.lr, with the same decay",
    source="Jordan et al. 2024, kellerjordan.github.io/posts/muon; "
    "scales after Dion (github.com/microsoft/dion) and arXiv:2502.16982",
)
class Muon:
    """Orthogonalise the momentum of hidden matrices."""

    lr: Positive = 3.36
    momentum: Memory = 0.95
    nesterov: bool = True
    warmup_from: Memory = 0.95
    warmup_steps: SomeSteps = 1
    ns: Literal["kj5", "polar5", "polar7", "you5", "exact"] = "polar7"
    scale: Literal["spectral", "keller", "rms"] = "keller"
    split: Literal["joint", "blocks", "heads"] = "blocks"
    warmup_behind: Natural = silent(0)  # steps that the rise of momentum counts too few

    def apply(self, recipe):
        momentum = Momentum(
            self.momentum,
            self.nesterov,
            self.warmup_from,
            self.warmup_steps,
            behind=self.warmup_behind,
        )
        orthogonal = Orthogonalize(self.ns, self.scale, self.split)
        moved = edit(recipe, "optim.chains.hidden.steps", swap(Adam, momentum, orthogonal))
        return edit(moved, "optim.chains.hidden.lr", put(self.lr))
