"""The command line.  Heavy imports stay inside the commands: `ablab --help` and `ablab list` load neither torch nor mlflow."""

import errno
import json
import re
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from ablab.core.errors import UserError
from ablab.core.store.record import Store, store_root
from ablab.experiments.cli import bench as bench_cli
from ablab.experiments.cli import check as check_cli
from ablab.experiments.cli import data as data_cli
from ablab.experiments.cli.options import Jobs, Json, Plugins

INTERRUPTED = 130
EXITS = """Exit codes: 0 done (a run that diverged is done); 1 runs failed, or ablab broke; 2 the request cannot be met as asked;
130 interrupted (Ctrl-C or SIGTERM).  `--debug` anywhere shows where an error was raised."""

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    epilog=EXITS,
    help="Ablations for people who pre-train small language models.",
)
app.add_typer(data_cli.app, name="data")
app.add_typer(check_cli.app, name="check")
app.add_typer(bench_cli.app, name="bench")
new = typer.Typer(no_args_is_help=True, help="Write a new file from a template.")
app.add_typer(new, name="new")

Name = Annotated[
    str, typer.Argument(help="a catalog entry, or a path to an experiment's .yaml")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        help="path=value: a recipe path, with.NAME.DOSE, runtime.X, study.X, seeds, design"
    ),
]
Where = Annotated[
    Path | None,
    typer.Option("--store", help="where ablab writes ($ABLAB_STORE, else ./ablab-store)"),
]


@app.command("list")
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
        return typer.echo(
            json.dumps({"interventions": interventions, "experiments": experiments}, indent=1)
        )
    typer.echo("Interventions")
    for one in interventions:
        typer.echo(f"  {one['name']:<15} {one['summary']}\n  {'':<15} off: {one['off']}")
    typer.echo("\nExperiments")
    for one in experiments:
        typer.echo(f"  {one['name']:<15} {one['question']}")


@app.command()
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

    experiment, _ = _prepare(name, overrides, plugins, _store(store))
    runs = experiment.runs(experiment.sheet.seeds[:1] or [0])
    run = _one(runs, cell or runs[0].cell)
    if diff is None:
        return show_recipe(experiment, run)
    show_difference(
        experiment.name,
        run,
        experiment.base if diff == "base" else _one(runs, diff).recipe,
        diff,
    )


@app.command()
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
    jobs: Jobs = None,
    mlflow: Annotated[bool, typer.Option(help="show the runs in MLflow")] = True,
    run_inert: Annotated[
        bool,
        typer.Option(
            "--run-inert", help="also train arms that compute the same bits as their reference"
        ),
    ] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="no progress, only the result")
    ] = False,
    plugins: Plugins = None,
    store: Where = None,
    as_json: Json = False,
) -> None:
    """Train what is missing of an experiment, then print the verdicts.  Ask twice, run once."""
    where = _store(store)
    experiment, runs = _prepare(name, overrides, plugins, where, seeds)
    if not runs:
        raise UserError(
            f"{experiment.name} names no seeds; write seeds: [0, 1, 2], or give --seeds 0-2"
        )
    from ablab.experiments.plan.selection import chosen

    picked = chosen(runs, only or [])
    if dry_run:
        from ablab.experiments.run.forecast import forecast, show_forecast

        found = forecast(experiment, picked, where, jobs)
        return (
            typer.echo(json.dumps(asdict(found), indent=1)) if as_json else show_forecast(found)
        )
    from ablab.experiments.cli.printing import show_outcome
    from ablab.experiments.run.progress import watcher
    from ablab.experiments.run.runner import execute

    watching = watcher(experiment.sheet.metric.name, quiet or as_json)
    try:
        outcome = execute(
            experiment,
            where,
            runs,
            watching,
            jobs,
            _folders(plugins),
            mlflow,
            run_inert,
            picked,
        )
    finally:
        watching.close()
    show_outcome(where, experiment.name, outcome, as_json)
    if outcome.failed:
        raise typer.Exit(1)


@app.command()
def study(
    name: Name,
    overrides: Overrides = None,
    storage: Annotated[
        str | None, typer.Option(help="an Optuna URL, or journal:PATH (STORE/optuna.db)")
    ] = None,
    jobs: Jobs = None,
    mlflow: Annotated[bool, typer.Option(help="show the trials in MLflow")] = True,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="no progress, only the result")
    ] = False,
    plugins: Plugins = None,
    store: Where = None,
    as_json: Json = False,
) -> None:
    """Tune each arm of an experiment over its study's space, confirm the winners on other seeds, and report.  Goes on where it was."""
    where = _store(store)
    experiment, _ = _prepare(name, overrides, plugins, where)
    from ablab.experiments.cli.printing import show_study
    from ablab.experiments.run.progress import watcher
    from ablab.experiments.tune.confirmation import confirm
    from ablab.experiments.tune.study import Study

    watching = watcher(experiment.sheet.metric.name, quiet or as_json)
    try:
        record = Study(experiment, where, watching, storage).tune(
            jobs, _folders(plugins), mlflow
        )
        if experiment.sheet.seeds:
            confirm(experiment, where, watching, record, jobs, _folders(plugins), mlflow)
    finally:
        watching.close()
    show_study(where, experiment.name, as_json)


@app.command()
def report(
    name: Name,
    overrides: Overrides = None,
    plugins: Plugins = None,
    store: Where = None,
    as_json: Json = False,
) -> None:
    """The verdict table; writes report.md, a forest plot and the loss curves into STORE/reports/NAME."""
    from ablab.core.language.parse import near
    from ablab.experiments.cli.printing import show_report
    from ablab.experiments.plan.sheets import catalog

    where = _store(store)
    held = list(
        dict.fromkeys(
            word for one in where.experiments() for word in (one.removesuffix("@study"), one)
        )
    )
    if not name.endswith((".yaml", ".yml")) and name not in (*held, *catalog()):
        raise UserError(
            f"no experiment {name!r} in {where.root}. {near(name, [*held, *catalog()])}It holds: {', '.join(held) or 'none'}"
        )
    if overrides or name not in held:
        name = _prepare(name, overrides, plugins, where)[0].name
    show_report(where, name, as_json)


@app.command()
def sync(
    names: Annotated[
        list[str] | None, typer.Argument(help="experiments (all in the store)")
    ] = None,
    store: Where = None,
    as_json: Json = False,
) -> None:
    """Rebuild the MLflow view from the run folders; sends only what it lacks."""
    from ablab.experiments.track.mlflow_tracker import sync as send

    counts = send(_store(store), names or None)
    typer.echo(
        json.dumps(counts)
        if as_json
        else ", ".join(f"{count} {word}" for word, count in counts.items())
    )


@app.command()
def ui(
    host: Annotated[str, typer.Option()] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 5000,
    store: Where = None,
) -> None:
    """The MLflow UI over the local store."""
    from ablab.experiments.track.ui import serve

    serve(_store(store).root, host, port, typer.echo)


@new.command("intervention")
def new_intervention(
    name: Annotated[str, typer.Argument(help="a word such as my_idea")],
    folder: Annotated[Path, typer.Option(help="where to write; name it to --plugins")] = Path(
        "plugins"
    ),
) -> None:
    """Write FOLDER/NAME.py: a neutral intervention that passes the contract tests; change it into yours."""
    from ablab.ablations.registry import discover
    from ablab.ablations.template import write

    discover()
    path = write(name, folder)
    typer.echo(f"wrote {path}\nsee it:  ablab list --plugins {folder}")
    typer.echo(
        f"test it: pytest tests/contracts --plugins {folder.absolute()} -k {name}   (in a checkout of ablab)"
    )


# -- what the commands share -------------------------------------------------------------------------------------------
def _store(flag: Path | None) -> Store:
    return Store(store_root(str(flag) if flag else None).absolute())


def _folders(plugins: list[Path] | None) -> list[str]:
    return [str(folder.absolute()) for folder in plugins or ()]


def _prepare(
    name: str,
    overrides: list[str] | None,
    plugins: list[Path] | None,
    store: Store,
    seeds: str | None = None,
) -> tuple[Any, list[Any]]:
    """Load an experiment and its runs.  The data digest is read from the store where the config leaves it open."""
    from ablab.ablations.registry import discover
    from ablab.core.recipe.load import overrides_from
    from ablab.experiments.plan.experiment import load

    discover(plugins or ())
    experiment = load(name, overrides_from(overrides or []), lambda data: _digest(store, data))
    return experiment, experiment.runs(_seeds(seeds))


def _digest(store: Store, data: str) -> str | None:
    """None while the tokens are not there: a recipe can be shown before its data exists, but not run."""
    from ablab.core.data.corpus import load_meta

    return (
        load_meta(store.root / "data" / data).digest
        if (store.root / "data" / data).exists()
        else None
    )


def _seeds(text: str | None) -> list[int] | None:
    if text is None:
        return None
    spans = [re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part) for part in text.split(",")]
    if not all(spans) or any(int(span[1]) > int(span[2] or span[1]) for span in spans):
        raise UserError(f"--seeds {text!r} must look like 0-4 or 0,3,7")
    return [seed for span in spans for seed in range(int(span[1]), int(span[2] or span[1]) + 1)]


def _one(runs: list[Any], cell: str) -> Any:
    from ablab.core.language.parse import near

    found = next((run for run in runs if run.cell == cell), None)
    if found is None:
        cells = list(dict.fromkeys(run.cell for run in runs))
        raise UserError(f"no cell {cell!r}. {near(cell, cells)}Cells: {', '.join(cells)}")
    return found


def main() -> None:
    signal.signal(
        signal.SIGTERM, signal.default_int_handler
    )  # a scheduler's request to stop is a Ctrl-C
    debug = "--debug" in sys.argv
    sys.argv = [word for word in sys.argv if word != "--debug"]
    try:
        code = app(standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except Exception as fault:
        if debug:
            raise
        code = _explained(fault)
    if code == INTERRUPTED:  # typer turns Ctrl-C into this number
        _said("interrupted; the same command goes on from here", code)
    sys.exit(code if isinstance(code, int) else 0)


def _explained(fault: Exception) -> int:
    """One line on stderr, and the exit code."""
    if isinstance(fault, UserError):
        return _said(f"error: {fault}", 2)
    if hasattr(
        fault, "format_message"
    ):  # typer's own complaint about the words given; empty beside the help
        return _said(f"error: {fault.format_message()}", 2) if fault.format_message() else 2
    if isinstance(fault, OSError) and (
        fault.filename or fault.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    ):
        where = fault.filename or "the disk"
        return _said(
            f"error: cannot use {where}: {fault.strerror}; free space or permission there, or choose another folder with --store",
            2,
        )
    return _said(f"error: {type(fault).__name__}: {fault} (--debug shows where)", 1)


def _said(line: str, code: int) -> int:
    print(line, file=sys.stderr)
    return code


if __name__ == "__main__":
    main()
