"""What a difference owes to the choice of the held-out text: its standard error over documents.

All arms read the same held-out tokens, so a delta is a sum over them, and another text would give another sum.  With
d_i the arm's loss on token i minus the reference's, each a mean over its runs, and documents g:

    D_g = sum of d_i over the counted tokens of g;   S_g = their size: ln 2 times bytes, or their number for a loss
    delta = sum D_g / sum S_g
    SE^2 = G / (G - 1) * sum (D_g - delta S_g)^2 / (sum S_g)^2

the sandwich estimate of a weighted mean, clustered by document, for tokens of one document are not independent (Miller,
arXiv:2411.00640).  The seeds are held fixed: it stands beside the interval over seeds, and is not in it.
"""

import math
from collections.abc import Callable, Iterable, Sequence, Set
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd

from ablab.analysis.effects.effect import Effect, TokenEffect
from ablab.core.store.held_out import HeldOut
from ablab.core.store.record import Damaged, Record
from ablab.core.store.store import Store

FEWEST = 2  # documents; one has no spread


@dataclass(frozen=True, eq=False)
class Sums:
    """The losses of one run, summed over each document: [documents] each."""

    document: np.ndarray
    nats: np.ndarray
    size: np.ndarray  # in what the metric divides nats by
    tokens: np.ndarray

    def reads_as(self, other: "Sums") -> bool:
        """Whether both read the same tokens, as far as documents and sizes tell."""
        pairs = ((self.document, other.document), (self.size, other.size))
        return all(np.array_equal(*pair) for pair in pairs)


Size = Callable[[HeldOut], np.ndarray]
SIZES: dict[str, Size] = {  # metric -> the size of each token; 0: not counted
    "val/bits_per_byte": lambda held_out: math.log(2) * held_out.bytes,
    "val/loss": lambda held_out: np.ones(held_out.bytes.shape),
}


def sums_of(held_out: HeldOut, metric: str) -> Sums:
    size = SIZES[metric](held_out)
    counted = size > 0
    documents, places = np.unique(held_out.document[counted], return_inverse=True)
    return Sums(
        document=documents,
        nats=np.bincount(places, held_out.nats[counted].astype(float)),
        size=np.bincount(places, size[counted]),
        tokens=np.bincount(places),
    )


def token_effect(arm: Sequence[Sums], reference: Sequence[Sums]) -> TokenEffect | None:
    """arm, reference: of the runs behind the delta.

    None where they read other tokens or too few documents, and where a loss is beyond float16.
    """
    everyone = [*arm, *reference]
    if not (arm and reference) or not all(one.reads_as(everyone[0]) for one in everyone):
        return None
    size = everyone[0].size
    count = len(size)
    if count < FEWEST or not all(np.isfinite(one.nats).all() for one in everyone):
        return None
    ours = np.mean([one.nats for one in arm], axis=0)
    theirs = np.mean([one.nats for one in reference], axis=0)
    whole = size.sum()
    delta = (ours - theirs).sum() / whole
    residuals = ours - theirs - delta * size
    variance = count / (count - 1) * np.square(residuals).sum() / whole**2
    return TokenEffect(
        delta=float(delta),
        se=math.sqrt(variance),
        documents=count,
        tokens=int(everyone[0].tokens.sum()),
    )


class TokenEffects:
    """The token effects of an experiment.

    runs: of `frame.load`.  damages: what could not be read, in sentences.
    """

    def __init__(self, store: Store, runs: pd.DataFrame, metric: str):
        self.store = store
        self.metric = metric
        self.damages: list[str] = []
        # Cell -> run -> its seed, each run once.
        self.seeds: dict[str, dict[str, int]] = {}
        # A reference stands behind every arm: its runs are read once.
        self.known: dict[tuple[str, str], Sums | None] = {}
        for cell, run, seed in zip(runs.cell, runs.run, runs.seed, strict=True):
            self.seeds.setdefault(cell, {}).setdefault(run, seed)

    def added(self, effects: Iterable[Effect]) -> list[Effect]:
        """Each with its token effect; none for metrics that are no mean over tokens."""
        if self.metric not in SIZES:
            return list(effects)
        return [replace(effect, tokens=self._of(effect)) for effect in effects]

    def _of(self, effect: Effect) -> TokenEffect | None:
        if effect.reference is None:
            return None
        behind = set(effect.runs)
        arm = self._sums(effect.cell, behind)
        reference = self._sums(effect.reference, behind)
        return token_effect(arm, reference)

    def _sums(self, cell: str, behind: Set[str]) -> list[Sums]:
        """Of those runs of a cell; empty where one of them has none."""
        found = [self._known(cell, run) for run in self.seeds[cell] if run in behind]
        whole = [one for one in found if one]
        return whole if len(whole) == len(found) else []

    def _known(self, cell: str, run: str) -> Sums | None:
        who = (cell, run)
        if who not in self.known:
            self.known[who] = self._read(cell, run)
        return self.known[who]

    def _read(self, cell: str, run: str) -> Sums | None:
        record = self.store.run(run)
        result = record.result()
        if result is None or not result.held_out:
            return None
        try:
            return _remembered(record.folder, result.held_out, self.metric, _stamp(record))
        except Damaged as damage:
            self.damages.append(
                f"`{cell}`, seed {self.seeds[cell][run]}: {damage}; the token errors that need it are left out"
            )
            return None


def _stamp(record: Record) -> int:
    """Tells a file from the one that replaces it; 0 while there is none."""
    try:
        return record.held_out_path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


# A watched page asks again every few seconds, and a million losses are read in 0.1 s.
@lru_cache(maxsize=10_000)
def _remembered(folder: Path, digest: str, metric: str, stamp: int) -> Sums:
    """Raises Damaged."""
    return sums_of(Record(folder).held_out(digest), metric)
