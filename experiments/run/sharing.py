"""Whether runs that share a GPU train in turn or at once, where `runtime.turns` leaves it open.  No torch here.

Processes share a GPU in slices of time: no two of them compute at one moment, so models too small to fill it train no
faster together (MEASURED).  What jobs at once hide is the rest of a run, in which it does not train.  So they are
chosen where that is the larger part, and for arms such as were measured: eager, of steps no larger.  Nowhere else: a
run whose pace was shared has none to compare, and several models must fit into one memory.
"""

from dataclasses import dataclass, replace

from ablab.core.model.cost import cost_of
from ablab.core.recipe.recipe import Recipe
from ablab.core.runtime.runtime import Runtime
from ablab.core.store.metrics import MEASURED as OF_THE_MACHINE
from ablab.experiments.plan.experiment import Experiment
from ablab.experiments.run.capacity import gpus_for

GPU_RATE = 2.5e14  # FLOP/s of a model that fills an H100, while nothing of it has been measured
GPU_STEP = 2.5e-3  # seconds at least: quickstart's model took 400 steps a second on an H200, as one recorded graph
GPU_REST = 2.0  # seconds of a run, on an H100: building a model, recording its step, evaluating, writing its record


@dataclass(frozen=True)
class Point:
    """Jobs at once on one card beside one alone."""

    what: str
    flops: float  # of a step
    steps: int  # of a run
    jobs: int
    faster: float  # tokens/s of all of them, or runs an hour, over those of one alone


MEASURED = (
    Point("steps of quickstart's model alone, 512 tokens each; H200", 1.5e9, 10_000, 2, 0.91),
    Point("steps of quickstart's model alone, 512 tokens each; H200", 1.5e9, 10_000, 4, 0.92),
    Point("36 runs of quickstart: 47 s, and 78 s one by one; H100", 1.5e9, 196, 4, 1.66),
    Point("36 runs of quickstart: 45 s, and 78 s one by one; H100", 1.5e9, 196, 8, 1.73),
)


LARGEST = 1.6e9  # FLOPs of a step: of larger ones nothing was measured


def seconds_of(flops: float, steps: int) -> float:
    """Training alone on a GPU, at a guess."""
    return max(flops * steps / GPU_RATE, steps * GPU_STEP)


def pays(flops: float, steps: int) -> bool:
    """Whether a run of so many steps trains for less than its rest takes, by steps such as were measured.

    flops: of a step.
    """
    return flops <= LARGEST and seconds_of(flops, steps) < GPU_REST


def with_turns(experiment: Experiment) -> Runtime:
    """Its runtime, with `turns` settled for the GPUs of this machine."""
    runtime = experiment.sheet.runtime
    if runtime.turns is not None:
        return runtime
    return replace(runtime, turns=not why_at_once(experiment))


def why_at_once(experiment: Experiment) -> str:
    """Why its runs train at once on a GPU of this machine though nobody asked, in words; empty where they do not.

    Never where what is judged is the pace or the memory of a run.
    """
    runtime = experiment.sheet.runtime
    asked = runtime.turns is not None or runtime.ranks > 1
    eager = runtime.compile is False
    if asked or not eager or not gpus_for(runtime):
        return ""
    if experiment.sheet.metric.name in OF_THE_MACHINE:
        return ""
    recipes = [one for chain in experiment.stage_recipes.values() for one in chain]
    sizes = [(_flops_a_step(recipe), recipe.steps) for recipe in recipes]
    if not all(pays(flops, steps) for flops, steps in sizes):
        return ""
    longest = max(seconds_of(flops, steps) for flops, steps in sizes)
    return f"a run trains for {longest:.1f} s on a GPU, and its rest takes {GPU_REST:g}"


def _flops_a_step(recipe: Recipe) -> float:
    flops = cost_of(recipe).flops_per_token * recipe.tokens_after(recipe.steps)
    return flops / recipe.steps
