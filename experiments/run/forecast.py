"""What a grid would cost, before anything runs.  No torch here."""

from dataclasses import dataclass, field

import typer

from ablab.core.errors import UserError
from ablab.core.model.cost import cost_of
from ablab.core.recipe.recipe import Recipe
from ablab.core.runtime.runtime import Runtime
from ablab.core.store.planned import Factors, notes_on_design
from ablab.core.store.result import FINISHED, RETRY, Result
from ablab.core.store.store import Store
from ablab.experiments.plan.experiment import Experiment, PlannedRun
from ablab.experiments.run.capacity import default_jobs, gpus_for, training_at_once
from ablab.experiments.run.executor import Launcher
from ablab.experiments.run.progress import duration
from ablab.experiments.run.sharing import GPU_RATE, GPU_REST, why_at_once, with_turns
from ablab.experiments.run.succession import needed, once
from ablab.experiments.text import count

# FLOP/s of one worker while nothing of the experiment has been measured; of a GPU: GPU_RATE
GUESS_CPU = 1.5e10

DAY = 86400.0  # seconds: a grid of more on a CPU is told what a GPU would take


@dataclass(frozen=True)
class Beginning:
    """Seconds that are no training step.  On two quiet cores, and on one H100 with full caches."""

    start: float  # until the first worker is ready
    trace: float  # of an arm's liveness, besides the arithmetic of its steps
    run: float  # building a model, compiling or recording its step, writing its record


BEGINNINGS = {"cpu": Beginning(8.0, 0.5, 0.5), "cuda": Beginning(20.0, 3.0, GPU_REST)}
TRACED_ROWS = 8  # four steps of two rows of the full context: ablations/checks/liveness.py
FORWARD = 1 / 3  # of the FLOPs of a training step: an evaluation goes no way back

LIMIT = 200  # rows printed; --json prints them all


@dataclass(frozen=True)
class ForecastRow:
    cell: str
    seed: int
    run: str
    state: str  # of its result, or "missing"
    parameters: int
    flops: int
    seconds: float


@dataclass(frozen=True)
class Forecast:
    """What is planned (rows, runs) and what of it is missing: tokens, FLOPs, and seconds with `jobs` workers."""

    experiment: str
    rows: list[ForecastRow]
    runs: int
    missing: int
    jobs: int
    tokens: int
    flops: int
    seconds: float
    rate: str  # "measured" or "guessed"
    device: str  # in words
    overhead: (
        float  # of `seconds`: start-up, liveness, and what each run takes besides its steps
    )
    device_seconds: float  # of one device that does all that is missing
    no_data: list[str]  # token folders that the store lacks; with them come other identities
    on_a_gpu: float | None = (
        None  # seconds on one H100, where no GPU is seen and a CPU would take days
    )
    factors: Factors | None = None  # of a crossed design
    infeasible: dict[str, str] = field(default_factory=dict)  # cell -> why it cannot be built
    at_once: str = ""  # why several train at once on a GPU though nobody asked, in words


@dataclass(frozen=True)
class Elsewhere:
    """Machines that are not this one."""

    runtime: Runtime  # with a device
    seats: int  # runs at a time
    place: str  # in words


def seats_of(launcher: Launcher, experiment: Experiment, jobs: int | None) -> Elsewhere | None:
    """Where a launcher would train; None for this machine.  Raises UserError for what it would refuse."""
    recipes = [one for chain in experiment.stage_recipes.values() for one in chain]
    runtime = launcher.checked(experiment.sheet.runtime, recipes)
    place = launcher.place(runtime)
    if not place:
        return None
    return Elsewhere(runtime, jobs or launcher.carried(runtime), place)


def forecast(
    experiment: Experiment,
    runs: list[PlannedRun],
    store: Store,
    jobs: int | None,
    there: Elsewhere | None = None,
) -> Forecast:
    """Seconds go by the pace of the runs that this store holds, or by a guess where it holds none.

    there: None: on this machine.
    """
    runtime = there.runtime if there else with_turns(experiment)
    stages = once(one for run in runs for one in run.chain)
    unique = {run.id: run for run in stages}
    results = {id: _peek(store, id) for id in unique}
    flops = {id: _flops(run.recipe) for id, run in unique.items()}
    work = {id: flops[id] + _evaluating(run.recipe, runtime) for id, run in unique.items()}
    measured = _measured_rate(results, flops)
    rate = measured or (GPU_RATE if _on_gpus(runtime, there) else GUESS_CPU)
    shown = _with_stages(runs)
    claims, _ = needed(runs, lambda id: None if _is_missing(results[id]) else results[id])
    missing = once(claims)
    jobs = there.seats if there else jobs or default_jobs(runtime)
    at_once = jobs if there else training_at_once(runtime, jobs)
    workers = max(min(at_once, len(missing)), 1)
    to_do = sum(work[run.id] for run in missing)
    device = "cuda" if _on_gpus(runtime, there) else "cpu"
    overhead = _overhead(missing, BEGINNINGS[device], rate, workers)
    seconds = to_do / rate / workers
    is_slow = device == "cpu" and seconds > DAY and not there
    return Forecast(
        experiment=experiment.name,
        rows=[_row(run, results[run.id], flops[run.id], work[run.id] / rate) for run in shown],
        runs=len(unique),
        missing=len(missing),
        jobs=jobs,
        tokens=sum(_tokens(run.recipe) for run in missing),
        flops=sum(flops[run.id] for run in missing),
        seconds=seconds + overhead,
        rate="measured" if measured else "guessed",
        device=there.place if there else _device(runtime),
        overhead=overhead,
        device_seconds=to_do / rate,
        no_data=_no_data(missing),
        on_a_gpu=to_do / GPU_RATE if is_slow else None,
        factors=experiment.factors,
        infeasible=experiment.infeasible,
        at_once="" if there or jobs <= len(gpus_for(runtime)) else why_at_once(experiment),
    )


@dataclass
class Pace:
    """How fast runs of one experiment train here, learned from those that do."""

    runtime: Runtime
    # run id -> FLOPs done, and the seconds of training that they took
    seen: dict[str, tuple[float, float]] = field(default_factory=dict)

    def learn(self, run: PlannedRun, step: int, seconds: float) -> None:
        """seconds: of training, over all its resumes, up to that step."""
        if seconds:
            done = _flops(run.recipe) * step / run.recipe.steps
            self.seen[run.id] = (done, seconds)

    def seconds(self, run: PlannedRun) -> float | None:
        """What the whole run will take, with its evaluations and its beginning; None while nothing was measured."""
        if not self.seen:
            return None
        done = sum(flops for flops, _ in self.seen.values())
        taken = sum(seconds for _, seconds in self.seen.values())
        work = _flops(run.recipe) + _evaluating(run.recipe, self.runtime)
        device = "cuda" if gpus_for(self.runtime) else "cpu"
        return work * taken / done + BEGINNINGS[device].run


def _with_stages(runs: list[PlannedRun]) -> list[PlannedRun]:
    """As asked, each after those that it goes on from and that have not been named yet."""
    before = {one.id for run in runs for one in run.before}
    shown: list[PlannedRun] = []
    named: set[str] = set()
    for run in runs:
        for one in run.chain:
            if one.id not in named or one.id not in before:
                shown.append(one)
                named.add(one.id)
    return shown


def _peek(store: Store, id: str) -> Result | None:
    """A damaged result counts as none; the run itself will name it."""
    try:
        return store.run(id).result()
    except UserError:
        return None


def _is_missing(result: Result | None) -> bool:
    return result is None or result.status in RETRY


def _tokens(recipe: Recipe) -> int:
    return recipe.tokens_after(recipe.steps)


def _flops(recipe: Recipe) -> int:
    return cost_of(recipe).flops_per_token * _tokens(recipe)


def _evaluating(recipe: Recipe, runtime: Runtime) -> int:
    """FLOPs of all evaluations of a run."""
    passes = min(runtime.evaluations, recipe.steps)
    tokens = recipe.data.held_out * passes
    return int(cost_of(recipe).flops_per_token * tokens * FORWARD)


def _overhead(missing: list[PlannedRun], each: Beginning, rate: float, workers: int) -> float:
    """Seconds before and between the steps: start-up, each arm's liveness once, each run's own."""
    if not missing:
        return 0.0
    arms = {run.cell: run.recipe for run in missing}
    traced = sum(
        cost_of(recipe).flops_per_token * TRACED_ROWS * recipe.data.context
        for recipe in arms.values()
    )
    between = len(arms) * each.trace + traced / rate + len(missing) * each.run
    return each.start + between / workers


def _device(runtime: Runtime) -> str:
    gpus = len(gpus_for(runtime))
    if not gpus:
        return "this CPU"
    return f"{gpus} GPUs" if gpus > 1 else "1 GPU"


def _no_data(missing: list[PlannedRun]) -> list[str]:
    """What must be tokenized before: a folder, or a mix by its name."""
    names = [run.recipe.data.name for run in missing if run.recipe.data.digest is None]
    return sorted(set(names))


def _measured_rate(results: dict[str, Result | None], flops: dict[str, int]) -> float | None:
    """FLOP/s over the runs that have finished; None where none has."""
    seconds = {
        id: result.seconds
        for id, result in results.items()
        if result and result.status == FINISHED and result.seconds
    }
    if not seconds:
        return None
    return sum(flops[id] for id in seconds) / sum(seconds.values())


def _on_gpus(runtime: Runtime, there: Elsewhere | None) -> bool:
    return runtime.device == "cuda" if there else bool(gpus_for(runtime))


def _row(run: PlannedRun, result: Result | None, flops: int, seconds: float) -> ForecastRow:
    return ForecastRow(
        cell=run.title,
        seed=run.recipe.seed,
        run=run.id,
        state=result.status if result else "missing",
        parameters=cost_of(run.recipe).parameters,
        flops=flops,
        seconds=seconds,
    )


# -- showing it --------------------------------------------------------------------------------------------------------
def show_forecast(found: Forecast) -> None:
    width = max(len(row.cell) for row in found.rows)
    typer.echo(
        f"{'cell':<{width}}  seed  run               state         params      FLOPs     time"
    )
    for row in found.rows[:LIMIT]:
        identity = f"{row.cell:<{width}}  {row.seed:>4}  {row.run}  {row.state:<12}"
        cost = f"{count(row.parameters):>8}  {row.flops:.2e}  {duration(row.seconds):>7}"
        typer.echo(f"{identity}  {cost}")
    if len(found.rows) > LIMIT:
        typer.echo(f"... and {len(found.rows) - LIMIT:,} more (--json prints all)")
    named = [(row.cell, row.run) for row in found.rows]
    for note in notes_on_design(found.factors, found.infeasible, named):
        typer.echo(f"design: {note}")
    work = f"{found.tokens / 1e6:,.1f} M tokens, {found.flops:.2e} FLOPs"
    time = f"about {duration(found.seconds)} on {found.device}, {found.jobs} at a time"
    parts = f"{found.rate} rate; {duration(found.overhead)} of it start-up and liveness"
    typer.echo(
        f"\n{found.experiment}: {found.runs:,} runs, {found.missing:,} missing: {work}, {time} ({parts})"
    )
    if found.at_once:
        typer.echo(f"They train at once, not in turn (runtime.turns): {found.at_once}")
    if found.on_a_gpu:
        typer.echo(
            f"No GPU is seen here, and this grid wants one: about {duration(found.on_a_gpu)} on one H100"
        )
    if found.no_data:
        names = ", ".join(found.no_data)
        typer.echo(
            f"The store lacks the tokens of {names} (`ablab data`): these ids will change with them"
        )
