"""Value embeddings: alternate layers add a row of a table of their own, chosen by the token, to their values.

    v_t <- v_t + g E_l[token_t],   E_l [vocab, KV*D], g a learned number a layer, start `start`

Layers are counted back from the last, which always has a table: layer l where (L - 1 - l) is a multiple of `every`.
The row is cut into the KV heads, and added before the attention, so decoding keeps the sum in its cache.  A value
residual beside it mixes the raw values: it stands before.

Tables have the role `embedding`: 0.02 of standard deviation, and the token table's learning rate.  nanochat's gate,
3 sigmoid(W x[..., :12]) a head, needs x, which the slot of the values does not see.
"""

from ablab.core.language.declare import Param, Stage, Where
from ablab.core.language.numbers import Whole
from ablab.core.language.part import Part, part
from ablab.core.recipe.edit import append, edit
from ablab.core.recipe.intervention import register

CARRIED = "tokens"  # of the carry


@part("remember_tokens")
class RememberTokens(Part):
    """The token ids go into the carry, for the layers to look up."""

    def build(self, where: Where) -> Stage:
        return Stage(remember)


@register(
    "value_embeddings",
    order=25,
    slots=("model.on_embedding", "model.attention.on_values"),
    off="a layer's values are projected from the stream alone",
    source="modded-nanogpt records 14 to 17 (weight 0.5); alternate layers as karpathy/nanochat gpt.py has_ve",
)
class ValueEmbeddings(Part):
    """Add a learned row a token to the values of alternate layers."""

    every: Whole = 2
    start: float = 0.5

    def apply(self, recipe):
        remembering = edit(recipe, "model.on_embedding", append(RememberTokens()))
        return edit(remembering, "model.attention.on_values", append(self))

    def build(self, where: Where) -> Stage | None:
        before_last = where.layers - 1 - where.layer
        if before_last % self.every:
            return None
        rows = (where.vocab, where.kv_heads * where.head_dim)
        return Stage(
            add_rows,
            table=Param(rows, "embedding"),
            strength=Param((1,), "vector", fill=self.start),
        )


def remember(x, tokens, carry):
    """x: [B,T,W]; tokens: int [B,T]."""
    return x, {**carry, CARRIED: tokens}


def add_rows(v, carry, *, table, strength):
    """v: [B,T,KV,D].  The fp32 number on rows of any dtype; the result keeps that of v."""
    from torch.nn.functional import embedding

    rows = embedding(carry[CARRIED], table).to(v.dtype)
    heads = rows.unflatten(-1, v.shape[2:])
    return (v + strength * heads).to(v.dtype), carry
