"""Words that were encoded before: text repeats itself, and a dictionary is faster than merging bytes again.

A byte-level BPE splits text by a pattern and merges inside the pieces.  GPT-2's pattern never goes on into white space
behind other characters, and what it finds does not depend on what was before: so a text is its runs of white space
with the word behind each, encoded by themselves, and an ASCII word is its pieces by the same pattern in ASCII.

    "for i in f(x):\\n  go"  =  "for" + " i" + " in" + " f(x):" + "\\n  go";   " f(x):" = " f" + "(" + "x" + "):"

The library encodes each distinct piece, once.  A tokenizer that splits in another way is asked for every text whole.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from numpy import dtype, ndarray

WORD = re.compile(r"\s*\S+|\s+")
# White space for Python, and none for the pattern.
SEPARATORS = ("\x1c", "\x1d", "\x1e", "\x1f")
# GPT-2's pattern (github.com/openai/gpt-2, src/encoder.py) where letters and digits are ASCII.
PIECE = re.compile(r"'(?:[stmd]|re|ve|ll)| ?[A-Za-z]+| ?[0-9]+| ?[^\sA-Za-z0-9]+|\s+(?!\S)|\s+")
MOST_WORDS = 500_000  # kept: about 100 MB a process
MOST_CHARACTERS = 32_000_000  # in them
BETWEEN = (
    "\n"  # new pieces are encoded as lines of one text: a call costs as much as 30 characters
)
TOGETHER = 2_000  # lines of such a text


@dataclass(frozen=True)
class Splitting:
    """How a tokenizer comes from text to pieces.  digits: a pattern that parts them before GPT-2's does."""

    digits: re.Pattern[str] | None = None

    def pieces(self, text: str) -> list[str]:
        """text: ASCII."""
        if self.digits is None:
            return PIECE.findall(text)
        parts = self.digits.findall(text)
        return [piece for part in parts for piece in PIECE.findall(part)]


def splitting_of(told: dict[str, Any]) -> Splitting | None:
    """Of a tokenizer.json, as data; None for one whose pieces are not known to end before white space."""
    model = told.get("model") or {}
    added = told.get("added_tokens") or []
    plain = model.get("type") == "BPE" and not model.get("dropout") and not told["normalizer"]
    # An added token that is no special one is found in the whole text, and may hold spaces.
    if not plain or not all(one["special"] for one in added):
        return None
    match told["pre_tokenizer"]:
        case {"type": "ByteLevel", "use_regex": True, "add_prefix_space": False}:
            return Splitting()
        case {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Digits", "individual_digits": single},
                {"type": "ByteLevel", "use_regex": True, "add_prefix_space": False},
            ],
        }:
            return Splitting(re.compile(r"[0-9]|[^0-9]+" if single else r"[0-9]+|[^0-9]+"))
    return None


class Library(Protocol):
    """What is asked of a tokenizer.  file_dtype: of ids; token_bytes: the bytes of each id, [vocab]."""

    end: int
    file_dtype: "dtype"
    token_bytes: "ndarray"

    def ids_of(self, texts: list[str]) -> list[list[int]]: ...

    def spell(self, ids: Iterable[int]) -> bytes: ...


class Table:
    """Text -> its ids, in arrays, so that a million look-ups are one gather."""

    def __init__(self, codec: Library):
        import numpy

        self.number: dict[str, int] = {}  # text -> its place in the arrays
        self.starts = numpy.zeros(0, numpy.int64)  # of its ids in `ids`
        self.lengths = numpy.zeros(0, numpy.int64)
        self.ids = numpy.zeros(0, codec.file_dtype)

    def unknown(self, texts: Iterable[str]) -> list[str]:
        return [text for text in texts if text not in self.number]

    def add(self, texts: list[str], lengths: "ndarray", ids: "ndarray") -> None:
        """ids: of all the texts in a row."""
        import numpy

        first = len(self.number)
        self.number.update(zip(texts, range(first, first + len(texts)), strict=True))
        starts = len(self.ids) + numpy.cumsum(lengths) - lengths
        self.starts = numpy.concatenate((self.starts, starts))
        self.lengths = numpy.concatenate((self.lengths, lengths))
        self.ids = numpy.concatenate((self.ids, ids))

    def gather(self, texts: Iterable[str], count: int) -> "tuple[ndarray, ndarray]":
        """The ids of `count` texts in a row, and where those of each begin, and the last end: [count + 1]."""
        import numpy

        numbers = numpy.fromiter(map(self.number.__getitem__, texts), numpy.int64, count)
        lengths = self.lengths[numbers]
        ends = numpy.zeros(count + 1, numpy.int64)
        numpy.cumsum(lengths, out=ends[1:])
        shifts = self.starts[numbers] - ends[:-1]
        places = numpy.arange(ends[-1]) + numpy.repeat(shifts, lengths)
        return self.ids[places], ends


class Words:
    """The words of text, found in a table; filled by the library, piece by piece."""

    def __init__(self, codec: Library, splitting: Splitting):
        self.codec = codec
        self.splitting = splitting
        (self.between,) = codec.ids_of([BETWEEN])
        self._clear()

    def _clear(self) -> None:
        self.words = Table(self.codec)
        self.pieces = Table(self.codec)
        self.characters = 0

    def encode(self, texts: list[str]) -> "ndarray | None":
        """Ids of the texts, each closed by the end of text; None where the library must be asked for the whole."""
        import numpy

        if any(sign in text for text in texts for sign in SEPARATORS):
            return None
        if len(self.words.number) > MOST_WORDS or self.characters > MOST_CHARACTERS:
            self._clear()
        found = [WORD.findall(text) for text in texts]
        if not self._learn(self.words.unknown(set[str]().union(*found))):
            return None
        behind = numpy.cumsum([len(words) for words in found])
        ids, ends = self.words.gather(chain.from_iterable(found), int(behind[-1]))
        with_ends: ndarray = numpy.insert(ids, ends[behind], self.codec.end)
        return with_ends

    def _learn(self, words: list[str]) -> bool:
        """False where the ids of the words do not spell them."""
        import numpy

        self.characters += sum(map(len, words))
        joined = [word for word in words if _joins(word)]
        alone = [word for word in words if not _joins(word)]
        pieces = self.splitting.pieces("".join(joined))
        if not self._learn_pieces(self.pieces.unknown(set(pieces))):
            return False
        ids, _ = self.pieces.gather(pieces, len(pieces))
        sizes = numpy.fromiter(map(len, joined), numpy.int64, len(joined))
        lengths = self._lengths(ids, sizes)
        if lengths is None:
            return False
        self.words.add(joined, lengths, ids)
        return self._learn_alone(self.words, alone)

    def _learn_pieces(self, pieces: list[str]) -> bool:
        lines = [piece for piece in pieces if self._may_be_a_line(piece)]
        for first in range(0, len(lines), TOGETHER):
            if not self._learn_lines(lines[first : first + TOGETHER]):
                return False
        alone = [piece for piece in pieces if not self._may_be_a_line(piece)]
        return self._learn_alone(self.pieces, alone)

    def _may_be_a_line(self, piece: str) -> bool:
        """Whether it stays one piece between line ends: at most one space before it, and a line end is one id."""
        stripped = piece.strip()
        return len(self.between) == 1 and stripped != "" and stripped == piece.removeprefix(" ")

    def _learn_lines(self, lines: list[str]) -> bool:
        import numpy

        text = BETWEEN.join(lines)
        (found,) = self.codec.ids_of([text])
        ids = numpy.array(found, self.codec.file_dtype)
        inside = ids != self.between[0]
        sizes = numpy.fromiter(map(len, lines), numpy.int64, len(lines))
        lengths = self._lengths(ids[inside], sizes)
        if lengths is None or self.codec.spell(found) != text.encode():
            return False
        self.pieces.add(lines, lengths, ids[inside])
        return True

    def _learn_alone(self, table: Table, texts: list[str]) -> bool:
        import numpy

        found = self.codec.ids_of(texts)
        lengths = numpy.fromiter(map(len, found), numpy.int64, len(found))
        flat = numpy.fromiter(chain.from_iterable(found), self.codec.file_dtype)
        table.add(texts, lengths, flat)
        spell = self.codec.spell
        return all(spell(ids) == text.encode() for ids, text in zip(found, texts, strict=True))

    def _lengths(self, ids: "ndarray", sizes: "ndarray") -> "ndarray | None":
        """Ids of each text, of so many bytes; None where an id lies across two of them."""
        import numpy

        spelt = numpy.cumsum(self.codec.token_bytes[ids], dtype=numpy.int64)
        ends = numpy.cumsum(sizes)
        last = numpy.searchsorted(spelt, ends)
        if len(ends) and (last[-1] >= len(spelt) or (spelt[last] != ends).any()):
            return None
        lengths: ndarray = numpy.diff(last, prepend=-1)
        return lengths


def _joins(word: str) -> bool:
    """Whether words such as this can stand in a row: each begins where a piece begins."""
    return word.isascii() and word[0].isspace() and not word[-1].isspace()
