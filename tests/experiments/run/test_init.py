"""`init:` a run's weights, or those of a folder, begin another run, which their digest names."""

import shutil

import pytest

from ablab.core.store import inventory
from ablab.core.store.store import Store

QUICK = ("--no-mlflow", "--jobs", "1", "--json")
ONE = {"arms": [], "design": "single", "seeds": [0]}


@pytest.fixture(scope="module")
def source(lab):
    """The id of a run that kept its weights."""
    ended = lab.run("run", lab.sheet("source", **ONE, runtime={"keep_weights": True}), *QUICK)
    assert ended.code == 0, ended.err
    return ended.trained[0]


@pytest.fixture(scope="module")
def warm(lab, source):
    ended = lab.run("run", lab.sheet("warm", **ONE, init=source[:8]), *QUICK)
    assert ended.code == 0, ended.err
    return ended.trained[0]


def test_it_begins_where_the_weights_are(lab, source, warm):
    """The first evaluation of one that is not trained further would be the source's last; here it goes on to fall."""
    recipe = (lab.run_folder(warm) / "recipe.yaml").read_text()
    digest = lab.result("source", "full")["weights"]
    assert f"weights: {digest}" in recipe
    losses = [lab.result(name, "full")["metrics"]["val/loss"] for name in ("source", "warm")]
    assert losses[1] < losses[0]
    assert warm != source


def test_the_run_whose_weights_it_begins_with_is_wanted_while_it_is_planned(lab, source, warm):
    """Nobody asks for `source` any more, and `warm` could never be trained again without it."""
    lab.store.joinpath("experiments", "source.json").unlink()
    store = Store(lab.store)
    wanted = inventory.wanted_runs(store)
    assert wanted[source] == {"warm": [inventory.START]}
    assert source not in [run.run for run in inventory.removal(store, [], unused=True).runs]
    assert source in [run.run for run in inventory.removal(store, ["warm"]).runs]
    lab.run("run", "source.yaml", *QUICK)


def test_a_copy_of_the_weights_is_the_same_run(lab, source, warm):
    shutil.copytree(lab.run_folder(source), lab.root / "copy")
    again = lab.run("run", lab.sheet("copied", **ONE, init=str(lab.root / "copy")), *QUICK)
    assert again.trained == [] and again.reused == [warm]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["init=0000"], "'0000' is not the id of one of"),
        (["init=WARM"], "kept no weights; delete"),
        (
            ["model.width=32"],
            "embedding.table is [64, 32] here and [64, 16] among the weights of init",
        ),
        (["init.run=1"], "init"),
    ],
)
def test_what_cannot_begin_a_run_is_one_line(ablab, warm, words, said):
    words = [word.replace("WARM", warm) for word in words]
    refused = ablab("run", "warm.yaml", *words, "--dry-run")
    assert refused.code == 2
    assert said in refused.err and refused.err.count("\n") == 1


def test_weights_that_changed_since_they_were_named_are_refused(lab, source, ablab):
    """The digest stands in the file's head; its bits are looked at when the run begins."""
    copy = lab.root / "changed"
    shutil.copytree(lab.run_folder(source), copy)
    path = copy / "weights.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    refused = lab.run(
        "run", lab.sheet("changed", **ONE, init=str(copy), set={"optim.lr": 1e-3}), *QUICK
    )
    assert refused.code == 2
    assert "holds weights" in refused.err and "the run was planned with" in refused.err
