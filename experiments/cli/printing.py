"""What the commands print of recipes, verdicts, studies and the coordinate check."""

import hashlib
import importlib.util
import json
import shlex
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import typer

from ablab.core.errors import UserError
from ablab.core.store.planned import command, notes_on_design
from ablab.core.store.store import Store
from ablab.experiments.text import count, table
from ablab.experiments.track.chosen import TENSORBOARD, TITLES, WANDB, Tracked

if TYPE_CHECKING:
    from ablab.analysis.effects.simulation import Figure
    from ablab.analysis.pages.report import Report
    from ablab.analysis.pages.sizes import SizesReport
    from ablab.core.recipe.recipe import Recipe
    from ablab.core.runtime.runtime import Runtime
    from ablab.experiments.plan.experiment import Experiment, PlannedRun
    from ablab.experiments.run.pool import Outcome

# Columns of a report that a narrow terminal goes without; its page has them all.
SPARE = ("x, 95 %", "x reference", "tokens/s", "sd", "runs", "mean", "p (Holm)")
LONGEST_FOLDER = 120  # characters of a report's folder
SPARE_OF_STUDY = ("95 % interval", "optimum")
SPARE_OF_CONFIRMATION = ("tuning moves it by", "verdict", "own setting")


# -- recipes -----------------------------------------------------------------------------------------------------------
def show_recipe(experiment: "Experiment", run: "PlannedRun") -> None:
    from ablab.core.language.written import dump
    from ablab.core.recipe.recipe import plain

    _head(experiment.name, run)
    for note in notes_on_design(experiment.factors, experiment.infeasible):
        typer.echo(f"# design: {note}")
    _kernels(experiment.sheet.runtime, run.recipe)
    typer.echo(dump(plain(run.recipe)), nl=False)


def show_difference(experiment: str, run: "PlannedRun", other: "Recipe", name: str) -> None:
    """Each leaf of the recipe in which `run` differs from the recipe `other`, whose name is `name`."""
    from ablab.core.recipe.edit import diff
    from ablab.core.recipe.recipe import plain

    _head(experiment, run)
    paired = replace(other, seed=run.recipe.seed)
    changes = diff(plain(paired), plain(run.recipe))
    for path, (old, now) in changes.items():
        typer.echo(f"{path}: {_written(old)} -> {_written(now)}")
    if not changes:
        typer.echo(f"no difference from {name}")


def _written(value: Any) -> str:
    """As the recipe shows it: true, 1e-10, a word; it can be typed again."""
    from ablab.core.language.written import typed

    if value is None:
        return "absent"
    return str(value).lower() if isinstance(value, bool) else typed(value)


def _head(experiment: str, run: "PlannedRun") -> None:
    from ablab.core.model.cost import cost_of

    recipe = run.recipe
    cost = cost_of(recipe)
    typer.echo(f"# {experiment}, cell {run.cell!r}, seed {recipe.seed}: run {run.id}")
    typer.echo(
        f"# {count(cost.parameters)} parameters, {count(cost.matmul_parameters)} in matrix products, "
        f"{cost.flops_per_token / 1e6:.1f} MFLOP a token, "
        f"{recipe.steps:,} steps of {_tokens_a_step(recipe)} tokens"
    )


def _tokens_a_step(recipe: "Recipe") -> str:
    sizes = {span.windows * recipe.data.context for span in recipe.batches.spans if span.steps}
    least, most = min(sizes), max(sizes)
    return f"{most:,}" if least == most else f"{least:,} to {most:,}"


def _kernels(runtime: "Runtime", recipe: "Recipe") -> None:
    """What serves each place on this machine."""
    from ablab.core.fusion.places import places
    from ablab.core.runtime.runtime import settle

    for place, served in places(
        recipe, settle(runtime, recipe.batches.largest_micro_batch)
    ).items():
        typer.echo(f"# {place}: {served.why}")


# -- verdicts ----------------------------------------------------------------------------------------------------------
def show_outcome(
    store: Store, name: str, outcome: "Outcome", as_json: bool, more: dict[str, Any] = {}
) -> None:
    """The report after `ablab run`; that every run diverged or failed is an answer too.  more: what else JSON says."""
    done = {"outcome": asdict(outcome), **more}
    try:
        show_report(store, name, as_json, done)
    except UserError as lacking:
        if not as_json:
            return typer.echo(f"no verdict: {lacking}", err=True)
        found = {"experiment": name, "effects": [], "warnings": [str(lacking)]}
        typer.echo(json.dumps(found | done, indent=1))


def show_report(
    store: Store, name: str, as_json: bool, more: dict[str, Any] = {}, mixed: bool = False
) -> None:
    """The verdicts; of a study that confirms nothing, the winners.  Raises UserError where no run has finished.

    more: what else to say in JSON.  mixed: also where runs of different code, precision or kernels stand together.
    """
    from ablab.analysis.effects import frame
    from ablab.analysis.pages import report as reports
    from ablab.core.store.study_record import study_path

    is_study = study_path(store, name).is_file()
    if is_study and not store.plan_path(name).is_file():
        return show_study(store, name, as_json)
    found = reports.read(store, name, mixed)
    if as_json:
        logged = frame.curves(store, name)
        return typer.echo(json.dumps(reports.as_json(found, logged) | more, indent=1))
    folder = store.root / "reports" / name
    pages = _kept(lambda: _write_pages(store, found, folder))
    typer.echo(f"\n{found.plan.question}")
    for sentence in found.mixed:
        typer.echo(f"mixed runs: {sentence}")
    typer.echo(found.answer.replace("`", ""))
    table(reports.table(found.effects), SPARE)
    for effect in found.effects:
        if effect.sentence:
            typer.echo(f"  {effect.sentence}")
    for warning in found.warnings:
        typer.echo(f"warning: {warning}", err=True)
    pictures = (folder / "forest.png", folder / "curves.png")
    drawn = ", ".join(str(picture) for picture in pictures if picture.exists())
    if pages:
        page, text = pages
        typer.echo(f"\npage:   {page}")
        typer.echo(f"report: {text}")
        typer.echo(f"plots:  {drawn}")
    typer.echo(f"MLflow: ablab ui --store {store.root}")
    if is_study:
        typer.echo(f"study:  {command(name, 'study', found.plan.sheet, found.plan.asked)}")


def show_sizes(store: Store, names: list[str], as_json: bool, mixed: bool = False) -> None:
    """How the effects of several experiments, one a size, change with size."""
    from ablab.analysis.pages import sizes

    found = sizes.read(store, names, mixed)
    if as_json:
        return typer.echo(json.dumps(sizes.as_json(found), indent=1))
    folder = store.root / "reports" / _together(names)
    pages = _kept(lambda: _write_sizes(found, folder))
    typer.echo(f"\n{found.title}")
    typer.echo(found.answer.replace("`", ""))
    if found.arms:
        table(sizes.table(found))
    for sentence in sizes.sentences(found):
        typer.echo(f"  {sentence.replace('`', '')}")
    for warning in found.warnings:
        typer.echo(f"warning: {warning}", err=True)
    if pages:
        page, text = pages
        typer.echo(f"\npage:   {page}")
        typer.echo(f"report: {text}")


def _together(names: list[str]) -> str:
    """The folder of a report on several experiments; a digest stands where the names are too long for one."""
    joined = "+".join(names)
    if len(joined) <= LONGEST_FOLDER:
        return joined
    return f"{joined[:LONGEST_FOLDER]}+{hashlib.sha256(joined.encode()).hexdigest()[:8]}"


def _write_sizes(found: "SizesReport", folder: Path) -> tuple[Path, Path]:
    from ablab.analysis.pages import sizes_html
    from ablab.analysis.pages.sizes import write_markdown

    return sizes_html.write(found, folder), write_markdown(found, folder)


def _write_pages(store: Store, found: "Report", folder: Path) -> tuple[Path, Path]:
    """The page that a browser opens, and the same as Markdown with pictures."""
    from ablab.analysis.effects import frame
    from ablab.analysis.pages import html
    from ablab.analysis.pages.report import write_markdown

    logged = frame.curves(store, found.plan.name)
    return html.write(store, found, logged, folder), write_markdown(found, logged, folder)


Written = TypeVar("Written")


def _kept(write: Callable[[], Written]) -> Written | None:
    """What was written; None, after a warning, in a store that can only be read."""
    try:
        return write()
    except (UserError, OSError) as refusal:
        typer.echo(f"warning: no page is written: {refusal}", err=True)
        return None


def show_in_mlflow(store: Store, name: str) -> None:
    """Attach the report to the experiment's summary run; a view that cannot be written costs a warning."""
    if not importlib.util.find_spec("mlflow"):
        return
    from ablab.experiments.track.mlflow_sync import show_report as attach

    try:
        attach(store, name)
    except UserError as lost:
        typer.echo(f"warning: the report is not in MLflow: {lost}", err=True)


def show_places(store: Store, tracked: Tracked) -> None:
    """How the views other than MLflow are opened."""
    if TENSORBOARD in tracked:
        folder = store.root / "tensorboard"
        typer.echo(f"{TITLES[TENSORBOARD]}: tensorboard --logdir {shlex.quote(str(folder))}")
    if WANDB in tracked and any((store.root / "wandb").glob("offline-run-*")):
        waiting = f"{shlex.quote(str(store.root / 'wandb'))}/offline-run-*"
        typer.echo(f"{TITLES[WANDB]}: wandb sync {waiting}")


def show_study(store: Store, name: str, as_json: bool) -> None:
    """The winners of a study, and what became of them on other seeds."""
    from ablab.analysis.pages import study_report

    if as_json:
        return typer.echo(json.dumps(study_report.as_json(store, name), indent=1))
    page = _kept(lambda: study_report.write(store, name, store.root / "reports" / name))
    table(study_report.table(store, name), SPARE_OF_STUDY)
    if confirmed := study_report.compared(store, name):
        typer.echo("\nOn other seeds, at one setting for all arms and at each arm's own")
        table(confirmed, SPARE_OF_CONFIRMATION)
    if page:
        typer.echo(f"\nreport: {page}")
    typer.echo(f"MLflow: ablab ui --store {store.root}")


# -- the coordinate check ----------------------------------------------------------------------------------------------
def show_coords(found: dict[str, Any], out: Path | None, as_json: bool) -> None:
    """How far each tensor moves at each width.  out: a folder for the picture and the numbers."""
    from ablab.analysis.pictures import coords as view
    from ablab.core.store.files import write_atomically

    if out:
        write_atomically(out / "coords.json", json.dumps(found).encode())
        view.draw(found, out / "coords.png")
    if as_json:
        arms = [_without_rows(arm) for arm in found["arms"]]
        return typer.echo(json.dumps(found | {"arms": arms}, indent=1))
    table(view.table(found))
    typer.echo(
        f"\nlr {found['lr']:g}, step {found['steps']}, base width {found['base_width']}; "
        f"flat: within {found['flat']:g} of 0; x: is not.  logits at init: -0.5 is the rule of a random muP readout, "
        "0 of a standard one; not judged, nor is the last line"
    )
    if out:
        typer.echo(f"picture: {out / 'coords.png'}")
        typer.echo(f"numbers: {out / 'coords.json'}")


def _without_rows(arm: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in arm.items() if key != "rows"}


# -- the check of the statistics ---------------------------------------------------------------------------------------
def show_figures(found: "list[Figure]", experiments: int, as_json: bool) -> None:
    """A row per scenario and number of seeds; each share beside its target."""
    if as_json:
        told = {"experiments": experiments, "figures": [asdict(figure) for figure in found]}
        return typer.echo(json.dumps(told, indent=1))
    rows: dict[tuple[str, int], dict[str, str]] = {}
    for figure in found:
        row = rows.setdefault(
            (figure.scenario, figure.seeds),
            {
                "scenario": figure.scenario,
                "seeds": str(figure.seeds),
                "method": figure.method,
                "coverage": "",
                "family-wise error": "",
                "power": "",
            },
        )
        missed = " MISSED" if figure.missed else ""
        row[figure.what] = f"{figure.share:.1f} ({figure.target}){missed}"
    table(list(rows.values()), ("method",))
    typer.echo(
        f"\nper cent of {experiments:,} simulated experiments with ten arms, target in brackets; "
        "family-wise error after Holm; power: one arm shifted by 2 sd"
    )
