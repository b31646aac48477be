"""`ablab run`, `ablab study` and `ablab report`: train what is missing, and say what came of it."""

import json
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ablab.core.errors import UserError
from ablab.core.store.planned import notes_on_design
from ablab.experiments.cli.asked import (
    experiments_of,
    folders_of,
    held_name,
    prepare,
    store_of,
)
from ablab.experiments.cli.in_time import ends_in_time
from ablab.experiments.cli.options import (
    Address,
    Deadline,
    GpusPerRun,
    Jobs,
    Json,
    LauncherName,
    Mirror,
    Mlflow,
    Name,
    Overrides,
    Plugins,
    Quiet,
    RayOptions,
    Scale,
    SlurmOptions,
    Track,
    Where,
)
from ablab.experiments.track.chosen import MLFLOW, Tracked, tracked

if TYPE_CHECKING:
    from ablab.core.runtime.runtime import Runtime
    from ablab.core.store.store import Store
    from ablab.experiments.plan.experiment import Experiment, PlannedRun
    from ablab.experiments.run.executor import Launcher
    from ablab.experiments.run.pool import Outcome
    from ablab.experiments.run.progress import Watcher

STUDY = (
    "Tune each arm of an experiment over its study's space, confirm the winners on other seeds, and report.  "
    "Goes on where it was."
)


@ends_in_time
def run(
    name: Name,
    overrides: Overrides = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="cells, identities, what is missing and what it would cost, where --launcher trains it",
        ),
    ] = False,
    only: Annotated[
        list[str] | None,
        typer.Option(help="cells to run: a name, a pattern, or !pattern; repeat for more"),
    ] = None,
    seeds: Annotated[
        str | None, typer.Option(help="such as 0-4 or 0,3,7 (the experiment's)")
    ] = None,
    until_decided: Annotated[
        bool,
        typer.Option(
            "--until-decided",
            help="look at 3, 5 and 8 seeds, and add seeds to undecided arms alone; needs --budget",
        ),
    ] = False,
    budget: Annotated[
        str | None,
        typer.Option(help="of training for --until-decided, all runs together: 90m, 4h, 2d"),
    ] = None,
    scale: Scale = None,
    jobs: Jobs = None,
    gpus_per_run: GpusPerRun = None,
    launcher: LauncherName = "local",
    address: Address = "",
    ray: RayOptions = None,
    slurm: SlurmOptions = None,
    deadline: Deadline = None,
    mirror: Mirror = None,
    track: Track = None,
    mlflow: Mlflow = None,
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
    from ablab.experiments.launch.named import Launching
    from ablab.experiments.plan.selection import chosen

    where = store_of(store)
    shown = tracked(track, mlflow)
    launching = Launching(launcher, address, tuple(ray or ()), tuple(slurm or ()))
    hours = _hours(until_decided, budget, seeds, only)
    words = [*with_ranks(overrides, gpus_per_run), *mirrored(mirror)]
    experiment, runs = prepare(name, words, plugins, where, seeds, scale)
    there = launching.of(experiment.sheet)
    if is_follower():
        return None if dry_run else follow_command(experiment.sheet.runtime)
    if hours:
        from ablab.experiments.run.sequential import with_looks

        experiment = with_looks(experiment, hours)
        runs = experiment.runs(experiment.stopping.seeds)
    if not runs:
        raise UserError(
            f"{experiment.name} names no seeds; write seeds: [0, 1, 2], or give --seeds 0-2"
        )
    picked = chosen(runs, only or [])
    if dry_run:
        from ablab.experiments.run.forecast import forecast, seats_of, show_forecast

        seats = seats_of(there, experiment, jobs)
        found = forecast(experiment, picked, where, jobs, seats)
        if as_json:
            return typer.echo(json.dumps(asdict(found), indent=1))
        show_forecast(found)
        for note in experiment.not_kept:
            typer.echo(f"scale: {note}")
        return None
    from ablab.experiments.cli.printing import show_in_mlflow, show_outcome, show_places
    from ablab.experiments.run.progress import watcher

    watching = watcher(experiment.sheet.metric.name, quiet or as_json)
    train = Training(where, watching, jobs, folders_of(plugins), shown, run_inert, there)
    try:
        named = [(one.cell, one.id) for one in runs]
        for note in notes_on_design(experiment.factors, experiment.infeasible, named):
            watching.say(f"design: {note}")
        for note in experiment.not_kept:
            watching.note(f"scale: {note}")
        if hours:
            outcome, look = train.until_decided(experiment)
        else:
            outcome, look = train.all_at_once(experiment, runs, picked), {}
    finally:
        watching.close()
    show_outcome(where, experiment.name, outcome, as_json, look)
    if not as_json:
        show_places(where, shown)
    if MLFLOW in shown:
        show_in_mlflow(where, experiment.name)
    if outcome.failed:
        raise typer.Exit(1)


@dataclass(frozen=True)
class Training:
    """How the runs of one command are trained, whichever they are."""

    store: "Store"
    watcher: "Watcher"
    jobs: int | None
    plugins: list[str]
    tracked: Tracked
    run_inert: bool
    launcher: "Launcher"

    def __call__(
        self,
        experiment: "Experiment",
        runs: "list[PlannedRun]",
        only: "list[PlannedRun] | None" = None,
    ) -> "Outcome":
        from ablab.experiments.run.runner import execute

        return execute(
            experiment,
            self.store,
            runs,
            self.watcher,
            self.jobs,
            self.plugins,
            self.tracked,
            self.run_inert,
            only,
            self.launcher,
        )

    def all_at_once(
        self, experiment: "Experiment", runs: "list[PlannedRun]", only: "list[PlannedRun]"
    ) -> "Outcome":
        from ablab.experiments.run.verdicts import note_final_verdicts

        outcome = self(experiment, runs, only)
        note_final_verdicts(self.store, experiment.name, outcome, self.watcher.say)
        return outcome

    def until_decided(self, experiment: "Experiment") -> "tuple[Outcome, dict[str, Any]]":
        """Also what JSON says of the looks."""
        from ablab.experiments.run.sequential import Looking

        looked = Looking(experiment, self.store, self.watcher, self.jobs, self).until_decided()
        if looked.stopped:
            self.watcher.say(looked.stopped)
        told = {
            "seeds": looked.seeds,
            "undecided": looked.undecided,
            "stopped": looked.stopped,
        }
        return looked.outcome, {"look": told}


def with_ranks(overrides: list[str] | None, gpus_per_run: int | None) -> list[str]:
    """--gpus-per-run, said as an override."""
    words = list(overrides or [])
    return words if gpus_per_run is None else [*words, f"runtime.ranks={gpus_per_run}"]


def is_follower() -> bool:
    """Whether torchrun started this command, and another process of it plans and records."""
    from ablab.experiments.run import torchrun

    return torchrun.is_follower()


def follow_command(runtime: "Runtime") -> None:
    from ablab.experiments.run import torchrun

    torchrun.follow_command(runtime)


def _hours(
    until_decided: bool, budget: str | None, seeds: str | None, only: list[str] | None
) -> float | None:
    """What the looks may spend; None where all seeds are wanted at once.  Raises UserError for words that clash."""
    if not until_decided:
        if budget:
            raise UserError("--budget is what --until-decided may spend; give both, or neither")
        return None
    if budget is None:
        raise UserError(
            "--until-decided adds seeds until its arms are decided; say what it may spend: --budget 4h"
        )
    if seeds or only:
        flag = "--seeds" if seeds else "--only"
        raise UserError(f"--until-decided chooses cells and seeds itself; drop {flag}")
    from ablab.experiments.run.sequential import hours_of

    return hours_of(budget)


def mirrored(url: str | None) -> list[str]:
    """As an override.  Raises UserError for a URL that nothing here can open."""
    if not url:
        return []
    from ablab.core.store.mirror import opened

    opened(url)
    return [f"runtime.mirror={url}"]


@ends_in_time
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
    gpus_per_run: GpusPerRun = None,
    launcher: LauncherName = "local",
    address: Address = "",
    ray: RayOptions = None,
    slurm: SlurmOptions = None,
    deadline: Deadline = None,
    mirror: Mirror = None,
    track: Track = None,
    mlflow: Mlflow = None,
    quiet: Quiet = False,
    plugins: Plugins = None,
    store: Where = None,
    as_json: Json = False,
) -> None:
    """As STUDY says."""
    where = store_of(store)
    shown = tracked(track, mlflow)
    words = [*with_ranks(overrides, gpus_per_run), *mirrored(mirror)]
    from ablab.experiments.launch.named import Launching

    experiment, _ = prepare(name, words, plugins, where)
    launching = Launching(launcher, address, tuple(ray or ()), tuple(slurm or ()))
    there = launching.of(experiment.sheet)
    if is_follower():
        return follow_command(experiment.sheet.runtime)
    from ablab.experiments.cli.printing import show_places, show_study
    from ablab.experiments.run.progress import watcher
    from ablab.experiments.tune.confirmation import confirm
    from ablab.experiments.tune.study import Study

    folders = folders_of(plugins)
    watching = watcher(experiment.sheet.metric.name, quiet or as_json)
    try:
        tuning = Study(experiment, where, watching, storage, there)
        record = tuning.tune(jobs, folders, shown)
        if experiment.sheet.seeds:
            confirm(experiment, where, watching, record, jobs, folders, shown, there)
    finally:
        watching.close()
    show_study(where, experiment.name, as_json)
    if not as_json:
        show_places(where, shown)


def report(
    name: Name,
    words: Annotated[
        list[str] | None,
        typer.Argument(
            help="path=value: of the experiment named before it; another experiment: the same arms at another size"
        ),
    ] = None,
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
    """The verdict table; writes report.html, report.md and its plots into STORE/reports/NAME.

    Of several experiments, one a size: how the effects of the arms that they share change with size.
    """
    from ablab.experiments.cli.printing import show_report, show_sizes

    where = store_of(store)
    asked = experiments_of(name, words or [])
    names = [held_name(where, one, overrides, plugins) for one, overrides in asked]
    if len(names) > 1:
        return show_sizes(where, names, as_json, mixed)
    show_report(where, names[0], as_json, mixed=mixed)
