"""An evaluation goes on where it was killed, asks nothing twice, and is the same on one device and on several."""

from contextlib import contextmanager, suppress
from dataclasses import replace

import pytest
import torch

from ablab.core.errors import UserError
from ablab.core.store.evaluation import path_of, read
from ablab.core.store.store import Store
from ablab.experiments.evaluate import blimp
from ablab.experiments.evaluate.answering import Here
from ablab.experiments.evaluate.evaluating import Sitting, answering, evaluate
from ablab.experiments.evaluate.progress import Progress
from ablab.experiments.evaluate.questions import Answer
from ablab.experiments.evaluate.subjects import How, subject_of

ITEMS = 5  # of the folder `pairs`


class Killed(BaseException):
    """As by a signal: nothing catches it."""


class Counting:
    """Answers a question at a time, and is killed after some."""

    def __init__(self, scorer, after: int = 99):
        self.scorer = scorer
        self.after = after
        self.asked: list[str] = []

    @contextmanager
    def __call__(self):
        yield self

    def answer(self, questions):
        for question in questions:
            if len(self.asked) == self.after:
                raise Killed
            self.asked.append(question.key)
            (answers,) = Here(self.scorer, 1).answer([question])
            yield answers


def test_a_killed_evaluation_goes_on_and_asks_nothing_twice(tmp_path, pairs, table):
    exam = blimp.exam(pairs)
    scorer = table({("a", "cat"): 0.5, ("<s>", "a"): 0.4, ("<s>", "dogs"): 0.1})
    sitting = Sitting(tmp_path / "run", "w", "fp32")
    whole = Sitting(tmp_path / "other", "w", "fp32").sit(exam, Counting(scorer))
    asked = []
    for _ in range(2):
        killed = Counting(scorer, after=2)
        with pytest.raises(Killed):
            sitting.sit(exam, killed)
        asked += killed.asked
    log = path_of(tmp_path / "run", exam.title).with_suffix(".jsonl")
    log.write_bytes(log.read_bytes()[:-4])  # torn by the kill: the last answer counts as none
    last = Counting(scorer)
    evaluation = sitting.sit(exam, last)
    assert asked[:-1] + last.asked == [question.key for question in exam.questions()]
    assert replace(evaluation, seconds=0) == replace(whole, seconds=0)
    assert not log.exists()
    again = Counting(scorer)
    assert sitting.sit(exam, again) == evaluation == read(path_of(tmp_path / "run", exam.title))
    assert not again.asked


@pytest.mark.parametrize("other", [("v", "fp32"), ("w", "bf16")], ids=["weights", "dtype"])
def test_answers_of_other_weights_are_not_taken_over(tmp_path, pairs, table, other):
    exam = blimp.exam(pairs)
    scorer = table({})
    for done in (99, 2):
        run = tmp_path / f"run{done}"
        with suppress(Killed):
            Sitting(run, "w", "fp32").sit(exam, Counting(scorer, after=done))
        then = Counting(scorer)
        Sitting(run, *other).sit(exam, then)
        assert len(then.asked) == ITEMS


def test_two_processes_do_not_write_one_evaluation(tmp_path):
    whose = {"weights": "w"}
    with Progress(tmp_path, "core", whose), pytest.raises(UserError, match="another process"):
        Progress(tmp_path, "core", whose).__enter__()
    with Progress(tmp_path, "core", whose) as again:
        again.add([Answer("t/0", [1.0])])
        assert again.known == {"t/0": Answer("t/0", [1.0])}


def test_a_damaged_evaluation_is_asked_again(tmp_path, pairs, table):
    exam = blimp.exam(pairs)
    sitting = Sitting(tmp_path / "run", "w", "fp32")
    evaluation = sitting.sit(exam, Counting(table({})))
    path = path_of(tmp_path / "run", exam.title)
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match="is damaged"):
        read(path)
    then = Counting(table({}))
    assert replace(sitting.sit(exam, then), seconds=0) == replace(evaluation, seconds=0)
    assert len(then.asked) == ITEMS


# -- models ------------------------------------------------------------------------------------------------------------
@pytest.fixture
def folder(weights_folder):
    return weights_folder


def test_two_processes_answer_as_one_does(tmp_path, folder, pairs):
    """Which shares the questions by chunks of two."""
    store = Store(tmp_path / "store")
    subject = subject_of(str(folder), store)
    how = How("cpu", batch=1)
    exam = blimp.exam(pairs)
    alone = evaluate(subject, exam, how, ["cpu"])
    assert alone.weights == subject.weights and alone.items == ITEMS
    questions = list(exam.questions())
    with answering(subject, how, ["cpu", "cpu"]) as both:
        shared = {one.key: one for some in both.answer(questions) for one in some}
    assert exam.evaluation(shared, subject.weights).parts == alone.parts


def test_weights_and_exported_folders_are_one_model(tmp_path, folder, pairs, own_module_cache):
    from ablab.core.interop.exporting import export
    from ablab.core.interop.weights import load

    export(load(folder), tmp_path / "exported", folder / "tokenizer.json", "")
    store = Store(tmp_path / "store")
    exam = blimp.exam(pairs)
    found = []
    for path in (folder, tmp_path / "exported"):
        subject = subject_of(str(path), store)
        how = How("cpu", trust_remote_code=True)
        with answering(subject, how, ["cpu"]) as asked, torch.no_grad():
            rows = asked.answer(exam.questions())
            found.append(sorted((one.key, one.values) for some in rows for one in some))
    assert found[0] == found[1]


def test_texts_of_an_imported_model_begin_as_they_did_there(tmp_path, folder):
    """With its BOS, as its tokenizer_config names it; of our own models, with the end of text."""
    subject = subject_of(str(folder), Store(tmp_path / "store"))
    own = subject.scorer(How("cpu"), "cpu")
    assert own.first == own.words.end == 0
    (folder / "hf").mkdir()
    (folder / "hf" / "tokenizer_config.json").write_text('{"bos_token": "a"}')
    imported = subject.scorer(How("cpu"), "cpu")
    assert [imported.first] == imported.ids("a")


def test_a_folder_that_lacks_files_says_which(tmp_path, folder):
    from shutil import copytree

    store = Store(tmp_path / "store")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(UserError, match="lacks config.json, weights .*, a tokenizer"):
        subject_of(str(empty), store)
    (empty / "config.json").write_text("{}")
    (empty / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="lacks weights"):
        subject_of(str(empty), store)
    bare = copytree(folder, tmp_path / "bare")
    (bare / "weights.safetensors").write_bytes(b"12345678")
    with pytest.raises(UserError, match="cannot read .*weights.safetensors"):
        subject_of(str(bare), store)
    with pytest.raises(UserError, match="is not the id of one of 0 runs"):
        subject_of("0123456789abcdef", store)
