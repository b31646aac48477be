"""The names of scores: eval/SUITE[@LIMIT][/PART], as sheets, records and reports write them."""

import re
from dataclasses import dataclass

from ablab.core.errors import UserError

PREFIX = "eval/"
SUITES = ("core", "blimp", "bpb")  # what a run can be evaluated on at its end
NAME = re.compile(
    r"eval/(?P<suite>[a-z]+)(?P<share>_\d+_of_\d+)?(@(?P<limit>[1-9]\d{0,8}))?(/(?P<part>.+))?"
)


@dataclass(frozen=True)
class Asked:
    """What a name asks for.  share: `_20_of_22`, of a mean over fewer parts than the suite has."""

    suite: str
    share: str = ""
    limit: int | None = None
    part: str = ""

    @property
    def title(self) -> str:
        """Of the evaluation: the name of its file."""
        limit = f"@{self.limit}" if self.limit else ""
        return f"{self.suite}{self.share}{limit}"


def is_evaluation(metric: str) -> bool:
    return metric.startswith(PREFIX)


def asked_of(metric: str) -> Asked:
    """Raises UserError for what names no evaluation."""
    found = NAME.fullmatch(metric)
    if not found or found["suite"] not in SUITES:
        raise UserError(
            f"metric {metric!r:.80} names no evaluation; known: eval/core, eval/blimp, eval/bpb/SOURCE, "
            "each also of the first N items a task, as eval/core@100"
        )
    limit = int(found["limit"]) if found["limit"] else None
    return Asked(found["suite"], found["share"] or "", limit, found["part"] or "")
