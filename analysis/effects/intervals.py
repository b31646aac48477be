"""How sure seeds make us of a difference: estimates, intervals and p-values for many arms at once.

Arms share seeds with their reference, and with the seed the initial weights and the batches, bit for bit.  So what
counts is the spread of  D[j, s] = y[arm j, seed s] - y[reference, seed s],  never that of y.

    n >= 6 seeds           paired t:            se_j = s_j / sqrt(n),   df = n - 1
    n = 3, 4, 5; k >= 3    moderated paired t:  se_j = s~_j / sqrt(n),  s~_j^2 = (d0 s0^2 + f_j s_j^2) / (d0 + f_j)
    n = 3, 4, 5; k = 2     diffmax:             se_j^2 = max(2 MSE of y ~ arm + seed, s~_j^2) / n
    n = 3, 4, 5; k = 1     paired t
    no seed in common      Welch's t

k arms, f_j = n_j - 1.  Moderation shrinks the k variances of D towards each other as far as they look alike: (d0, s0^2)
is Smyth's fit of a scaled F distribution (limma's fitFDist; Stat. Appl. Genet. Mol. Biol. 3:3, 2004).  The arms share a
reference, so their variances are correlated, and k of them are worth fewer: d0 and df stop at

    cap = sum_j f_j / (1 + (k - 1) / 4)

`ablab check stats` measures the coverage of all of them.
"""

from dataclasses import dataclass

import numpy as np
from scipy.special import polygamma, psi, stdtr, stdtrit

PAIRED = "paired t"
MODERATED = "moderated paired t"
DIFFMAX = "diffmax"
WELCH = "Welch"
MODERATED_FROM = 3  # seeds, and arms
PLAIN_FROM = 6  # seeds: from here on each arm's own spread is known well enough
LEVEL = 0.95
LEAST_VARIANCE = 1e-5  # of the median variance, as in limma: a logarithm is taken


@dataclass(frozen=True)
class Estimates:
    """Differences with their uncertainty.  Arrays [..., k]; k arms."""

    method: str
    delta: np.ndarray
    standard_error: np.ndarray
    degrees: np.ndarray  # of freedom

    def half_width(self, level: float = LEVEL) -> np.ndarray:
        """Of a two-sided interval of that level for each arm alone."""
        return stdtrit(self.degrees, (1 + level) / 2) * self.standard_error

    @property
    def p(self) -> np.ndarray:
        """Two-sided, of no difference, for each arm alone.  Without any spread: 0, or 1 where nothing differs."""
        return 2 * stdtr(self.degrees, -np.abs(self._in_errors(self.delta)))

    def p_beyond(self, margin: float) -> np.ndarray:
        """Of a difference as large as +-margin or larger (TOST): small where the arms are equivalent."""
        room = margin - np.abs(self.delta)
        return stdtr(self.degrees, -self._in_errors(room))

    def _in_errors(self, distance: np.ndarray) -> np.ndarray:
        """In standard errors; where these are zero, infinitely many, of the distance's sign."""
        exact = self.standard_error == 0
        inside = distance / np.where(exact, 1.0, self.standard_error)
        beyond = np.where(distance == 0, 0.0, np.copysign(np.inf, distance))
        return np.where(exact, beyond, inside)


def paired(differences: np.ndarray) -> Estimates:
    """Student's paired t for each arm.  differences: [..., k, n], n >= 2."""
    n = differences.shape[-1]
    delta = differences.mean(-1)
    standard_error = np.sqrt(differences.var(-1, ddof=1) / n)
    return Estimates(PAIRED, delta, standard_error, np.full_like(delta, n - 1.0))


def moderated(differences: np.ndarray) -> Estimates:
    """The moderated paired t.  differences: [..., k, n], n >= 2, k >= 2."""
    *_, k, n = differences.shape
    degrees = np.full(k, n - 1.0)
    variance, shrunk = shrink(differences.var(-1, ddof=1), degrees)
    return Estimates(MODERATED, differences.mean(-1), np.sqrt(variance / n), shrunk)


def diffmax(differences: np.ndarray, values: np.ndarray) -> Estimates:
    """The larger of the block model's error and the moderated one.

    differences: [..., k, n];  values: [..., cells, n] of all cells that they compare, over the same seeds.
    """
    *_, cells, n = values.shape
    own = moderated(differences)
    blocks = 2 * block_error(values)[..., None]
    pooled = blocks > own.standard_error**2 * n
    degrees = np.where(pooled, (cells - 1.0) * (n - 1), own.degrees)
    standard_error = np.where(pooled, np.sqrt(blocks / n), own.standard_error)
    return Estimates(DIFFMAX, own.delta, standard_error, degrees)


def welch(ours: np.ndarray, theirs: np.ndarray) -> Estimates:
    """Welch's t of mean(ours) - mean(theirs): [..., n] and [..., m], n and m >= 2, no seed in common."""
    a = ours.var(-1, ddof=1) / ours.shape[-1]
    b = theirs.var(-1, ddof=1) / theirs.shape[-1]
    spread = a + b
    squares = a**2 / (ours.shape[-1] - 1) + b**2 / (theirs.shape[-1] - 1)
    exact = spread == 0  # df has no value then; any will do, because se is zero
    degrees = np.where(exact, 1.0, spread**2 / np.where(exact, 1.0, squares))
    delta = ours.mean(-1) - theirs.mean(-1)
    return Estimates(WELCH, delta, np.sqrt(spread), degrees)


def on_shared_seeds(values: np.ndarray, reference: np.ndarray) -> Estimates:
    """The method that n and k ask for.  values: [..., k, n] of the arms, reference: [..., n]; n >= 2."""
    differences = values - reference[..., None, :]
    *_, k, n = differences.shape
    if not MODERATED_FROM <= n < PLAIN_FROM or k == 1:
        return paired(differences)
    if k < MODERATED_FROM:
        cells = np.concatenate([values, reference[..., None, :]], -2)
        return diffmax(differences, cells)
    return moderated(differences)


def block_error(values: np.ndarray) -> np.ndarray:
    """Mean squared error of y ~ cell + seed.  values: [..., cells, n]; df = (cells - 1)(n - 1)."""
    *_, cells, n = values.shape
    of_cells = values.mean(-1, keepdims=True)
    of_seeds = values.mean(-2, keepdims=True)
    residuals = values - of_cells - of_seeds + values.mean((-1, -2), keepdims=True)
    return (residuals**2).sum((-1, -2)) / ((cells - 1) * (n - 1))


def shrink(variances: np.ndarray, degrees: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Moderated variances and their degrees of freedom, [..., k] each.  variances: [..., k]; degrees: [k], f_j."""
    k = len(degrees)
    cap = degrees.sum() / (1 + (k - 1) / 4)
    prior_degrees, prior = scaled_f(variances, degrees)
    weight = np.minimum(prior_degrees, cap)[..., None]
    together = weight + degrees
    shrunk = (weight * prior[..., None] + degrees * variances) / together
    return shrunk, np.minimum(together, cap)


def scaled_f(variances: np.ndarray, degrees: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(d0, s0^2) of  s_j^2 ~ s0^2 F(f_j, d0),  by the moments of log s_j^2; d0 infinite where they spread no more
    than equal variances do, and s0^2 their mean then.

    With e_j = log s_j^2 - psi(f_j / 2) + log(f_j / 2):  var e - mean psi'(f_j / 2) = psi'(d0 / 2),
    log s0^2 = mean e + psi(d0 / 2) - log(d0 / 2).  variances: [..., k] -> [...] each.
    """
    median = np.median(variances, -1, keepdims=True)
    floor = LEAST_VARIANCE * np.where(median > 0, median, 1.0)
    half = degrees / 2
    logs = np.log(np.maximum(variances, floor)) - psi(half) + np.log(half)
    excess = logs.var(-1, ddof=1) - polygamma(1, half).mean()
    alike = excess <= 0
    half_prior = trigamma_inverse(np.where(alike, 1.0, excess))
    fitted = np.exp(logs.mean(-1) + psi(half_prior) - np.log(half_prior))
    prior_degrees = np.where(alike, np.inf, 2 * half_prior)
    return prior_degrees, np.where(alike, variances.mean(-1), fitted)


def trigamma_inverse(values: np.ndarray) -> np.ndarray:
    """x > 0 with psi'(x) = value, elementwise: Newton's method on 1 / psi', which is nearly straight (Smyth 2004)."""
    x = 0.5 + 1 / values
    for _ in range(50):
        here = polygamma(1, x)
        step = here * (1 - here / values) / polygamma(2, x)
        x = x + step
        if np.all(-step < 1e-9 * x):
            break
    return x
