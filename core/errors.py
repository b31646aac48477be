"""The exceptions that ablab raises on purpose, and what their lines must not say."""

import re

# //user:secret@host, whatever stands in the secret; //token@host; ?password=secret.
OF_A_HOST = re.compile(r"//(?:[^\s/:@]*:\S*|[^\s/]*)@")
OF_A_QUERY = re.compile(r"\b(\w*(?:password|passwd|pwd|token|secret)=)[^&\s]+", re.IGNORECASE)


class UserError(Exception):
    """A mistake the user can mend.  One line: the thing, the rule, the value, the cure.  Exit code 2."""


class Pruned(Exception):
    """Raised by a log to end a run early: the study has seen enough.  A result, and one that can be taken up again."""


class Diverged(Exception):
    """The training loss stopped being finite.  The run ends as a record, the grid goes on."""

    def __init__(self, step: int, last_good: float):
        super().__init__(
            f"the loss was not finite at step {step}; the last good loss was {last_good:.4f} nats/token"
        )
        self.step, self.last_good = step, last_good


def without_password(text: str) -> str:
    """A URL, or a line with some in it, without what should stay secret."""
    return OF_A_QUERY.sub(r"\1...", OF_A_HOST.sub("//", text))
