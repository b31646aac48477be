"""`ablab runs`, `ablab rm` and `ablab export`: what the store holds, as things to list, remove and take away."""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ablab.core.errors import UserError
from ablab.core.store.store import Store
from ablab.experiments.cli.asked import store_of
from ablab.experiments.cli.options import Json, Where
from ablab.experiments.text import table

if TYPE_CHECKING:
    import pandas as pd

    from ablab.core.store.inventory import Held, Removal

FORMATS = (".csv", ".json", ".parquet")
MOST_NAMED = 6  # runs that a question names one by one


# -- runs --------------------------------------------------------------------------------------------------------------
def runs(
    names: Annotated[
        list[str] | None, typer.Argument(help="experiments (all runs of the store)")
    ] = None,
    status: Annotated[
        list[str] | None,
        typer.Option(
            help="such as finished, failed, interrupted; repeat for more", show_default="any"
        ),
    ] = None,
    unused: Annotated[
        bool, typer.Option("--unused", help="only those that no experiment wants")
    ] = False,
    sort: Annotated[
        str,
        typer.Option(
            help="started, run, status, experiment, step, tokens, seconds, size or a metric; "
            "-size: the largest first"
        ),
    ] = "started",
    limit: Annotated[int | None, typer.Option(min=1, help="so many lines at most")] = None,
    store: Where = None,
    as_json: Json = False,
) -> None:
    """Every run of the store: its state, what it answers, its numbers, its size on disk."""
    from ablab.core.store.inventory import held_runs

    where = store_of(store)
    _refuse_unknown(where, names or [])
    found = [
        run
        for run in held_runs(where)
        if _is_asked_for(run, names or [], status or [], unused=unused)
    ]
    found = _sorted(found, sort)
    shown = found[:limit]
    if as_json:
        return typer.echo(json.dumps([asdict(run) for run in shown], indent=1))
    if shown:
        table([_line(run) for run in shown], SPARE)
    total = in_bytes(sum(run.size for run in found))
    cut = f", {len(shown)} shown" if len(shown) < len(found) else ""
    typer.echo(
        f"{len(found)} runs{cut}, {total} in {where.root} (--store or $ABLAB_STORE names another)"
    )


SPARE = ("started", "tokens", "train time")  # columns that a narrow terminal goes without


def _refuse_unknown(store: Store, names: list[str]) -> None:
    from ablab.core.language.parse import near

    known = store.experiments()
    for name in names:
        if name not in known:
            raise UserError(
                f"no experiment {name!r} in {store.root}. {near(name, known)}"
                f"It holds: {', '.join(known) or 'none'}"
            )


def _is_asked_for(run: "Held", names: list[str], statuses: list[str], *, unused: bool) -> bool:
    if statuses and run.status not in statuses:
        return False
    if unused and run.wanted_by:
        return False
    return not names or any(name in run.wanted_by for name in names)


def _sorted(found: "list[Held]", by: str) -> "list[Held]":
    """By a field or a metric; what lacks it stands last either way."""
    name = by.removeprefix("-")
    values = {run.run: _sort_value(run, name) for run in found}
    present = [run for run in found if values[run.run] is not None]
    if found and not present:
        metrics = sorted({metric for run in found for metric in run.metrics})
        raise UserError(
            f"--sort {by!r:.80} names nothing that a run here has; "
            f"choose from {', '.join((*FIELDS, *metrics))}"
        )
    absent = [run for run in found if values[run.run] is None]
    present.sort(key=lambda run: values[run.run], reverse=by.startswith("-"))
    return present + absent


FIELDS: "dict[str, Callable[[Held], Any]]" = {
    "started": lambda run: run.started,
    "run": lambda run: run.run,
    "status": lambda run: run.status,
    "experiment": lambda run: _wanted(run),
    "step": lambda run: run.step,
    "tokens": lambda run: run.tokens,
    "seconds": lambda run: run.seconds,
    "size": lambda run: run.size,
}


def _sort_value(run: "Held", name: str) -> Any:
    if name in FIELDS:
        return FIELDS[name](run)
    return run.metrics.get(name)


def _line(run: "Held") -> dict[str, str]:
    loss = run.metrics.get("val/bits_per_byte")
    return {
        "run": run.run,
        "status": run.status.replace("_", " "),
        "answers": _wanted(run) or "nothing",
        "bits/byte": "" if loss is None else f"{loss:.4f}",
        "step": f"{run.step:,}",
        "tokens": f"{run.tokens:,}",
        "train time": f"{run.seconds:,.0f} s",
        "started": _moment(run.started),
        "size": in_bytes(run.size),
    }


def _wanted(run: "Held") -> str:
    """quickstart: - muon; +1 more."""
    wanted = [f"{name}: {cell}" for name, cells in run.wanted_by.items() for cell in cells]
    return "; ".join(wanted[:1] + ([f"+{len(wanted) - 1} more"] if wanted[1:] else []))


def _moment(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds)) if seconds else ""


def in_bytes(size: float) -> str:
    """12.3 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


# -- rm ----------------------------------------------------------------------------------------------------------------
def rm(
    names: Annotated[
        list[str] | None,
        typer.Argument(help="experiments, or runs (the first digits are enough)"),
    ] = None,
    unused: Annotated[
        bool, typer.Option("--unused", help="every run that no experiment wants")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="do not ask")] = False,
    store: Where = None,
) -> None:
    """Remove experiments and runs; never a run that an experiment which stays wants."""
    from ablab.core.store.inventory import removal, remove

    if not names and not unused:
        raise UserError("nothing is named to remove; name experiments or runs, or --unused")
    where = store_of(store)
    what = removal(where, names or [], unused)
    typer.echo(_said(what))
    if not what.runs and not what.experiments:
        return
    if not yes:
        _ask()
    remove(where, what)
    typer.echo(f"removed; {in_bytes(what.size)} are free again.  MLflow follows: ablab sync")


def _said(what: "Removal") -> str:
    """What would go, and what would stay."""
    named = ", ".join(run.run for run in what.runs[:MOST_NAMED])
    more = len(what.runs) - MOST_NAMED
    runs = f"{len(what.runs)} runs, {in_bytes(what.size)}"
    if named:
        runs += f" ({named}{f' and {more} more' if more > 0 else ''})"
    lines = [f"goes: {runs}"]
    if what.experiments:
        lines.append(f"goes: plan, study and report of {', '.join(what.experiments)}")
    if what.shared:
        others = {name for run in what.shared for name in run.wanted_by}
        stayers = sorted(others - set(what.experiments))
        lines.append(f"stays: {len(what.shared)} runs that {', '.join(stayers)} wants too")
    return "\n".join(lines)


def _ask() -> None:
    if not sys.stdin.isatty():
        raise UserError("nobody is there to be asked; say --yes to remove this")
    if not typer.confirm("Remove this?"):
        raise typer.Abort


# -- export ------------------------------------------------------------------------------------------------------------
def export(
    name: Annotated[str, typer.Argument(help="an experiment of the store")],
    out: Annotated[
        Path, typer.Argument(help="a new file: .csv, .json (a line a row) or .parquet")
    ],
    curves: Annotated[
        bool, typer.Option("--curves", help="one row a logged line, not one a run")
    ] = False,
    store: Where = None,
) -> None:
    """Write the runs of an experiment as one table for other tools; `ablab report` explains the columns."""
    from ablab.analysis.effects import frame

    if out.suffix not in FORMATS:
        raise UserError(f"{out} must end in one of {', '.join(FORMATS)}")
    if out.exists():
        raise UserError(f"{out} exists and is not overwritten; name another file")
    where = store_of(store)
    _refuse_unknown(where, [name])
    found = frame.curves(where, name) if curves else _flat(frame.load(where, name))
    _write(found, out)
    typer.echo(f"{len(found)} rows, {len(found.columns)} columns: {out}")


def _flat(runs: "pd.DataFrame") -> "pd.DataFrame":
    """The table without mappings: a parameter is a column, `params/optim.lr`, in words."""
    import pandas as pd

    params = pd.DataFrame(
        [
            {f"params/{path}": str(value) for path, value in row.items()}
            for row in runs.pop("params")
        ]
    )
    return pd.concat([runs.drop(columns="tags"), params], axis=1)


def _write(found: "pd.DataFrame", out: Path) -> None:
    """In one step: a reader sees the whole table or none."""
    import io

    from ablab.core.store.files import write_atomically

    buffer = io.BytesIO()
    match out.suffix:
        case ".csv":
            found.to_csv(buffer, index=False)
        case ".json":
            found.to_json(buffer, orient="records", lines=True)
        case ".parquet":
            found.to_parquet(buffer, index=False)
    write_atomically(out, buffer.getvalue())
