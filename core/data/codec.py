"""Byte-level tokenizers: training one, and encoding with every byte accounted for.

A byte-level token is spelt in an alphabet of 256 characters, one a byte, so any text can be encoded and the
bytes of a token are its characters.  A character of three bytes may be split between tokens; the sum still holds.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ablab.core.data.documents import documents
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
) -> int:
    """Train a byte-level BPE of `vocab` ids in all, `<|endoftext|>` being id 0, on the first `max_bytes` of text.

    Returns the bytes read.  The same text gives the same file.
    Raises UserError: vocab below 257 or beyond MOST_IDS, or text too short to yield that many ids.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

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
    texts = _Metered(documents(paths, field), max_bytes)
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

    def __init__(self, path: Path):
        """Raises UserError: unreadable, no end of text, or not byte-level."""
        import numpy
        from tokenizers import Tokenizer

        self.path = Path(path)
        try:
            self.tokenizer = Tokenizer.from_file(str(path))
        except Exception as flaw:  # the library raises bare Exception
            raise UserError(
                f"cannot read the tokenizer {path}: {flaw}; train one with `ablab data train-tokenizer`"
            ) from None
        end = self.tokenizer.token_to_id(END)
        if end is None:
            raise UserError(
                f"{path} has no token {END}, which must end each document; add it as a special token"
            )
        self.end: int = end
        # "<|endoftext|>" inside a document is text, not an end.
        self.tokenizer.encode_special_tokens = True
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.token_bytes = self._token_bytes()
        self.vocab = len(self.token_bytes)
        self.dtype: Literal["uint16", "uint32"] = "uint16" if self.vocab <= 65_536 else "uint32"
        self.file_dtype = numpy.dtype(self.dtype).newbyteorder("<")

    def _token_bytes(self) -> "ndarray":
        """int32 [vocab].  One character of a byte-level token is one byte; an added token is plain text."""
        import numpy
        from tokenizers import pre_tokenizers

        vocab = self.tokenizer.get_vocab()
        added = self.tokenizer.get_added_tokens_decoder()
        alphabet = set(pre_tokenizers.ByteLevel.alphabet())
        lengths = numpy.zeros(max(vocab.values()) + 1, "<i4")
        for spelling, number in vocab.items():
            if number not in added and not alphabet.issuperset(spelling):
                raise UserError(
                    f"{self.path} is not byte-level: token {spelling!r}; "
                    "train one with `ablab data train-tokenizer`"
                )
            lengths[number] = len(spelling)
        for number, token in added.items():
            lengths[number] = 0 if token.special else len(token.content.encode())
        return lengths

    def encode(self, texts: list[str]) -> "tuple[ndarray, int]":
        """Ids of the texts in a row, each closed by the end of text, [tokens]; and the bytes of text.

        Raises UserError if the ids do not stand for exactly those bytes (a normalizer, a prefix space, an unknown).
        """
        import numpy

        encoded = self.tokenizer.encode_batch(texts, add_special_tokens=False)
        rows = [[*row.ids, self.end] for row in encoded]
        ids = numpy.concatenate([numpy.array(row, self.file_dtype) for row in rows])
        size = sum(len(text.encode()) for text in texts)
        spelt = int(self.token_bytes[ids].sum(dtype="int64"))
        if spelt != size:
            raise UserError(
                f"{self.path} changes the text: {size} bytes became {spelt}; "
                "use byte-level BPE without normalizer, prefix space or unknown token"
            )
        return ids, size
