"""U-net skips: the later half of the blocks takes in what the earlier half left, in reverse order.

    x <- x + w_l y_{L-1-l}   before block l >= L - n,   n = floor(L / 2), y_j [B,T,W] the stream after block j

Each w_l is a learned number, start `start`: 1 is the source's, 0 is neutral.  With an odd L the middle block takes
nothing.  With an even L block L/2 takes the very stream that it reads, and so starts with x doubled.  x0 lambdas beside
it scale a stream with its skip already in it, as in the source.
"""

from ablab.core.errors import UserError
from ablab.core.language.declare import Param, Stage, Where
from ablab.core.language.part import Part
from ablab.core.recipe.edit import append, edit
from ablab.core.recipe.intervention import register


@register(
    "unet_skips",
    order=20,
    slots=("model.on_block",),
    off="a block reads what the block before it leaves, and nothing older",
    source="modded-nanogpt record 11, weights start at 1 (there with twice the learning rate)",
)
class UNetSkips(Part):
    """Add the outputs of the first half of the blocks to the inputs of the second, in reverse order."""

    start: float = 1.0

    def apply(self, recipe):
        return edit(recipe, "model.on_block", append(self))

    def build(self, where: Where) -> Stage | None:
        skips = where.layers // 2
        if not skips:
            raise UserError(
                f"unet_skips joins blocks in pairs, and model.layers={where.layers}; use at least 2"
            )
        before = where.layer - 1  # the block whose output is read here
        taken = where.layers - 1 - where.layer
        weight = Param((1,), "vector", fill=self.start)
        if before == taken:
            return Stage(take_own, weight=weight)
        if where.layer >= where.layers - skips:
            return Stage(take, weight=weight, name=_carried(taken))
        if 0 <= before < skips:
            return Stage(leave, name=_carried(before))
        return None


def _carried(block: int) -> str:
    return f"skip/{block}"


def leave(x, carry, *, name):
    """x: [B,T,W] as the block before left it."""
    return x, {**carry, name: x}


def take(x, carry, *, weight, name):
    """The fp32 weight on activations of any dtype; the result keeps it."""
    return (x + weight * carry[name]).to(x.dtype), carry


def take_own(x, carry, *, weight):
    """In the middle of an even depth, where the stream after the block before is x itself."""
    return (x + weight * x).to(x.dtype), carry
