"""CORE on bundles made by hand, asked of a model whose every probability is known."""

import json
import random

import pytest

from ablab.core.errors import UserError
from ablab.experiments.evaluate import core_suite
from ablab.experiments.evaluate.answering import Here
from ablab.experiments.evaluate.bundle import read_bundle
from ablab.experiments.evaluate.questions import answers

CHOICE, SCHEMA, LM = "multiple_choice", "schema", "language_modeling"
ODDS = {
    ("is", "blue"): 0.5,
    ("is", "green"): 0.3,
    ("green", "grass"): 0.9,
    ("cat", "barks"): 0.1,
    ("dog", "barks"): 0.6,
    ("barks", "loud"): 0.5,
    ("two", "three"): 0.6,
    ("six", "seven"): 0.4,
    ("six", "eight"): 0.5,
    ("then", "eight"): 0.5,
    ("<s>", "the"): 0.5,
    ("<s>", "a"): 0.4,
}
# Means of nats: blue .693, green grass (1.204 + .105) / 2 = .655, though both its words together are less likely.
SKY = {"query": "the sky is", "choices": ["blue", "green grass"]}
BARKS = {"context_options": ["the cat", "the dog"], "continuation": "barks loud"}
COUNTS = {"context": " one two ", "continuation": "three"}
MISSES = {"context": "five six", "continuation": "seven"}


def found(exam, scorer):
    given = [one for some in Here(scorer, 5).answer(exam.questions()) for one in some]
    return exam.evaluation({one.key: one for one in given}, weights="w")


def test_of_each_kind_without_examples_right_is_what_the_odds_say(bundle, table):
    """Two choices right of four, three schemas of four, one continuation of two: worked out by hand above."""
    folder = bundle(
        {
            "sky": (CHOICE, 0, " ", 50, [SKY | {"gold": g} for g in (0, 1, 1, 0)]),
            "pets": (SCHEMA, 0, " ", 50, [BARKS | {"gold": g} for g in (1, 1, 0, 1)]),
            "counts": (LM, 0, " ", 0, [COUNTS, MISSES]),
        }
    )
    evaluation = found(core_suite.exam(folder), table(ODDS))
    scores = {part.name: part.score for part in evaluation.parts}
    assert scores == {"sky": 0.5, "pets": 0.75, "counts": 0.5}
    centered = {part.name: part.centered for part in evaluation.parts}
    assert centered == {"sky": 0.0, "pets": 0.5, "counts": 0.5}
    (mean,) = evaluation.headlines.values()
    assert mean.value == pytest.approx((0.0 + 0.5 + 0.5) / 3)
    assert mean.items == 10


def test_of_each_kind_examples_make_right_what_they_have_shown(bundle, table):
    """The one example before an item repeats its own pairs of words, which the model then finds likely (0.95).

    Of choices: an example whose answer is blue makes blue the likelier one, one of green grass the other.
    """
    skies = [SKY | {"gold": gold} for gold in (0, 0, 0)]
    pets = [BARKS | {"gold": 0}, BARKS | {"gold": 0}]
    folder = bundle(
        {
            "sky": (CHOICE, 1, " ", 50, skies),
            "pets": (SCHEMA, 1, " ", 50, pets),
            "counts": (LM, 1, "\nthen ", 0, [MISSES, MISSES]),
        }
    )
    scores = {
        part.name: part.score for part in found(core_suite.exam(folder), table(ODDS)).parts
    }
    # (is, blue) shown: .95 against (.3 * .9)^(1/2).  (cat, barks) shown: .95 against .6.  (then, seven) shown.
    assert scores == {"sky": 1.0, "pets": 1.0, "counts": 1.0}
    bare = {
        "sky": (CHOICE, 0, " ", 50, skies),
        "pets": (SCHEMA, 0, " ", 50, pets),
        "counts": (LM, 0, "\nthen ", 0, [MISSES, MISSES]),
    }
    again = write_again(folder, bare)
    scores = {
        part.name: part.score for part in found(core_suite.exam(again), table(ODDS)).parts
    }
    assert scores == {"sky": 0.0, "pets": 0.0, "counts": 0.0}


def write_again(folder, tasks):
    """The same items, asked otherwise."""
    index = json.loads((folder / "core.yaml").read_text())
    for task in index["icl_tasks"]:
        task["num_fewshot"] = [tasks[task["label"]][1]]
    (folder / "core.yaml").write_text(json.dumps(index))
    return folder


def numbered(count: int) -> list[dict]:
    return [{"context": f"q{i}", "continuation": f"a{i}"} for i in range(count)]


def test_order_and_examples_are_those_of_nanochat(bundle):
    """Shuffled by Random(1337), cut, then examples of item n by Random(1234 + n) from all others that are left."""
    folder = bundle({"t": (LM, 2, ": ", 0, numbered(9))})
    order = list(range(9))
    random.Random(1337).shuffle(order)
    kept = order[:5]
    (paper,) = core_suite.exam(folder, limit=5).papers
    assert len(paper.questions) == 5
    assert paper.there == 9
    for number, question in enumerate(paper.questions):
        others = [kept[i] for i in range(5) if i != number]
        places = random.Random(1234 + number).sample(range(4), 2)
        shown = "".join(f"q{others[i]}: a{others[i]}\n\n" for i in places)
        own = kept[number]
        assert question.texts == (f"{shown}q{own}:", f"{shown}q{own}: a{own}")


def test_fewer_items_than_examples_may_be_asked(bundle):
    folder = bundle({"t": (LM, 4, ": ", 0, numbered(9))})
    (paper,) = core_suite.exam(folder, limit=2).papers
    assert len(paper.questions) == 2
    assert all(one.texts[1].count(": ") == 5 for one in paper.questions)


def test_the_mean_of_all_22_tasks_alone_is_called_core(bundle, table):
    tasks = {label: (LM, 0, " ", 0, [COUNTS]) for label in core_suite.CORE}
    tasks["mine"] = (LM, 0, " ", 0, [MISSES])
    folder = bundle(tasks)
    assert core_suite.exam(folder).headline == "eval/core"
    assert core_suite.exam(folder, limit=3).headline == "eval/core@3"
    assert list(found(core_suite.exam(folder), table(ODDS)).headlines) == ["eval/core"]
    chosen = core_suite.exam(folder, labels=["copa", "mine"])
    assert chosen.title != "core"
    assert list(found(chosen, table(ODDS)).headlines) == ["eval/core/copa", "eval/core/mine"]
    (folder / "eval_data" / "copa.jsonl").unlink()
    fewer = core_suite.exam(folder)
    assert fewer.headline == "eval/core_21_of_22"
    assert fewer.missing == ["copa"]


def test_the_digest_is_of_all_that_is_asked(bundle):
    folder = bundle({"t": (LM, 0, " ", 0, numbered(3)), "u": (LM, 0, " ", 0, numbered(4))})
    digests = {core_suite.exam(folder).bundle}
    for file in ("eval_data/t.jsonl", "eval_meta_data.csv", "core.yaml"):
        with open(folder / file, "a") as opened:
            opened.write("\n")
        digests.add(core_suite.exam(folder).bundle)
    assert len(digests) == 4


BAD_LINES = {
    '{"context": "c"': "is no JSON",
    "[1]": "must be an object",
    '{"context": "c"}': "'continuation'",
    '{"context": 3, "continuation": "d"}': "'context'",
    '{"context": "c", "continuation": " "}': "nothing to continue with",
}


@pytest.mark.parametrize("line", BAD_LINES)
def test_a_malformed_line_is_named_by_file_and_number(bundle, line):
    folder = bundle({"t": (LM, 0, " ", 0, numbered(2))})
    path = folder / "eval_data" / "t.jsonl"
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(UserError) as refusal:
        core_suite.exam(folder)
    assert f"{path}:3 " in str(refusal.value)
    assert BAD_LINES[line] in str(refusal.value)


@pytest.mark.parametrize(
    "change, flaw",
    [({"gold": 2}, "'gold' a number from 0 to 1, not 2"), ({"gold": True}, "'gold'")]
    + [
        ({"choices": one}, "two texts or more under 'choices'") for one in ("ab", ["a"], [1, 2])
    ],
    ids=str,
)
def test_choices_that_cannot_be_asked_are_named(bundle, change, flaw):
    folder = bundle(
        {"t": (CHOICE, 0, " ", 25, [SKY | {"gold": 0}, SKY | {"gold": 0} | change])}
    )
    with pytest.raises(UserError) as refusal:
        core_suite.exam(folder)
    assert "t.jsonl:2" in str(refusal.value) and flaw in str(refusal.value)


def broken(folder, file: str, old: str, new: str):
    path = folder / file
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


BREAKS = {
    "no baseline": ("eval_meta_data.csv", "t,", "other,", "has no row for task 't'"),
    "baseline of 100": ("eval_meta_data.csv", ",0,", ",100,", "says 100 %"),
    "baseline of words": ("eval_meta_data.csv", ",0,", ",none,", "eval_meta_data.csv:2"),
    "another type": (
        "core.yaml",
        LM,
        "generation",
        "type 'generation'; known: multiple_choice",
    ),
    "no list": ("core.yaml", "icl_tasks", "tasks", "icl_tasks must list"),
    "no label": ("core.yaml", "label", "name", "icl_tasks[0]"),
    "too many examples": (
        "core.yaml",
        "[0]",
        "[3]",
        "t.jsonl has 3 items, and t shows 3 others",
    ),
    "file elsewhere": ("core.yaml", "t.jsonl", "u.jsonl", "the items of none of the 1 tasks"),
}


@pytest.mark.parametrize("what", BREAKS)
def test_a_broken_bundle_is_refused_in_a_line(bundle, what):
    folder = bundle({"t": (LM, 0, " ", 0, numbered(3))})
    file, old, new, flaw = BREAKS[what]
    broken(folder, file, old, new)
    with pytest.raises(UserError) as refusal:
        core_suite.exam(folder)
    assert flaw in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_an_empty_folder_file_or_choice_of_tasks_says_what_is_there(bundle, tmp_path):
    with pytest.raises(UserError, match="no bundle .*--fetch-bundle"):
        read_bundle(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no core.yaml"):
        read_bundle(tmp_path / "empty")
    folder = bundle({"t": (LM, 0, " ", 0, numbered(3)), "u": (LM, 0, " ", 0, [])})
    with pytest.raises(UserError, match=r"u\.jsonl is empty"):
        core_suite.exam(folder)
    with pytest.raises(UserError, match="no task 'tt'. Did you mean 't'.*There are: t, u"):
        core_suite.exam(folder, labels=["tt"])


def test_choices_that_begin_with_each_other_are_still_scored(table):
    """nanochat would take the mean of no tokens."""
    from ablab.experiments.evaluate.questions import Question

    scorer = table({("a", "b"): 0.5, ("b", "c"): 0.9})
    question = Question("t", 0, CHOICE, ("a b", "a b c"), gold=1)
    (answer,) = answers([question], scorer)
    assert answer.values == [1.0]
