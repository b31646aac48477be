"""The answers so far of an evaluation, on disk as they come: killed, it goes on, and asks no question twice.

FOLDER/evaluations/core@100.jsonl    first who is asked what, then an answer a line; it goes when the evaluation
                                     itself is written
"""

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from pathlib import Path

import msgspec

from ablab.core.errors import UserError
from ablab.core.store.claim import Claim, Lost, place_beside, take_if_dead
from ablab.core.store.evaluation import FOLDER
from ablab.core.store.files import FLAWS, writing
from ablab.experiments.evaluate.questions import Answer

ANSWER = msgspec.json.Decoder(Answer)

# A place -> its claim; None where another holds it.
Taking = Callable[[Path], Claim | None]


class Held(UserError):
    """Another process asks the same, here or on another machine."""

    def __init__(self, path: Path):
        super().__init__(f"another process writes {path}; wait for it, or stop it first")


class Progress:
    """Held by one process at a time, among all hosts.  Use it as a context.

    whose: what a line must belong to: the questions, the weights, how they compute.  Answers of others are dropped.
    """

    def __init__(
        self, folder: Path, title: str, whose: dict[str, str], take: Taking = take_if_dead
    ):
        self.path = folder / FOLDER / f"{title}.jsonl"
        self.whose = msgspec.json.encode(whose) + b"\n"
        self.take = take
        self.known: dict[str, Answer] = {}

    def __enter__(self) -> "Progress":
        """Raises Held."""
        claim = self.take(place_beside(self.path))
        if claim is None:
            raise Held(self.path)
        self.claim = claim
        with ExitStack() as opened:
            opened.enter_context(claim.beating())
            with writing(self.path):
                self._begin()
            self.opened = opened.pop_all()
        return self

    def _begin(self) -> None:
        """Read what is there; a last line that a kill has torn is cut off."""
        kept = self._sound()
        self.file = open(self.path, "r+b" if self.path.exists() else "w+b")  # noqa: SIM115  closed by `__exit__`
        self.file.truncate(0)
        self.file.write(kept)
        self.file.flush()

    def _sound(self) -> bytes:
        """The header and whole lines behind it; those of others count as none."""
        content = self.path.read_bytes() if self.path.is_file() else b""
        if not content.startswith(self.whose):
            return self.whose
        kept = [self.whose]
        for line in content[len(self.whose) :].splitlines(keepends=True):
            try:
                answer = ANSWER.decode(line)
            except FLAWS:
                break
            if not line.endswith(b"\n"):
                break
            self.known[answer.key] = answer
            kept.append(line)
        return b"".join(kept)

    def fence(self) -> None:
        """Before a write.  Raises Held where we slept for so long that another went on."""
        try:
            self.claim.beat()
        except Lost:
            raise Held(self.path) from None

    def add(self, answers: Iterable[Answer]) -> None:
        found = list(answers)
        self.fence()
        with writing(self.path):
            self.file.write(b"".join(msgspec.json.encode(one) + b"\n" for one in found))
            self.file.flush()
        self.known |= {one.key: one for one in found}

    def __exit__(self, *fault: object) -> None:
        self.file.close()
        self.opened.close()

    def done(self) -> None:
        """The evaluation stands in its own file now."""
        self.path.unlink(missing_ok=True)
