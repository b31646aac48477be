"""BLiMP: 67 paradigms of 1,000 minimal pairs; right is the sentence that the model finds likelier as a whole.

Warstadt et al. 2020, arXiv:1912.00582.  FOLDER/*.jsonl or FOLDER/data/*.jsonl, a paradigm a file, a pair a line:
{"sentence_good", "sentence_bad"}.  As in lm-evaluation-harness a space stands before each sentence.  The score is the
mean of the paradigms' accuracies; guessing has 0.5.
"""

from pathlib import Path

from ablab.core.errors import UserError
from ablab.experiments.evaluate.bundle import Item, digest_of, flaw_of_texts, read_lines
from ablab.experiments.evaluate.exam import Exam, Paper
from ablab.experiments.evaluate.names import PREFIX
from ablab.experiments.evaluate.questions import SENTENCES, Question

PARADIGMS = 67


def exam(folder: Path, limit: int | None = None) -> Exam:
    """limit: the first so many pairs of a paradigm.  Raises UserError: no such files, a malformed line."""
    files = paradigms(folder)
    title = f"blimp{share_of(len(files))}" + (f"@{limit}" if limit else "")
    return Exam(
        title=title,
        headline=PREFIX + title,
        mean="centered",  # around nothing: what is published is accuracy
        papers=[_paper(path, limit) for path in files],
        bundle=digest_of(files, folder),
        source=str(folder),
    )


def share_of(paradigms: int) -> str:
    """What its name says of a mean over fewer or more."""
    return "" if paradigms == PARADIGMS else f"_{paradigms}_of_{PARADIGMS}"


def paradigms(folder: Path) -> list[Path]:
    inner = folder / "data"
    files = sorted((inner if inner.is_dir() else folder).glob("*.jsonl"))
    if not files:
        raise UserError(
            f"{folder} holds no paradigm of BLiMP (*.jsonl, or data/*.jsonl); clone them: "
            "git clone https://github.com/alexwarstadt/blimp"
        )
    return files


def _paper(path: Path, limit: int | None) -> Paper:
    items = read_lines(path, _flaw)
    questions = [
        Question(
            path.stem, i, SENTENCES, (f" {item['sentence_good']}", f" {item['sentence_bad']}")
        )
        for i, item in enumerate(items[:limit])
    ]
    return Paper(path.stem, questions, there=len(items))


def _flaw(item: Item) -> str:
    return flaw_of_texts(item, "sentence_good", "sentence_bad")
