"""Byte-level tokenizers: training one, and encoding with every byte accounted for.

A byte-level token is spelt in an alphabet of 256 characters, one a byte, so any text can be encoded and the
bytes of a token are its characters.  A character of three bytes may be split between tokens: what is compared with
the text is the bytes of its tokens joined.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from os.path import commonprefix
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ablab.core.data.documents import documents
from ablab.core.data.folder import Meta
from ablab.core.data.words import Words, splitting_of
from ablab.core.errors import UserError
from ablab.core.store.files import write_atomically

if TYPE_CHECKING:
    from numpy import ndarray

END = "<|endoftext|>"
BYTES_AND_END = 257  # ids that a byte-level vocabulary has at least
# Ids at most: the library claims their memory at once, and aborts where there is none.  Published ones have 262,144.
MOST_IDS = 2_000_000


def train_tokenizer(
    paths: Iterable[str | Path],
    out: Path,
    vocab: int,
    max_bytes: int | None = None,
    field: str = "text",
    split: str | None = None,
) -> int:
    """Train a byte-level BPE of `vocab` ids in all, `<|endoftext|>` being id 0, on the first `max_bytes` of text.

    Returns the bytes read.  The same text gives the same file.
    Raises UserError: `out` exists, vocab below 257 or beyond MOST_IDS, or text too short to yield that many ids.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if Path(out).exists():
        raise UserError(f"{out} exists already; delete it or choose another --out")
    if vocab < BYTES_AND_END:
        raise UserError(
            f"vocab={vocab} is too small: 256 bytes and {END} take {BYTES_AND_END} ids; try 4096"
        )
    if vocab > MOST_IDS:
        raise UserError(f"vocab={vocab} is too large: at most {MOST_IDS:,} ids; try 32000")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = _Metered(documents(paths, field, split), max_bytes)
    tokenizer.train_from_iterator(texts, trainer)
    got = tokenizer.get_vocab_size()
    if got < vocab:
        raise UserError(
            f"{texts.read:,} bytes of text yield only {got} ids, not {vocab}; "
            f"give more text or ask for --vocab {got}"
        )
    write_atomically(Path(out), tokenizer.to_str().encode())
    return texts.read


class _Metered:
    """Texts until `limit` bytes have been read; counts them."""

    def __init__(self, texts: Iterator[str], limit: int | None):
        self.texts = texts
        self.limit = limit
        self.read = 0

    def __iter__(self) -> Iterator[str]:
        for text in self.texts:
            self.read += len(text.encode())
            yield text
            if self.limit and self.read >= self.limit:
                return


class Codec:
    """A tokenizer that accounts for every byte: ids, their dtype, and the bytes of each id."""

    def __init__(self, path: Path, end: str = END):
        """end: the special token that ends a document.  Raises UserError: unreadable, no such token, not byte-level."""
        import numpy
        from tokenizers import Tokenizer

        self.path = Path(path)
        try:
            self.tokenizer = Tokenizer.from_file(str(path))
        except Exception as flaw:  # the library raises bare Exception
            raise UserError(
                f"cannot read the tokenizer {path}: {flaw}; train one with `ablab data train-tokenizer`"
            ) from None
        number = self.tokenizer.token_to_id(end)
        self.spelling = self._spelling()
        if number is None or self.spelling[number]:
            raise UserError(
                f"{path} has no token {end} that is special, to end each document; add it as a special token"
                f"{self._other_ends(end)}"
            )
        self.end: int = number
        # "<|endoftext|>" inside a document is text, not an end.
        self.tokenizer.encode_special_tokens = True
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.token_bytes = numpy.array([len(token) for token in self.spelling], "<i4")
        self.vocab = len(self.token_bytes)
        self.dtype: Literal["uint16", "uint32"] = "uint16" if self.vocab <= 65_536 else "uint32"
        self.file_dtype = numpy.dtype(self.dtype).newbyteorder("<")
        self.told: dict[str, Any] = json.loads(self.tokenizer.to_str())
        splitting = splitting_of(self.told)
        self.words = Words(self, splitting) if splitting else None

    @classmethod
    def of_folder(cls, folder: Path, meta: Meta) -> "Codec":
        """The tokenizer that a token folder was made by.  Raises UserError where it is not there, or another."""
        from tokenizers import Tokenizer

        path = folder / "tokenizer.json"
        try:
            end = Tokenizer.from_file(str(path)).id_to_token(meta.end_of_text)
        except Exception as flaw:  # the library raises bare Exception
            raise UserError(
                f"cannot read the tokenizer {path}: {flaw}; copy it there"
            ) from None
        codec = cls(path, end or END)
        if codec.vocab != meta.vocab:
            raise UserError(
                f"{path} has {codec.vocab} ids, but the tokens beside it are of {meta.vocab}; restore it"
            )
        return codec

    def shown(self, ids: list[int]) -> str:
        """The text of ids; special ones as they are written."""
        pieces = []
        for number in ids:
            special = not self.spelling[number]
            written = self.tokenizer.id_to_token(number) if special else ""
            pieces.append((written or "").encode() or self.spelling[number])
        return b"".join(pieces).decode(errors="replace")

    def _other_ends(self, end: str) -> str:
        """What may have been meant."""
        special = [
            token.content for token in self.tokenizer.get_added_tokens_decoder().values()
        ]
        ends = [
            token for token in special if token != end and ("end" in token or "/s" in token)
        ]
        return f", or name another with --end-of-text: {', '.join(ends[:3])}" if ends else ""

    @property
    def digest(self) -> str:
        """First 16 hex digits of sha256 over what decides ids; how its JSON is written does not matter."""
        return rules_digest(self.told)

    def _spelling(self) -> list[bytes]:
        """The bytes of each id, none for special ones.  An added token is plain text, any other byte-level."""
        vocab = self.tokenizer.get_vocab()
        added = self.tokenizer.get_added_tokens_decoder()
        byte = alphabet()
        spelling = [b""] * (max(vocab.values(), default=-1) + 1)
        for token, number in vocab.items():
            if number in added:
                continue
            if not byte.keys() >= set(token):
                raise UserError(
                    f"{self.path} is not byte-level: token {token!r:.40}; "
                    "train one with `ablab data train-tokenizer`"
                )
            spelling[number] = bytes(byte[character] for character in token)
        for number, addition in added.items():
            spelling[number] = b"" if addition.special else addition.content.encode()
        return spelling

    def encode(self, texts: list[str]) -> "tuple[ndarray, int]":
        """Ids of the texts in a row, each closed by the end of text, [tokens]; and the bytes of text.

        Raises UserError if the ids of a text do not spell exactly its bytes (a normalizer, a prefix space, an unknown).
        """
        import numpy

        size = sum(len(text.encode()) for text in texts)
        if self.words and (found := self.words.encode(texts)) is not None:
            return found, size
        rows = [self.encode_plainly(text) for text in texts]
        return numpy.concatenate(rows), size

    def encode_plainly(self, text: str) -> "ndarray":
        """Ids of one text by the library alone, and the end of text."""
        import numpy

        (ids,) = self.ids_of([text])
        self._check_spelt(text.encode(), ids)
        return numpy.array([*ids, self.end], self.file_dtype)

    def ids_of(self, texts: list[str]) -> list[list[int]]:
        """By the library, without any end."""
        encoded = self.tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [one.ids for one in encoded]

    def _check_spelt(self, text: bytes, ids: list[int]) -> None:
        """Refuse ids that spell another text."""
        spelt = self.spell(ids)
        if spelt != text:
            first = len(commonprefix([text, spelt]))
            was = text[first : first + 10]
            became = spelt[first : first + 10]
            raise UserError(
                f"{self.path} changes the text at byte {first} {was!r} to {became!r}: "
                f"{len(text)} bytes became {len(spelt)}; "
                "use byte-level BPE without normalizer, prefix space or unknown token"
            )

    def spell(self, ids: Iterable[int]) -> bytes:
        """The bytes that ids stand for."""
        return b"".join(map(self.spelling.__getitem__, ids))


def rules_digest(told: dict[str, Any]) -> str:
    """Of a tokenizer.json, as data: equal where the same text becomes the same ids."""
    rules = {
        key: told.get(key) for key in ("model", "normalizer", "pre_tokenizer", "added_tokens")
    }
    return hashlib.sha256(json.dumps(rules, sort_keys=True).encode()).hexdigest()[:16]


def alphabet() -> dict[str, int]:
    """Character -> the byte that it stands for: printable Latin-1 is itself, the other bytes count up from 256.

    GPT-2's, github.com/openai/gpt-2, src/encoder.py:bytes_to_unicode.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    spelt = {chr(byte): byte for byte in printable}
    return spelt | {chr(256 + place): byte for place, byte in enumerate(others)}
