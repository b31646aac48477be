"""Feed-forward, readout and attention's projections in 8-bit floats, a dynamic scale a tensor.

e4m3 forward, e5m2 or e4m3 for gradients.

    s_t = max |t| / largest,    q_t = cast(t / s_t)        largest = 448 in e4m3, 57344 in e5m2
    y  = (q_x q_w^T) s_x s_w                               x and w in e4m3
    dx = (q_g q_w) s_g s_w,     dW = (q_g^T q_x) s_g s_x   g, the gradient of y, in the format `gradient`

A kernel that casts a tensor while it makes it knows no max |t| yet and takes a bound on it (kernels/fp8_swiglu.py).
Sums in fp32 (kernels/fp8.py), or shorter where a kernel serves (kernels/fp8_projection.py); weights and optimizer as
before.  Gradients of tokens differ by orders of magnitude, hence e5m2, with twice the range of exponents and half the
precision.

Training alone: where no gradient is asked for, in evaluation and decoding, the trained weights multiply plainly, as in
nanochat.  A scale over all tokens would let a token's logits depend on later ones and on the other rows of its batch.
In training they do, slightly; and as each micro-batch has its own scales, its size shows in the bits.
"""

from dataclasses import dataclass
from typing import Any, Literal

from ablab.core.errors import UserError
from ablab.core.language.declare import Linear
from ablab.core.language.offers import EightBits
from ablab.core.language.part import Part, silent
from ablab.core.recipe.edit import append, edit
from ablab.core.recipe.intervention import register

PLACES = {  # `where` -> the maps that multiply so
    "ffn": ("ffn",),
    "readout": ("readout",),
    "both": ("ffn", "readout"),
    "attention": ("attention.qkv", "attention.out"),
    "all": ("ffn", "attention.qkv", "attention.out", "readout"),
}


@register(
    "fp8",
    order=50,
    slots=("model.products",),
    off="matrix products in the activations' dtype (bf16)",
    source="Micikevicius et al., arXiv:2209.05433; "
    "a dynamic scale a tensor, as nanochat and torchao's tensorwise recipe",
)
class FP8(Part):
    """Multiply matrices of the feed-forward, the readout and the attention in 8-bit floats."""

    # a tied head has no readout of its own; attention: its projections, the one back too
    where: Literal["ffn", "readout", "both", "attention", "all"] = "ffn"
    gradient: Literal["e5m2", "e4m3"] = "e5m2"
    weight_gradient: Literal["fp8", "wide"] = silent(
        "fp8"
    )  # dW of 8-bit numbers, or of x and g before the cast

    training_alone = True  # so an exported model multiplies plainly

    def apply(self, recipe):
        if recipe.model.tied and "readout" in PLACES[self.where]:
            raise UserError(
                f"fp8.where={self.where} has no readout to act on: the head is tied; "
                "use fp8.where=ffn, or set model.tied=false"
            )
        return edit(recipe, "model.products", append(self))

    def product(self, path: str, linear: Linear):
        """Gates and whatever else is not a plain matrix keep their products."""
        if _place(path, linear.weight.role) not in PLACES[self.where]:
            return None
        return Multiply(EightBits(self.gradient, self.weight_gradient))


def _place(path: str, role: str) -> str:
    """What PLACES calls a map; a name that is not there, of any other, as of a stage's own map called `out`."""
    if role != "hidden":
        return role
    return "ffn" if ".ffn." in path else ".".join(path.split(".")[-2:])


@dataclass(frozen=True)
class Multiply:
    """x: [..., fan_in], weight: [fan_out, fan_in] -> [..., fan_out] in the dtype of x."""

    offer: EightBits

    def __call__(self, x: Any, weight: Any) -> Any:
        import torch

        from ablab.core.model.layers import plain_product
        from ablab.kernels.fp8 import fp8_linear

        if not torch.is_grad_enabled():
            return plain_product(x, weight)
        return fp8_linear(x, weight, self.offer.gradient, self.offer.weight_gradient)
