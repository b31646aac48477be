"""The plan of a model: every stage and parameter it will have, before any tensor exists.  No torch here."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any

from ablab.core.errors import UserError
from ablab.core.language.declare import Linear, Param, Stage, Where, linear, multiplied
from ablab.core.language.offers import LogitFactor, UnitRows, only
from ablab.core.parts.norm import eps_of, gain_of, multiply, rms_norm
from ablab.core.recipe.asks import MayBuild, Multiplies, Parametrizes, Product
from ablab.core.recipe.edit import at
from ablab.core.recipe.recipe import Model, Recipe
from ablab.core.recipe.slots import Slot, slot_at

Stages = dict[str, Stage]
# The built module -> what runs in the place of the stages that a kernel has claimed (core/fusion/rewrite.py).
Kernel = Callable[[Any], Any]


@dataclass(frozen=True)
class AttentionPlan:
    norm: Stage
    on_norm: Stages
    qkv: Linear  # [(H + 2 KV) D, W]: queries, keys, values
    on_qk: Stages
    position: Stage
    on_values: Stages
    mix: Stage
    on_heads: Stages
    out: Linear
    on_branch: Stages
    kernel: Kernel | None = None


@dataclass(frozen=True)
class FeedForwardPlan:
    norm: Stage
    on_norm: Stages
    inner: Stage
    on_branch: Stages
    kernel: Kernel | None = None


@dataclass(frozen=True)
class BlockPlan:
    on_block: Stages
    block: Stage
    attention: AttentionPlan
    ffn: FeedForwardPlan
    kernel: Kernel | None = None


@dataclass(frozen=True)
class Plan:
    embedding: Stage
    on_table: Stages  # the parametrization's multiplier of the embedding
    on_embedding: Stages
    blocks: tuple[BlockPlan, ...]
    on_features: Stages
    norm: Stage
    readout: Linear | None  # None: tied to the embedding
    on_logits: Stages
    objective: Stages
    kernel: Kernel | None = None


def plan_of(recipe: Recipe) -> Plan:
    return plan_for(
        recipe.model,
        recipe.parametrization,
        recipe.objective,
        recipe.data.vocab,
        recipe.data.context,
    )


# A grid has many cells and few shapes: 10,000 dry cells plan a handful of models.
@lru_cache(maxsize=256)
def plan_for(
    model: Model,
    parametrization: Parametrizes,
    objective: tuple[MayBuild, ...],
    vocab: int,
    context: int,
) -> Plan:
    """Raises UserError for a part whose stage is made for another slot."""
    scale = parametrization.multipliers(model)
    slots = {"model": model, "objective": objective}
    places = wheres(model, vocab, context)
    sites = [Site(slots, replace(where, branch=scale.branch)) for where in places]
    outside = sites[0]
    plan = Plan(
        embedding=Stage(embed, table=Param((vocab, model.width), "embedding")),
        on_table=_factor(scale.embedding),
        on_embedding=outside.stages("model.on_embedding"),
        blocks=tuple(_block(model, site) for site in sites),
        on_features=outside.stages("model.on_features"),
        norm=_norm(model),
        readout=None if model.tied else linear(model.width, vocab, role="readout"),
        on_logits={**_factor(scale.logits), **outside.stages("model.on_logits")},
        objective=outside.stages("objective"),
    )
    return multiplied(plan, partial(_product, model.products)) if model.products else plan


def _block(model: Model, site: "Site") -> BlockPlan:
    width, dim = model.width, model.attention.head_dim
    rows = (model.heads * dim, model.kv_heads * dim, model.kv_heads * dim)
    attention = AttentionPlan(
        norm=_norm(model),
        on_norm=site.stages("model.on_norm"),
        qkv=linear(width, sum(rows), blocks=rows, head=dim),
        on_qk=site.stages("model.attention.on_qk"),
        position=site.stage("model.attention.position"),
        on_values=site.stages("model.attention.on_values"),
        mix=site.stage("model.attention.mix"),
        on_heads=site.stages("model.attention.on_heads"),
        out=linear(rows[0], width),
        on_branch=_factor(site.where.branch),
    )
    ffn = FeedForwardPlan(
        norm=_norm(model),
        on_norm=site.stages("model.on_norm"),
        inner=site.stage("model.ffn"),
        on_branch=_factor(site.where.branch),
    )
    return BlockPlan(
        on_block=site.stages("model.on_block"),
        block=site.stage("model.block"),
        attention=attention,
        ffn=ffn,
    )


@dataclass(frozen=True)
class Site:
    """One place of the model: what the parts in the recipe's slots build there."""

    slots: Mapping[str, Any]  # the recipe, or those of its branches that build
    where: Where

    def stage(self, path: str) -> Stage:
        """The choice in the slot at `path`."""
        part = at(self.slots, path)
        stage = slot_at(path).stage(part, self.where)
        if stage is None:
            raise UserError(f"{path}={part.kind} builds nothing; a choice must build a stage")
        return stage

    def stages(self, path: str) -> Stages:
        """Kind -> stage, of the ordered parts in the slot at `path`."""
        return build_stages(slot_at(path), at(self.slots, path), self.where)


def build_stages(slot: Slot, parts: tuple[MayBuild, ...], where: Where) -> Stages:
    """Names come from the kind, not the place in line, so another toggle never renames a parameter."""
    stages: Stages = {}
    for part in parts:
        name = part.kind
        copy = 1
        while name in stages:
            copy += 1
            name = f"{part.kind}_{copy}"
        if stage := slot.stage(part, where):
            stages[name] = stage
    return stages


def wheres(model: Model, vocab: int, context: int) -> list[Where]:
    """Each layer's place, in their order."""
    first = Where(
        layer=0,
        layers=model.layers,
        width=model.width,
        heads=model.heads,
        kv_heads=model.kv_heads,
        head_dim=model.attention.head_dim,
        context=context,
        vocab=vocab,
        eps=model.norm_eps,
    )
    return [replace(first, layer=layer) for layer in range(model.layers)]


def _norm(model: Model) -> Stage:
    gain = Param((model.width,), "vector", fill=1.0)
    return Stage(rms_norm, offer=UnitRows(gain_of, eps_of), gain=gain, eps=model.norm_eps)


def _factor(value: float) -> Stages:
    """A multiplier of exactly 1 is absent."""
    if value == 1.0:
        return {}
    return {"multiplier": Stage(multiply, offer=LogitFactor(only("factor")), factor=value)}


def _product(parts: tuple[Multiplies, ...], path: str, declared: Linear) -> Product | None:
    offered = [(part.kind, part.product(path, declared)) for part in parts]
    kinds = [kind for kind, product in offered if product]
    if len(kinds) > 1:
        raise UserError(
            f"model.products: {' and '.join(kinds)} each multiply {path}; keep one of them"
        )
    return next((product for _, product in offered if product), None)


def embed(tokens, *, table):
    """tokens: int [B,T] -> [B,T,W]."""
    from torch.nn.functional import embedding

    return embedding(tokens, table)
