"""`ablab runs`, `rm`, `export`, and what `list` says of a store: seen as a user types them."""

import json

import pandas as pd
import pytest


@pytest.fixture(scope="module")
def grown(lab):
    """A store with two experiments of two arms, which share their reference."""
    lab.sheet("one", arms=["qk_norm"], seeds=[0])
    lab.sheet("two", arms=["value_residual"], seeds=[0])
    for sheet in ("one.yaml", "two.yaml"):
        assert lab.run("run", sheet, "--no-mlflow", "--quiet").code == 0
    return lab


def runs_of(ablab, *words) -> list[dict]:
    return ablab("runs", *words, "--json").json


def test_runs_are_listed_filtered_sorted_and_weighed(grown, ablab):
    every = runs_of(ablab)
    assert len(every) == 3
    assert {len(run["wanted_by"]) for run in every} == {1, 2}
    assert all(run["size"] > 1000 and run["status"] == "finished" for run in every)
    assert len(runs_of(ablab, "one")) == 2
    assert runs_of(ablab, "--status", "failed") == []
    losses = [run["metrics"]["val/loss"] for run in runs_of(ablab, "--sort", "-val/loss")]
    assert losses == sorted(losses, reverse=True) and len(set(losses)) > 1
    said = ablab("runs", "--limit", "1").out
    assert "3 runs, 1 shown" in said and "$ABLAB_STORE" in said


def test_a_sort_by_what_no_run_has_names_what_they_have(grown, ablab):
    refused = ablab("runs", "--sort", "banana")
    assert refused.code == 2
    assert "'banana' names nothing" in refused.err and "val/loss" in refused.err


def test_a_table_is_exported_whole_and_replaces_nothing(grown, ablab):
    for suffix, read in (("csv", pd.read_csv), ("parquet", pd.read_parquet)):
        out = grown.root / f"runs.{suffix}"
        assert ablab("export", "one", out.name).code == 0
        table = read(out)
        assert set(table.run) == {run["run"] for run in runs_of(ablab, "one")}
        assert list(table.cell) == ["full", "base", "- qk_norm"]
        assert table["val/loss"].notna().all()
        assert table["params/model.width"].astype(str).eq("16").all()
    assert ablab("export", "one", "curves.json", "--curves").code == 0
    lines = (grown.root / "curves.json").read_text().splitlines()
    assert {json.loads(line)["step"] for line in lines} >= {5, 10, 20}
    before = (grown.root / "curves.json").read_bytes()
    refused = ablab("export", "one", "curves.json")
    assert refused.code == 2 and "exists and is not overwritten" in refused.err
    assert (grown.root / "curves.json").read_bytes() == before
    assert "must end in one of .csv, .json, .parquet" in ablab("export", "one", "x.xls").err


def test_list_shows_the_sheets_of_this_folder_and_what_the_store_holds(grown, ablab):
    found = ablab("list", "--json").json
    assert {"one.yaml", "two.yaml"} <= {sheet["name"] for sheet in found["here"]}
    assert {"name": "one", "question": "3 of 3 runs ended"} in found["store"]


def test_hints_repeat_the_path_of_the_sheet(grown, ablab):
    lacking = ablab("report", "two.yaml", "optim.lr=0.02")
    assert lacking.code == 2 and "--store or $ABLAB_STORE" in lacking.err
    assert ablab("run", "one.yaml", "--seeds", "0-1", "--only", "nothing*").code == 2
    grown.sheet("three", arms=["qk_norm"], seeds=[0, 1])
    assert grown.run("run", "three.yaml", "--only", "full", "--no-mlflow", "--quiet").code == 0
    assert "continue with: ablab run three.yaml" in ablab("report", "three").err


def test_removing_asks_and_keeps_what_others_want(grown, ablab):
    before = runs_of(ablab)
    unasked = ablab("rm", "two")
    assert unasked.code == 2 and "say --yes" in unasked.err
    assert "stays: 1 runs" in unasked.out
    assert runs_of(ablab) == before
    removed = ablab("rm", "two", "--yes")
    assert removed.code == 0 and "removed" in removed.out
    assert len(runs_of(ablab)) == len(before) - 1
    assert ablab("report", "one").code == 0
