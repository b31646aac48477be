"""Arguments and options that several commands take, said once."""

from pathlib import Path
from typing import Annotated

import typer

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
Plugins = Annotated[
    list[Path] | None,
    typer.Option("--plugins", help="a folder with interventions of your own; repeat for more"),
]
Scale = Annotated[
    str | None,
    typer.Option(
        "--scale",
        help="a shorter run with the same ratios, such as 1/1000: tokens, steps, warm-ups, horizons",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="print JSON")]
Jobs = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="runs at a time (one a GPU, 4 with runtime.turns=false, else cores/threads); "
        "on one GPU they train in turn, short ones at once",
    ),
]
GpusPerRun = Annotated[
    int | None,
    typer.Option(
        "--gpus-per-run",
        min=1,
        help="of one machine, for each run: they share its batch and its optimizer (1); as runtime.ranks",
    ),
]
Track = Annotated[
    str | None,
    typer.Option(
        envvar="ABLAB_TRACK",
        show_envvar=False,
        help="who shows the runs: mlflow, tensorboard, wandb, several by commas, or none; $ABLAB_TRACK (mlflow)",
    ),
]
Mlflow = Annotated[
    bool | None,
    typer.Option("--mlflow/--no-mlflow", help="with MLflow or without, whatever --track says"),
]
LauncherName = Annotated[
    str, typer.Option("--launcher", help="where the runs are executed: local, ray, slurm")
]
Address = Annotated[
    str,
    typer.Option(
        help="of the Ray cluster: HOST:6379 on a machine of it, ray://HOST:10001 from any other; "
        "$RAY_ADDRESS, else this machine's"
    ),
]
RayOptions = Annotated[
    list[str] | None,
    typer.Option("--ray", help="KEY=VALUE: num_gpus of each run, as 0.25; num_cpus"),
]
SlurmOptions = Annotated[
    list[str] | None,
    typer.Option(
        "--slurm", help="KEY=VALUE of submitit: partition=gpu, gres=gpu:1, time=240 (minutes)"
    ),
]
Deadline = Annotated[
    str | None,
    typer.Option(
        help="such as 9m: begin no run that cannot end in it, save what runs in time, exit with 75"
    ),
]
Mirror = Annotated[
    str | None,
    typer.Option(
        help="a second copy of the run folders, such as s3://bucket/place; a fresh machine goes on from it"
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="no progress, only the result")]
