"""Why two identities differ, and why a cell is not one that the store has."""

import json
from dataclasses import replace

import pytest

from ablab.core.errors import UserError
from ablab.core.language.part import Part
from ablab.core.language.written import dump
from ablab.core.recipe.recipe import SCHEMA, plain, run_id
from ablab.core.store.result import Result
from ablab.core.store.store import Store
from ablab.experiments.plan.experiment import load
from ablab.experiments.plan.why import why_differ, why_not_reused


@pytest.fixture
def read(lab):
    def of(overrides={}, digest="0" * 16, **keys):
        sheet = lab.sheet("asked", **{"arms": ["qk_norm"]} | keys)
        return load(str(lab.root / sheet), overrides, lambda data: digest)

    return of


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path)


def run_of(experiment, cell: str = "full", seed: int = 0):
    return next(run for run in experiment.runs([seed]) if run.cell == cell)


def leave(store: Store, run, status: str | None = "finished", id: str = "", **about) -> str:
    """What a run leaves behind; status None: no result yet."""
    record = store.run(id or run.id)
    record.begin(dump(plain(run.recipe)), {"experiment": "asked", **about}, print)
    if status:
        record.finish(Result(record.folder.name, status, 20, 1280, error="it broke"))
    return record.folder.name


def test_the_fields_that_differ_are_named_with_both_values(read, store):
    one = leave(store, run_of(read()))
    other = leave(store, run_of(read({"optim.lr": 0.5, "data.context": 32}, digest="f" * 16)))
    assert why_differ(store, one, other) == [
        "data.digest: 0000000000000000 -> ffffffffffffffff",
        "data.context: 16 -> 32",
        "optim.lr: 0.003 -> 0.5",
    ]


def test_a_part_that_one_has_is_absent_in_the_other(read, store):
    one = leave(store, run_of(read()))
    other = leave(store, run_of(read(), "base"))
    assert "model.attention.on_qk.qk_norm.kind: qk_norm -> absent" in why_differ(
        store, one, other
    )


def test_the_beginning_of_an_id_is_enough_and_a_wrong_one_is_refused(read, store):
    one = leave(store, run_of(read()))
    other = leave(store, run_of(read(), seed=1))
    assert why_differ(store, one[:6], other[:6]) == ["seed: 0 -> 1"]
    with pytest.raises(UserError, match="'0123456789abcdef' is not the id of one of 2 runs in"):
        why_differ(store, one, "0123456789abcdef")
    with pytest.raises(UserError, match="are one run"):
        why_differ(store, one, one[:8])
    leave(store, run_of(read()), id=one[:8] + "f" * 8)
    with pytest.raises(UserError, match="begins 2 runs"):
        why_differ(store, one[:8], other)


def test_a_plugin_whose_code_was_another_is_named_and_so_is_an_older_schema(
    read, store, monkeypatch
):
    run = run_of(read())
    monkeypatch.setitem(Part.foreign, "qk_norm", "new digest")
    now = replace(run, id=run_id(run.recipe))
    old = leave(
        store, run, id="a" * 16, identity={"schema": 1, "plugins": {"qk_norm": "old digest"}}
    )
    title, *fields = why_not_reused(store, now)
    assert f"the nearest is {old}, trained for asked, which differs in:" in title
    assert fields == [
        f"  schema: 1 -> {SCHEMA}",
        "  code of the plugin qk_norm: old digest -> new digest",
    ]


def test_a_run_of_before_identities_were_recorded_says_that_they_were_not(read, store):
    run = run_of(read())
    leave(store, run, id="a" * 16)
    _, *fields = why_not_reused(store, replace(run, id=run.id))
    assert fields == [f"  schema: not recorded -> {SCHEMA}"]


def test_the_nearest_run_is_the_one_with_the_fewest_fields_that_differ(read, store):
    leave(store, run_of(read(), "base"))
    near = leave(store, run_of(read(digest="f" * 16)))
    leave(store, run_of(read({"optim.lr": 0.5}, digest="f" * 16)))
    leave(store, run_of(read(digest="f" * 16), seed=1))
    title, *fields = why_not_reused(store, run_of(read()))
    assert near in title
    assert fields == ["  data.digest: ffffffffffffffff -> 0000000000000000"]


STATES = {
    "finished": "is there, finished: it is reused",
    "diverged": "is there, diverged: it is reused",
    "failed": "ended as failed, which is tried again: it broke",
    None: "was begun and has no result: it goes on from its last checkpoint",
}


@pytest.mark.parametrize("status", STATES)
def test_a_run_that_is_there_says_what_becomes_of_it(read, store, status):
    run = run_of(read())
    leave(store, run, status)
    (line,) = why_not_reused(store, run)
    assert line == f"full, seed 0: run {run.id} {STATES[status]}"


def test_a_damaged_result_is_named(read, store):
    run = run_of(read())
    leave(store, run)
    store.run(run.id).result_path.write_text("{")
    (line,) = why_not_reused(store, run)
    assert "is there, but" in line
    assert "is damaged" in line


def test_an_empty_store_and_unreadable_recipes_are_no_neighbours(read, store):
    (line,) = why_not_reused(store, run_of(read()))
    assert "nor is any other run in" in line
    broken = store.run("b" * 16).folder
    broken.mkdir(parents=True)
    (broken / "recipe.yaml").write_bytes(b"\xff: [")
    assert len(why_not_reused(store, run_of(read()))) == 1


def test_the_command_takes_two_runs_or_an_experiment_and_a_cell(lab, ablab, read):
    digest = json.loads((lab.store / "data" / "tiny" / "meta.json").read_text())["digest"]
    stored = Store(lab.store)
    one = leave(stored, run_of(read(digest=digest)))
    other = leave(stored, run_of(read(digest=digest), seed=1))
    assert ablab("why", one, other).out == "seed: 0 -> 1\n"
    assert "it is reused" in ablab("why", "asked.yaml", "full").out
    said = ablab("why", "asked.yaml", "full", "optim.lr=0.5").out
    assert f"the nearest is {one}" in said
    assert said.endswith("  optim.lr: 0.003 -> 0.5\n")
    assert ablab("why", "asked.yaml", "full", "--seed", "2", "--json").json["why"]
    for words, why in {
        f"{one} {'0' * 16}": "'0000000000000000' is not the id of one of 2 runs",
        "asked.yaml fulll": "no cell 'fulll'. Did you mean 'full'",
    }.items():
        ended = ablab("why", *words.split())
        assert ended.code == 2
        assert why in ended.err
        assert len(ended.err.splitlines()) == 1
