"""The SwiGLU feed-forward.  Functions are pure."""

from ablab.core.language.declare import Stage, Where, linear
from ablab.core.language.numbers import Positive, Whole
from ablab.core.language.offers import GatedSilu, only
from ablab.core.language.part import Part, part


def hidden_width(width: int, expansion: float, multiple: int) -> int:
    """Feed-forward width: width * expansion to the nearest multiple (768 * 2.667 -> 2048)."""
    return max(round(width * expansion / multiple), 1) * multiple


@part("swiglu")
class SwiGLU(Part):
    """down(silu(gate x) * (up x)).  Shazeer, arXiv:2002.05202.  2.6667 keeps the parameters of a 4x ReLU block."""

    expansion: Positive = 2.6667
    multiple: Whole = 64

    def build(self, where: Where) -> Stage:
        hidden = hidden_width(where.width, self.expansion, self.multiple)
        return Stage(
            swiglu,
            offer=GatedSilu(only("gate_up", "down")),
            gate_up=linear(where.width, 2 * hidden, blocks=(hidden, hidden)),
            down=linear(hidden, where.width),
        )


def swiglu(x, *, gate_up, down):
    """x: [B,T,W] -> [B,T,W]."""
    from torch.nn.functional import silu

    gate, up = gate_up(x).chunk(2, dim=-1)
    return down(silu(gate) * up)
