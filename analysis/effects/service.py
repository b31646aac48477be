"""Which kernels served an arm and its reference: where these differ, their speeds compare kernels as well as ideas.

A run records place -> what served it: `triton`, or `torch: why not triton`.  Two reasons for torch are one service.
"""

import pandas as pd

COLUMN = "kernels/"  # of frame.load, one a place: kernels/attention


def differing_service(pairs: pd.DataFrame) -> dict[str, tuple[str, str]]:
    """Place -> what served it in the cell and in the reference, where these differ.

    pairs: a row per pair that both finished, columns of the reference end in /reference.  A place that only one of the
    two has (Muon's products), or that a run did not record, cannot be compared and is left out.
    """
    found = {}
    for column in (str(name) for name in pairs):
        other = f"{column}/reference"
        if not column.startswith(COLUMN) or other not in pairs:
            continue
        ours = list(pairs[column].dropna().unique())
        theirs = list(pairs[other].dropna().unique())
        if ours and theirs and len({server(said) for said in ours + theirs}) > 1:
            found[column.removeprefix(COLUMN)] = (" and ".join(ours), " and ".join(theirs))
    return found


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
