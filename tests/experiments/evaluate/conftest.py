"""A model whose every probability is known, and bundles made by hand."""

import csv
import json
import math

import pytest

from ablab.core.interop.score import Score

RARE = 0.001  # of a word after one that the table does not name


class Table:
    """A scorer of words: the probability of a word depends on the one before it, as a table says.

    A pair of words that the row has shown before has probability 0.95.
    """

    def __init__(self, odds: dict[tuple[str, str], float], context: int = 1000):
        self.odds = odds
        self.context = context
        self.words = [
            "<s>",
            *dict.fromkeys(word for pair in odds for word in pair if word != "<s>"),
        ]
        self.first = 0
        self.lead = ()
        self.asked = 0

    def ids(self, text: str) -> list[int]:
        for word in text.split():
            if word not in self.words:
                self.words.append(word)
        return [self.words.index(word) for word in text.split()]

    def probability(self, before: list[int], word: int) -> float:
        pair = (before[-1], word)
        if pair in zip(before, before[1:], strict=False):
            return 0.95
        return self.odds.get((self.words[pair[0]], self.words[word]), RARE)

    def scores(self, rows):
        self.asked += len(rows)
        return [self._score(row) for row in rows]

    def _score(self, row) -> Score:
        ids = [*row.given, *row.scored]
        nats, likeliest = [], []
        for place in range(len(row.given), len(ids)):
            before = ids[:place]
            own = self.probability(before, ids[place])
            best = max(self.probability(before, word) for word in range(len(self.words)))
            nats.append(-math.log(own))
            likeliest.append(own == best)
        return Score(tuple(nats), tuple(likeliest))


@pytest.fixture
def table():
    return Table


def write_bundle(folder, tasks):
    """tasks: label -> (type, shots, delimiter, baseline in per cent, items)."""
    (folder / "eval_data").mkdir(parents=True)
    listed = []
    with open(folder / "eval_meta_data.csv", "w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["Eval Task", "Task Category", "Random baseline", "Description"])
        for label, (kind, shots, delimiter, baseline, items) in tasks.items():
            rows.writerow([label, "a, b", baseline, 'says "so"'])
            about = {"label": label, "dataset_uri": f"{label}.jsonl", "icl_task_type": kind}
            more = {"num_fewshot": [shots], "continuation_delimiter": delimiter}
            listed.append(about | more | {"has_categories": False})
            lines = "".join(json.dumps(item) + "\n" for item in items)
            (folder / "eval_data" / f"{label}.jsonl").write_text(lines)
    (folder / "core.yaml").write_text(json.dumps({"icl_tasks": listed}))  # JSON is YAML
    return folder


@pytest.fixture
def bundle(tmp_path):
    """tasks -> the folder of a bundle."""
    return lambda tasks: write_bundle(tmp_path / "bundle", tasks)
