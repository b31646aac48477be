"""The lessons run from top to bottom on a small store, and are kept without what they showed."""

import json
from pathlib import Path

import numpy as np
import pytest

from ablab.core.store import study_record
from ablab.core.store.study_record import LR, WIDTH, StudyRecord, Trial

FOLDER = Path(__file__).parents[2] / "analysis/notebooks"
BOOKS = sorted(FOLDER.glob("*.ipynb"))
PICTURES = {"comparing_arms": 2, "learning_rate_and_width": 5, "training_dynamics": 3}


def test_there_is_a_lesson_for_each():
    assert {book.stem for book in BOOKS} == set(PICTURES)


@pytest.mark.parametrize("book", BOOKS, ids=lambda book: book.stem)
def test_outputs_are_cleared(book):
    for cell in json.loads(book.read_text())["cells"]:
        assert cell.get("outputs", []) == []
        assert cell.get("execution_count") is None


@pytest.fixture
def quickstart(lab, normal):
    """What `ablab run quickstart` and `ablab study lr_width_tiny` leave, in small."""
    lab.name = "quickstart"
    seeds = normal.normal(0, 0.02, 3)
    for cell, effect in {"full": 0.0, "- wsd": 0.05, "- muon": 0.04}.items():
        values = 3 + effect + seeds + normal.normal(0, 0.002, 3)
        lab.cell(cell, list(values), None if cell == "full" else "full", points=10)
    store = lab.write()
    for planned in lab.rows:
        _log_what_workers_log(store.run(planned.run))
    study_record.write(store, _study())
    return store


def _log_what_workers_log(record):
    """The synthetic lines lack the learning rate and the gradient's norm."""
    lines = [json.loads(line) for line in record.metrics_path.read_text().splitlines()]
    for number, line in enumerate(lines):
        line |= {
            "optim/lr": 0.01 * (1 - number / len(lines)),
            "train/grad_norm": 1.0 + number % 3,
        }
    record.metrics_path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    names = ("kurtosis", "rms", "attention_logit", "hidden.weight", "hidden.update")
    for line in lines[4::5]:
        looked = {f"layer/{name}/{i:02}": 1.0 + i for name in names for i in range(3)}
        record.note_look(line["step"], looked)


def _study() -> StudyRecord:
    trials = []
    for cell, moves in {"base": 1, "+ mup": 0}.items():
        for width in (32, 64):
            for lr in np.geomspace(0.002, 0.064, 6):
                away = np.log2(lr / 0.01) + moves * np.log2(width / 32)
                point = {LR: float(lr), WIDTH: width}
                trials.append(
                    Trial(cell, len(trials), point, "complete", float(3 + away**2 / 50))
                )
    about = {"name": "lr_width_tiny", "question": "?", "metric": "val/loss", "better": "lower"}
    space = {LR: {"log": [0.002, 0.064]}, WIDTH: {"choices": [32, 64]}}
    searched = {"sampler": "grid", "pruner": "none", "seeds": [0], "trials_per_cell": 12}
    return StudyRecord(**about, **searched, space=space, hard={}, base={}, trials=trials)


def test_they_run_from_top_to_bottom(quickstart, monkeypatch):
    """In one kernel after another's variables are gone: a kernel of its own for each would take twice as long."""
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("ABLAB_STORE", str(quickstart.root))
    whole = nbformat.v4.new_notebook()
    for book in BOOKS:
        whole.cells.append(nbformat.v4.new_code_cell("%reset -f", metadata={"book": book.stem}))
        cells = nbformat.read(book, as_version=4).cells
        whole.cells += [cell for cell in cells if cell.cell_type == "code"]
    nbclient.NotebookClient(whole, timeout=300, kernel_name="python3").execute()
    pictures: dict[str, int] = {}
    for cell in whole.cells:
        book = cell.metadata.get("book", None) or book
        shown = sum("image/png" in output.get("data", {}) for output in cell.outputs)
        pictures[book] = pictures.get(book, 0) + shown
    assert pictures == PICTURES


def test_without_a_store_the_first_question_says_how_to_make_one(tmp_path):
    from ablab import analysis as ab
    from ablab.core.errors import UserError

    with pytest.raises(UserError, match="no store at .*; make one with: ablab run quickstart"):
        ab.list_experiments(tmp_path / "nothing")
