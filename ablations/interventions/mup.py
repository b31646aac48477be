"""Maximal update parametrization: one tuned learning rate for every width.

With m = width / base_width and L = layers / base_layers, every factor is 1 at the base:

    tensor      init std     Adam LR    rms-Muon LR   spectral/Keller Muon LR   decay rate      forward
    embedding   unchanged    1          -             -                         1               alpha_in
    hidden      1/sqrt(fan)  1/m        1/sqrt(m)     1                         1 / LR factor   branch L^-a
    readout     1/m          1/m        -             -                         m               alpha_out
    vectors     unchanged    1          -             -                         -               -

Heads grow in number, not in size, so attention keeps 1/sqrt(head_dim).  A decay of 1/LR keeps lr * decay constant;
`decay_width` e makes it fall as m^-e (nanochat fits 2).  Readout `multiplier` keeps init and LR of the base and divides
the logits by m; tied heads always do.  Readout `zero` starts at 0: no logits of size m^-1/2 for training to undo.
depth: `sqrt` a = 1/2, `complete` a = 1 (CompleteP), hidden LR times L^(a-1); gains keep their learning rate at every
depth.  Measured by `ablab check coords`; gates that read all channels count as hidden.
"""

from dataclasses import replace
from typing import Literal

from ablab.core.errors import UserError
from ablab.core.language.declare import Param
from ablab.core.language.numbers import Positive, Whole
from ablab.core.language.part import Part
from ablab.core.parts.parametrize import Multipliers, Scales, Sizes, Standard
from ablab.core.recipe.asks import Parametrizes
from ablab.core.recipe.edit import edit, put
from ablab.core.recipe.intervention import register


@register(
    "mup",
    order=40,
    slots=("parametrization",),
    off="the standard parametrization: fan-in init and one learning rate for every width",
    source="Yang et al., arXiv:2203.03466; EleutherAI/nanoGPT-mup model.py; "
    "CompleteP arXiv:2505.01618; Muon rows after Dion",
)
class MuP(Part):
    """Scale init, learning rate, decay and logits so that the best learning rate does not move with width."""

    base_width: Whole = 256
    base_layers: Whole = 8
    alpha_in: Positive = 1.0
    alpha_out: Positive = 1.0
    readout: Literal["init", "multiplier", "zero"] = "init"
    adam_lr: float = 1.0  # Adam LR of hidden matrices and readout falls as m^-adam_lr
    rms_lr: float = 0.5  # Muon LR under the rms scale falls as m^-rms_lr (1: arXiv:2505.02222)
    decay_width: float = 0.0
    depth: Literal["none", "sqrt", "complete"] = "none"
    base: Parametrizes | None = None  # holds at the base width; null: the recipe's own

    def apply(self, recipe):
        if recipe.model.tied and self.readout != "init":
            raise UserError(
                f"mup.readout={self.readout} has no readout to act on: the head is tied; "
                "drop it, or set model.tied=false"
            )
        based = replace(self, base=self.base or recipe.parametrization)
        return edit(recipe, "parametrization", put(based))

    def scales(self, name: str, param: Param, model: Sizes, rule: str) -> Scales:
        std = self._base.scales(name, param, model, rule).std
        m = model.width / self.base_width
        if param.role == "gate" and param.shape[-1] != model.width:
            m = 1.0  # a gate that reads a fixed number of channels: its fan-in does not grow
        if param.role in ("embedding", "vector"):
            return Scales(std)
        if param.role == "readout" and self.readout == "multiplier":
            return Scales(std * m**0.5)
        lr = self._lr(m, "adam" if param.role == "readout" else rule)
        decay = m**-self.decay_width / lr
        if param.role == "readout":
            return Scales(0.0 if self.readout == "zero" else std * m**-0.5, lr, decay)
        if self.depth != "none":
            lr *= self._depth(model) ** (self._alpha - 1)
        return Scales(std, lr, decay)

    def _lr(self, m: float, rule: str) -> float:
        exponents = {"adam": self.adam_lr, "rms": self.rms_lr, "spectral": 0.0}
        if rule not in exponents:
            raise UserError(
                f"mup has no learning-rate rule for a chain without {', '.join(exponents)} scaling; "
                "use adam, lion or muon, or drop mup"
            )
        return m ** -exponents[rule]

    @property
    def _alpha(self) -> float:
        return {"none": 0.0, "sqrt": 0.5, "complete": 1.0}[self.depth]

    @property
    def _base(self) -> Parametrizes:
        return self.base or Standard()

    def _depth(self, model: Sizes) -> float:
        return model.layers / self.base_layers

    def multipliers(self, model: Sizes) -> Multipliers:
        shrinks = model.tied or self.readout == "multiplier"
        return Multipliers(
            embedding=self.alpha_in,
            branch=self._depth(model) ** -self._alpha,
            logits=self.alpha_out * (self.base_width / model.width if shrinks else 1.0),
        )
