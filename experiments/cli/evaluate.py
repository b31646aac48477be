"""`ablab eval`: a model asked what others are asked, and every arm of an experiment."""

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ablab.core.errors import UserError
from ablab.experiments.cli.asked import folders_of, store_of
from ablab.experiments.cli.evaluating import progress
from ablab.experiments.cli.options import Json, Plugins, Quiet, Track, Where
from ablab.experiments.text import Row, table

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ablab.core.store.evaluation import Evaluation, Part
    from ablab.core.store.store import Store
    from ablab.experiments.evaluate.asking import Arms
    from ablab.experiments.evaluate.exam import Examination
    from ablab.experiments.evaluate.subjects import How, Subject

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
    from ablab.experiments.evaluate.subjects import How

    if name is None:
        raise UserError("name a run, a folder or an experiment: ablab eval RUN --suite core")
    where = store_of(store)
    how = How(device, dtype, batch, trust_remote_code, tuple(folders_of(plugins)))
    asked = Asked(suite, _words(tasks), bundle, include_path, max_per_task)
    arms = _arms_of(name, where, how)
    found = [
        (subject, evaluation)
        for subject in arms.subjects
        for evaluation in asked.of(subject, where, how, quiet or as_json)
    ]
    _show_in_views(where, [subject.run for subject in arms.subjects], track)
    for line in arms.others:
        typer.echo(f"left out: {line}", err=True)
    if as_json:
        from ablab.experiments.evaluate.evaluating import as_json as told

        return typer.echo(json.dumps([told(one) for _, one in found], indent=1))
    for subject, evaluation in found:
        _show(subject, evaluation)


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


@dataclass(frozen=True)
class Asked:
    """What every model of one command is asked."""

    suite: Suite | None
    tasks: list[str]
    bundle: Path | None
    include: Path | None
    limit: int | None

    def of(
        self, subject: "Subject", store: "Store", how: "How", quiet: bool
    ) -> "Iterator[Evaluation]":
        from ablab.experiments.evaluate.answering import devices_of
        from ablab.experiments.evaluate.evaluating import evaluate

        for exam in self._exams(subject, store):
            with progress(f"{subject.name}: {exam.title}", quiet) as watch:
                yield evaluate(subject, exam, how, devices_of(how), watch)

    def _exams(self, subject: "Subject", store: "Store") -> "Iterator[Examination]":
        from ablab.experiments.evaluate import harness
        from ablab.experiments.evaluate.asking import exam_of

        if self.suite:
            yield exam_of(self.suite, self.bundle, self.limit, self.tasks, subject, store)
        elif self.tasks:
            yield from (harness.exam(task, self.limit, self.include) for task in self.tasks)
        else:
            raise UserError("say what to ask: --suite core, blimp or bpb, or --tasks NAMES")


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
