"""`ablab bench`: what this machine does with ablab.  Nothing heavy is imported before a command runs."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from ablab.experiments.cli.asked import folders_of
from ablab.experiments.cli.options import Plugins

app = typer.Typer(
    no_args_is_help=True,
    help="Measure on this machine: ablab, a study, a report, a step, decoding, tokenizing, the kernels, a grid.",
)

Name = Annotated[
    str | None,
    typer.Argument(
        help="a catalog entry, a size such as 70m, or a path to a .yaml (loo_70m; without a GPU quickstart)"
    ),
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(help="path=value: a recipe path, with.NAME.DOSE, runtime.X"),
]
Steps = Annotated[int | None, typer.Option(min=1, help="of a window (100; on a CPU 10)")]
WarmUp = Annotated[
    int | None, typer.Option(min=0, help="steps before the first window (50; on a CPU 3)")
]
Out = Annotated[Path | None, typer.Option(help="also write JSON here")]


@app.command()
def overhead(out: Out = None) -> None:
    """What ablab itself costs, against its targets."""
    from ablab.experiments.bench import overhead as bench
    from ablab.experiments.bench.targets import show_costs

    show_costs(bench.overhead(), out)


@app.command()
def study(out: Out = None) -> None:
    """What the coordinator of an Optuna study costs a trial, and what opening a large study takes."""
    from ablab.experiments.bench.study_overhead import bench_study
    from ablab.experiments.bench.targets import show_costs

    show_costs(bench_study(), out)


@app.command()
def report(
    runs: Annotated[int, typer.Option(min=10, help="finished runs of the store")] = 1000,
    points: Annotated[int, typer.Option(min=10, help="logged lines a run")] = 500,
    out: Out = None,
) -> None:
    """What a report and the page of a watched grid cost at many runs, against their targets."""
    from ablab.experiments.bench.report import bench_report
    from ablab.experiments.bench.targets import show_costs

    show_costs(bench_report(runs, points), out)


@app.command()
def checkpoint(
    name: Name = None,
    overrides: Overrides = None,
    cell: Annotated[
        str | None, typer.Option(help="one arm of the experiment (the first)")
    ] = None,
    plugins: Plugins = None,
    out: Out = None,
) -> None:
    """How long a save holds training up, beside a step, and how long the disk takes; random tokens."""
    subject, given = _asked(name, overrides, plugins)
    from ablab.experiments.bench.checkpoint import bench_checkpoint, show_checkpoint

    found = bench_checkpoint(subject, given, cell)
    show_checkpoint(found)
    _write(found, out)


@app.command()
def claims(
    runs: Annotated[int, typer.Option(min=10, help="of the plan")] = 10_000,
    workers: Annotated[int, typer.Option(min=1, help="processes on one folder")] = 64,
    out: Out = None,
) -> None:
    """What dividing runs among workers that share a folder costs, and how long a dead one keeps its run."""
    from ablab.experiments.bench.claims import bench_claims, rate
    from ablab.experiments.bench.targets import show_costs

    costs = bench_claims(runs, workers)
    show_costs(costs, out)
    typer.echo(rate(costs))


@app.command()
def step(
    name: Name = None,
    overrides: Overrides = None,
    against: Annotated[
        str | None,
        typer.Option(
            help="a second subject, timed in turn: hf (Hugging Face's Llama), a cell, or path=value"
        ),
    ] = None,
    cell: Annotated[
        str | None, typer.Option(help="one arm of the experiment (full, else the first)")
    ] = None,
    steps: Steps = None,
    windows: Annotated[
        int | None, typer.Option(min=1, help="of each subject; their median counts [3]")
    ] = None,
    warm_up: WarmUp = None,
    plugins: Plugins = None,
    out: Out = None,
) -> None:
    """Tokens/s, MFU, memory, launches, and where each millisecond of a training step goes; random tokens."""
    subject, given = _asked(name, overrides, plugins)
    from ablab.experiments.bench.step import bench_step
    from ablab.experiments.bench.step_table import show_step

    found = bench_step(subject, given, against, cell, steps, windows, warm_up)
    show_step(found)
    _write(found, out)


@app.command()
def peers(
    name: Name = None,
    overrides: Overrides = None,
    nanochat: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="a checkout of github.com/karpathy/nanochat, to be timed too"
        ),
    ] = None,
    apart: Annotated[
        bool,
        typer.Option("--apart", help="a process each, as where memory is too small for all"),
    ] = False,
    steps: Steps = None,
    windows: Annotated[
        int | None, typer.Option(min=1, help="of each; their median counts [3]")
    ] = None,
    warm_up: WarmUp = None,
    plugins: Plugins = None,
    out: Out = None,
) -> None:
    """ablab, with fp8 too (with.fp8.DOSE is its alone), beside Hugging Face's Llama and nanochat of the same shape."""
    subject, given = _asked(name, overrides, plugins)
    from ablab.experiments.bench.peers import Asked, bench_peers, show_peers

    asked = Asked(subject, given, nanochat, plugins or (), steps, windows, warm_up)
    found = bench_peers(asked, apart)
    show_peers(found)
    _write(found, out)


@app.command()
def kernels(
    only: Annotated[
        str | None, typer.Option(help="a kernel, or a pattern such as 'attention*'")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    out: Out = None,
) -> None:
    """Each kernel beside its peers and its floor; tiny shapes without a GPU."""
    from ablab.experiments.bench.kernels.comparison import bench_kernels, show_kernels

    found = bench_kernels(only, device)
    show_kernels(found)
    _write(found, out)


@app.command()
def decode(
    name: Name = None,
    overrides: Overrides = None,
    cell: Annotated[
        str | None, typer.Option(help="one arm of the experiment (full, else the first)")
    ] = None,
    prompt: Annotated[int, typer.Option(min=1, help="tokens before the first new one")] = 448,
    tokens: Annotated[int, typer.Option(min=1, help="new ones a row")] = 64,
    rows: Annotated[int, typer.Option(min=1, help="at once")] = 1,
    plugins: Plugins = None,
    out: Out = None,
) -> None:
    """Tokens/s of decoding with a cache, beside running the row again for each token; data.context is 512."""
    subject, given = _asked(name, overrides, plugins)
    from ablab.experiments.bench.decode import bench_decode, show_decode

    usual = {"data.context": 512, "budget.tokens": 10**9}
    found = bench_decode(subject, usual | given, cell, prompt, tokens, rows)
    show_decode(found)
    _write(found, out)


@app.command()
def data(
    text: Annotated[
        list[str] | None,
        typer.Argument(help="files or folders (the text that ships with ablab)"),
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="a tokenizer.json (that of the shipped text)")
    ] = None,
    field: Annotated[str, typer.Option(help="JSON key or Parquet column")] = "text",
    out: Out = None,
) -> None:
    """Megabytes of text a second that one core tokenizes."""
    from ablab.experiments.bench.tokenizing import bench_tokenizing, table

    found = bench_tokenizing(text, tokenizer, field)
    typer.echo(table(found))
    _write(asdict(found), out)


GRID = (
    "Training time over wall time of a grid of short cells, "
    "and the seconds before each cell's first step; random tokens."
)


@app.command(help=GRID)
def grid(
    name: Name = None,
    overrides: Overrides = None,
    cells: Annotated[
        int | None, typer.Option(min=2, help="runs of the grid (12; without a GPU 4)")
    ] = None,
    seconds: Annotated[
        float | None, typer.Option(min=0.1, help="of training a cell (60; without a GPU 3)")
    ] = None,
    jobs: Annotated[
        int,
        typer.Option(
            min=1, help="cells at a time; two on a GPU train one while they compile the other"
        ),
    ] = 1,
    mlflow: Annotated[
        bool, typer.Option(help="also show the runs in MLflow, whose time then counts")
    ] = False,
    plugins: Plugins = None,
    out: Out = None,
) -> None:
    """As GRID says."""
    subject, given = _asked(name, overrides, plugins)
    from ablab.experiments.bench.grid import bench_grid, show_grid

    folders = folders_of(plugins)
    found = bench_grid(subject, given, cells, seconds, mlflow, folders, jobs)
    show_grid(found)
    _write(found, out)


@app.command()
def scale(
    gpus: Annotated[int, typer.Option(min=2, help="of this host, for one run")] = 2,
    only: Annotated[str | None, typer.Option(help="a size: 70M or 430M [both]")] = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="of a window (40; on a CPU 3)")
    ] = None,
    windows: Annotated[int, typer.Option(min=1, help="of each kind; their median counts")] = 2,
    warm_up: Annotated[
        int | None, typer.Option(min=0, help="steps before each window (30; on a CPU 2)")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    out: Out = None,
) -> None:
    """Tokens/s of one run on one GPU and on several, and the share of their messages; random tokens."""
    from ablab.experiments.bench.scale import bench_scale, show_scale

    found = bench_scale(gpus, only, steps, windows, warm_up, device)
    show_scale(found)
    _write(found, out)


def _asked(
    name: str | None, overrides: list[str] | None, plugins: list[Path] | None
) -> tuple[str, dict[str, Any]]:
    """The experiment and its overrides; an override may stand where the name is left out."""
    from ablab.ablations.registry import discover
    from ablab.core.recipe.load import overrides_from
    from ablab.core.runtime.runtime import visible_gpus

    discover(plugins or ())
    words = list(overrides or [])
    if name and "=" in name:
        words.insert(0, name)
        name = None
    given = overrides_from(words)
    small = given.get("runtime.device") == "cpu" or not visible_gpus()
    return name or ("quickstart" if small else "loo_70m"), given


def _write(found: dict[str, Any], out: Path | None) -> None:
    from ablab.core.store.files import write_atomically

    if out:
        write_atomically(out, json.dumps(found, indent=1).encode())
