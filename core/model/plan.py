"""The plan of a model: every stage and parameter it will have, before any tensor exists.  No torch here."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial

from ablab.core.errors import UserError
from ablab.core.language.declare import Linear, Param, Stage, Where, linear, multiplied
from ablab.core.language.part import Part
from ablab.core.parts.norm import multiply, rms_norm
from ablab.core.recipe.recipe import Model, Recipe

Stages = dict[str, Stage]


@dataclass(frozen=True)
class AttentionPlan:
    norm: Stage
    on_norm: Stages
    qkv: Linear  # [(H + 2 KV) D, W]: queries, keys, values
    on_qk: Stages
    position: Stage
    on_values: Stages
    on_heads: Stages
    out: Linear
    on_branch: Stages


@dataclass(frozen=True)
class FeedForwardPlan:
    norm: Stage
    on_norm: Stages
    inner: Stage
    on_branch: Stages


@dataclass(frozen=True)
class BlockPlan:
    attention: AttentionPlan
    ffn: FeedForwardPlan


@dataclass(frozen=True)
class Plan:
    embedding: Stage
    on_embedding: Stages
    blocks: tuple[BlockPlan, ...]
    norm: Stage
    readout: Linear | None  # None: tied to the embedding
    on_logits: Stages


def plan_of(recipe: Recipe) -> Plan:
    return plan_for(
        recipe.model, recipe.parametrization, recipe.data.vocab, recipe.data.context
    )


@lru_cache(
    maxsize=256
)  # a grid has many cells and few shapes: 10,000 dry cells plan a handful of models
def plan_for(model: Model, parametrization: Part, vocab: int, context: int) -> Plan:
    scale = parametrization.multipliers(model)
    on_logits = build_stages(model.on_logits, _where(model, 0, context))
    plan = Plan(
        embedding=Stage(embed, table=Param((vocab, model.width), "embedding")),
        on_embedding=_factor(scale.embedding),
        blocks=tuple(
            _block(model, _where(model, layer, context), scale.branch)
            for layer in range(model.layers)
        ),
        norm=_norm(model),
        readout=None if model.tied else linear(model.width, vocab, role="readout"),
        on_logits={**_factor(scale.logits), **on_logits},
    )
    return multiplied(plan, partial(_product, model.products)) if model.products else plan


def _product(parts: tuple[Part, ...], path: str, declared: Linear) -> Callable | None:
    chosen = [
        (part.kind, product) for part in parts if (product := part.product(path, declared))
    ]
    if len(chosen) > 1:
        raise UserError(
            f"model.products: {' and '.join(kind for kind, _ in chosen)} each multiply {path}; keep one of them"
        )
    return chosen[0][1] if chosen else None


def _where(model: Model, layer: int, context: int) -> Where:
    return Where(
        layer,
        model.layers,
        model.width,
        model.heads,
        model.kv_heads,
        model.attention.head_dim,
        context,
        model.norm_eps,
    )


def _block(model: Model, where: Where, branch: float) -> BlockPlan:
    attention, dim = model.attention, where.head_dim
    rows = (where.heads * dim, where.kv_heads * dim, where.kv_heads * dim)
    return BlockPlan(
        AttentionPlan(
            norm=_norm(model),
            on_norm=build_stages(model.on_norm, where),
            qkv=linear(where.width, sum(rows), blocks=rows, head=dim),
            on_qk=build_stages(attention.on_qk, where),
            position=attention.position.build(where),
            on_values=build_stages(attention.on_values, where),
            on_heads=build_stages(attention.on_heads, where),
            out=linear(rows[0], where.width),
            on_branch=_factor(branch),
        ),
        FeedForwardPlan(
            norm=_norm(model),
            on_norm=build_stages(model.on_norm, where),
            inner=model.ffn.build(where),
            on_branch=_factor(branch),
        ),
    )


def _norm(model: Model) -> Stage:
    return Stage(rms_norm, gain=Param((model.width,), "vector", fill=1.0), eps=model.norm_eps)


def _factor(value: float) -> Stages:
    """A multiplier of exactly 1 is absent."""
    return {} if value == 1.0 else {"multiplier": Stage(multiply, factor=value)}


def embed(tokens, *, table):
    """tokens: int [B,T] -> [B,T,W]."""
    from torch.nn.functional import embedding

    return embedding(tokens, table)


def build_stages(parts: tuple[Part, ...], where: Where) -> Stages:
    """Kind -> stage.  Names come from the kind, not the place in line, so another toggle never renames a parameter."""
    stages: Stages = {}
    for part in parts:
        name, copy = part.kind, 1
        while name in stages:
            copy += 1
            name = f"{part.kind}_{copy}"
        if stage := part.build(where):  # None: nothing at this place
            stages[name] = stage
    return stages
