"""The command line: every command, and how it ends.

Heavy imports stay inside the commands: `ablab --help` and `ablab list` load neither torch nor mlflow.
"""

import errno
import io
import signal
import sys
from importlib import metadata
from typing import Annotated

import typer

from ablab.core.errors import UserError, one_line, told
from ablab.experiments.cli import (
    bench,
    challenge,
    check,
    data,
    evaluate,
    look,
    models,
    new,
    planner,
    stored,
    view,
    watch,
    why,
    work,
)
from ablab.experiments.cli.arms import TakesArms
from ablab.experiments.run.halting import INTERRUPTED as IN_TIME

INTERRUPTED = 130
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # refusals of a disk that name no file
EXITS = (
    "Exit codes: 0 done (a run that diverged is done); 1 runs failed, or ablab broke; "
    "2 the request cannot be met as asked;\n"
    "75 stopped in time by a signal or --deadline: what ran is saved, the same command goes on; "
    "130 interrupted.\n"
    "`--debug` anywhere shows where an error was raised."
)

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    epilog=EXITS,
    help="Ablations for people who pre-train small language models.",
)


def _say_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"ablab {metadata.version('ablab')}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            callback=_say_version,
            is_eager=True,
            help="print the version and leave",
        ),
    ] = False,
) -> None:
    """What stands before the command."""


app.command("list")(look.list_)
app.command()(look.show)
app.command()(work.run)
app.command(help=work.STUDY)(work.study)
app.command()(work.report)
app.command()(watch.watch)
app.command()(planner.plan)
app.command(cls=TakesArms)(challenge.challenge)
app.command(cls=TakesArms)(why.why)
app.command()(stored.runs)
app.command()(stored.rm)
app.command()(stored.export)
app.command()(view.sync)
app.command()(view.ui)
app.command()(models.generate)
app.command("eval")(evaluate.evaluate)
app.command("export-hf")(models.export_hf)
app.command("import-hf")(models.import_hf)
app.add_typer(models.convert, name="convert")
app.add_typer(data.app, name="data")
app.add_typer(check.app, name="check")
app.add_typer(bench.app, name="bench")
app.add_typer(new.app, name="new")


def main() -> None:
    # A scheduler's request to stop is a Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    for stream in (sys.stdout, sys.stderr):  # a terminal that lacks a sign gets another for it
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    debug = "--debug" in sys.argv
    sys.argv = [word for word in sys.argv if word != "--debug"]
    try:
        code = app(standalone_mode=False)
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except (
        SystemExit
    ) as end:  # of click, with a number; or of somebody's plugin, and then it is no success
        code = end.code if isinstance(end.code, int) and end.code else _explained(end)
    except Exception as fault:
        if debug:
            raise
        code = _explained(fault)
    if code in (INTERRUPTED, IN_TIME):  # typer turns Ctrl-C into the first
        print("interrupted; the same command goes on from here", file=sys.stderr)
    sys.exit(code if isinstance(code, int) else 0)


def _explained(fault: BaseException) -> int:
    """One line on stderr, and the exit code."""
    code, line = 2, _of_the_request(fault)
    if line is None:
        code, line = 1, f"{told(fault)} (--debug shows where)"
    if line:
        print(f"error: {one_line(line)}", file=sys.stderr)
    return code


def _of_the_request(fault: BaseException) -> str | None:
    """What is wrong with what was asked; None where the fault is ours."""
    if isinstance(fault, UserError):
        return str(fault)
    if hasattr(fault, "format_message"):
        # typer's own complaint about the words given; empty beside the help
        return fault.format_message()
    if isinstance(fault, OSError) and (fault.filename or fault.errno in FULL):
        return (
            f"cannot use {fault.filename or 'the disk'}: {fault.strerror}; "
            "free space or permission there, or choose another folder with --store"
        )
    return _of_a_plugin(fault)


def _of_a_plugin(fault: BaseException) -> str | None:
    """The line of the user's own code that raised it; None where none did."""
    if "ablab.ablations.registry" not in sys.modules:
        return None
    from ablab.ablations.registry import raised_at

    place = raised_at(fault)
    return f"plugin {place} raised {told(fault)}; mend it" if place else None


if __name__ == "__main__":
    main()
