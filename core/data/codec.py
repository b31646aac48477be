"""Byte-level tokenizers: training one, and encoding with every byte accounted for.

A byte-level token is spelt in an alphabet of 256 characters, one a byte, so any text can be encoded and the
bytes of a token are its characters.  A character of three bytes may be split between tokens; the sum still holds.
"""

from pathlib import Path

from ablab.core.data.documents import documents
from ablab.core.errors import UserError
from ablab.core.store.files import write_atomically

END = "<|endoftext|>"


def train_tokenizer(
    paths, out: Path, vocab: int, max_bytes: int | None = None, field: str = "text"
) -> int:
    """Train a byte-level BPE of `vocab` ids in all, `<|endoftext|>` being id 0, on the first `max_bytes` of text.

    Returns the bytes read.  The same text gives the same file.
    Raises UserError: vocab below 257, or text too short to yield that many ids.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    if vocab < 257:
        raise UserError(
            f"vocab={vocab} is too small: 256 bytes and {END} take 257 ids; try 4096"
        )
    read = 0

    def texts():
        nonlocal read
        for text in documents(paths, field):
            read += len(text.encode())
            yield text
            if max_bytes and read >= max_bytes:
                return

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts(), trainer)
    if (got := tokenizer.get_vocab_size()) < vocab:
        raise UserError(
            f"{read:,} bytes of text yield only {got} ids, not {vocab}; give more text or ask for --vocab {got}"
        )
    write_atomically(Path(out), tokenizer.to_str().encode())
    return read


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
        self.end = self.tokenizer.token_to_id(END)
        if self.end is None:
            raise UserError(
                f"{path} has no token {END}, which must end each document; add it as a special token"
            )
        self.tokenizer.encode_special_tokens = (
            True  # "<|endoftext|>" inside a document is text, not an end
        )
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.token_bytes = self._token_bytes()
        self.vocab = len(self.token_bytes)
        self.dtype = "uint16" if self.vocab <= 65_536 else "uint32"
        self.file_dtype = numpy.dtype(self.dtype).newbyteorder("<")

    def _token_bytes(self):
        """int32 [vocab].  One character of a byte-level token is one byte; an added token is plain text."""
        import numpy
        from tokenizers import pre_tokenizers

        vocab, added = self.tokenizer.get_vocab(), self.tokenizer.get_added_tokens_decoder()
        alphabet = set(pre_tokenizers.ByteLevel.alphabet())
        lengths = numpy.zeros(max(vocab.values()) + 1, "<i4")
        for token, number in vocab.items():
            if number not in added and not alphabet.issuperset(token):
                raise UserError(
                    f"{self.path} is not byte-level: token {token!r}; train one with `ablab data train-tokenizer`"
                )
            lengths[number] = len(token)
        for number, token in added.items():
            lengths[number] = 0 if token.special else len(token.content.encode())
        return lengths

    def encode(self, texts: list[str]):
        """Ids of the texts in a row, each closed by the end of text, [tokens]; and the bytes of text.

        Raises UserError if the ids do not stand for exactly those bytes (a normalizer, a prefix space, an unknown).
        """
        import numpy

        rows = [
            [*row.ids, self.end]
            for row in self.tokenizer.encode_batch(texts, add_special_tokens=False)
        ]
        ids = numpy.concatenate([numpy.array(row, self.file_dtype) for row in rows])
        size, spelt = (
            sum(len(text.encode()) for text in texts),
            int(self.token_bytes[ids].sum(dtype="int64")),
        )
        if spelt != size:
            raise UserError(
                f"{self.path} changes the text: {size} bytes became {spelt}; use byte-level BPE without normalizer, prefix space or unknown token"
            )
        return ids, size
