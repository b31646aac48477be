"""What a model weighs and what a token costs, counted on its plan.  No torch here."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from ablab.core.language.declare import Where, params
from ablab.core.model.plan import plan_for, wheres
from ablab.core.recipe.asks import Builds, CountsKeys, CountsReadouts, MayBuild, Parametrizes
from ablab.core.recipe.recipe import SCHEMA, Model, Recipe, identity_of


@dataclass(frozen=True)
class Cost:
    """What a model weighs.  FLOPs count a multiply-add as two, and of attention only the keys that a query sees."""

    parameters: int
    matmul_parameters: int
    flops_per_token: int  # forward and backward


def cost_of(recipe: Recipe) -> Cost:
    """FLOPs/token = 6 * matmul parameters + 12 * width * keys that a query sees on average, summed over the layers.

    The last term: scores and mixing.  Causal attention sees T/2 keys; a mix that sees fewer says so (CountsKeys).
    The readout counts once more for each time that an objective reads (CountsReadouts).
    """
    return _cost(
        recipe.model,
        recipe.parametrization,
        recipe.objective,
        recipe.data.vocab,
        recipe.data.context,
    )


def facts_of(recipe: Recipe) -> dict[str, Any]:
    """What run.json says of a recipe, for readers that know none.

    size: parameters, FLOPs a token (forward and backward), steps, tokens.  identity: what the run's name rests on
    besides recipe.yaml.
    """
    cost = cost_of(recipe)
    size = {
        "parameters": cost.parameters,
        "flops_per_token": cost.flops_per_token,
        "steps": recipe.steps,
        "tokens": recipe.tokens_after(recipe.steps),
    }
    identity = {"schema": SCHEMA, "plugins": identity_of(recipe)["plugins"]}
    return {"size": size, "identity": identity}


@lru_cache(maxsize=256)
def _cost(
    model: Model,
    parametrization: Parametrizes,
    objective: tuple[MayBuild, ...],
    vocab: int,
    context: int,
) -> Cost:
    plan = plan_for(model, parametrization, objective, vocab, context)
    declared = [one for _, one in params(plan)]
    matmul = sum(one.size for one in declared if one.role in ("hidden", "readout", "gate"))
    if model.tied:
        matmul += vocab * model.width
    again = sum(part.readouts() for part in objective if isinstance(part, CountsReadouts))
    multiplied = matmul + again * vocab * model.width
    mix = model.attention.mix
    keys = sum(keys_seen(mix, where) for where in wheres(model, vocab, context))
    channels = model.heads * model.attention.head_dim
    return Cost(
        parameters=sum(one.size for one in declared),
        matmul_parameters=matmul,
        flops_per_token=6 * multiplied + round(12 * channels * keys),
    )


def keys_seen(mix: Builds, where: Where) -> float:
    """By a query of one layer, on average over a row; a mix that does not say is counted as causal."""
    return mix.keys_seen(where) if isinstance(mix, CountsKeys) else where.context / 2
