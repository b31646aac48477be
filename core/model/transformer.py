"""The transformer: a fixed trunk whose slots hold only what is switched on.

No configuration is read in a forward: an absent stage is an empty loop, and a compiled graph does not see it.
Shapes: B rows, T tokens, W channels, H heads, KV key-value heads, D channels a head, V vocabulary.
"""

import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ablab.core.model.layers import LinearMap, StageModule, stages
from ablab.core.model.plan import AttentionPlan, BlockPlan, FeedForwardPlan, plan_of
from ablab.core.recipe.recipe import Recipe

Carry = dict[
    str, Tensor
]  # handed from block to block; a stage returns a new one, never mutates it
Past = tuple[Tensor, Tensor]  # keys and values seen so far, [B,KV,T,D] each


class Attention(nn.Module):
    def __init__(self, plan: AttentionPlan, head_dim: int):
        super().__init__()
        self.norm, self.on_norm = StageModule(plan.norm), stages(plan.on_norm)
        self.qkv, self.out = LinearMap(plan.qkv), LinearMap(plan.out)
        self.on_qk, self.position = stages(plan.on_qk), StageModule(plan.position)
        self.on_values, self.on_heads = stages(plan.on_values), stages(plan.on_heads)
        self.on_branch = stages(plan.on_branch)
        self.heads = [rows // head_dim for rows in plan.qkv.weight.blocks]  # H, KV, KV
        self.mix = functools.partial(
            F.scaled_dot_product_attention, enable_gqa=self.heads[0] != self.heads[1]
        )
        self.attend = self._attend  # core/fusion/places.py may put one kernel here

    def forward(self, x: Tensor, carry: Carry) -> tuple[Tensor, Carry]:
        """x: [B,T,W] -> the branch's output [B,T,W]; causal over the T tokens given."""
        y, carry = self.attend(self.normed(x), carry)
        return self.merge(y), carry

    def _attend(self, x: Tensor, carry: Carry) -> tuple[Tensor, Carry]:
        """x: normed [B,T,W] -> the heads' outputs [B,T,H,D]."""
        q, k, v, carry = self.project(x, carry, 0)
        return self.gated(self.mix(q, k, v, is_causal=True), x), carry

    def extend(self, x: Tensor, carry: Carry, past: Past) -> tuple[Tensor, Carry, Past]:
        """The same for T new tokens that follow `past`."""
        x, seen = self.normed(x), past[0].shape[2]
        q, k, v, carry = self.project(x, carry, seen)
        past = torch.cat((past[0], k), dim=2), torch.cat((past[1], v), dim=2)
        visible = torch.ones(
            q.shape[2], past[0].shape[2], dtype=torch.bool, device=x.device
        ).tril(seen)
        return self.merge(self.gated(self.mix(q, *past, attn_mask=visible), x)), carry, past

    def normed(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        for stage in self.on_norm.values():
            x = stage(x)
        return x

    def project(
        self, x: Tensor, carry: Carry, start: int
    ) -> tuple[Tensor, Tensor, Tensor, Carry]:
        """normed x -> q [B,H,T,D], k and v [B,KV,T,D], carry."""
        q, k, v = self.qkv(x).unflatten(-1, (sum(self.heads), -1)).split(self.heads, dim=2)
        for stage in self.on_qk.values():
            q, k = stage(q, k)
        q, k = self.position(q, k, start)
        for stage in self.on_values.values():
            v, carry = stage(v, carry)
        return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), carry

    def gated(self, y: Tensor, x: Tensor) -> Tensor:
        """y: [B,H,T,D], x: normed [B,T,W] -> [B,T,H,D]."""
        y = y.transpose(1, 2)
        for stage in self.on_heads.values():
            y = stage(y, x)
        return y

    def merge(self, y: Tensor) -> Tensor:
        """y: [B,T,H,D] -> the branch's output [B,T,W]."""
        y = self.out(y.flatten(2))
        for stage in self.on_branch.values():
            y = stage(y)
        return y


class FeedForward(nn.Module):
    def __init__(self, plan: FeedForwardPlan):
        super().__init__()
        self.norm, self.on_norm = StageModule(plan.norm), stages(plan.on_norm)
        self.inner, self.on_branch = StageModule(plan.inner), stages(plan.on_branch)

    def forward(self, x: Tensor) -> Tensor:
        """[B,T,W] -> the branch's output [B,T,W]."""
        x = self.norm(x)
        for stage in self.on_norm.values():
            x = stage(x)
        x = self.inner(x)
        for stage in self.on_branch.values():
            x = stage(x)
        return x


class Block(nn.Module):
    def __init__(self, plan: BlockPlan, head_dim: int):
        super().__init__()
        self.attention, self.ffn = Attention(plan.attention, head_dim), FeedForward(plan.ffn)

    def forward(self, x: Tensor, carry: Carry) -> tuple[Tensor, Carry]:
        y, carry = self.attention(x, carry)
        x = x + y
        return x + self.ffn(x), carry

    def extend(self, x: Tensor, carry: Carry, past: Past) -> tuple[Tensor, Carry, Past]:
        y, carry, past = self.attention.extend(x, carry, past)
        x = x + y
        return x + self.ffn(x), carry, past


class Transformer(nn.Module):
    """recompute: how many of the first blocks keep no activations and run again in the backward pass."""

    def __init__(self, recipe: Recipe, dtype: torch.dtype = torch.float32, recompute: int = 0):
        super().__init__()
        plan, head_dim = plan_of(recipe), recipe.model.attention.head_dim
        self.embedding, self.on_embedding = (
            StageModule(plan.embedding),
            stages(plan.on_embedding),
        )
        self.blocks = nn.ModuleList(Block(block, head_dim) for block in plan.blocks)
        self.norm = StageModule(plan.norm)
        if plan.readout:
            self.readout = LinearMap(plan.readout)
        self.on_logits = stages(plan.on_logits)
        self.dtype, self.context, self.shape = dtype, recipe.data.context, recipe.model
        self.run = [
            _recomputed(block) if i < recompute else block
            for i, block in enumerate(self.blocks)
        ]
        self.read = (
            functools.partial(self.readout) if plan.readout else self._tied_readout
        )  # partial: not registered twice

    def _tied_readout(self, x: Tensor) -> Tensor:
        return F.linear(x, self.embedding.table.to(x.dtype))

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens: int [B,T] -> logits [B,T,V] in the activations' dtype."""
        return self.logits(self.features(tokens))

    def features(self, tokens: Tensor) -> Tensor:
        """What the readout reads: tokens int [B,T] -> normed [B,T,W]."""
        return self.norm(self.trunk(tokens))

    def trunk(self, tokens: Tensor) -> Tensor:
        """What the blocks leave: tokens int [B,T] -> [B,T,W]."""
        x, carry = self.embed(tokens), {}
        for block in self.run:
            x, carry = block(x, carry)
        return x

    def extend(self, tokens: Tensor, cache: list[Past] | None) -> tuple[Tensor, list[Past]]:
        """Logits [B,T,V] of T new tokens, given the cache of the tokens before them (None: there are none)."""
        empty = torch.empty(
            tokens.shape[0],
            self.shape.kv_heads,
            0,
            self.shape.attention.head_dim,
            dtype=self.dtype,
            device=tokens.device,
        )
        x, carry, grown = self.embed(tokens), {}, []
        for block, past in zip(
            self.blocks, cache or [(empty, empty)] * len(self.blocks), strict=True
        ):
            x, carry, past = block.extend(x, carry, past)
            grown.append(past)
        return self.logits(self.norm(x)), grown

    def embed(self, tokens: Tensor) -> Tensor:
        return self.enter(self.embedding(tokens))

    def enter(self, x: Tensor) -> Tensor:
        """x: rows of the token table [B,T,W] -> what the first block reads, in the activations' dtype."""
        for stage in self.on_embedding.values():
            x = stage(x)
        return x.to(self.dtype)

    def logits(self, x: Tensor) -> Tensor:
        """x: normed [B,T,W]."""
        logits = self.read(x)
        for stage in self.on_logits.values():
            logits = stage(logits)
        return logits


def _recomputed(block: Block) -> Callable:
    """The block is bound here, not looked up in a loop: a late-bound loop variable recomputes the wrong block.

    Nothing in a block is random, and a CUDA graph cannot record the state of a generator.
    """
    return functools.partial(checkpoint, block, use_reentrant=False, preserve_rng_state=False)
