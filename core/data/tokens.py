"""Tokens on disk -> batches.  A batch is a pure function of (seed, step, row), so resuming needs one integer."""

import hashlib
import os
from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ablab.core.data.folder import Meta, Side
from ablab.core.data.mixture import Shares
from ablab.core.data.sources import Source, opened, windows_in
from ablab.core.errors import UserError
from ablab.core.recipe.recipe import Data, Recipe


class Tokens:
    """The training and held-out tokens of a recipe, memory-mapped: one folder's, or those of the sources of a mix.

    folder: STORE/data/NAME.
    Raises UserError when a folder is not the one that the recipe's digest names, was changed, or is too short
    for one row.
    """

    def __init__(self, recipe: Recipe, folder: Path):
        data, self.folder = recipe.data, folder
        self.batches = recipe.batches
        self.read_before = recipe.before.windows
        self.context = data.context
        self.vocab = data.vocab
        sources = opened(recipe, folder)
        # All sources alike, whatever their shares: arms that differ in shares are measured on the same tokens.
        rows = data.held_out // len(sources) // data.context
        self.sources = [SourceTokens(one, data, recipe.seed, rows) for one in sources]
        self.shares = Shares(data.mix or {data.name: 1.0})
        self.held_out = [
            (source, start) for source in self.sources for start in source.held_out_starts
        ]
        self.token_bytes = torch.from_numpy(
            np.load(sources[0].folder / "token_bytes.npy").astype(np.int64)
        )

    @property
    def windows(self) -> int:
        """Windows of all sources, each seen once: an epoch where there is one source."""
        return sum(source.windows for source in self.sources)

    def rows(self, step: int, first: int, count: int) -> Tensor:
        """The rows of windows `first`..`first+count-1` of optimizer step `step` (from 0).

        int64 [count, context + 1]; a step whose windows are split into n has rows [count * n, context / n + 1].
        """
        pieces = self.batches.at(step).pieces
        context = self.context // pieces
        window = self.read_before + self.batches.windows_before(step) + first
        turns = [self.shares.at(number) for number in range(window, window + count)]
        rows = np.empty((count * pieces, context + 1), np.int64)
        for place, source in enumerate(self.sources):
            mine = [(i, own) for i, (taken, own) in enumerate(turns) if taken == place]
            if not mine:
                continue
            begins = [source.start(own) for _, own in mine]
            starts = [begin + piece * context for begin in begins for piece in range(pieces)]
            places = [i * pieces + piece for i, _ in mine for piece in range(pieces)]
            rows[places] = self._checked(source, source.train.take(starts, context + 1))
        return torch.from_numpy(rows)

    def held_out_rows(self) -> int:
        return len(self.held_out)

    def held_out_batch(self, first: int, count: int) -> Tensor:
        """Held-out rows, spread over the validation file of each source in turn: int64 [count, context + 1]."""
        rows = [
            self._checked(source, source.held_out.take([start], self.context + 1))
            for source, start in self.held_out[first : first + count]
        ]
        return torch.from_numpy(np.concatenate(rows).astype(np.int64))

    def held_out_targets(self) -> tuple[np.ndarray, np.ndarray]:
        """Of each held-out token to predict: the bytes it stands for, its document.  int32 [rows, context] each.

        Documents are counted on from source to source.
        """
        table = self.token_bytes.numpy().astype(np.int32)
        targets = self.held_out_batch(0, self.held_out_rows())[:, 1:].numpy()
        documents = []
        before = 0
        for source in self.sources:
            own = source.held_out_documents()
            documents.append(own + before)
            before += int(own.max()) + 1
        return table[targets], np.concatenate(documents).astype(np.int32)

    def held_out_spans(self, rows: int) -> Iterator[tuple[int, int, int]]:
        """Batches of at most `rows` held-out rows, each of one source: its number, first row, count."""
        begin = 0
        for number, source in enumerate(self.sources):
            end = begin + len(source.held_out_starts)
            for first in range(begin, end, rows):
                yield number, first, min(rows, end - first)
            begin = end

    def _checked(self, source: "SourceTokens", block: np.ndarray) -> np.ndarray:
        if (top := int(block.max())) >= self.vocab:
            raise UserError(
                f"{source.folder} holds token {top}, beyond data.vocab={self.vocab}; "
                "tokenize again with the recipe's tokenizer"
            )
        return block


class SourceTokens:
    """One source: its files, the order of its windows, its held-out rows.  It knows of no other source."""

    def __init__(self, source: Source, data: Data, seed: int, held_out_rows: int):
        meta, context = source.meta, data.context
        self.name = source.name
        self.folder = source.folder
        self.context = context
        self.train = Mapped(source.folder, meta, "train")
        self.held_out = Mapped(source.folder, meta, "val")
        self.windows = windows_in(meta, context)  # an epoch
        self.end_of_text = meta.end_of_text
        self.held_out_starts = spread_rows(meta.val_tokens, context, held_out_rows)
        # First token of a window, counted over the run from 0.
        self.start: Callable[[int], int] = InTurn(seed, self.windows, context)
        if data.replacement:
            self.start = Anew(seed, meta.train_tokens - context)

    def held_out_documents(self) -> np.ndarray:
        """The document of the validation file that each held-out token to predict is in, int32 [rows, context]."""
        places = np.array(self.held_out_starts)[:, None] + np.arange(1, self.context + 1)
        return self.held_out.documents(places, self.end_of_text)


class InTurn:
    """Each epoch visits every window once, in its own order and at its own phase."""

    def __init__(self, seed: int, windows: int, context: int):
        self.windows = windows
        self.context = context
        # A batch may straddle two epochs.
        self.order = lru_cache(maxsize=2)(partial(_epoch, seed, windows, context))

    def __call__(self, window: int) -> int:
        epoch, position = divmod(window, self.windows)
        order, phase = self.order(epoch)
        return phase + int(order[position]) * self.context


class Anew:
    """Each window begins at any token that leaves room for it, whatever was read before."""

    def __init__(self, seed: int, places: int):
        self.seed = seed
        self.places = places

    def __call__(self, window: int) -> int:
        digest = hashlib.sha256(f"{self.seed}/data/window/{window}".encode()).digest()
        return int.from_bytes(digest[:16], "big") % self.places


def spread_rows(tokens: int, context: int, wanted: int) -> list[int]:
    """The first token of each of `wanted` rows, evenly spread over a file of so many tokens.

    Of its W = (tokens - 1) // context whole windows, row i of n is window floor(i W / n); all of them where n = W.
    """
    windows = (tokens - 1) // context
    rows = min(wanted, windows)
    return [i * windows // rows * context for i in range(rows)]


class Mapped:
    """The tokens of one side in memory as far as they are read: what it gave is what stood there when it was opened.

    A shard that is replaced or deleted meanwhile is read to the end; one that is written over is refused.
    """

    def __init__(self, folder: Path, meta: Meta, side: Side):
        self.shards = [
            MappedFile(folder / file, meta.dtype, tokens)
            for file, tokens in meta.files(side).items()
        ]
        self.begins = np.cumsum([0] + [shard.length for shard in self.shards])

    def __len__(self) -> int:
        return int(self.begins[-1])

    def take(self, starts: list[int], count: int) -> np.ndarray:
        """ids [starts, count], copied.  Raises UserError if a file was written over since it was opened."""
        if len(self.shards) == 1:
            return self.shards[0].take(starts, count)
        return np.stack([self._run(start, count) for start in starts])

    def documents(self, places: np.ndarray, end_of_text: int) -> np.ndarray:
        """The document that each place is in, int32, counted from 0; an end of text is its document's last token."""
        ends = [
            begin + shard.places_of(end_of_text)
            for begin, shard in zip(self.begins, self.shards, strict=False)
        ]
        return np.searchsorted(np.concatenate(ends), places).astype(np.int32)

    def _run(self, start: int, count: int) -> np.ndarray:
        """Tokens in a row, across shards."""
        found: list[np.ndarray] = []
        number = int(np.searchsorted(self.begins, start, side="right")) - 1
        while count:
            shard = self.shards[number]
            first = start - int(self.begins[number])
            taken = min(count, shard.length - first)
            found.append(shard.take([first], taken)[0])
            start, count, number = start + taken, count - taken, number + 1
        return np.concatenate(found)


class MappedFile:
    """A file of ids."""

    def __init__(self, path: Path, dtype: str, length: int):
        self.path = path
        self.length = length
        self.file = open(path, "rb")  # noqa: SIM115  closed with the last reference
        self.ids = np.memmap(self.file, dtype=dtype, mode="r")
        self.opened = self._written()

    def take(self, starts: list[int], count: int) -> np.ndarray:
        """ids [starts, count], copied.  Raises UserError if the file was written over since it was opened."""
        block = np.stack([self.ids[start : start + count] for start in starts])
        if self._written() != self.opened:
            raise UserError(
                f"{self.path} was written over while it was read; "
                "restore it, or delete the folder and fill it again"
            )
        return block

    def places_of(self, number: int) -> np.ndarray:
        """Where an id stands."""
        return np.flatnonzero(self.ids[: self.length] == number)

    def _written(self) -> tuple[int, int]:
        """Size and time of the last write.  Under a microsecond, where a step takes milliseconds."""
        status = os.fstat(self.file.fileno())
        return status.st_size, status.st_mtime_ns


def _epoch(seed: int, windows: int, context: int, epoch: int) -> tuple[np.ndarray, int]:
    """The order in which the windows are visited, [windows], and the token at which the first of them begins."""
    digest = hashlib.sha256(f"{seed}/data/{epoch}".encode()).digest()
    key = int.from_bytes(digest[:16], "big")
    draw = np.random.Generator(np.random.Philox(key=key))
    order = draw.permutation(windows)
    phase = int(draw.integers(context))
    return order, phase
