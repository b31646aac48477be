"""`ablab eval`: a model asked what others are asked, and every arm of an experiment."""

import json
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ablab.core.errors import UserError
from ablab.experiments.cli.asked import folders_of, store_of
from ablab.experiments.cli.evaluating import progress
from ablab.experiments.cli.in_time import ends_in_time
from ablab.experiments.cli.options import (
    Address,
    Json,
    LauncherName,
    Plugins,
    Quiet,
    RayOptions,
    SlurmOptions,
    Track,
    Where,
)
from ablab.experiments.text import Row, table

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ablab.core.store.evaluation import Evaluation, Part
    from ablab.core.store.store import Store
    from ablab.experiments.evaluate.asking import Arms, Request
    from ablab.experiments.evaluate.exam import Examination
    from ablab.experiments.evaluate.subjects import How, Subject
    from ablab.experiments.run.executor import Launcher

Suite = Literal["core", "blimp", "bpb"]


def evaluate(
    name: Annotated[
        str | None,
        typer.Argument(
            help="a run's id or its beginning, a weights folder, a folder that transformers loads, OWNER/NAME of "
            "the Hub, or an experiment: all its runs that kept their weights"
        ),
    ] = None,
    suite: Annotated[
        Suite | None,
        typer.Option(
            help="core: 22 tasks, centered; blimp: minimal pairs; bpb: bits per byte of each source of a text"
        ),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            help="such as arc_easy,piqa: of lm-evaluation-harness; with --suite core, of the bundle"
        ),
    ] = None,
    bundle: Annotated[
        Path | None,
        typer.Option(
            help="core: a folder in DCLM's format; blimp: a folder of *.jsonl; bpb: JSONL with text and source "
            "(the held-out text of the run's own data)"
        ),
    ] = None,
    include_path: Annotated[
        Path | None,
        typer.Option(help="a folder with YAML files of the harness's tasks, besides its own"),
    ] = None,
    max_per_task: Annotated[
        int | None, typer.Option(min=1, help="items of each task (all)")
    ] = None,
    device: Annotated[
        Literal["auto", "cpu", "cuda"], typer.Option(help="auto: all GPUs, each with its share")
    ] = "auto",
    dtype: Annotated[
        Literal["auto", "fp32", "bf16"], typer.Option(help="auto: bf16 on a GPU, else fp32")
    ] = "auto",
    batch: Annotated[int, typer.Option(min=1, help="rows at once")] = 16,
    trust_remote_code: Annotated[
        bool,
        typer.Option("--trust-remote-code", help="run the Python code that comes with a model"),
    ] = False,
    fetch_bundle: Annotated[
        Path | None,
        typer.Option(help="download the public bundle of CORE into a new folder, and leave"),
    ] = None,
    launcher: LauncherName = "local",
    address: Address = "",
    ray: RayOptions = None,
    slurm: SlurmOptions = None,
    jobs: Annotated[
        int | None,
        typer.Option(
            min=1, help="evaluations at a time, with another launcher (as many as it carries)"
        ),
    ] = None,
    track: Track = None,
    quiet: Quiet = False,
    plugins: Plugins = None,
    store: Where = None,
    as_json: Json = False,
) -> None:
    """Score a model on CORE, BLiMP, held-out text, or tasks of lm-evaluation-harness.  Killed, it goes on."""
    if fetch_bundle:
        from ablab.experiments.evaluate.fetch import fetch

        fetch(fetch_bundle)
        return typer.echo(
            f"{fetch_bundle}: ablab eval RUN --suite core --bundle {fetch_bundle}"
        )
    from ablab.experiments.evaluate.asking import Request
    from ablab.experiments.evaluate.subjects import How
    from ablab.experiments.launch.named import Launching

    if name is None:
        raise UserError("name a run, a folder or an experiment: ablab eval RUN --suite core")
    where = store_of(store)
    how = How(device, dtype, batch, trust_remote_code, tuple(folders_of(plugins)))
    request = Request(suite or "", tuple(_words(tasks)), bundle, include_path, max_per_task)
    launching = Launching(launcher, address, tuple(ray or ()), tuple(slurm or ()))
    there = launching.of()
    arms = _arms_of(name, where, how)
    asking = Asking(where, how, request, arms.subjects, quiet or as_json)
    if launching.is_elsewhere:
        asking.elsewhere(there, jobs)
    else:
        _refuse_jobs_here(jobs)
        asking.here()
    found = asking.found
    _show_in_views(where, [subject.run for subject in arms.subjects], track)
    for line in arms.others:
        typer.echo(f"left out: {line}", err=True)
    if as_json:
        from ablab.experiments.evaluate.evaluating import as_json as told

        typer.echo(json.dumps([told(one) for _, one in found], indent=1))
        found = []
    for subject, evaluation in found:
        _show(subject, evaluation)
    if asking.failed:
        raise typer.Exit(1)


def _refuse_jobs_here(jobs: int | None) -> None:
    if jobs is not None:
        raise UserError(
            f"--jobs {jobs}: on this machine one model is asked at a time, on all its GPUs; "
            "add --launcher ray or slurm, or drop it"
        )


def _show_in_views(store: "Store", runs: list[str], track: str | None) -> None:
    """Bring the views of the experiments that hold these runs up to date."""
    from ablab.core.store.inventory import wanted_runs
    from ablab.experiments.track.chosen import tracked
    from ablab.experiments.track.trackers import VIEWS

    warn = partial(typer.echo, err=True)
    try:
        wanted = wanted_runs(store)
        holding = sorted({name for run in runs if run for name in wanted.get(run, ())})
        for view in tracked(track) if holding else ():
            VIEWS[view](store, warn).sync(holding)
    except UserError as lost:  # the scores stand; `ablab sync` shows them later
        warn(f"warning: {lost}")


def _arms_of(name: str, store: "Store", how: "How") -> "Arms":
    """An experiment's runs, or the one model of that name."""
    from ablab.experiments.evaluate.asking import Arms, arms_of
    from ablab.experiments.evaluate.subjects import subject_of

    if not Path(name).is_dir() and name in store.experiments():
        return arms_of(name, store)
    return Arms([subject_of(name, store, how.trust_remote_code)], [])


@dataclass
class Asking:
    """The models of one command, each asked the same."""

    store: "Store"
    how: "How"
    request: "Request"
    subjects: "list[Subject]"
    quiet: bool
    found: "list[tuple[Subject, Evaluation]]" = field(default_factory=list)
    failed: list[str] = field(default_factory=list)

    def here(self) -> None:
        """One after another, on all GPUs."""
        from ablab.experiments.evaluate.answering import devices_of
        from ablab.experiments.evaluate.evaluating import evaluate

        for subject, _, exam in self._exams():
            with progress(f"{subject.name}: {exam.title}", self.quiet) as watch:
                told = evaluate(subject, exam, self.how, devices_of(self.how), watch)
            self.found.append((subject, told))

    @ends_in_time
    def elsewhere(self, launcher: "Launcher", jobs: int | None) -> None:
        """On the launcher's machines, each a task."""
        from ablab.experiments.run.evaluations import Wanted, evaluate_there

        wanted = [Wanted.of(*one) for one in self._exams()]
        with progress(f"{len(wanted)} evaluations", self.quiet) as watch:
            say = partial(typer.echo, err=True)
            told = evaluate_there(wanted, launcher, self.how, self.store, jobs, watch, say)
        self.found = told.found
        self.failed = told.failed

    def _exams(self) -> "Iterator[tuple[Subject, Request, Examination]]":
        for subject in self.subjects:
            for request in self.request.single():
                yield subject, request, request.exam(subject, self.store)


def _show(subject: "Subject", evaluation: "Evaluation") -> None:
    """A row a part, then what they come to together."""
    typer.echo(
        f"{subject.name} (weights {evaluation.weights}): {evaluation.items:,} items of "
        f"{evaluation.source}, digest {evaluation.bundle}"
    )
    table([_row(part) for part in evaluation.parts])
    for name, one in evaluation.headlines.items():
        between = f"{one.low:.4f} to {one.high:.4f}"
        typer.echo(f"{name}  {one.value:.4f}  (95 % over {one.items:,} items: {between})")
    if evaluation.missing:
        typer.echo(
            f"This is not CORE, but the mean of {len(evaluation.parts)} of its 22 tasks; "
            f"missing: {', '.join(evaluation.missing)}"
        )
    cut = sum(part.cut for part in evaluation.parts)
    if cut:
        typer.echo(
            f"{cut:,} items are longer than the model's context: their beginnings were not read"
        )


def _row(part: "Part") -> Row:
    low, high = part.interval
    items = f"{len(part.values):,}"
    if part.there > len(part.values):
        items += f" of {part.there:,}"
    return {
        "task": part.name,
        "score": f"{part.score:.4f}",
        "95 %": f"{low:.3f} to {high:.3f}",
        "centered": f"{part.centered:+.4f}" if part.baseline else "",
        "guessing": f"{part.baseline:.3f}" if part.baseline else "",
        "shots": str(part.shots),
        "items": items,
    }


def _words(tasks: str | None) -> list[str]:
    return [word.strip() for word in (tasks or "").split(",") if word.strip()]
