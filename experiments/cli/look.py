"""`ablab list` and `ablab show`: what there is, and what an experiment would run."""

import json
from typing import Annotated

import typer

from ablab.experiments.cli.asked import prepare, run_of, store_of
from ablab.experiments.cli.options import Json, Name, Overrides, Plugins, Where


def list_(plugins: Plugins = None, as_json: Json = False) -> None:
    """Interventions and experiments, a line each."""
    from ablab.ablations.registry import discover
    from ablab.core.recipe.load import read_yaml
    from ablab.experiments.plan.sheets import catalog

    interventions = [
        {"name": name, "summary": one.about.summary, "off": one.about.off}
        for name, one in sorted(discover(plugins or ()).items())
    ]
    experiments = [
        {"name": name, "question": read_yaml(path).get("question", "")}
        for name, path in catalog().items()
    ]
    if as_json:
        found = {"interventions": interventions, "experiments": experiments}
        return typer.echo(json.dumps(found, indent=1))
    column = max(len(one["name"]) for one in [*interventions, *experiments])
    typer.echo("Interventions")
    for one in interventions:
        typer.echo(f"  {one['name']:<{column}} {one['summary']}")
        typer.echo(f"  {'':<{column}} off: {one['off']}")
    typer.echo("\nExperiments")
    for one in experiments:
        typer.echo(f"  {one['name']:<{column}} {one['question']}")


def show(
    name: Name,
    overrides: Overrides = None,
    cell: Annotated[
        str | None, typer.Option(help="one arm of the experiment (the first)")
    ] = None,
    diff: Annotated[
        str | None,
        typer.Option(help="another cell, or `base`: print only what differs from it"),
    ] = None,
    plugins: Plugins = None,
    store: Where = None,
) -> None:
    """The resolved recipe of an arm, its identity and cost; or what differs between two arms."""
    from ablab.experiments.cli.printing import show_difference, show_recipe

    experiment, _ = prepare(name, overrides, plugins, store_of(store))
    runs = experiment.runs(experiment.sheet.seeds[:1] or [0])
    run = run_of(runs, cell or runs[0].cell)
    if diff is None:
        return show_recipe(experiment, run)
    other = experiment.base if diff == "base" else run_of(runs, diff).recipe
    show_difference(experiment.name, run, other, diff)
