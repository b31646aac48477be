"""The store: whose a plan is."""

from dataclasses import replace

import pytest

from ablab.core.errors import UserError
from ablab.core.store.planned import CATALOG, GridPlan
from ablab.core.store.store import Store


@pytest.fixture
def sheets(tmp_path):
    """Two files of one name."""
    paths = [tmp_path / folder / "exp.yaml" for folder in ("a", "b")]
    for path in paths:
        path.parent.mkdir()
        path.write_text(f"question: {path.parent.name}\n")
    return paths


def plan(sheet) -> GridPlan:
    return GridPlan("exp", f"{sheet}?", "val/loss", "lower", "add_one", [], sheet=str(sheet))


def test_two_sheets_of_one_name_do_not_share_a_plan(tmp_path, sheets):
    store, (first, second) = Store(tmp_path / "store"), sheets
    store.write_plan(plan(first))
    before = store.plan_path("exp").read_bytes()
    said = r"^experiment 'exp' in .* is that of .*a/exp.yaml, not of .*b/exp.yaml; rename one"
    with pytest.raises(UserError, match=said):
        store.write_plan(plan(second))
    with pytest.raises(UserError, match=said):
        store.change_plan("exp", lambda old: plan(second), print)
    with pytest.raises(UserError, match=r"is that of .*a/exp.yaml, not of catalog"):
        store.write_plan(plan(CATALOG))
    assert store.plan_path("exp").read_bytes() == before
    store.write_plan(replace(plan(first), question="changed"))
    assert store.read_plan("exp").question == "changed"


def test_a_sheet_of_ones_own_does_not_take_the_plan_of_the_catalogs(tmp_path, sheets):
    store = Store(tmp_path / "store")
    store.write_plan(plan(CATALOG))
    with pytest.raises(UserError, match=r"is that of catalog, not of .*a/exp.yaml"):
        store.write_plan(plan(sheets[0]))


def test_a_sheet_that_was_moved_or_copied_goes_on_with_its_plan(tmp_path, sheets):
    store, (first, second) = Store(tmp_path / "store"), sheets
    store.write_plan(plan(first))
    second.write_text(first.read_text())
    store.write_plan(plan(second))
    second.rename(tmp_path / "exp.yaml")
    (tmp_path / "exp.yaml").write_text("question: edited since\n")
    store.write_plan(plan(tmp_path / "exp.yaml"))
    assert store.read_plan("exp").sheet == str(tmp_path / "exp.yaml")


def test_a_plan_that_names_no_sheet_is_anyones(tmp_path, sheets):
    store = Store(tmp_path / "store")
    store.write_plan(replace(plan(CATALOG), sheet=None))
    store.write_plan(plan(sheets[0]))
    assert store.read_plan("exp").sheet == str(sheets[0])
