"""What a token folder holds, as text for people."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ablab.core.data.codec import Codec
from ablab.core.data.folder import Side, load_meta
from ablab.core.errors import UserError


@dataclass(frozen=True)
class Passage:
    """Tokens of one side in a row.  document: the first's, where that is known."""

    first: int
    ids: list[int]
    text: str
    document: int | None = None


class Folder:
    """A token folder that is read as text."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.meta = load_meta(folder)

    def document(self, side: Side, number: int) -> Passage:
        """Raises UserError: no such document, or a folder that does not say where documents begin."""
        starts = self._starts(side)
        count = len(starts)
        if not 0 <= number < count:
            raise UserError(
                f"{self.folder} has {count:,} {side} documents, counted from 0; no document {number}"
            )
        total = sum(self.meta.files(side).values())
        end = starts[number + 1] if number + 1 < count else total
        return self.passage(side, starts[number], end - starts[number], number)

    def passage(
        self, side: Side, first: int, count: int, document: int | None = None
    ) -> Passage:
        """Raises UserError where the side ends before."""
        total = sum(self.meta.files(side).values())
        if not 0 <= first < total:
            raise UserError(
                f"{self.folder} has {total:,} {side} tokens, counted from 0; no token {first}"
            )
        ids = list(self._ids(side, first, min(count, total - first)))
        codec = Codec.of_folder(self.folder, self.meta)
        return Passage(first, ids, codec.shown(ids), document)

    def _ids(self, side: Side, first: int, count: int) -> Iterator[int]:
        import numpy

        for file, tokens in self.meta.files(side).items():
            if first < tokens and count:
                taken = min(count, tokens - first)
                mapped = numpy.memmap(self.folder / file, self.meta.dtype, "r")
                yield from mapped[first : first + taken].tolist()
                count -= taken
                first = 0
            else:
                first -= tokens

    def _starts(self, side: Side) -> list[int]:
        import numpy

        try:
            found: list[int] = numpy.fromfile(
                self.folder / f"{side}.starts.bin", "<i8"
            ).tolist()
        except OSError:
            raise UserError(
                f"{self.folder} does not say where documents begin, since it was made before that was kept; "
                "name a token with --start"
            ) from None
        return found
