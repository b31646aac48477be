"""What the commands print: recipes, verdicts, and the tables of both."""

import json
import sys
from collections.abc import Iterable
from dataclasses import asdict, replace
from typing import Any

import typer

from ablab.core.errors import UserError
from ablab.core.store.planned import command
from ablab.core.store.store import Store


def show_recipe(experiment: Any, run: Any) -> None:
    from ablab.core.recipe.load import dump
    from ablab.core.recipe.recipe import plain

    _head(experiment.name, run)
    _kernels(experiment.sheet.runtime, run.recipe)
    typer.echo(dump(plain(run.recipe)), nl=False)


def show_difference(experiment: str, run: Any, other: Any, name: str) -> None:
    """Each leaf of the recipe in which `run` differs from the recipe `other`, whose name is `name`."""
    from ablab.core.recipe.edit import diff
    from ablab.core.recipe.recipe import plain

    _head(experiment, run)
    changes = diff(plain(replace(other, seed=run.recipe.seed)), plain(run.recipe))
    for path, sides in changes.items():
        old, now = ("absent" if side is None else _written(side) for side in sides)
        typer.echo(f"{path}: {old} -> {now}")
    if not changes:
        typer.echo(f"no difference from {name}")


def _written(value: Any) -> str:
    """As the recipe shows it: true, 1e-10, a word."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _head(experiment: str, run: Any) -> None:
    from ablab.core.model.cost import cost_of

    cost, recipe = cost_of(run.recipe), run.recipe
    typer.echo(f"# {experiment}, cell {run.cell!r}, seed {recipe.seed}: run {run.id}")
    typer.echo(
        f"# {count(cost.parameters)} parameters, {count(cost.matmul_parameters)} in matrix products, "
        f"{cost.flops_per_token / 1e6:.1f} MFLOP a token, {recipe.steps:,} steps of {recipe.tokens_per_step:,} tokens"
    )


def _kernels(runtime: Any, recipe: Any) -> None:
    """What serves each place on this machine."""
    from ablab.core.fusion.places import places
    from ablab.core.runtime.runtime import settle

    for place, served in places(
        recipe, settle(runtime, recipe.batches.largest_micro_batch)
    ).items():
        typer.echo(f"# {place}: {served.why}")


def count(number: int) -> str:
    return f"{number / 1e6:,.1f} M" if number >= 1e5 else f"{number:,}"


SPARE = (
    "x reference",
    "tokens/s",
    "method",
    "sd",
    "runs",
)  # columns of a report; its page has them all


def show_report(store: Store, name: str, as_json: bool, more: dict[str, Any] = {}) -> None:
    """The verdicts; of a study that confirms nothing, the winners.  Raises UserError where no run has finished."""
    from ablab.analysis.pages import report as reports
    from ablab.core.store.study_record import study_path

    if not store.plan_path(name).is_file() and study_path(store, name).is_file():
        return show_study(store, name, as_json)
    found, folder = reports.read(store, name), store.root / "reports" / name
    if as_json:
        return typer.echo(json.dumps(reports.as_json(found) | more, indent=1))
    path = reports.write(store, name, folder)
    typer.echo(f"\n{found.plan.question}")
    table(reports.table(found.effects), SPARE)
    for effect in found.effects:
        if effect.sentence:
            typer.echo(f"  {effect.sentence}")
    for warning in found.warnings:
        typer.echo(f"warning: {warning}", err=True)
    plots = ", ".join(
        str(picture)
        for picture in (folder / "forest.png", folder / "curves.png")
        if picture.exists()
    )
    typer.echo(f"\nreport: {path}\nplots:  {plots}\nMLflow: ablab ui --store {store.root}")
    if study_path(store, name).is_file():
        typer.echo(f"study:  {command(name, 'study')}")


def show_outcome(store: Store, name: str, outcome: Any, as_json: bool) -> None:
    """The report after `ablab run`; that every run diverged or failed is an answer too."""
    done = {"outcome": asdict(outcome)}
    try:
        show_report(store, name, as_json, done)
    except UserError as lacking:
        if as_json:
            typer.echo(
                json.dumps(
                    {"experiment": name, "effects": [], "warnings": [str(lacking)]} | done,
                    indent=1,
                )
            )
        else:
            typer.echo(f"no verdict: {lacking}", err=True)


def show_study(store: Store, name: str, as_json: bool) -> None:
    from ablab.analysis.pages import study_report

    if as_json:
        return typer.echo(json.dumps(study_report.as_json(store, name), indent=1))
    path = study_report.write(store, name, store.root / "reports" / name)
    table(study_report.table(store, name), ("95 % interval", "optimum"))
    if confirmed := study_report.compared(store, name):
        typer.echo("\nOn other seeds, at one setting for all arms and at each arm's own")
        table(confirmed, ("tuning moves it by", "verdict", "own setting"))
    typer.echo(f"\nreport: {path}\nMLflow: ablab ui --store {store.root}")


def table(rows: list[dict[str, str]], spare: Iterable[str] = ()) -> None:
    """A rich table on a terminal, aligned columns elsewhere.  spare: what a narrow terminal goes without, the first to go first."""
    widths = {head: max(len(head), *(len(row[head]) for row in rows)) for head in rows[0]}
    if sys.stdout.isatty():
        return _drawn(rows, widths, spare)
    for line in ({head: head for head in widths}, *rows):
        typer.echo(
            "  ".join(line[head].ljust(width) for head, width in widths.items()).rstrip()
        )


def _drawn(rows: list[dict[str, str]], widths: dict[str, int], spare: Iterable[str]) -> None:
    from rich.console import Console
    from rich.table import Table

    console, without = Console(), []
    for head in spare:
        if sum(widths.values()) + 2 * (len(widths) - 1) > console.width:
            del widths[head]
            without.append(head)
    drawn = Table(header_style="bold", box=None, pad_edge=False)
    for i, head in enumerate(widths):
        drawn.add_column(head, no_wrap=i == 0)  # the name of an arm is never cut
    for row in rows:
        drawn.add_row(*(row[head].replace("[", "\\[") for head in widths))
    console.print(drawn)
    if without:
        typer.echo(f"(too narrow for: {', '.join(without)})")
