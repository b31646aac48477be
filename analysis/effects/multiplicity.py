"""Several comparisons at once: with twelve dead arms, verdicts at 95 % each would hold a false one in 23 to 41 %."""

import numpy as np


def holm(p: np.ndarray) -> np.ndarray:
    """Holm's adjusted p-values of a family.  p: [..., k].

    Sorted:  adjusted_i = max over j <= i of  min(1, (k - j + 1) p_j).  Verdicts where adjusted p < alpha are all true
    with probability 1 - alpha or more, whatever the dependence.  Holm, Scand. J. Statist. 6:65, 1979.
    """
    k = p.shape[-1]
    order = np.argsort(p, -1, kind="stable")
    steps = np.take_along_axis(p, order, -1) * np.arange(k, 0, -1)
    adjusted = np.minimum(np.maximum.accumulate(steps, -1), 1.0)
    found = np.empty_like(adjusted)
    np.put_along_axis(found, order, adjusted, -1)
    return found
