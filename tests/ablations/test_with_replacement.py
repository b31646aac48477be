"""With replacement: any place, as likely as any other, and still a pure function of seed, step and row."""

import numpy as np
import torch

from ablab.core.data.tokens import Tokens


def begins(tokens, windows) -> np.ndarray:
    (source,) = tokens.sources
    return np.array([source.start(window) for window in range(windows)])


def test_windows_begin_anywhere_and_some_are_never_read(tiny, token_folder):
    """1,000 tokens, rows of 16: 984 places.  Chi-squared over eight eighths of them: 24.3 is passed once in 1,000."""
    places = begins(Tokens(tiny(["with_replacement"]), token_folder), 4000)
    assert places.min() == 0 and places.max() == 983
    counts = np.histogram(places, bins=8, range=(0, 984))[0]
    assert ((counts - 500) ** 2 / 500).sum() < 24.3
    unread = 984 - len(set(places[:984]))
    assert abs(unread / 984 - np.exp(-1)) < 0.05


def test_rows_are_a_pure_function_of_seed_and_step(tiny, token_folder):
    recipe = tiny(["with_replacement"])
    one, other = Tokens(recipe, token_folder), Tokens(recipe, token_folder)
    late = one.rows(7, 0, 4)
    assert torch.equal(late, other.rows(7, 0, 4))
    assert torch.equal(late[2:], one.rows(7, 2, 2))
    assert not torch.equal(
        late, Tokens(tiny(["with_replacement"], seed=1), token_folder).rows(7, 0, 4)
    )
    assert not torch.equal(late, Tokens(tiny(), token_folder).rows(7, 0, 4))
