"""What a model weighs and what a token costs, counted on its plan.  No torch here."""

from dataclasses import dataclass
from functools import lru_cache

from ablab.core.language.declare import params
from ablab.core.language.part import Part
from ablab.core.model.plan import plan_for
from ablab.core.recipe.recipe import Model, Recipe


@dataclass(frozen=True)
class Cost:
    """What a model weighs.  FLOPs count a multiply-add as two, and attention causally."""

    parameters: int
    matmul_parameters: int
    flops_per_token: int  # forward and backward


def cost_of(recipe: Recipe) -> Cost:
    """FLOPs/token = 6 * matmul parameters + 6 * layers * context * width (causal scores and mixing, T/2 seen on average)."""
    return _cost(recipe.model, recipe.parametrization, recipe.data.vocab, recipe.data.context)


@lru_cache(maxsize=256)
def _cost(model: Model, parametrization: Part, vocab: int, context: int) -> Cost:
    declared = list(params(plan_for(model, parametrization, vocab, context)))
    matmul = sum(p.size for _, p in declared if p.role in ("hidden", "readout", "gate"))
    matmul += vocab * model.width if model.tied else 0
    return Cost(
        sum(p.size for _, p in declared),
        matmul,
        6 * matmul + 6 * model.layers * context * model.heads * model.attention.head_dim,
    )
