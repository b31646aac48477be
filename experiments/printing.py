"""What the commands print: recipes, verdicts, and the tables of both."""

import json
import sys
from dataclasses import asdict, replace
from typing import Any

import typer

from ablab.core.errors import UserError
from ablab.core.record import Store


def show_recipe(experiment: Any, run: Any) -> None:
    from ablab.core.load import dump
    from ablab.core.recipe import plain

    _head(experiment.name, run)
    _kernels(experiment.sheet.runtime, run.recipe)
    typer.echo(dump(plain(run.recipe)), nl=False)


def show_difference(experiment: str, run: Any, other: Any, name: str) -> None:
    """Each leaf of the recipe in which `run` differs from the recipe `other`, whose name is `name`."""
    from ablab.core.edit import diff
    from ablab.core.recipe import plain

    _head(experiment, run)
    changes = diff(plain(replace(other, seed=run.recipe.seed)), plain(run.recipe))
    for path, sides in changes.items():
        old, now = ("absent" if side is None else side for side in sides)
        typer.echo(f"{path}: {old} -> {now}")
    if not changes:
        typer.echo(f"no difference from {name}")


def _head(experiment: str, run: Any) -> None:
    from ablab.core.plan import cost_of

    cost, recipe = cost_of(run.recipe), run.recipe
    typer.echo(f"# {experiment}, cell {run.cell!r}, seed {recipe.seed}: run {run.id}")
    typer.echo(f"# {count(cost.parameters)} parameters, {count(cost.matmul_parameters)} in matrix products, "
               f"{cost.flops_per_token / 1e6:.1f} MFLOP a token, {recipe.steps:,} steps of {recipe.tokens_per_step:,} tokens")  # fmt: skip


def _kernels(runtime: Any, recipe: Any) -> None:
    """What serves each place on this machine."""
    from ablab.core.fuse import places
    from ablab.core.runtime import settle

    for place, served in places(recipe, settle(runtime, recipe.data.batch)).items():
        typer.echo(f"# {place}: {served.why}")


def count(number: int) -> str:
    return f"{number / 1e6:,.1f} M" if number >= 1e5 else f"{number:,}"


def show_report(store: Store, name: str, as_json: bool, more: dict[str, Any] = {}) -> None:
    """The verdicts.  Raises UserError where no run has finished."""
    from ablab.analysis import report as reports

    found, folder = reports.read(store, name), store.root / "reports" / name
    if as_json:
        return typer.echo(json.dumps(reports.as_json(found) | more, indent=1))
    path = reports.write(store, name, folder)
    typer.echo(f"\n{found.plan.question}")
    table(reports.table(found.effects))
    for effect in found.effects:
        if effect.sentence:
            typer.echo(f"  {effect.sentence}")
    for warning in found.warnings:
        typer.echo(f"warning: {warning}", err=True)
    plots = ", ".join(str(picture) for picture in (folder / "forest.png", folder / "curves.png") if picture.exists())
    typer.echo(f"\nreport: {path}\nplots:  {plots}\nMLflow: ablab ui --store {store.root}")


def show_outcome(store: Store, name: str, outcome: Any, as_json: bool) -> None:
    """The report after `ablab run`; that every run diverged or failed is an answer too."""
    done = {"outcome": asdict(outcome)}
    try:
        show_report(store, name, as_json, done)
    except UserError as lacking:
        if as_json:
            typer.echo(json.dumps({"experiment": name, "effects": [], "warnings": [str(lacking)]} | done, indent=1))
        else:
            typer.echo(f"no verdict: {lacking}", err=True)


def show_study(store: Store, name: str, as_json: bool) -> None:
    from ablab.analysis import study_report

    if as_json:
        return typer.echo(json.dumps(study_report.as_json(store, name), indent=1))
    path = study_report.write(store, name, store.root / "reports" / name)
    table(study_report.table(store, name))
    typer.echo(f"\nreport: {path}\nMLflow: ablab ui --store {store.root}")


def table(rows: list[dict[str, str]]) -> None:
    """A rich table on a terminal, aligned columns elsewhere."""
    heads = list(rows[0])
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table

        drawn = Table(*heads, header_style="bold", box=None)
        for row in rows:
            drawn.add_row(*(row[head].replace("[", "\\[") for head in heads))
        return Console().print(drawn)
    widths = [max(len(head), *(len(row[head]) for row in rows)) for head in heads]
    for line in (dict(zip(heads, heads, strict=True)), *rows):
        typer.echo("  ".join(line[head].ljust(width) for head, width in zip(heads, widths, strict=True)).rstrip())
