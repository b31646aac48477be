"""The residual block.  Functions are pure."""

from ablab.core.language.declare import Stage, Where
from ablab.core.language.offers import PlainResidual
from ablab.core.language.part import Part, part


@part("residual")
class Residual(Part):
    """x <- x + attention(x);  x <- x + ffn(x).  Each branch has its own norm.  Pre-norm, as GPT-2."""

    def build(self, where: Where) -> Stage:
        return Stage(residual, offer=PlainResidual())


def residual(x, carry, attention, ffn):
    """x: [B,T,W]; attention: (x, carry) -> y [B,T,W], carry; ffn: x -> y [B,T,W].  Returns x, carry."""
    y, carry = attention(x, carry)
    x = x + y
    return x + ffn(x), carry
