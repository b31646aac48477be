"""The same service for all: a place is served by a kernel only where every cell of an experiment can have it there."""

from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from ablab.core.recipe.recipe import Recipe, plain
from ablab.core.runtime.runtime import KernelPlace, Runtime


def settle_service(
    runtime: Runtime, recipes: Iterable[Recipe], plugins: Iterable[str | Path]
) -> Runtime:
    """The runtime, with the places that kernels serve in all of the recipes named in the place of `same`.

    Asked in a process of its own: it imports torch and opens the GPU, and both go with it.
    """
    if runtime.kernels != "same":
        return runtime
    wanted = [plain(recipe) for recipe in recipes]
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as apart:
        named = apart.submit(common_of_plain, runtime, wanted, [*map(str, plugins)])
        return replace(runtime, kernels=named.result())


def common_of_plain(
    runtime: Runtime, wanted: list[dict[str, Any]], plugins: list[str]
) -> tuple[KernelPlace, ...]:
    from ablab.ablations.registry import discover
    from ablab.core.language.parse import parse

    discover(plugins)
    return common_places(runtime, [parse(Recipe, one, "") for one in wanted])


def common_places(runtime: Runtime, recipes: Iterable[Recipe]) -> tuple[KernelPlace, ...]:
    """Places that kernels would serve in each recipe that has them, were they free to choose, in the order of names."""
    from ablab.core.fusion.places import places
    from ablab.core.runtime.runtime import settle

    free = replace(runtime, kernels="auto")
    somewhere: set[KernelPlace] = set()
    refused: set[KernelPlace] = set()
    for recipe in recipes:
        settled = settle(free, recipe.batches.largest_micro_batch)
        for place, one in places(recipe, settled).items():
            (somewhere if one.kernel else refused).add(place)
    return tuple(sorted(somewhere - refused))
