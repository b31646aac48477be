"""`ablab plan`: how many seeds a question needs, and what they cost."""

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from ablab.core.errors import UserError
from ablab.experiments.cli.asked import prepare, store_of
from ablab.experiments.cli.options import Jobs, Json, Name, Overrides, Plugins, Where

if TYPE_CHECKING:
    from ablab.experiments.run.noise import FamilyNoise
    from ablab.experiments.run.planner import SeedPlan


def plan(
    name: Name,
    overrides: Overrides = None,
    effect: Annotated[
        float | None,
        typer.Option(
            help="a difference to tell, in the metric's unit (the sheet's equivalence)"
        ),
    ] = None,
    power: Annotated[
        float, typer.Option(help="the chance of a verdict where the difference is that large")
    ] = 0.8,
    spread: Annotated[
        float | None,
        typer.Option(
            help="the sd over seeds of an arm's difference to expect, in the metric's unit (as measured here)"
        ),
    ] = None,
    jobs: Jobs = None,
    plugins: Plugins = None,
    store: Where = None,
    as_json: Json = False,
) -> None:
    """Seeds, runs and hours that an effect of that size needs, by the noise measured here, or by --spread."""
    from ablab.experiments.run.planner import seed_plan

    if effect is not None and not 0 < effect < float("inf"):
        raise UserError(f"--effect {effect:g} must be a number above 0, such as 0.003")
    if spread is not None and not 0 < spread < float("inf"):
        raise UserError(f"--spread {spread:g} must be a number above 0, such as 0.002")
    if not 0 < power < 1:
        raise UserError(f"--power {power:g} must lie between 0 and 1, such as 0.8")
    where = store_of(store)
    experiment, _ = prepare(name, overrides, plugins, where)
    found = seed_plan(experiment, where, effect, power, jobs, spread)
    if as_json:
        return typer.echo(json.dumps(asdict(found), indent=1))
    show(found)


def _row(noise: "FamilyNoise") -> dict[str, str]:
    return {
        "optimizer": noise.family,
        "arms": str(noise.arms),
        "seeds": str(noise.seeds),
        "seed sd": f"{noise.sd:.4f}",
        "rho": "-" if noise.correlation is None else f"{noise.correlation:.2f}",
        "sd of a difference": f"{noise.spread:.4f}",
        "quietest to noisiest arm": f"{noise.quietest:.4f} to {noise.noisiest:.4f}",
    }


def show(found: "SeedPlan") -> None:
    from ablab.analysis.pages.text import number
    from ablab.experiments.run.planner import MOST_SEEDS
    from ablab.experiments.run.progress import duration
    from ablab.experiments.text import table

    if found.noise:
        typer.echo(f"Noise of {found.metric}, measured at this setting")
        table([_row(noise) for noise in found.noise])
        typer.echo()
    typer.echo(
        f"To tell {found.effect:g} with power {found.power:.0%} in a family of {len(found.arms)} arms"
    )
    table(
        [
            {
                "arm": arm.cell,
                "optimizer": arm.family,
                "sd of a difference": f"{arm.spread:.4f}",
                "from": arm.source,
                "seeds": str(arm.seeds or "> 1,000"),
                f"smallest effect at {found.present} seeds": number(arm.smallest, ".4f"),
            }
            for arm in found.arms
        ]
    )
    hours = f"about {duration(3600 * found.hours)} of one device ({found.rate} rate)"
    if found.on_a_gpu:
        hours += f", or {duration(3600 * found.on_a_gpu)} of one H100"
    if found.seeds is None:
        typer.echo(
            f"\n{found.experiment}: more than {MOST_SEEDS} seeds, which would be {found.runs:,} runs, "
            f"{hours}; ask for a larger effect, or train longer"
        )
        return
    typer.echo(
        f"\n{found.experiment}: {found.seeds} seeds, {found.runs:,} runs, {found.missing:,} missing: {hours}"
    )
