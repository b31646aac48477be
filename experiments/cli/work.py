"""`ablab run`, `ablab study` and `ablab report`: train what is missing, and say what came of it."""

import json
from dataclasses import asdict
from typing import Annotated

import typer

from ablab.core.errors import UserError
from ablab.core.store.planned import notes_on_design
from ablab.experiments.cli.asked import folders_of, prepare, store_of
from ablab.experiments.cli.options import (
    Jobs,
    Json,
    Name,
    Overrides,
    Plugins,
    Quiet,
    Scale,
    Where,
)

STUDY = (
    "Tune each arm of an experiment over its study's space, confirm the winners on other seeds, and report.  "
    "Goes on where it was."
)


def run(
    name: Name,
    overrides: Overrides = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="cells, identities, what is missing and what it would cost"
        ),
    ] = False,
    only: Annotated[
        list[str] | None,
        typer.Option(help="cells to run: a name, a pattern, or !pattern; repeat for more"),
    ] = None,
    seeds: Annotated[
        str | None, typer.Option(help="such as 0-4 or 0,3,7 (the experiment's)")
    ] = None,
    scale: Scale = None,
    jobs: Jobs = None,
    mlflow: Annotated[bool, typer.Option(help="show the runs in MLflow")] = True,
    run_inert: Annotated[
        bool,
        typer.Option(
            "--run-inert", help="also train arms in which the liveness check sees no difference"
        ),
    ] = False,
    quiet: Quiet = False,
    plugins: Plugins = None,
    store: Where = None,
    as_json: Json = False,
) -> None:
    """Train what is missing of an experiment, then print the verdicts.  Ask twice, run once."""
    from ablab.experiments.plan.selection import chosen

    where = store_of(store)
    experiment, runs = prepare(name, overrides, plugins, where, seeds, scale)
    if not runs:
        raise UserError(
            f"{experiment.name} names no seeds; write seeds: [0, 1, 2], or give --seeds 0-2"
        )
    picked = chosen(runs, only or [])
    if dry_run:
        from ablab.experiments.run.forecast import forecast, show_forecast

        found = forecast(experiment, picked, where, jobs)
        if as_json:
            return typer.echo(json.dumps(asdict(found), indent=1))
        show_forecast(found)
        for note in experiment.not_kept:
            typer.echo(f"scale: {note}")
        return None
    from ablab.experiments.cli.printing import show_outcome
    from ablab.experiments.run.progress import watcher
    from ablab.experiments.run.runner import execute

    watching = watcher(experiment.sheet.metric.name, quiet or as_json)
    try:
        for note in notes_on_design(experiment.factors, experiment.infeasible):
            watching.say(f"design: {note}")
        for note in experiment.not_kept:
            watching.note(f"scale: {note}")
        outcome = execute(
            experiment,
            where,
            runs,
            watching,
            jobs,
            folders_of(plugins),
            mlflow,
            run_inert,
            picked,
        )
    finally:
        watching.close()
    show_outcome(where, experiment.name, outcome, as_json)
    if outcome.failed:
        raise typer.Exit(1)


def study(
    name: Name,
    overrides: Overrides = None,
    storage: Annotated[
        str | None,
        typer.Option(
            envvar="ABLAB_STORAGE",
            show_envvar=False,
            help="an Optuna URL, or journal:PATH; $ABLAB_STORAGE (STORE/optuna.db)",
        ),
    ] = None,
    jobs: Jobs = None,
    mlflow: Annotated[bool, typer.Option(help="show the trials in MLflow")] = True,
    quiet: Quiet = False,
    plugins: Plugins = None,
    store: Where = None,
    as_json: Json = False,
) -> None:
    """As STUDY says."""
    where = store_of(store)
    experiment, _ = prepare(name, overrides, plugins, where)
    from ablab.experiments.cli.printing import show_study
    from ablab.experiments.run.progress import watcher
    from ablab.experiments.tune.confirmation import confirm
    from ablab.experiments.tune.study import Study

    folders = folders_of(plugins)
    watching = watcher(experiment.sheet.metric.name, quiet or as_json)
    try:
        record = Study(experiment, where, watching, storage).tune(jobs, folders, mlflow)
        if experiment.sheet.seeds:
            confirm(experiment, where, watching, record, jobs, folders, mlflow)
    finally:
        watching.close()
    show_study(where, experiment.name, as_json)


def report(
    name: Name,
    overrides: Overrides = None,
    mixed: Annotated[
        bool,
        typer.Option(
            "--mixed",
            help="also where the runs differ in code, precision or kernels; the report says so first",
        ),
    ] = False,
    plugins: Plugins = None,
    store: Where = None,
    as_json: Json = False,
) -> None:
    """The verdict table; writes report.md, a forest plot and the loss curves into STORE/reports/NAME."""
    from ablab.core.language.parse import near
    from ablab.experiments.cli.printing import show_report
    from ablab.experiments.plan.sheets import catalog

    where = store_of(store)
    held: list[str] = []
    for one in where.experiments():
        held += [one.removesuffix("@study"), one]
    held = list(dict.fromkeys(held))
    known = [*held, *catalog()]
    if not name.endswith((".yaml", ".yml")) and name not in known:
        raise UserError(
            f"no experiment {name!r} in {where.root} (--store or $ABLAB_STORE names another). "
            f"{near(name, known)}It holds: {', '.join(held) or 'none'}"
        )
    if overrides or name not in held:
        experiment, _ = prepare(name, overrides, plugins, where)
        name = experiment.name
        where.check_owner(name, experiment.origin)
    show_report(where, name, as_json, mixed=mixed)
