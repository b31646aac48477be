"""The words of a model: its tokenizer, and where its texts end."""

from collections.abc import Iterator
from pathlib import Path

from ablab.core.data.codec import END
from ablab.core.data.corpus import load_meta
from ablab.core.errors import UserError
from ablab.core.interop.folder import BESIDE, Source, read_json, refuse_other_vocabulary
from ablab.core.recipe.recipe import Recipe

BROKEN = "\N{REPLACEMENT CHARACTER}"  # of bytes that are no text, or not yet


class Words:
    """Text -> ids and back, as the model's own tokenizer has it.

    Raises UserError for one that is unreadable, or has ids that the model has no row for.
    """

    def __init__(self, path: Path, recipe: Recipe):
        from tokenizers import Tokenizer

        refuse_other_vocabulary(path, recipe)
        self.tokenizer = Tokenizer.from_file(str(path))
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        self.end = end_of(path)

    def ids(self, text: str) -> list[int]:
        """An empty text is what follows the end of another.  Raises UserError where there is no such end."""
        ids = self.tokenizer.encode(text).ids
        if ids:
            return ids
        if self.end is None:
            raise UserError(f"an empty prompt needs a tokenizer with {END}; write a word")
        return [self.end]

    def text(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids)


class Pieces:
    """A text as it comes: what each token adds, once its characters are whole."""

    def __init__(self, words: Words):
        from tokenizers.decoders import DecodeStream

        self.words = words
        self.decoder = DecodeStream(skip_special_tokens=True)
        self.ids: list[int] = []
        self.said = ""

    def __call__(self, token: int) -> str:
        self.ids.append(token)
        piece = self.decoder.step(self.words.tokenizer, token) or ""
        self.said += piece
        return piece

    def rest(self) -> str:
        """What was held back: a character that never became whole is left out."""
        whole = self.words.text(self.ids).rstrip(BROKEN)
        return whole.removeprefix(self.said) if whole.startswith(self.said) else ""


def end_of(tokenizer: Path) -> int | None:
    """The id that ends each text: as the token folder says in which the tokenizer stands, else that of END."""
    if (tokenizer.parent / "meta.json").is_file():
        return load_meta(tokenizer.parent).end_of_text
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(tokenizer)).token_to_id(END)


def begin_of(folder: Path, source: Source, words: Words) -> int | None:
    """The id before a text that has nothing before it: an imported model's BOS, else the end of text."""
    beside = folder / BESIDE / "tokenizer_config.json"
    told = read_json(beside).get("bos_token") if beside.is_file() else None
    word = told.get("content") if isinstance(told, dict) else told
    begin = source.config.get("bos_token_id")
    if isinstance(word, str):
        begin = words.tokenizer.token_to_id(word)
    return begin if isinstance(begin, int) else words.end


def ends_of(folder: Path, source: Source, words: Words) -> frozenset[int]:
    """Ids after which a text is over: those of an imported model, else the end of text."""
    told = list(_told(folder, source))
    if not told and words.end is not None:
        told = [words.end]
    return frozenset(told)


def _told(folder: Path, source: Source) -> Iterator[int]:
    beside = folder / BESIDE / "generation_config.json"
    described = read_json(beside) if beside.is_file() else source.config
    ends = described.get("eos_token_id", source.config.get("eos_token_id"))
    for one in ends if isinstance(ends, list) else [ends]:
        if isinstance(one, int):
            yield one
