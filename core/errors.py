"""The exceptions that ablab raises on purpose, and how those of others are told in a line that keeps secrets."""

import re
import traceback
from collections.abc import Collection

# //user:secret@host, whatever stands in the secret; //token@host; ?password=secret.
OF_A_HOST = re.compile(r"//(?:[^\s/:@]*:\S*|[^\s/]*)@")
OF_A_QUERY = re.compile(r"\b(\w*(?:password|passwd|pwd|token|secret)=)[^&\s]+", re.IGNORECASE)

LONGEST_LINE = 320  # characters: most errors have 150, and a value that was given any number
END_KEPT = 100  # of a longer line: the cure stands there


def one_line(said: str) -> str:
    """`said` on one line that any terminal takes: cut in its middle if it is long, what does not print as escapes."""
    line = " ".join(part.strip() for part in said.splitlines()) if "\n" in said else said
    line = "".join(one if one.isprintable() else ascii(one)[1:-1] for one in line)
    if len(line) <= LONGEST_LINE:
        return line
    return f"{line[: LONGEST_LINE - END_KEPT]} ... {line[-END_KEPT:]}"


class UserError(Exception):
    """A mistake the user can mend.  One line: the thing, the rule, the value, the cure.  Exit code 2."""

    def __init__(self, said: str):
        super().__init__(one_line(said))


class Pruned(Exception):
    """Raised by a log to end a run early: the study has seen enough.  A result, and one that can be taken up again."""


class Halted(Exception):
    """The run was asked to end in time: it is saved at this step, and has no result."""

    def __init__(self, step: int):
        super().__init__(f"halted at step {step}")
        self.step = step


class Diverged(Exception):
    """The training loss stopped being finite.  The run ends as a record, the grid goes on."""

    def __init__(self, step: int, last_good: float):
        super().__init__(
            f"the loss was not finite at step {step}; the last good loss was {last_good:.4f} nats/token"
        )
        self.step, self.last_good = step, last_good


class ParentDiverged(Exception):
    """The run from which one goes on has diverged: so has this one, before its first step."""

    def __init__(self, run: str, why: str):
        super().__init__(f"run {run}, from which it goes on, diverged: {why}")


def told(flaw: BaseException) -> str:
    """`ValueError: what it says`, in one line; also of one that fails to say anything."""
    said = said_by(flaw)
    name = type(flaw).__name__
    return one_line(f"{name}: {said}" if said else name)


def said_by(flaw: BaseException) -> str:
    """Its text.  An exception may be anybody's class, and its text anybody's code."""
    try:
        return str(flaw)
    except Exception as worse:
        return f"it cannot be shown, for that raises {type(worse).__name__}"


def place_in(flaw: BaseException, files: Collection[str]) -> str:
    """`FILE:LINE`, the innermost line of the trace that stands in one of the files; '' if none does."""
    frames = traceback.extract_tb(flaw.__traceback__)
    places = [f"{frame.filename}:{frame.lineno}" for frame in frames if frame.filename in files]
    return places[-1] if places else ""


def without_password(text: str) -> str:
    """A URL, or a line with some in it, without what should stay secret."""
    return OF_A_QUERY.sub(r"\1...", OF_A_HOST.sub("//", text))
