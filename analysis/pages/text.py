"""What the pages are made of: numbers as text, lists and Markdown tables."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pandas as pd

NONE = "–"


def number(value: float | None, form: str, mark: str = "") -> str:
    """The value in that format, a mark behind it; a dash where there is none."""
    return NONE if value is None or pd.isna(value) else f"{value:{form}}{mark and ' '}{mark}"


def markdown_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table; the first column is a name and set as code."""
    if not rows:
        return NONE
    lines = [list(rows[0]), ["---"] * len(rows[0])]
    for row in rows:
        name, *rest = (str(value).replace("|", "\\|") for value in row.values())
        lines.append([f"`{name}`", *rest])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def bullets(sentences: Iterable[str]) -> str:
    return "\n".join(f"- {sentence}" for sentence in sentences)
