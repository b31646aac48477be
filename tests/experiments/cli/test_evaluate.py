"""`ablab eval`: a run, an experiment and folders are asked; what cannot be asked is named in a line."""

import json
import zipfile
from dataclasses import replace

import pytest

from ablab.core.data import corpus
from ablab.core.recipe.edit import edit, put
from ablab.core.recipe.recipe import run_id
from ablab.core.runtime.runtime import Runtime
from ablab.core.store.evaluation import path_of, read
from ablab.core.store.planned import GridPlan, Planned
from ablab.core.store.store import Store
from ablab.core.train.run import run
from ablab.experiments.evaluate.subjects import How
from ablab.experiments.run.evaluations import Wanted
from ablab.experiments.run.messages import EvalJob
from ablab.experiments.track.mlflow_view import MlflowView

TEXT = "The cat sat on the mat, and the dog ran after the cat until both were tired. "
PAIRS = [
    ("The cat sat on the mat.", "Mat the on sat cat the."),
    ("both were", "were were were"),
]


@pytest.fixture(autouse=True)
def shown_to_nobody(monkeypatch):
    """Unless a command says --track."""
    monkeypatch.setenv("ABLAB_TRACK", "none")


@pytest.fixture(scope="module")
def trained(lab, tiny):
    """The ids of two runs on words in the lab's store, of which the second kept no weights, planned as `tales`."""
    (lab.root / "text.txt").write_text(TEXT * 40)
    tokenizer = lab.root / "tokenizer.json"
    corpus.train_tokenizer([lab.root / "text.txt"], tokenizer, 280)
    folder = lab.store / "data" / "words"
    (lab.root / "val.txt").write_text(TEXT * 8)
    meta = corpus.tokenize([lab.root / "text.txt"], [lab.root / "val.txt"], tokenizer, folder)
    base = tiny([], data__vocab=280, data__context=32)
    base = edit(edit(base, "data.name", put("words")), "data.digest", put(meta.digest))
    store = Store(lab.store)
    ids = []
    for seed, keeps in ((0, True), (1, False)):
        recipe = replace(base, seed=seed)
        runtime = Runtime(device="cpu", keep_weights=keeps, evaluations=1)
        run(recipe, runtime, folder, store.run(run_id(recipe)))
        ids.append(run_id(recipe))
    rows = [Planned("base", seed, seed, id) for seed, id in enumerate(ids)]
    rows.append(Planned("base", 2, 2, "0" * 16))
    store.write_plan(GridPlan("tales", "q", "val/loss", "lower", "add_one", rows))
    return ids


@pytest.fixture(scope="module")
def pairs(lab):
    folder = lab.root / "pairs"
    folder.mkdir()
    lines = [{"sentence_good": good, "sentence_bad": bad} for good, bad in PAIRS]
    (folder / "order.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return "pairs"


def test_a_run_is_asked_once_and_its_answers_stand_beside_its_result(
    lab, ablab, trained, pairs
):
    words = ("eval", trained[0][:8], "--suite", "blimp", "--bundle", pairs)
    said = ablab(*words, "--track", "mlflow")
    assert said.code == 0, said
    path = path_of(lab.run_folder(trained[0]), "blimp_1_of_67")
    kept = read(path)
    result = json.loads((lab.run_folder(trained[0]) / "result.json").read_text())
    assert kept.weights == result["weights"]
    assert [len(part.values) for part in kept.parts] == [2]
    score = kept.headlines["eval/blimp_1_of_67"].value
    assert f"eval/blimp_1_of_67  {score:.4f}" in said.out
    (shown,) = MlflowView(Store(lab.store)).runs("tales", trained[0])
    assert shown.data.metrics["eval/blimp_1_of_67"] == score
    stamp = path.stat().st_mtime_ns
    (told,) = ablab(*words, "--json").json
    assert path.stat().st_mtime_ns == stamp  # nothing was asked again
    assert told["headlines"]["eval/blimp_1_of_67"]["value"] == score
    assert told["parts"][0]["items"] == 2
    assert told["bundle"] == kept.bundle


def test_the_held_out_text_of_its_own_data_needs_no_file(lab, ablab, trained):
    """As a row by itself, which is what the run measured too, but for the context that a row has."""
    (told,) = ablab("eval", trained[0], "--suite", "bpb", "--json").json
    result = json.loads((lab.run_folder(trained[0]) / "result.json").read_text())
    own = told["headlines"]["eval/bpb/words"]["value"]
    assert own == pytest.approx(result["metrics"]["val/bits_per_byte"], rel=0.1)
    assert told["headlines"]["eval/bpb"]["value"] == own


def test_an_experiment_asks_the_runs_that_can_answer_and_names_the_others(
    lab, ablab, trained, pairs
):
    said = ablab("eval", "tales", "--suite", "blimp", "--bundle", pairs, "--json")
    assert len(said.json) == 1
    assert "left out: base, seed 1: it kept no weights" in said.err
    assert "left out: base, seed 2: it has not finished" in said.err


@pytest.fixture
def near_cluster(monkeypatch):
    """`--launcher ray`, whose machines are processes of this one."""
    from ablab.experiments.launch import ray
    from ablab.experiments.run.this_machine import ThisMachine

    monkeypatch.setattr(ray, "RayLauncher", lambda address, options: ThisMachine())


def without_seconds(told: list[dict]) -> list[dict]:
    return [one | {"seconds": 0} for one in told]


def test_another_machine_gives_the_answers_of_this_one(
    lab, ablab, trained, pairs, near_cluster
):
    asked = ("--suite", "blimp", "--bundle", str(lab.root / pairs), "--device", "cpu")
    words = ("eval", "tales", *asked, "--json")
    path = path_of(lab.run_folder(trained[0]), "blimp_1_of_67")
    path.unlink(missing_ok=True)  # of another test
    here = ablab(*words).json
    path.unlink()
    said = ablab(*words, "--launcher", "ray")
    assert said.code == 0, said
    assert without_seconds(said.json) == without_seconds(here)
    stamp = path.stat().st_mtime_ns
    assert ablab(*words, "--launcher", "ray").json == said.json
    assert path.stat().st_mtime_ns == stamp  # nothing was asked again


def test_an_evaluation_that_fails_there_is_named_and_ends_the_command_with_one(
    lab, ablab, trained, pairs, near_cluster, monkeypatch
):
    path_of(lab.run_folder(trained[0]), "blimp_1_of_67").unlink(missing_ok=True)
    monkeypatch.setattr(Wanted, "job", lambda self, how: replace_how(self, how))
    said = ablab("eval", "tales", "--suite", "blimp", "--bundle", pairs, "--launcher", "ray")
    assert said.code == 1, said
    assert "the same command goes on from its answers so far" in said.err


def replace_how(wanted: Wanted, how: How) -> EvalJob:
    """A job that breaks its worker's own code: no batch has a row."""
    how = replace(how, batch="none")
    return EvalJob(wanted.name, wanted.subject, wanted.request, how, wanted.bundle)


REFUSED = {
    ("eval", "tales", "--jobs", "2"): "--jobs 2: on this machine one model is asked at a time",
    ("eval", "tales", "--launcher", "slrm"): "Did you mean 'slurm'?",
    ("eval", "tales", "--address", "head:6379"): "add --launcher ray, or drop it",
    ("eval",): "name a run, a folder or an experiment",
    ("eval", "tales"): "--suite core, blimp or bpb, or --tasks",
    (
        "eval",
        "tales",
        "--suite",
        "core",
    ): "--suite core needs --bundle: a bundle in DCLM's format",
    ("eval", "tales", "--suite", "core", "--bundle", "nowhere"): "no bundle nowhere",
    (
        "eval",
        "tales",
        "--suite",
        "blimp",
        "--bundle",
        "pairs",
        "--tasks",
        "a",
    ): "--tasks chooses",
    ("eval", ".", "--suite", "bpb"): "lacks config.json",
    ("eval", "0123abcd", "--suite", "bpb"): "is not the id of one of",
}


@pytest.mark.parametrize("words", REFUSED, ids=" ".join)
def test_what_cannot_be_asked_is_named_in_a_line(ablab, trained, pairs, words):
    said = ablab(*words)
    assert said.code == 2
    assert said.err.startswith("error: ") and said.err.count("\n") == 1
    assert REFUSED[words] in said.err


def test_the_bundle_is_fetched_whole_or_not_at_all(lab, ablab, monkeypatch):
    from ablab.experiments.evaluate import fetch

    with zipfile.ZipFile(lab.root / "b.zip", "w") as packed:
        packed.writestr("eval_bundle/core.yaml", "icl_tasks: []")
        packed.writestr("eval_bundle/eval_data/x.jsonl", "{}")
    monkeypatch.setattr(fetch.fetch, "__defaults__", ((lab.root / "b.zip").as_uri(),))
    assert ablab("eval", "--fetch-bundle", "fetched").code == 0
    assert (lab.root / "fetched" / "eval_data" / "x.jsonl").read_text() == "{}"
    before = sorted(lab.root.iterdir())
    assert "exists" in ablab("eval", "--fetch-bundle", "fetched").err
    for content, flaw in (
        (b"no zip", "no whole zip"),
        (b"", "no whole zip"),
        (None, "cannot fetch"),
    ):
        path = lab.root / "bad.zip"
        if content is None:
            path.unlink()
        else:
            path.write_bytes(content)
        monkeypatch.setattr(fetch.fetch, "__defaults__", (path.as_uri(),))
        said = ablab("eval", "--fetch-bundle", "again")
        assert said.code == 2 and flaw in said.err
        assert said.err.count("\n") == 1
    assert sorted(lab.root.iterdir()) == before
