"""The exceptions that ablab raises on purpose."""

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


class Diverged(Exception):
    """The training loss stopped being finite.  The run ends as a record, the grid goes on."""

    def __init__(self, step: int, last_good: float):
        super().__init__(
            f"the loss was not finite at step {step}; the last good loss was {last_good:.4f} nats/token"
        )
        self.step, self.last_good = step, last_good
