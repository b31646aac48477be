"""Tokens on disk -> batches.  A batch is a pure function of (seed, step, row), so resuming needs one integer."""

import hashlib
import os
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ablab.core.data.corpus import check_meta, load_verified
from ablab.core.errors import UserError
from ablab.core.recipe.recipe import Recipe


class Tokens:
    """The training and held-out tokens of a recipe, memory-mapped.

    Raises UserError when the folder is not the one that the recipe's digest names, was changed, or is too short
    for one row.
    """

    def __init__(self, recipe: Recipe, folder: Path):
        data, self.folder = recipe.data, folder
        self.meta = check_meta(recipe, load_verified(folder), folder)
        self.batches = recipe.batches
        self.context = data.context
        self.vocab = data.vocab
        self.seed = recipe.seed
        self.train = Mapped(folder / "train.bin", self.meta.dtype, self.meta.train_tokens)
        self.held_out = Mapped(folder / "val.bin", self.meta.dtype, self.meta.val_tokens)
        wanted = data.held_out // data.context
        self.held_out_starts = spread_rows(len(self.held_out), data.context, wanted)
        self.token_bytes = torch.from_numpy(
            np.load(folder / "token_bytes.npy").astype(np.int64)
        )
        self.windows = (len(self.train) - self.context) // self.context  # an epoch

    def rows(self, step: int, first: int, count: int) -> Tensor:
        """The rows of windows `first`..`first+count-1` of optimizer step `step` (from 0).

        int64 [count, context + 1]; a step whose windows are split into n has rows [count * n, context / n + 1].
        """
        pieces = self.batches.at(step).pieces
        context = self.context // pieces
        window = self.batches.windows_before(step) + first
        starts = [
            self._start(*divmod(index, self.windows)) + piece * context
            for index in range(window, window + count)
            for piece in range(pieces)
        ]
        return self._take(self.train, starts, context)

    def _start(self, epoch: int, position: int) -> int:
        """Each epoch visits every window once, in its own order and at its own phase."""
        order, phase = _epoch(self.seed, epoch, self.windows, self.context)
        return phase + int(order[position]) * self.context

    def held_out_rows(self) -> int:
        return len(self.held_out_starts)

    def held_out_batch(self, first: int, count: int) -> Tensor:
        """Held-out rows, spread over the validation file, in its order: int64 [count, context + 1]."""
        starts = self.held_out_starts[first : first + count]
        return self._take(self.held_out, starts, self.context)

    def held_out_targets(self) -> tuple[np.ndarray, np.ndarray]:
        """Of each held-out token to predict: the bytes it stands for, its document.  int32 [rows, context] each."""
        table = self.token_bytes.numpy().astype(np.int32)
        targets = self.held_out_batch(0, self.held_out_rows())[:, 1:].numpy()
        places = np.array(self.held_out_starts)[:, None] + np.arange(1, self.context + 1)
        return table[targets], self.held_out.documents(places, self.meta.end_of_text)

    def _take(self, tokens: "Mapped", starts: list[int], context: int) -> Tensor:
        block = tokens.take(starts, context + 1).astype(np.int64)
        if (top := int(block.max())) >= self.vocab:
            raise UserError(
                f"{self.folder} holds token {top}, beyond data.vocab={self.vocab}; "
                "tokenize again with the recipe's tokenizer"
            )
        return torch.from_numpy(block)


def spread_rows(tokens: int, context: int, wanted: int) -> list[int]:
    """The first token of each of `wanted` rows, evenly spread over a file of so many tokens.

    Of its W = (tokens - 1) // context whole windows, row i of n is window floor(i W / n); all of them where n = W.
    """
    windows = (tokens - 1) // context
    rows = min(wanted, windows)
    return [i * windows // rows * context for i in range(rows)]


class Mapped:
    """A file of ids in memory as far as it is read: what it gave is what stood there when it was opened.

    A file that is replaced or deleted meanwhile is read to the end; one that is written over is refused.
    """

    def __init__(self, path: Path, dtype: str, length: int):
        self.path = path
        self.length = length
        self.file = open(path, "rb")  # noqa: SIM115  closed with the last reference
        self.ids = np.memmap(self.file, dtype=dtype, mode="r")
        self.opened = self._written()

    def __len__(self) -> int:
        return self.length

    def take(self, starts: list[int], count: int) -> np.ndarray:
        """ids [starts, count], copied.  Raises UserError if the file was written over since it was opened."""
        block = np.stack([self.ids[start : start + count] for start in starts])
        if self._written() != self.opened:
            raise UserError(
                f"{self.path} was written over while it was read; "
                "restore it, or delete the folder and fill it again"
            )
        return block

    def documents(self, places: np.ndarray, end_of_text: int) -> np.ndarray:
        """The document that each place is in, int32, counted from 0; an end of text is its document's last token."""
        ends = np.flatnonzero(self.ids[: self.length] == end_of_text)
        return np.searchsorted(ends, places).astype(np.int32)

    def _written(self) -> tuple[int, int]:
        """Size and time of the last write.  Under a microsecond, where a step takes milliseconds."""
        status = os.fstat(self.file.fileno())
        return status.st_size, status.st_mtime_ns


@lru_cache(maxsize=4)  # a batch may straddle two epochs
def _epoch(seed: int, epoch: int, windows: int, context: int) -> tuple[np.ndarray, int]:
    """The order in which the windows are visited, [windows], and the token at which the first of them begins."""
    digest = hashlib.sha256(f"{seed}/data/{epoch}".encode()).digest()
    key = int.from_bytes(digest[:16], "big")
    draw = np.random.Generator(np.random.Philox(key=key))
    order = draw.permutation(windows)
    phase = int(draw.integers(context))
    return order, phase
