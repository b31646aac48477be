"""`ablab list` and `ablab show`: what there is, and what an experiment would run."""

import json
from pathlib import Path
from typing import Annotated

import typer

from ablab.core.errors import UserError
from ablab.core.store.store import Store
from ablab.experiments.cli.asked import prepare, run_of, store_of
from ablab.experiments.cli.options import Json, Name, Overrides, Plugins, Scale, Where


def list_(plugins: Plugins = None, store: Where = None, as_json: Json = False) -> None:
    """Interventions and experiments, those of this folder and of the store too, a line each."""
    from ablab.ablations.design import DESIGNS, summary_of
    from ablab.ablations.registry import discover
    from ablab.core.recipe.load import read_yaml
    from ablab.experiments.plan.sheets import catalog

    interventions = [
        {"name": name, "summary": one.about.summary, "off": one.about.off}
        for name, one in sorted(discover(plugins or ()).items())
    ]
    designs = [{"name": name, "summary": summary_of(name)} for name in DESIGNS]
    experiments = [
        {"name": name, "question": read_yaml(path).get("question", "")}
        for name, path in catalog().items()
    ]
    beside = _sheets_here()
    held = _held(store_of(store))
    if as_json:
        found = {
            "interventions": interventions,
            "designs": designs,
            "experiments": experiments,
            "here": beside,
            "store": held,
        }
        return typer.echo(json.dumps(found, indent=1))
    named = [*interventions, *designs, *experiments, *beside, *held]
    column = max(len(one["name"]) for one in named)
    typer.echo("Interventions")
    for one in interventions:
        typer.echo(f"  {one['name']:<{column}} {one['summary']}")
        typer.echo(f"  {'':<{column}} off: {one['off']}")
    typer.echo("\nDesigns")
    for one in designs:
        typer.echo(f"  {one['name']:<{column}} {one['summary']}")
    _section("Experiments", experiments, column)
    _section("Experiments in this folder", beside, column)
    _section(f"In {store_of(store).root} (--store or $ABLAB_STORE names another)", held, column)


def _section(title: str, experiments: list[dict[str, str]], column: int) -> None:
    if experiments:
        typer.echo(f"\n{title}")
    for one in experiments:
        typer.echo(f"  {one['name']:<{column}} {one['question']}")


def _sheets_here() -> list[dict[str, str]]:
    """The experiment files of the current folder: YAML with a question."""
    from ablab.core.recipe.load import read_yaml

    found = []
    for path in sorted(Path().glob("*.y*ml")):
        try:
            question = read_yaml(path).get("question")
        except UserError:  # no sheet, or one that `ablab run` will refuse with its reason
            continue
        if isinstance(question, str):
            found.append({"name": str(path), "question": question})
    return found


def _held(store: Store) -> list[dict[str, str]]:
    """The experiments of the store, with the number of their runs."""
    found = []
    for name in store.experiments():
        try:
            plan = store.read_plan(name)
        except UserError as damage:
            found.append({"name": name, "question": str(damage)})
            continue
        done = sum(store.run(row.run).result_path.is_file() for row in plan.rows)
        found.append({"name": name, "question": f"{done} of {len(plan.rows)} runs ended"})
    return found


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
    scale: Scale = None,
    plugins: Plugins = None,
    store: Where = None,
) -> None:
    """The resolved recipe of an arm, its identity and cost; or what differs between two arms."""
    from ablab.experiments.cli.printing import show_difference, show_recipe

    experiment, _ = prepare(name, overrides, plugins, store_of(store), scale=scale)
    runs = experiment.runs(experiment.sheet.seeds[:1] or [0])
    run = run_of(runs, cell or runs[0].cell)
    if diff is None:
        return show_recipe(experiment, run)
    of_the_sheet = diff == "base" and diff not in experiment.cell_named
    other = experiment.base if of_the_sheet else run_of(runs, diff).recipe
    show_difference(experiment.name, run, other, diff)
