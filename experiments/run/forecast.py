"""What a grid would cost, before anything runs.  No torch here."""

from typing import Any

import typer

from ablab.core.errors import UserError
from ablab.core.model.cost import cost_of
from ablab.core.store.record import FINISHED, RETRY, Result, Store
from ablab.experiments.cli.printing import count
from ablab.experiments.plan.experiment import Experiment, Run
from ablab.experiments.run.runner import default_jobs, gpus_for

GUESS = {
    "cpu": 1.5e10,
    "gpu": 2.5e14,
}  # FLOP/s of one worker while nothing of the experiment has been measured


def forecast(
    experiment: Experiment, runs: list[Run], store: Store, jobs: int | None
) -> dict[str, Any]:
    """Cells, identities, state, parameters, FLOPs, and seconds of training: measured where this store has runs to go by."""
    unique = {run.id: run for run in runs}
    results = {id: _peek(store, id) for id in unique}
    pending = [
        run for id, run in unique.items() if not results[id] or results[id].status in RETRY
    ]
    flops = {
        id: cost_of(run.recipe).flops_per_token * run.recipe.steps * run.recipe.tokens_per_step
        for id, run in unique.items()
    }
    finished = [
        id
        for id, result in results.items()
        if result and result.status == FINISHED and result.seconds
    ]
    rate = (
        sum(flops[id] for id in finished) / sum(results[id].seconds for id in finished)
        if finished
        else _guess(experiment)
    )
    jobs, gpus = (
        jobs or default_jobs(experiment.sheet.runtime),
        len(gpus_for(experiment.sheet.runtime)),
    )
    rows = [_row(run, results[run.id], flops[run.id], rate) for run in runs]
    at_once = min(jobs, gpus) if gpus and experiment.sheet.runtime.turns else jobs
    seconds = sum(flops[run.id] for run in pending) / rate / max(min(at_once, len(pending)), 1)
    return {
        "experiment": experiment.name,
        "rows": rows,
        "runs": len(unique),
        "missing": len(pending),
        "jobs": jobs,
        "tokens": sum(run.recipe.steps * run.recipe.tokens_per_step for run in pending),
        "flops": sum(flops[run.id] for run in pending),
        "seconds": seconds,
        "rate": "measured" if finished else "guessed",
    }


def _peek(store: Store, id: str) -> Result | None:
    try:
        return store.run(id).result()
    except UserError:
        return None


def _guess(experiment: Experiment) -> float:
    return GUESS["gpu" if gpus_for(experiment.sheet.runtime) else "cpu"]


def _row(run: Run, result: Result | None, flops: int, rate: float) -> dict[str, Any]:
    return {
        "cell": run.cell,
        "seed": run.recipe.seed,
        "run": run.id,
        "state": result.status if result else "missing",
        "parameters": cost_of(run.recipe).parameters,
        "flops": flops,
        "seconds": flops / rate,
    }


LIMIT = 200  # rows printed; --json prints them all


def show_forecast(found: dict[str, Any]) -> None:
    rows = found["rows"]
    width = max(len(row["cell"]) for row in rows)
    typer.echo(
        f"{'cell':<{width}}  seed  run               state         params      FLOPs     time"
    )
    for row in rows[:LIMIT]:
        typer.echo(
            f"{row['cell']:<{width}}  {row['seed']:>4}  {row['run']}  {row['state']:<12}  {count(row['parameters']):>8}  "
            f"{row['flops']:.2e}  {duration(row['seconds']):>7}"
        )
    if len(rows) > LIMIT:
        typer.echo(f"... and {len(rows) - LIMIT:,} more (--json prints all)")
    typer.echo(
        f"\n{found['experiment']}: {found['runs']:,} runs, {found['missing']:,} missing: {found['tokens'] / 1e6:,.1f} M tokens, "
        f"{found['flops']:.2e} FLOPs, about {duration(found['seconds'])} with {found['jobs']} at a time ({found['rate']} rate)"
    )


def duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
