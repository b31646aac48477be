"""A model that was trained with ablab, as transformers runs it.  Needs torch and transformers alone.

config.json holds its plan: which stages stand at which place, with their numbers and the shapes of their parameters.
The functions of the stages stand at the end of this file, as they were trained; what is absent from the plan was off.

    B rows, T new tokens, S tokens with those in the cache, W channels, H heads, KV key-value heads, D channels a head

Pads (attention_mask 0) are seen by nobody, enter as zeros, and count for no position: a padded row has the logits of
the row by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

# Name -> function of the stages; filled at the end of an exported file.
STAGES: dict[str, Callable[..., Any]] = {}
Plan = dict[str, Any]
Carry = dict[str, Tensor]


class AblabConfig(PreTrainedConfig):
    """plan: what the model holds, place by place."""

    model_type = "ablab"
    keys_to_ignore_at_inference = ["past_key_values"]

    def __init__(self, plan: Plan | None = None, use_cache: bool = True, **more: Any):
        self.plan = plan or {}
        self.use_cache = use_cache
        super().__init__(**more)


class Tables(nn.Module):
    """Constant tensors, saved with the weights."""

    def __init__(self, shapes: dict[str, list[int]]):
        super().__init__()
        for name, shape in shapes.items():
            self._buffers[name] = torch.zeros(shape)


class Angles(Tables):
    """Of one kind of rotary positions: cos and sin, [context, R/2]."""

    cos: Tensor
    sin: Tensor

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """int [B,T] -> cos and sin there, [B,T,1,R/2]."""
        return self.cos[positions][:, :, None], self.sin[positions][:, :, None]


class Stage(nn.Module):
    """A function of the plan with its parameters, maps, tables and numbers bound by name.

    Written into torch's own tables, for registration refuses names such as `half` and `type`.
    """

    def __init__(self, plan: Plan):
        super().__init__()
        self.function = STAGES[plan["function"]]
        self.numbers = plan["numbers"]
        self.start = plan["start"]
        for name, shape in plan["parameters"].items():
            self._parameters[name] = nn.Parameter(torch.empty(shape))
        self.maps = plan["maps"]
        for name, (rows, columns) in self.maps.items():
            self._modules[name] = nn.Linear(columns, rows, bias=False)
        self.tables = Tables(plan["tables"])

    def forward(self, *inputs: Any) -> Any:
        maps = {name: self._modules[name] for name in self.maps}
        tables = self.tables._buffers
        return self.function(*inputs, **self._parameters, **maps, **tables, **self.numbers)


class Stages(nn.Module):
    """The stages of a slot, in their order."""

    def __init__(self, plans: dict[str, Plan]):
        super().__init__()
        for name, plan in plans.items():
            self._modules[name] = Stage(plan)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._modules.values())


@dataclass
class Seen:
    """What all blocks share of one forward.

    turns: cos and sin of the new tokens, [B,T,1,R/2], for each kind of positions in the plan.
    masks: which keys a query sees, bool [B,1,T,S], by window; None: all up to its own position, with no mask.
    """

    turns: list[tuple[Tensor, Tensor]]
    masks: dict[int | None, Tensor | None]
    causal: bool  # without a mask: whether a query sees only the keys up to its own
    cache: Cache | None


class Attention(nn.Module):
    def __init__(self, plan: Plan, layer: int):
        super().__init__()
        rows, columns = plan["qkv"]
        self.heads = plan["heads"]  # H, KV, KV
        self.position = plan["position"]
        self.window = plan["window"]
        self.layer = layer
        self.norm = Stage(plan["norm"])
        self.on_norm = Stages(plan["on_norm"])
        self.qkv = nn.Linear(columns, rows, bias=False)
        self.on_qk = Stages(plan["on_qk"])
        self.on_values = Stages(plan["on_values"])
        self.on_heads = Stages(plan["on_heads"])
        self.out = nn.Linear(plan["out"][1], plan["out"][0], bias=False)
        self.on_branch = Stages(plan["on_branch"])

    def forward(self, seen: Seen, x: Tensor, carry: Carry) -> tuple[Tensor, Carry]:
        """x: [B,T,W] -> the branch's output [B,T,W]."""
        x = self.norm(x)
        for stage in self.on_norm:
            x = stage(x)
        heads = self.qkv(x).unflatten(-1, (sum(self.heads), -1))
        q, k, v = heads.split(self.heads, dim=2)
        for stage in self.on_qk:
            q, k = stage(q, k)
        cos, sin = seen.turns[self.position]
        q = turn(q, cos, sin)
        k = turn(k, cos, sin)
        for stage in self.on_values:
            v, carry = stage(v, carry)
        y = self.mix(seen, q, k, v)
        for stage in self.on_heads:
            y = stage(y, x)
        y = self.out(y.flatten(2))
        for stage in self.on_branch:
            y = stage(y)
        return y, carry

    def mix(self, seen: Seen, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q: [B,T,H,D]; k, v: [B,T,KV,D] of the new tokens -> [B,T,H,D]."""
        q = q.transpose(1, 2)
        k = k.transpose(1, 2)
        v = v.transpose(1, 2)
        if seen.cache is not None:
            k, v = seen.cache.update(k, v, self.layer)
        mask = seen.masks[self.window]
        grouped = q.shape[1] != k.shape[1]
        causal = mask is None and seen.causal
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=grouped
        )
        return y.transpose(1, 2)


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x: [B,T,H,D]; cos, sin: [B,T,1,R/2].  Of the first R channels, i turns with i + R/2; the others stay."""
    turning = 2 * cos.shape[-1]
    still = x[..., turning:]
    a, b = x[..., :turning].chunk(2, dim=-1)
    one = a * cos - b * sin
    other = b * cos + a * sin
    return torch.cat((one, other, still), dim=-1)


class FeedForward(nn.Module):
    def __init__(self, plan: Plan):
        super().__init__()
        self.norm = Stage(plan["norm"])
        self.on_norm = Stages(plan["on_norm"])
        self.inner = Stage(plan["inner"])
        self.on_branch = Stages(plan["on_branch"])

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        for stage in self.on_norm:
            x = stage(x)
        x = self.inner(x)
        for stage in self.on_branch:
            x = stage(x)
        return x


class Block(nn.Module):
    def __init__(self, plan: Plan, layer: int):
        super().__init__()
        self.on_block = Stages(plan["on_block"])
        self.block = Stage(plan["block"])
        self.attention = Attention(plan["attention"], layer)
        self.ffn = FeedForward(plan["ffn"])

    def forward(self, seen: Seen, x: Tensor, carry: Carry) -> tuple[Tensor, Carry]:
        for stage in self.on_block:
            x, carry = stage(x, carry)
        return self.block(x, carry, partial(self.attention, seen), self.ffn)


class Past(DynamicLayer):
    """What later tokens look back at besides keys and values: an entry of the carry, kept behind the blocks' layers."""

    def __init__(self, name: str):
        super().__init__()
        self.name = name

    @property
    def value(self) -> Tensor:
        assert self.keys is not None, "kept before it is asked for"
        return self.keys

    def keep(self, value: Tensor) -> None:
        self.keys = self.values = value
        self.dtype, self.device = value.dtype, value.device
        self.is_initialized = True


class AblabForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = AblabConfig
    base_model_prefix = ""
    _no_split_modules = ["Block"]
    _supports_sdpa = True
    _is_stateful = True  # a carried `past/...` cannot be cut back, as assisted generation would

    def __init__(self, config: AblabConfig):
        super().__init__(config)
        plan = config.plan
        vocab, width = plan["table"]
        self.embed_tokens = nn.Embedding(vocab, width)
        self.on_table = Stages(plan["on_table"])
        self.on_embedding = Stages(plan["on_embedding"])
        self.tables = nn.ModuleList(map(Angles, plan["positions"]))
        self.blocks = nn.ModuleList(Block(one, i) for i, one in enumerate(plan["blocks"]))
        self.on_features = Stages(plan["on_features"])
        self.norm = Stage(plan["norm"])
        if not plan["tied"]:
            self.lm_head = nn.Linear(width, vocab, bias=False)
        self.on_logits = Stages(plan["on_logits"])
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embed_tokens = value  # type: ignore[assignment]

    def get_output_embeddings(self) -> nn.Module | None:
        return getattr(self, "lm_head", None)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Of a model that is made without weights: matrices with std 1/sqrt(fan in), the table as it was planned."""
        match module:
            case nn.Embedding():
                module.weight.normal_(0.0, self.config.plan["table_std"])
            case nn.Linear():
                module.weight.normal_(0.0, module.in_features**-0.5)
            case Stage():
                for name, value in module.named_parameters(recurse=False):
                    value.fill_(module.start[name])

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        **more: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """input_ids: int [B,T]; attention_mask: [B,S], 0 for pads; labels: int [B,T], -100 for none."""
        if input_ids is None or inputs_embeds is not None:
            raise ValueError("this model reads input_ids: its stages may look tokens up")
        if output_attentions or output_hidden_states:
            raise ValueError("this model gives out neither attentions nor hidden states")
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        cache = past_key_values if use_cache else None
        x = self.features(input_ids, attention_mask, position_ids, cache)
        kept = (
            slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        )
        logits = self.read(x[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, self.config.vocab_size, **more)
        output = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache)
        return output if return_dict is not False else output.to_tuple()

    def features(
        self,
        tokens: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: Cache | None,
    ) -> Tensor:
        """What the readout reads: normed [B,T,W]."""
        before = 0 if cache is None else cache.get_seq_length()
        there = self.present(tokens, attention_mask, before)
        seen = self.seen(tokens, there, position_ids, before, cache)
        carry = self.recalled(cache)
        x = self.embed_tokens(tokens)
        for stage in self.on_table:
            x = stage(x)
        if there is not None:
            x = x * there[:, before:, None]
        for stage in self.on_embedding:
            x, carry = stage(x, tokens, carry)
        for block in self.blocks:
            x, carry = block(seen, x, carry)
        for stage in self.on_features:
            x = stage(x, carry)
        self.remember(cache, carry)
        return self.norm(x)

    def read(self, x: Tensor) -> Tensor:
        """x: normed [B,T,W] -> logits [B,T,V]."""
        tied = self.config.plan["tied"]
        logits = F.linear(x, self.embed_tokens.weight) if tied else self.lm_head(x)
        for stage in self.on_logits:
            logits = stage(logits)
        return logits

    def present(self, tokens: Tensor, mask: Tensor | None, before: int) -> Tensor | None:
        """bool [B,S], False for pads; None: there are none."""
        if mask is None:
            return None
        length = before + tokens.shape[1]
        if mask.shape != (len(tokens), length):
            raise ValueError(
                f"attention_mask must have shape {[len(tokens), length]}, not {list(mask.shape)}"
            )
        there = mask.bool()
        return None if there.all() else there

    def seen(
        self,
        tokens: Tensor,
        there: Tensor | None,
        position_ids: Tensor | None,
        before: int,
        cache: Cache | None,
    ) -> Seen:
        if cache is not None and cache.is_compileable:
            raise ValueError("this model decodes with a dynamic cache, not with a static one")
        new = tokens.shape[1]
        place = torch.arange(before + new, device=tokens.device)
        if position_ids is None:
            counted = place[None]
            if there is not None:
                counted = (there.cumsum(1) - 1).clamp(min=0)
            position_ids = counted[:, before:]
        context = self.config.max_position_embeddings
        if before + new > context and position_ids.max() >= context:
            raise ValueError(f"a row of {before + new} tokens exceeds the context of {context}")
        turns = [angles(position_ids) for angles in self.tables]
        windows = {block["attention"]["window"] for block in self.config.plan["blocks"]}
        distance = place[before:, None] - place  # [T,S], of a key behind the query
        masks = {window: self.mask(distance, there, window) for window in windows}
        return Seen(turns, masks, new > 1 and not before, cache)

    def mask(self, distance: Tensor, there: Tensor | None, window: int | None) -> Tensor | None:
        new, length = distance.shape
        if there is None and window is None and new in (1, length):
            return None
        visible = distance >= 0
        if window is not None:
            visible = visible & (distance < window)
        if there is None:
            return visible[None, None]
        # a pad sees itself, for a softmax over nothing is not a number
        own = distance == 0
        visible = visible & there[:, None] | own
        return visible[:, None]

    def recalled(self, cache: Cache | None) -> Carry:
        """The carry as the tokens before left it."""
        layers = cache.layers if cache is not None else []
        return {layer.name: layer.value for layer in layers if isinstance(layer, Past)}

    def remember(self, cache: Cache | None, carry: Carry) -> None:
        if cache is None:
            return
        kept = {layer.name: layer for layer in cache.layers if isinstance(layer, Past)}
        for name, value in carry.items():
            if name.startswith("past/"):
                if name not in kept:
                    kept[name] = Past(name)
                    cache.layers.append(kept[name])
                kept[name].keep(value)
