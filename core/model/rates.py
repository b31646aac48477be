"""How fast each parameter moves, and which parameters move together in a bank.  No torch here."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from ablab.core.language.declare import Param, params
from ablab.core.model.plan import plan_of
from ablab.core.recipe.recipe import Chain, Recipe, Role

Key = tuple[Any, ...]


@dataclass(frozen=True)
class Rates:
    """The factors of a bank's members on the learning rate (with the chain's own) and on the decay rate."""

    lr: tuple[float, ...]
    decay: tuple[float, ...]

    @property
    def even(self) -> bool:
        return len(set(self.lr)) == 1 and len(set(self.decay)) == 1


def bank_of(declared: Param) -> Key:
    """Equal for parameters that stand in one bank."""
    return declared.role, declared.shape, declared.blocks, declared.head


def chain_of(declared: Param, recipe: Recipe) -> Chain:
    return recipe.optim.chains[cast(Role, declared.role)]


def width_rule(chain: Chain) -> str:
    """How the chain's learning rate scales with width under muP; '' when no step says."""
    return next((part.width_rule for part in chain.steps if part.width_rule), "")


def rates_of(names: Sequence[str], declared: Param, recipe: Recipe) -> Rates:
    """names: dotted, of parameters that are all declared so."""
    chain = chain_of(declared, recipe)
    rule = width_rule(chain)
    parametrization, model = recipe.parametrization, recipe.model
    scales = [parametrization.scales(name, declared, model, rule) for name in names]
    return Rates(
        lr=tuple(one.lr * chain.lr for one in scales),
        decay=tuple(one.decay for one in scales),
    )


def uneven_roles(recipe: Recipe) -> list[str]:
    """Roles of which some bank's members differ in learning rate or decay."""
    banks: dict[Key, list[str]] = {}
    declared_as: dict[Key, Param] = {}
    for name, declared in params(plan_of(recipe)):
        key = bank_of(declared)
        banks.setdefault(key, []).append(name)
        declared_as[key] = declared
    uneven = [
        declared_as[key].role
        for key, names in banks.items()
        if not rates_of(names, declared_as[key], recipe).even
    ]
    return list(dict.fromkeys(uneven))
