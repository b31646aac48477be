"""Effect in compute: how much less of it an arm needs for the loss that both it and its reference reach.

    S = T / t*,   T: what the reference was trained for,   t*: when the arm reached the reference's final loss

t* is the first time that the running minimum of the arm is there, log t linear between evaluations.  Where the arm ends
worse, the two change places, and S = t* / T: turning them round turns S into 1 / S.  In tokens; in FLOPs, each arm's
own per token; in seconds, at each run's own pace.  Log S of each shared seed, then a paired t interval: bootstraps of
three seeds cover 66 to 77 % where this covers 93 to 96.

A loss on the way, under a schedule that still has to decay, is higher than a run of that length would end with: a
speedup read off one pair of runs is too small for arms that are better.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.special import stdtrit

from ablab.analysis.effects.comparison import finished, pace, with_numbers
from ablab.analysis.effects.frame import stretches
from ablab.core.store.metrics import known

TOKENS = "tokens"
FLOPS = "FLOPs"
SECONDS = "seconds"
FEWEST_EVALUATIONS = 2  # of a curve


@dataclass(frozen=True)
class Speedup:
    """How many times less an arm costs than its reference for the same loss."""

    cell: str
    reference: str
    unit: str  # "tokens", "FLOPs" or "seconds"
    factor: float  # exp of the mean of log S
    low: float | None  # 95 % interval; None below two seeds
    high: float | None
    logs: tuple[float, ...]  # log S of each seed
    seeds: tuple[int, ...]
    at_least: bool  # in some seed the level was passed before the first evaluation

    @property
    def n(self) -> int:
        return len(self.logs)


@dataclass(frozen=True)
class Trend:
    """How a speedup changes with size: the factor by which S grows when the size doubles."""

    factor: float
    low: float | None  # 95 % interval
    high: float | None


@dataclass(frozen=True)
class Track:
    """One run: the metric as a loss against tokens [P], and what a token costs."""

    tokens: np.ndarray
    losses: np.ndarray
    flops: float  # a token; NaN where it is not recorded
    seconds: float  # a token; NaN where it is not measured

    def until(self, level: float) -> tuple[float, bool]:
        """Tokens until the loss is `level` or lower, and whether it was at the first evaluation already."""
        lowest = np.minimum.accumulate(self.losses)
        at = int(np.argmax(lowest <= level))
        if at == 0:
            return float(self.tokens[0]), True
        above = lowest[at - 1]
        part = (above - level) / (above - lowest[at])
        before, after = np.log(self.tokens[at - 1 : at + 1])
        return float(np.exp(before + part * (after - before))), False


def speedups(
    runs: pd.DataFrame, logged: pd.DataFrame, metric: str, better: str = "lower"
) -> list[Speedup]:
    """Of every arm with a common seed whose curves are known, in tokens, then FLOPs and seconds as far as recorded.

    runs: of `frame.load`; logged: of `frame.curves`.
    """
    if not known(metric).nears:  # a pace or a norm is reached by no amount of training
        return []
    done = finished(with_numbers(runs, metric))
    tracks = _tracks(done, logged, metric, 1 if better == "lower" else -1)
    cells: dict[str, dict[int, Track]] = {}  # seed -> its track, of those that have one
    for cell, seed, run in zip(done.cell, done.seed, done.run, strict=True):
        own = cells.setdefault(str(cell), {})
        if run in tracks:
            own[int(seed)] = tracks[run]
    references = dict(zip(done.cell, done.reference, strict=True))
    found: list[Speedup] = []
    for cell, own in cells.items():
        reference = str(references[cell])
        theirs = cells.get(reference, {})
        if pairs := {seed: (own[seed], theirs[seed]) for seed in own if seed in theirs}:
            found += _of_pairs(cell, reference, pairs)
    return found


def trend(by_size: Mapping[float, Speedup]) -> Trend:
    """Least squares of log S on log2 size, over two sizes or more; df by Welch and Satterthwaite."""
    sizes = np.log2(np.array(list(by_size), float))
    centred = sizes - sizes.mean()
    weights = centred / (centred**2).sum()
    logs = [np.array(one.logs) for one in by_size.values()]
    slope = float(weights @ [own.mean() for own in logs])
    if any(len(own) < 2 for own in logs):
        return Trend(float(np.exp(slope)), None, None)
    parts = weights**2 * [own.var(ddof=1) / len(own) for own in logs]
    variance = float(parts.sum())
    half = 0.0
    if variance:
        degrees = variance**2 / float(np.sum(parts**2 / [len(own) - 1 for own in logs]))
        half = float(stdtrit(degrees, 0.975) * np.sqrt(variance))
    return Trend(float(np.exp(slope)), float(np.exp(slope - half)), float(np.exp(slope + half)))


def _tracks(
    done: pd.DataFrame, logged: pd.DataFrame, metric: str, sign: int
) -> dict[str, Track]:
    """Run -> its track; runs with fewer than two evaluations have none."""
    if metric not in logged:
        return {}
    known = logged[logged.run.isin(done.run)].dropna(subset=[metric])
    # A run that several cells share has logged each line once.
    rows = known.drop_duplicates(["run", "step"]).sort_values("run", kind="stable")
    once = done.drop_duplicates("run")
    seconds = dict(zip(once.run, 1 / pace(once), strict=True))
    tokens = rows.tokens.to_numpy(float)
    losses = sign * rows[metric].to_numpy(float)
    token_flops = (rows.flops / rows.tokens).to_numpy(float)
    return {
        run: Track(
            tokens=tokens[lines],
            losses=losses[lines],
            flops=float(token_flops[lines][-1]),
            seconds=float(seconds[run]),
        )
        for run, lines in stretches(rows.run)
        if lines.stop - lines.start >= FEWEST_EVALUATIONS
    }


Pairs = Mapping[int, tuple[Track, Track]]  # seed -> arm and reference


def _of_pairs(cell: str, reference: str, pairs: Pairs) -> Iterator[Speedup]:
    in_tokens = []
    early = False
    for ours, theirs in pairs.values():
        log, at_once = _log_ratio(ours, theirs)
        in_tokens.append(log)
        early = early or at_once
    logs = np.array(in_tokens)
    flops = np.array([np.log(theirs.flops / ours.flops) for ours, theirs in pairs.values()])
    paces = np.array([np.log(theirs.seconds / ours.seconds) for ours, theirs in pairs.values()])
    for unit, told in ((TOKENS, logs), (FLOPS, logs + flops), (SECONDS, logs + paces)):
        if np.isfinite(told).all():
            yield _speedup(cell, reference, unit, told, tuple(pairs), early)


def _log_ratio(ours: Track, theirs: Track) -> tuple[float, bool]:
    """log S in tokens, and whether it is a bound."""
    if ours.losses[-1] == theirs.losses[-1]:
        return 0.0, False
    if ours.losses[-1] > theirs.losses[-1]:
        log, at_once = _log_ratio(theirs, ours)
        return -log, at_once
    passed, at_once = ours.until(theirs.losses[-1])
    return float(np.log(theirs.tokens[-1] / passed)), at_once


def _speedup(
    cell: str,
    reference: str,
    unit: str,
    logs: np.ndarray,
    seeds: Sequence[int],
    at_least: bool,
) -> Speedup:
    n = len(logs)
    mean = logs.mean()
    low = high = None
    if n > 1:
        half = stdtrit(n - 1, 0.975) * logs.std(ddof=1) / np.sqrt(n)
        low = float(np.exp(mean - half))
        high = float(np.exp(mean + half))
    return Speedup(
        cell=cell,
        reference=reference,
        unit=unit,
        factor=float(np.exp(mean)),
        low=low,
        high=high,
        logs=tuple(map(float, logs)),
        seeds=tuple(seeds),
        at_least=at_least,
    )
