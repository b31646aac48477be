"""Which values a query mixes, and how: causal softmax attention.  Functions are pure."""

from ablab.core.language.declare import Stage, Where
from ablab.core.language.offers import CausalMix
from ablab.core.language.part import Part, part


@part("causal")
class Causal(Part):
    """y = softmax(q k^T / sqrt(D)) v, each query over the keys up to its own position."""

    def build(self, where: Where) -> Stage:
        return Stage(causal, offer=CausalMix())


def causal(q, k, v, carry, start):
    """q: [B,H,T,D] at positions start..start+T-1; k, v: [B,KV,S,D] at 0..S-1, S = start + T.  Returns [B,H,T,D]."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    grouped = q.shape[1] != k.shape[1]
    if start == 0:  # no mask is made: the form that flash kernels know
        return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=grouped)
    pairs = (q.shape[2], k.shape[2])
    visible = torch.ones(pairs, dtype=torch.bool, device=q.device).tril(start)
    return scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=grouped)
