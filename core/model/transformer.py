"""The transformer: a fixed trunk whose slots hold only what is switched on.

No configuration is read in a forward: an absent stage is an empty loop, and a compiled graph does not see it.
Shapes: B rows, T tokens, W channels, H heads, KV key-value heads, D channels a head, V vocabulary.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ablab.core.model.layers import LinearMap, StageModule, StageModules, plain_product
from ablab.core.model.plan import AttentionPlan, BlockPlan, FeedForwardPlan, Plan, plan_of
from ablab.core.recipe.recipe import Recipe

# Handed from block to block; a stage returns a new one, never mutates it.
Carry = dict[str, Tensor]
# Keys and values seen so far, [B,KV,S,D] each.
Past = tuple[Tensor, Tensor]
# x [B,T,W], carry -> x, carry.
Layer = Callable[..., tuple[Tensor, Carry]]


@dataclass(frozen=True)
class Cache:
    """What decoding keeps of the tokens seen: each block's keys and values, and the carry's `past/...`."""

    blocks: list[Past]
    carry: Carry


class Attention(nn.Module):
    def __init__(self, plan: AttentionPlan, head_dim: int):
        super().__init__()
        self.norm = StageModule(plan.norm)
        self.on_norm = StageModules(plan.on_norm)
        self.qkv = LinearMap(plan.qkv)
        self.out = LinearMap(plan.out)
        self.on_qk = StageModules(plan.on_qk)
        self.position = StageModule(plan.position)
        self.on_values = StageModules(plan.on_values)
        self.mix = StageModule(plan.mix)
        self.on_heads = StageModules(plan.on_heads)
        self.on_branch = StageModules(plan.on_branch)
        self.heads = [rows // head_dim for rows in plan.qkv.weight.blocks]  # H, KV, KV
        # partial: an object whose type the compiler's guards see, as they see a kernel's
        self.attend = plan.kernel(self) if plan.kernel else partial(self._attend)

    def forward(self, x: Tensor, carry: Carry) -> tuple[Tensor, Carry]:
        """x: [B,T,W] -> the branch's output [B,T,W]; causal over the T tokens given."""
        return self.branch(self.normed(x), carry)

    def branch(self, x: Tensor, carry: Carry) -> tuple[Tensor, Carry]:
        """The same of a normed x."""
        y, carry = self.attend(x, carry)
        return self.merge(y), carry

    def _attend(self, x: Tensor, carry: Carry) -> tuple[Tensor, Carry]:
        """x: normed [B,T,W] -> the heads' outputs [B,T,H,D]."""
        q, k, v, carry = self.project(x, carry, 0)
        return self.gated(self.mix(q, k, v, carry, 0), x), carry

    def extend(self, x: Tensor, carry: Carry, past: Past) -> tuple[Tensor, Carry, Past]:
        """The same for T new tokens that follow `past`."""
        keys, values = past
        seen = keys.shape[2]
        x = self.normed(x)
        q, k, v, carry = self.project(x, carry, seen)
        keys = torch.cat((keys, k), dim=2)
        values = torch.cat((values, v), dim=2)
        y = self.gated(self.mix(q, keys, values, carry, seen), x)
        return self.merge(y), carry, (keys, values)

    def normed(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        for stage in self.on_norm.values():
            x = stage(x)
        return x

    def project(
        self, x: Tensor, carry: Carry, start: int
    ) -> tuple[Tensor, Tensor, Tensor, Carry]:
        """normed x -> q [B,H,T,D], k and v [B,KV,T,D], carry."""
        heads = self.qkv(x).unflatten(-1, (sum(self.heads), -1))
        q, k, v = heads.split(self.heads, dim=2)
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


class Continued:
    """A block's attention that goes on after `past`, and keeps the keys and values of the new tokens too."""

    def __init__(self, attention: Attention, past: Past):
        self.attention = attention
        self.past = past

    def __call__(self, x: Tensor, carry: Carry) -> tuple[Tensor, Carry]:
        y, carry, self.past = self.attention.extend(x, carry, self.past)
        return y, carry


class FeedForward(nn.Module):
    def __init__(self, plan: FeedForwardPlan):
        super().__init__()
        self.norm = StageModule(plan.norm)
        self.on_norm = StageModules(plan.on_norm)
        self.inner = StageModule(plan.inner)
        self.on_branch = StageModules(plan.on_branch)
        # partial: not registered twice
        self.transform = plan.kernel(self) if plan.kernel else partial(self.inner)

    def forward(self, x: Tensor) -> Tensor:
        """[B,T,W] -> the branch's output [B,T,W]."""
        x = self.norm(x)
        for stage in self.on_norm.values():
            x = stage(x)
        return self.branch(x)

    def branch(self, x: Tensor) -> Tensor:
        """The same of a normed x."""
        x = self.transform(x)
        for stage in self.on_branch.values():
            x = stage(x)
        return x


class Block(nn.Module):
    """Two branches, attention and feed-forward; the stage `block` says how they join the stream."""

    def __init__(self, plan: BlockPlan, head_dim: int):
        super().__init__()
        self.attention = Attention(plan.attention, head_dim)
        self.ffn = FeedForward(plan.ffn)
        self.on_block = StageModules(plan.on_block)
        self.block = StageModule(plan.block)
        # partial: as `attend`
        self.join = plan.kernel(self) if plan.kernel else partial(self._join)

    def forward(self, x: Tensor, carry: Carry) -> tuple[Tensor, Carry]:
        return self.join(x, carry)

    def _join(self, x: Tensor, carry: Carry) -> tuple[Tensor, Carry]:
        for stage in self.on_block.values():
            x, carry = stage(x, carry)
        return self.block(x, carry, self.attention, self.ffn)

    def extend(self, x: Tensor, carry: Carry, past: Past) -> tuple[Tensor, Carry, Past]:
        """The same for T new tokens that follow `past`."""
        attention = Continued(self.attention, past)
        for stage in self.on_block.values():
            x, carry = stage(x, carry)
        x, carry = self.block(x, carry, attention, self.ffn)
        return x, carry, attention.past


class Embedding(StageModule):
    """The token table [V,W]; a tied readout reads it too."""

    table: Tensor


class Transformer(nn.Module):
    """recompute: how many of the first blocks keep no activations and run again in the backward pass.

    plan: of the recipe, if kernels have claimed some of its stages (core/fusion/places.py); they name nothing anew.
    """

    def __init__(
        self,
        recipe: Recipe,
        dtype: torch.dtype = torch.float32,
        recompute: int = 0,
        plan: Plan | None = None,
    ):
        super().__init__()
        plan = plan or plan_of(recipe)
        self.shape = recipe.model
        self.context = recipe.data.context
        self.dtype = dtype
        self.embedding = Embedding(plan.embedding)
        self.on_table = StageModules(plan.on_table)
        self.on_embedding = StageModules(plan.on_embedding)
        blocks = [Block(block, recipe.model.attention.head_dim) for block in plan.blocks]
        self.blocks = nn.ModuleList(blocks)
        self.on_features = StageModules(plan.on_features)
        self.norm = StageModule(plan.norm)
        self.read: Callable[[Tensor], Tensor] = self._tied_readout
        if plan.readout:
            self.readout = LinearMap(plan.readout)
            self.read = partial(self.readout)  # partial: not registered twice
        self.on_logits = StageModules(plan.on_logits)
        self.head_kernel = plan.kernel
        self.objective = StageModules(plan.objective)
        recomputed = map(_recomputed, blocks[:recompute])
        self.run: list[Layer] = [*recomputed, *blocks[recompute:]]

    def _tied_readout(self, x: Tensor) -> Tensor:
        return plain_product(x, self.embedding.table)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens: int [B,T] -> logits [B,T,V] in the activations' dtype."""
        return self.logits(self.features(tokens))

    def features(self, tokens: Tensor) -> Tensor:
        """What the readout reads: tokens int [B,T] -> normed [B,T,W]."""
        return self.norm(self.trunk(tokens))

    def trunk(self, tokens: Tensor) -> Tensor:
        """What the final norm reads: tokens int [B,T] -> [B,T,W]."""
        carry: Carry = {}
        x = self.embed(tokens)
        for stage in self.on_embedding.values():
            x, carry = stage(x, tokens, carry)
        for block in self.run:
            x, carry = block(x, carry)
        for stage in self.on_features.values():
            x = stage(x, carry)
        return x

    def extend(self, tokens: Tensor, cache: Cache | None) -> tuple[Tensor, Cache]:
        """Logits [B,T,V] of T new tokens, given the cache of the tokens before them (None: there are none)."""
        before = cache or self._nothing_seen(tokens)
        carry = before.carry
        x = self.embed(tokens)
        for stage in self.on_embedding.values():
            x, carry = stage(x, tokens, carry)
        pasts = []
        for block, past in zip(self.blocks, before.blocks, strict=True):
            x, carry, past = cast(Block, block).extend(x, carry, past)
            pasts.append(past)
        for stage in self.on_features.values():
            x = stage(x, carry)
        kept = {name: value for name, value in carry.items() if name.startswith("past/")}
        return self.logits(self.norm(x)), Cache(pasts, kept)

    def _nothing_seen(self, tokens: Tensor) -> Cache:
        rows = len(tokens)
        empty = torch.empty(
            (rows, self.shape.kv_heads, 0, self.shape.attention.head_dim),
            dtype=self.dtype,
            device=tokens.device,
        )
        return Cache([(empty, empty)] * len(self.blocks), {})

    def embed(self, tokens: Tensor) -> Tensor:
        return self.enter(self.embedding(tokens))

    def enter(self, x: Tensor) -> Tensor:
        """x: rows of the token table [B,T,W] -> scaled, in the activations' dtype."""
        for stage in self.on_table.values():
            x = stage(x)
        return x.to(self.dtype)

    def logits(self, x: Tensor) -> Tensor:
        """x: normed [B,T,W]."""
        logits = self.read(x)
        for stage in self.on_logits.values():
            logits = stage(logits)
        return logits


def _recomputed(block: Block) -> Layer:
    """The block is bound here, not looked up in a loop: a late-bound loop variable recomputes the wrong block.

    Nothing in a block is random, and a CUDA graph cannot record the state of a generator.
    """
    return partial(checkpoint, block, use_reentrant=False, preserve_rng_state=False)
