"""Bits per byte of held-out text, source by source: the quiet metric, which every byte of a text moves a little.

    bits per byte = sum over documents of -log2 p(document) / sum of their UTF-8 bytes

Of JSONL (packed or not) whose lines hold `text` and `source`, or of the held-out side of token folders, each of which
is a source: those of a mix.  Documents are read from their own beginning, in rows as long as the model's context.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from ablab.core.data.formats import UNREADABLE, Unpacked, told_unreadable
from ablab.core.errors import UserError
from ablab.experiments.evaluate.bundle import digest_of
from ablab.experiments.evaluate.exam import Exam, Paper
from ablab.experiments.evaluate.names import PREFIX
from ablab.experiments.evaluate.questions import DOCUMENT, Question

Texts = dict[str, list[str]]  # source -> its documents


def exam_of_file(path: Path, limit: int | None = None) -> Exam:
    """limit: the first so many documents of a source.

    Raises UserError: no such file, a line without text or source, nothing in it.
    """
    if not path.is_file():
        raise UserError(
            f'no text {path}; name a JSONL file whose lines hold "text" and "source"'
        )
    texts: Texts = {}
    for source, text in read_sources(path):
        texts.setdefault(source, []).append(text)
    return _exam(texts, limit, digest_of([path], path.parent), str(path))


def exam_of_folders(folders: Mapping[str, Path], limit: int | None = None) -> Exam:
    """Source -> token folder, of whose held-out documents the text is asked, whatever the model's tokenizer.

    Raises UserError for a folder that is missing, changed or without a tokenizer.
    """
    from ablab.core.data.corpus import load_verified

    digests = [load_verified(folder).digest for folder in folders.values()]
    texts = {source: list(held_out_texts(folder)) for source, folder in folders.items()}
    where = ", ".join(map(str, folders.values()))
    return _exam(texts, limit, "-".join(digests), where)


def _exam(texts: Texts, limit: int | None, digest: str, where: str) -> Exam:
    papers = [_paper(source, own, limit) for source, own in texts.items() if own]
    if not papers:
        raise UserError(f"{where} holds no text to read")
    title = "bpb" + (f"@{limit}" if limit else "")
    return Exam(title, PREFIX + title, "pooled", papers, digest, where)


def _paper(source: str, texts: list[str], limit: int | None) -> Paper:
    asked = texts[:limit]
    return Paper(
        name=source,
        questions=[Question(source, i, DOCUMENT, (text,)) for i, text in enumerate(asked)],
        there=len(texts),
        sizes=[len(text.encode()) for text in asked],
    )


def read_sources(path: Path) -> Iterator[tuple[str, str]]:
    """Source and text of each document that has any.  Raises UserError with the line of a malformed one."""
    try:
        with Unpacked(path) as opened:
            lines = opened.file.read().splitlines()
    except UNREADABLE as flaw:
        raise told_unreadable(path, flaw) from None
    for number, line in enumerate(lines, 1):
        if line.strip():
            source, text = _read_line(line, f"{path}:{number}")
            if text:
                yield source, text


def _read_line(line: bytes, where: str) -> tuple[str, str]:
    try:
        document = json.loads(line)
    except (ValueError, RecursionError) as flaw:
        raise UserError(f"{where} is no JSON: {flaw!s:.80}") from None
    for key in ("source", "text"):
        if not (isinstance(document, dict) and isinstance(document.get(key), str)):
            raise UserError(f"{where} must be an object with a text under {key!r}")
    return document["source"], document["text"]


def held_out_texts(folder: Path) -> Iterator[str]:
    """The held-out documents of a token folder, as its own tokenizer reads them back."""
    from ablab.core.data.corpus import load_meta
    from ablab.core.data.tokens import Mapped
    from ablab.core.interop.folder import TOKENIZER

    if not (folder / TOKENIZER).is_file():
        raise UserError(f"{folder} holds no {TOKENIZER} to read its held-out text back with")
    from tokenizers import Tokenizer

    meta = load_meta(folder)
    tokenizer = Tokenizer.from_file(str(folder / TOKENIZER))
    tokens = Mapped(folder, meta, "val")
    ids = tokens.take([0], len(tokens))[0].tolist() if len(tokens) else []
    begin = 0
    for place, token in enumerate(ids):
        if token == meta.end_of_text:
            text = tokenizer.decode(ids[begin:place])
            begin = place + 1
            if text:
                yield text
