"""`ablab challenge`: does a verdict stand on fresh seeds?"""

import json
from typing import Annotated

import typer

from ablab.experiments.cli.asked import folders_of, prepare, store_of
from ablab.experiments.cli.in_time import ends_in_time
from ablab.experiments.cli.options import (
    Address,
    Jobs,
    Json,
    LauncherName,
    Mlflow,
    Name,
    Overrides,
    Plugins,
    Quiet,
    RayOptions,
    SlurmOptions,
    Track,
    Where,
)
from ablab.experiments.track.chosen import tracked


@ends_in_time
def challenge(
    name: Name,
    arm: Annotated[str, typer.Argument(help="as the report names it, such as '- qk_norm'")],
    overrides: Overrides = None,
    jobs: Jobs = None,
    launcher: LauncherName = "local",
    address: Address = "",
    ray: RayOptions = None,
    slurm: SlurmOptions = None,
    track: Track = None,
    mlflow: Mlflow = None,
    quiet: Quiet = False,
    plugins: Plugins = None,
    store: Where = None,
    as_json: Json = False,
) -> None:
    """Run an arm and its reference again on as many seeds that nothing has used, and say whether the verdict stands."""
    from ablab.experiments.launch.named import Launching
    from ablab.experiments.run.challenge import Challenge
    from ablab.experiments.run.progress import watcher
    from ablab.experiments.run.runner import execute
    from ablab.experiments.run.verdicts import verdict_of

    where = store_of(store)
    shown = tracked(track, mlflow)
    experiment, _ = prepare(name, overrides, plugins, where)
    launching = Launching(launcher, address, tuple(ray or ()), tuple(slurm or ()))
    there = launching.of(experiment.sheet)
    arm = arm.strip()
    asked = Challenge(experiment, where, arm)
    runs = asked.experiment.runs(asked.seeds)
    watching = watcher(experiment.sheet.metric.name, quiet or as_json)
    try:
        outcome = execute(
            asked.experiment,
            where,
            runs,
            watching,
            jobs,
            folders_of(plugins),
            shown,
            launcher=there,
        )
        found = asked.judge(watching.say)
    finally:
        watching.close()
    if as_json:
        told = {
            "experiment": experiment.name,
            "arm": arm,
            "stands": found.stands,
            "before": verdict_of(found.before),
            "after": verdict_of(found.after),
        }
        typer.echo(json.dumps(told, indent=1))
    else:
        typer.echo(found.sentence.replace("`", ""))
    if outcome.failed:
        raise typer.Exit(1)
