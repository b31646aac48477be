"""Document mask: a query sees the keys of its own document only.

    y_t = softmax(q_t k_s^T / sqrt(D)) v_s   over s <= t with d_s = d_t,   d_t = ends of text among the tokens before t

A row of training tokens holds several documents in a row, each closed by the end of text, which belongs to the document
that it closes.  `end_of_text` is its id: 0 of the tokenizers that ablab trains and of SmolLM2, 50256 of GPT-2; another
than the tokens' own is refused where they are opened.  Where a row is one document it is causal attention.

The mask is dense: torch's kernels spend time on the hidden keys, and FLOPs are counted as of causal attention, since
how long documents are is a matter of the text.  Positions go on through the row: rotary ones are relative.
"""

from ablab.core.language.declare import Stage, Where
from ablab.core.language.numbers import Natural
from ablab.core.language.part import Part, part
from ablab.core.recipe.edit import append, edit, put
from ablab.core.recipe.intervention import register

ROW = "past/row"  # of the carry: the tokens so far, [B,S]


@part("remember_row")
class RememberRow(Part):
    """The tokens go into the carry, those that a cache has seen too."""

    def build(self, where: Where) -> Stage:
        return Stage(remember)


@register(
    "document_mask",
    order=20,
    slots=("model.on_embedding", "model.attention.mix"),
    acts_late=True,  # random tokens of a large vocabulary hold no end of text
    off="each query sees all keys up to its own position, across documents",
    source="Llama 3, arXiv:2407.21783, section 3.2 (little effect in pre-training, more on long sequences); "
    "Zhao et al., arXiv:2402.13991",
)
class DocumentMask(Part):
    """Hide from a query the documents before its own in the row."""

    end_of_text: Natural = 0  # its id

    def apply(self, recipe):
        remembering = edit(recipe, "model.on_embedding", append(RememberRow()))
        return edit(remembering, "model.attention.mix", put(self))

    def build(self, where: Where) -> Stage:
        return Stage(within_documents, end_of_text=self.end_of_text)


def remember(x, tokens, carry):
    """tokens: int [B,T] -> int [B,S] in the carry, S = those before and these."""
    from torch import cat

    before = carry.get(ROW)
    row = tokens if before is None else cat((before, tokens), dim=1)
    return x, {**carry, ROW: row}


def within_documents(q, k, v, carry, start, *, end_of_text):
    """q: [B,H,T,D] at positions start..start+T-1; k, v: [B,KV,S,D] at 0..S-1, S = start + T.  Returns [B,H,T,D]."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    ends = (carry[ROW] == end_of_text).long()
    documents = ends.cumsum(1) - ends  # [B,S]
    own = documents[:, start:, None] == documents[:, None, :]
    pairs = (q.shape[2], k.shape[2])
    causal = torch.ones(pairs, dtype=torch.bool, device=q.device).tril(start)
    visible = (own & causal).unsqueeze(1)  # one for all heads
    grouped = q.shape[1] != k.shape[1]
    return scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=grouped)
