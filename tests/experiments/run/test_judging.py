"""An evaluation judges an experiment: each run is asked at its end, and its score is a number like any other."""

import json

import pytest

from ablab.core.data import corpus
from ablab.core.store.evaluation import path_of, read
from ablab.core.store.store import Store

TEXT = "The cat sat on the mat, and the dog ran after the cat until both were tired. "
PAIRS = [("The cat sat", "Sat cat the"), ("dog ran", "ran dog ran"), ("both", "tired both")]
METRIC = {"name": "eval/blimp_1_of_67"}
DATA = """\
model: {width: 16, layers: 2, attention: {head_dim: 8}}
data: {name: words, vocab: 280, context: 16, batch: 4, held_out: 64}
schedule: {warmup_steps: 3}
budget: {tokens: 640}
"""


@pytest.fixture(scope="module")
def words(lab):
    """A bench whose data have a tokenizer, and something to ask."""
    (lab.root / "text.txt").write_text(TEXT * 40)
    (lab.root / "val.txt").write_text(TEXT * 8)
    tokenizer = lab.root / "tokenizer.json"
    corpus.train_tokenizer([lab.root / "text.txt"], tokenizer, 280)
    folder = lab.store / "data" / "words"
    corpus.tokenize([lab.root / "text.txt"], [lab.root / "val.txt"], tokenizer, folder)
    (lab.root / "words.yaml").write_text(DATA)
    (lab.root / "pairs").mkdir()
    lines = [{"sentence_good": good, "sentence_bad": bad} for good, bad in PAIRS]
    (lab.root / "pairs" / "order.jsonl").write_text("\n".join(map(json.dumps, lines)))
    texts = [{"source": "sea", "text": TEXT}, {"source": "land", "text": TEXT[:40]}]
    (lab.root / "val.jsonl").write_text("\n".join(map(json.dumps, texts)))

    def sheet(name: str, **keys) -> str:
        return lab.sheet(name, base=["base", "words"], arms=["qk_norm"], seeds=[0], **keys)

    return sheet


@pytest.fixture(scope="module")
def judged(lab, words):
    """The sheet of a grid that was trained and judged by pairs, and measured on texts besides."""
    asked = {"blimp": "pairs", "bpb": "val.jsonl"}
    kept = {"keep_weights": True}
    sheet = words("judged", metric=METRIC, evaluate=asked, runtime=kept)
    ended = lab.run("run", sheet, "--json", "--track", "none", "--jobs", "1")
    assert ended.code == 0, ended
    return sheet


def test_each_run_is_asked_at_its_end(lab, judged):
    for result in lab.results("judged").values():
        path = path_of(lab.run_folder(result["run"]), "blimp_1_of_67")
        kept = read(path)
        assert kept.weights == result["weights"]
        assert result["metrics"]["eval/blimp_1_of_67"] == kept.parts[0].score
        assert kept.items == len(PAIRS) and kept.bundle
        texts = {"eval/bpb", "eval/bpb/sea", "eval/bpb/land"}
        assert texts <= result["metrics"].keys()


def test_it_is_the_number_that_the_weights_folder_gives(lab, ablab, judged):
    for result in lab.results("judged").values():
        folder = lab.run_folder(result["run"])
        for suite, bundle in (("blimp", "pairs"), ("bpb", "val.jsonl")):
            (title,) = {"blimp": ["blimp_1_of_67"], "bpb": ["bpb"]}[suite]
            path_of(folder, title).unlink()
            words = ("eval", result["run"], "--suite", suite, "--bundle", bundle)
            (told,) = ablab(*words, "--json", "--track", "none").json
            for name, one in told["headlines"].items():
                assert result["metrics"][name] == one["value"]


def test_the_report_is_of_that_number(ablab, judged, lab):
    told = ablab("report", judged, "--json").json
    assert told["metric"]["name"] == METRIC["name"]
    means = {effect["cell"]: effect["mean"] for effect in told["effects"]}
    for (cell, _), result in lab.results("judged").items():
        assert means[cell] == result["metrics"][METRIC["name"]]


def test_what_is_asked_at_the_end_renames_no_run(lab, ablab, words, judged):
    plain = words("plain")
    ablab("run", plain, "--dry-run")
    found = ablab("run", plain, "--json", "--track", "none")
    assert len(found.reused) == 2 and not found.trained
    assert {row["run"] for row in lab.plan("plain")} == {
        row["run"] for row in lab.plan("judged")
    }


def test_runs_that_ended_unasked_are_named_until_they_are_asked(lab, ablab, words):
    late = {"data.batch": 2, "budget.tokens": 320}
    kept = {"set": late, "runtime": {"keep_weights": True}, "design": "single"}
    first = words("late", **kept)
    assert len(ablab("run", first, "--json", "--track", "none").trained) == 1
    again = words("late", **kept, metric=METRIC, evaluate={"blimp": "pairs"})
    said = ablab("run", again, "--track", "none").err
    assert "eval/blimp_1_of_67 was not asked of 1 runs that have ended" in said
    cure = said.partition("ablab eval ")[2].splitlines()[0].split()
    asked = ablab("eval", *cure, "--track", "none")
    assert asked.code == 0, asked
    assert "was not asked" not in ablab("run", again, "--track", "none").err
    (row,) = ablab("report", again, "--json").json["evaluations"]
    assert row["name"] == METRIC["name"] and row["seeds"] == 1


REFUSED = {
    "no such folder": ({"name": "eval/blimp"}, {"blimp": "none"}, "holds no paradigm"),
    "no such bundle": ({"name": "eval/core"}, {"core": "none"}, "no bundle"),
    "fewer parts": (
        {"name": "eval/blimp"},
        {"blimp": "pairs"},
        "name the metric eval/blimp_1_of_67",
    ),
    "other limit": (
        {"name": "eval/bpb@3"},
        {"bpb": "val.jsonl"},
        "write evaluate: {max_per_task: 3}",
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_asked_is_refused_before_any_run(lab, ablab, words, what):
    metric, asked, said = REFUSED[what]
    runs = sorted(Store(lab.store).root.glob("runs/*"))
    ended = ablab("run", words("refused", metric=metric, evaluate=asked), "--track", "none")
    assert ended.code == 2
    assert said in ended.err and ended.err.count("\n") == 1
    assert sorted(Store(lab.store).root.glob("runs/*")) == runs
