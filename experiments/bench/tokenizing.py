"""Megabytes of text a second that one core turns into tokens, from file to part: unpacked, parsed, encoded, written."""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter, process_time

from ablab.core.data.blocks import Reading, Skipped, cut, texts
from ablab.core.data.codec import END, Codec
from ablab.core.data.corpus import CONFIGS
from ablab.core.data.documents import expand
from ablab.core.data.parts import Named, Work, encode

MEGA = 1e6
PLAINLY = 4_000_000  # bytes of text that the library encodes alone, for comparison


@dataclass(frozen=True)
class TokenizingSpeed:
    """MB/s of text, by processor time and by the clock; `library` encodes whole texts, already read, by itself.

    A core that others use too takes longer by the clock, and some longer by its own time.
    """

    text_bytes: int
    tokens: int
    cpu_mb_per_second: float
    wall_mb_per_second: float
    library_cpu_mb_per_second: float
    by_words: bool  # whether words are looked up


def bench_tokenizing(
    paths: list[str] | None = None, tokenizer: Path | None = None, field: str = "text"
) -> TokenizingSpeed:
    """One process on one core; the shipped text where none is named.

    Raises UserError for text or a tokenizer that cannot be read.
    """
    shipped = CONFIGS / "embedded"
    files = expand(paths or [shipped / "train.jsonl.xz"])
    codec = Codec(tokenizer or shipped / "tokenizer.json")
    reading = Reading(field)
    # The library's threads are waited for by the clock, and counted in the processor's time.
    cpu, wall = process_time(), perf_counter()
    size = tokens = 0
    with tempfile.TemporaryDirectory() as folder:
        work = Work(codec.path, END, reading, 0.01, Path(folder))
        for number, file in enumerate(files):
            for block in cut(file, reading):
                part = encode(Named(number, "train", block), work, codec)
                size += part.bytes
                tokens += part.tokens
    cpu, wall = process_time() - cpu, perf_counter() - wall
    return TokenizingSpeed(
        size,
        tokens,
        size / cpu / MEGA,
        size / wall / MEGA,
        _by_the_library(_some_of(files, reading), codec),
        codec.words is not None,
    )


def _some_of(files: list[Path], reading: Reading) -> list[str]:
    found: list[str] = []
    size = 0
    for text in _all_texts(files, reading):
        found.append(text)
        size += len(text.encode())
        if size >= PLAINLY:
            break
    return found


def _all_texts(files: list[Path], reading: Reading) -> Iterator[str]:
    for file in files:
        for block in cut(file, reading):
            yield from texts(block, reading, Skipped())


def _by_the_library(found: list[str], codec: Codec) -> float:
    size = sum(len(text.encode()) for text in found)
    cpu = process_time()
    for text in found:
        codec.ids_of([text])
    return size / (process_time() - cpu) / MEGA


def table(speed: TokenizingSpeed) -> str:
    how = "words looked up" if speed.by_words else "whole texts, by the library"
    return (
        f"{speed.text_bytes / MEGA:,.1f} MB of text, {speed.tokens / MEGA:,.2f} M tokens, one core, {how}\n"
        f"  {speed.cpu_mb_per_second:6.1f} MB/s by processor time: unpacked, parsed, encoded, written\n"
        f"  {speed.wall_mb_per_second:6.1f} MB/s by the clock\n"
        f"  {speed.library_cpu_mb_per_second:6.1f} MB/s the library alone, of text in memory"
    )
