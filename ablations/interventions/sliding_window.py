"""Sliding window: a query sees its own key and those of the few tokens before it.

    y_t = softmax(q_t k_s^T / sqrt(D)) v_s   over s = t - window + 1 .. t, in a short layer
                                             over s = 0 .. t, in a long one

`pattern` is tiled over the layers: S short, L long.  last: the last layer sees all whatever the pattern says (`long`:
nanochat), or not (`pattern`: every layer short is Mistral's, arXiv:2310.06825).  A window of null is a quarter of the
context, rounded up (nanochat rounds to 128 tokens).  Where a row has no key to hide, or no layer is short, it would be
causal attention by another name, and is refused.

The mask is dense: FLOPs are counted without the hidden keys (`keys_seen`), but torch's kernels spend time on them, and
decoding keeps them in its cache.
"""

from typing import Annotated, Literal

from msgspec import Meta

from ablab.core.errors import UserError
from ablab.core.language.declare import Stage, Where
from ablab.core.language.numbers import Whole
from ablab.core.language.offers import WindowMix, only
from ablab.core.language.part import Part
from ablab.core.parts.mixing import Causal
from ablab.core.recipe.edit import edit, put
from ablab.core.recipe.intervention import register

Pattern = Annotated[str, Meta(pattern="^[SL]+$", description="letters S and L, such as SSSL")]


@register(
    "sliding_window",
    order=20,
    slots=("model.attention.mix",),
    off="each query of every layer sees all keys up to its own position",
    source="Beltagy et al., arXiv:2004.05150; SSSL with the last layer long as nanochat "
    "(github.com/karpathy/nanochat, gpt.py); modded-nanogpt records 12, 13 and 20",
)
class SlidingWindow(Part):
    """Hide from a query all but the last few keys, in some of the layers."""

    window: Whole | None = None  # tokens, the query's own too; null: a quarter of the context
    pattern: Pattern = "SSSL"
    last: Literal["long", "pattern"] = "long"

    def apply(self, recipe):
        return edit(recipe, "model.attention.mix", put(self))

    def build(self, where: Where) -> Stage:
        self._refuse_what_is_causal(where)
        if not self._short(where.layer, where.layers):
            return Causal().build(where)
        window = self._window(where)
        return Stage(windowed, offer=WindowMix(only("window")), window=window)

    def keys_seen(self, where: Where) -> float:
        """w (1 - w / 2T): the mean of min(t, w), t from 0 to T."""
        short = self._short(where.layer, where.layers)
        seen = self._window(where) if short else where.context
        return seen * (1 - seen / (2 * where.context))

    def _window(self, where: Where) -> int:
        return self.window or -(-where.context // 4)

    def _short(self, layer: int, layers: int) -> bool:
        if self.last == "long" and layer == layers - 1:
            return False
        return self.pattern[layer % len(self.pattern)] == "S"

    def _refuse_what_is_causal(self, where: Where) -> None:
        if (window := self._window(where)) >= where.context:
            raise UserError(
                f"sliding_window.window={window} hides no key of a context of {where.context}; "
                f"use at most {where.context - 1}"
            )
        if not any(self._short(layer, where.layers) for layer in range(where.layers)):
            raise UserError(
                f"sliding_window.pattern={self.pattern} with last={self.last} makes none of "
                f"{where.layers} layers short; begin it with S, or use more layers"
            )


def windowed(q, k, v, carry, start, *, window):
    """q: [B,H,T,D] at positions start..start+T-1; k, v: [B,KV,S,D] at 0..S-1, S = start + T.  Returns [B,H,T,D]."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    pairs = (q.shape[2], k.shape[2])
    causal = torch.ones(pairs, dtype=torch.bool, device=q.device).tril(start)
    visible = causal.triu(start - window + 1)
    grouped = q.shape[1] != k.shape[1]
    return scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=grouped)
