"""How texts become rows: every token that is asked for is scored once, after as much as the context holds."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ablab.core.errors import UserError
from ablab.core.interop.score import Row, Score
from ablab.experiments.evaluate import blimp, per_source
from ablab.experiments.evaluate.answering import Here, chunks
from ablab.experiments.evaluate.questions import (
    DOCUMENT,
    LIKELIHOOD,
    Document,
    Question,
    answers,
    common,
    fitted,
)


class Letters:
    """Every character a token; each costs as many nats as tokens stand before it in its row."""

    def __init__(self, context: int = 1000, first: int | None = 0, lead: tuple[int, ...] = ()):
        self.context = context
        self.first = first
        self.lead = lead

    def ids(self, text: str) -> list[int]:
        return [ord(letter) for letter in text]

    def scores(self, rows):
        found = []
        for row in rows:
            assert row.given and len(row.scored) <= self.context
            nats = range(len(row.given), len(row.given) + len(row.scored))
            found.append(Score(tuple(map(float, nats)), tuple(True for _ in nats)))
        return found


@given(st.text("abc", min_size=1, max_size=40), st.integers(1, 12), st.sampled_from([0, None]))
def test_each_token_of_a_document_is_scored_once_with_all_the_context_before_it(
    text, context, first
):
    rows = Document().rows(Letters(context, first), [text])
    whole = ([0] if first == 0 else []) + [ord(letter) for letter in text]
    assert [token for row in rows for token in row.scored] == whole[1:]
    end = 1
    for row in rows:
        end += len(row.scored)
        assert list(row.given + row.scored) == whole[max(end - context - 1, 0) : end]
        assert len(row.read(context)) <= context


@given(
    st.lists(st.integers(0, 9), min_size=1, max_size=9),
    st.lists(st.integers(0, 9), min_size=1, max_size=9),
    st.integers(1, 9),
)
def test_of_more_to_score_than_the_context_has_the_end_is_scored(given_ids, scored, context):
    row = fitted(Row(tuple(given_ids), tuple(scored)), context)
    whole = [*given_ids, *scored]
    assert row.scored == tuple(scored[-context:])
    assert len(row.read(context)) <= context
    place = len(whole) - len(row.scored)
    assert row.given[-1] == whole[place - 1]


@given(st.lists(st.lists(st.integers(0, 2), max_size=6), min_size=1, max_size=4))
def test_the_common_beginning_is_the_longest(rows):
    count = common(rows)
    assert all(ids[:count] == rows[0][:count] for ids in rows)
    longer = [ids[: count + 1] for ids in rows]
    assert any(len(ids) <= count for ids in rows) or longer.count(longer[0]) < len(rows)


@pytest.mark.parametrize(
    "context, continuation, nats",
    [
        ("ab", "cd", 3 + 4),  # behind the lead, a, b
        ("ab ", "cd", 3 + 4 + 5),  # the space belongs to what is scored, as the harness has it
        ("", "cd", 1 + 2),  # behind the first id, without a lead
    ],
)
def test_a_continuation_is_scored_behind_its_context(context, continuation, nats):
    question = Question("t", 0, LIKELIHOOD, (context, continuation))
    (answer,) = answers([question], Letters(lead=(7,)))
    assert answer.values == [-nats, 1.0]


def test_an_item_longer_than_the_context_is_counted(table):
    question = Question("t", 0, DOCUMENT, ("abcdef",))
    assert not answers([question], Letters(3))[0].cut  # cut into rows, nothing is left out
    question = Question("t", 0, LIKELIHOOD, ("abcdef", "g"))
    assert answers([question], Letters(3))[0].cut
    assert not answers([question], Letters(6))[0].cut


@given(st.lists(st.integers(1, 9), max_size=30), st.integers(1, 20))
def test_every_question_is_in_one_chunk_and_the_longest_are_first(lengths, rows):
    asked = [Question("t", i, DOCUMENT, ("x" * n,)) for i, n in enumerate(lengths)]
    made = list(chunks(asked, rows))
    order = [one for chunk in made for one in chunk]
    assert sorted(one.number for one in order) == list(range(len(lengths)))
    assert [one.length for one in order] == sorted(lengths, reverse=True)
    assert all(len(chunk) <= rows for chunk in made)


def found(exam, scorer):
    given_answers = [one for some in Here(scorer, 5).answer(exam.questions()) for one in some]
    return exam.evaluation({one.key: one for one in given_answers}, weights="w")


# -- BLiMP -------------------------------------------------------------------------------------------------------------
def paradigm(folder, name: str, pairs: list[tuple[str, str]]):
    folder.mkdir(exist_ok=True)
    lines = [{"sentence_good": good, "sentence_bad": bad, "UID": name} for good, bad in pairs]
    (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))


def test_a_pair_is_right_where_the_good_sentence_is_likelier_as_a_whole(tmp_path, table):
    """cats purr: .2 * .5 = .1; cats purrs aloud: .2 * .4 * .9 = .072, though fewer nats a token: 1.15, .88."""
    odds = {
        ("<s>", "cats"): 0.2,
        ("cats", "purr"): 0.5,
        ("cats", "purrs"): 0.4,
        ("purrs", "aloud"): 0.9,
    }
    paradigm(
        tmp_path / "b", "one", [("cats purr", "cats purrs aloud"), ("cats purrs", "cats purr")]
    )
    paradigm(tmp_path / "b", "two", [("cats purr", "purr cats")])
    evaluation = found(blimp.exam(tmp_path / "b"), table(odds))
    assert {part.name: part.score for part in evaluation.parts} == {"one": 0.5, "two": 1.0}
    ((name, mean),) = evaluation.headlines.items()
    assert name == "eval/blimp_2_of_67"
    assert mean.value == 0.75
    assert [len(paper.questions) for paper in blimp.exam(tmp_path / "b", 1).papers] == [1, 1]


def test_a_folder_that_is_no_blimp_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no paradigm"):
        blimp.exam(tmp_path)
    (tmp_path / "one.jsonl").write_text('{"sentence_good": "a"}\n')
    with pytest.raises(UserError, match="one.jsonl:1 must hold a text under 'sentence_bad'"):
        blimp.exam(tmp_path)


# -- bits per byte -----------------------------------------------------------------------------------------------------
TEXTS = [("sea", "abcdé"), ("land", "xy"), ("sea", "zz"), ("land", "")]


@pytest.fixture
def texts(tmp_path):
    import gzip

    lines = [json.dumps({"source": source, "text": text}) for source, text in TEXTS]
    path = tmp_path / "val.jsonl.gz"
    path.write_bytes(gzip.compress("\n".join(lines).encode()))
    return path


def test_bits_per_byte_of_a_source_are_bits_over_bytes(texts):
    """Token n of a document costs n nats: abcdé 15 of 6 bytes, zz 3 of 2, xy 3 of 2."""
    evaluation = found(per_source.exam_of_file(texts), Letters())
    scores = evaluation.scores
    assert scores == pytest.approx(
        {
            "eval/bpb": 21 / math.log(2) / 10,
            "eval/bpb/sea": 18 / math.log(2) / 8,
            "eval/bpb/land": 3 / math.log(2) / 2,
        }
    )
    assert set(evaluation.headlines) == set(scores)
    assert per_source.exam_of_file(texts, limit=1).title == "bpb@1"


def test_the_held_out_text_of_token_folders_is_read_back(tmp_path):
    from ablab.core.data import corpus

    text = "The cat sat on the mat. " * 20
    (tmp_path / "t.jsonl").write_text(json.dumps({"text": text}) + "\n")
    held = [{"text": "The cat sat. "}, {"text": "On the mat, the cat."}]
    (tmp_path / "v.jsonl").write_text("\n".join(map(json.dumps, held)))
    corpus.train_tokenizer([tmp_path / "t.jsonl"], tmp_path / "tokenizer.json", 270)
    folder = tmp_path / "words"
    corpus.tokenize(
        [tmp_path / "t.jsonl"], [tmp_path / "v.jsonl"], tmp_path / "tokenizer.json", folder
    )
    exam = per_source.exam_of_folders({"words": folder})
    asked = [question.texts[0] for question in exam.questions()]
    assert sorted(asked) == sorted(one["text"] for one in held)


def test_a_line_without_source_or_text_is_named(tmp_path):
    path = tmp_path / "val.jsonl"
    path.write_text('{"source": "a", "text": "b"}\n\n{"text": "b"}\n')
    with pytest.raises(
        UserError, match="val.jsonl:3 must be an object with a text under 'source'"
    ):
        per_source.exam_of_file(path)
    path.write_text('{"source": "a", "text": ""}\n')
    with pytest.raises(UserError, match="holds no text"):
        per_source.exam_of_file(path)
    with pytest.raises(UserError, match="no text .*source"):
        per_source.exam_of_file(tmp_path / "none.jsonl")
