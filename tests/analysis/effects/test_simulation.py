"""The small form of `ablab check stats`, and what it catches."""

from dataclasses import replace

import numpy as np
import pytest

from ablab.analysis.effects import simulation
from ablab.analysis.effects.intervals import Estimates, on_shared_seeds, paired, welch
from ablab.analysis.effects.looks import LOOKS, nominal_alphas
from ablab.analysis.effects.multiplicity import holm
from ablab.analysis.effects.simulation import SCENARIOS, Target, figures

FEW = 1500


def test_every_row_of_the_table_is_met():
    found = list(figures(FEW))
    assert [figure for figure in found if figure.missed] == []
    assert {(figure.scenario, figure.seeds) for figure in found} == {
        (scenario.name, seeds) for scenario in SCENARIOS for seeds in (3, 5, 8)
    }
    assert sum(figure.what == "power" for figure in found) == 6


def pooled(values, reference) -> Estimates:
    """One variance for all arms: right while they are equally noisy."""
    own = paired(values - reference[..., None, :])
    *_, k, n = values.shape
    error = np.sqrt((own.standard_error**2).mean(-1, keepdims=True))
    everyone = np.full_like(own.delta, k * (n - 1.0))
    return Estimates("pooled", own.delta, np.broadcast_to(error, own.delta.shape), everyone)


def normal_quantiles(values, reference) -> Estimates:
    """As if the spread were known."""
    own = on_shared_seeds(values, reference)
    return replace(own, degrees=np.full_like(own.degrees, 1e9))


def unpaired(values, reference) -> Estimates:
    """Welch, though seeds are shared."""
    return welch(values, reference[..., None, :])


@pytest.mark.parametrize(
    ("method", "scenario", "what"),
    [
        (pooled, "one arm 3 x as noisy", "family-wise error"),
        (normal_quantiles, "equal sd, rho 0", "coverage"),
        (unpaired, "equal sd, rho .8", "power"),
    ],
)
def test_a_wrong_method_misses_by_name(monkeypatch, method, scenario, what):
    monkeypatch.setattr(simulation, "on_shared_seeds", method)
    missed = {(figure.scenario, figure.what) for figure in figures(FEW) if figure.missed}
    assert (scenario, what) in missed


def test_verdicts_without_a_correction_are_missed(monkeypatch):
    monkeypatch.setattr(simulation, "holm", lambda p: p)
    found = [figure for figure in figures(FEW) if figure.what == "family-wise error"]
    assert all(figure.missed for figure in found)
    dead = [figure.share for figure in found if figure.scenario.startswith("equal sd")]
    assert min(dead) > 20 and max(dead) < 45


@pytest.mark.parametrize(
    ("share", "error", "missed"),
    [
        (93.0, 0.1, True),
        (93.8, 0.1, False),
        (96.2, 0.1, False),
        (97.0, 0.1, True),
        (95.0, 9.0, False),
    ],
)
def test_a_target_is_missed_only_beyond_the_simulations_own_error(share, error, missed):
    assert Target(94, 96).misses(share, error) == missed


@pytest.mark.parametrize(
    ("seeds", "correlation", "share"),
    [(3, 0.0, 46), (5, 0.0, 82), (8, 0.0, 95), (3, 0.8, 100)],
)
def test_a_dead_arm_is_called_equivalent_the_more_surely_the_more_seeds_it_has(
    normal, seeds, correlation, share
):
    """Margin 2 sd, ten arms.  One error pooled over all arms would say 53, 86 and 98 %, and trust noisy ones."""
    size = (FEW, 11, seeds)
    draw = simulation.alike if correlation else simulation.independent
    values = draw(normal, size)
    found = on_shared_seeds(values[:, 1:], values[:, 0])
    assert 100 * (found.p_beyond(2) < 0.05).mean() == pytest.approx(share, abs=3)


def test_three_looks_err_as_one_and_see_more(normal):
    """Ten arms; one live arm of 2 sd."""
    values = simulation.independent(normal, (FEW, 11, 8))
    false, _ = first_verdicts(values)
    assert (false < 9).any(-1).mean() < 0.055 + 3 * np.sqrt(0.05 / FEW)
    values[:, 1] += 4
    _, live = first_verdicts(values)
    assert (live < 9).mean() > 0.95
    assert live[live < 9].mean() < 7


def first_verdicts(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Seeds at each arm's first verdict, 9 without: of the dead arms, of the first one."""
    decided = np.full(values.shape[:2], 9)[:, 1:]
    for seeds, alpha in zip(LOOKS, nominal_alphas(), strict=True):
        found = on_shared_seeds(values[:, 1:, :seeds], values[:, 0, :seeds])
        now = (holm(found.p) < alpha) & (decided == 9)
        decided[now] = seeds
    return decided[:, 1:], decided[:, 0]
