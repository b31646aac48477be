"""Which kernels served an arm and its reference: where these differ, their speeds compare kernels as well as ideas.

A run records place -> what served it: `triton`, or `torch: why not triton`.  Two reasons for torch are one service.
"""

from collections.abc import Mapping

import numpy as np

COLUMN = "kernels/"  # of frame.load, one a place: kernels/attention


def differing_service(
    ours: Mapping[str, np.ndarray], theirs: Mapping[str, np.ndarray]
) -> dict[str, tuple[str, str]]:
    """Place -> what served it in the cell and in the reference, where these differ.

    ours, theirs: place -> what served it in each run of the cell, and of its reference.  A place that only one of the
    two has (Muon's products), or that a run did not record, cannot be compared and is left out.
    """
    found = {}
    for place in ours:
        one = _recorded(ours[place])
        other = _recorded(theirs[place])
        if one and other and len({server(said) for said in one + other}) > 1:
            found[place] = (" and ".join(one), " and ".join(other))
    return found


def _recorded(served: np.ndarray) -> list[str]:
    """Each once."""
    return list(dict.fromkeys(said for said in served if isinstance(said, str)))


def server(said: str) -> str:
    """Who served, without why."""
    return said.partition(":")[0]


def in_words(service: dict[str, tuple[str, str]]) -> str:
    """attention by torch (qk_norm has no gains) against triton; loss by ..."""
    return "; ".join(
        f"{place} by {_by(ours)} against {_by(theirs)}"
        for place, (ours, theirs) in service.items()
    )


def _by(said: str) -> str:
    server, _, why = said.partition(": ")
    return f"{server} ({why})" if why else server
