"""What a grid leaves in MLflow beside its runs: descriptions, the report, and a page that compares."""

import time
from dataclasses import replace

import numpy as np
import pytest

from ablab import analysis as ab
from ablab.analysis.effects import frame
from ablab.analysis.pages import html, report
from ablab.core.store.planned import GridPlan, Planned
from ablab.core.store.result import FINISHED, Result
from ablab.core.store.store import Store
from ablab.experiments.track.cards import card_of, description_of
from ablab.experiments.track.mlflow_home import local_uri
from ablab.experiments.track.mlflow_sync import show_report, sync
from ablab.experiments.track.mlflow_view import MlflowView
from ablab.experiments.track.summary import report_files

RATES = {"full": 0.007, "- muon": 0.003}


@pytest.fixture
def store(tmp_path, migrated, monkeypatch):
    """Two arms of three seeds, finished; the arm without muon ends .04 higher."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    root = tmp_path / "store"
    root.mkdir()
    (root / "mlflow.db").write_bytes(migrated[0].read_bytes())
    store = Store(root)
    rows = []
    for cell, effect in {"full": 0.0, "- muon": 0.04}.items():
        for pair in range(3):
            run = f"{len(rows):016x}"
            reference = None if cell == "full" else "full"
            params = {"optim.lr": RATES[cell], "model.width": 64}
            rows.append(Planned(cell, pair, pair, run, reference, params=params))
            _train(store, run, 3 + effect + 0.01 * pair + 0.001 * pair * effect)
    plan = GridPlan("tiny", "Does muon pay?", "val/loss", "lower", "leave_one_out", rows)
    store.write_plan(replace(plan, treatments={"full": {"muon": {}}, "- muon": {}}, off=OFF))
    return store


OFF = {"muon": "AdamW on the hidden matrices"}


def _train(store, run, final):
    record = store.run(run)
    record.folder.mkdir(parents=True)
    record.recipe_path.write_text("data:\n  name: web\n  digest: 0123abcd\n")
    record.about_path.write_text('{"started": 1.7e9}')
    for step in range(10, 51, 10):
        loss = final + 1 - step / 50
        pace = {"seconds": step / 10, "tokens_per_second": 100.0}
        record.log(step, {"tokens": 10 * step, "train/loss": loss, "val/loss": loss}, pace)
    metrics = {"train/loss": final, "val/loss": final}
    record.finish(Result(run, FINISHED, 50, 500, metrics, 5.0, 100.0))


def _report(store):
    found = report.read(store, "tiny")
    folder = store.root / "reports/tiny"
    html.write(store, found, frame.curves(store, "tiny"), folder)
    report.write(store, "tiny", folder)


def summary(store):
    held = MlflowView(store).summaries("tiny")
    assert len(held) <= 1
    return held[0] if held else None


def test_a_run_says_who_it_is(store):
    plan = store.read_plan("tiny")
    assert description_of(plan, plan.rows[1]) == "Arm `full`, seed 1."
    assert card_of(store, plan, plan.rows[4]).description == (
        "Arm `- muon`, seed 1, beside `full` on the same seed. "
        "It is trained without `muon` (off: AdamW on the hidden matrices)."
    )
    sync(store)
    notes = {
        run.info.run_name: run.data.tags["mlflow.note.content"]
        for run in MlflowView(store).runs("tiny")
    }
    assert notes["full · seed 1"] == "Arm `full`, seed 1."


def test_the_report_is_attached_to_a_run_of_its_own_once(store):
    assert sync(store)["added"] == 6
    assert summary(store) is None
    _report(store)
    show_report(store, "tiny")
    run = summary(store)
    files = MlflowView(store).client.list_artifacts(run.info.run_id)
    assert (
        {file.path for file in files}
        == {path.name for path in report_files(store, "tiny")}
        >= {"report.html", "report.md", "forest.png", "curves.png"}
    )
    said = run.data.tags["mlflow.note.content"]
    assert "Does muon pay?" in said
    assert "muon helps" in said
    assert "![" not in said
    assert sync(store) == {"added": 0, "continued": 0, "current": 6, "missing": 0}
    assert summary(store).data.tags == run.data.tags
    assert len(MlflowView(store).runs("tiny")) == 6


def test_a_report_that_has_changed_takes_the_place_of_the_old_one(store):
    _report(store)
    sync(store)
    before = summary(store)
    (store.root / "reports/tiny/report.md").write_text("# tiny\n\nAnother verdict.\n")
    sync(store)
    after = summary(store)
    assert after.info.run_id == before.info.run_id
    assert after.data.tags["mlflow.note.content"] == "# tiny\n\nAnother verdict."


def test_frames_from_mlflow_are_those_from_the_folders(store):
    _report(store)
    sync(store)
    server = local_uri(store.root)
    assert ab.list_experiments(server) == ["tiny"]
    ours, theirs = (ab.read_effects("tiny", where) for where in (store.root, server))
    assert ours.set_index("cell").delta.to_dict() == pytest.approx(
        theirs.set_index("cell").delta.to_dict(), nan_ok=True
    )
    assert set(theirs.verdict) == {"reference", "helps"}
    keys = ["run", "step"]
    ours, theirs = (
        ab.read_curves("tiny", where).sort_values(keys) for where in (store.root, server)
    )
    for column in ("tokens", "train/loss", "val/loss", "seconds", "tokens_per_second"):
        assert np.allclose(ours[column], theirs[column], atol=1e-3), column
    assert list(ours.cell) == list(theirs.cell)


@pytest.mark.slow
def test_from_the_home_page_on_a_person_finds_the_arms_and_compares_runs(store, serve, window):
    """Clicks and ticks alone, also to an experiment that comes while the server runs."""
    sync(store)
    served = serve(store.root)
    try:
        page = window(served.address)
        page.get_by_role("link", name="ablab/tiny", exact=True).click()
        page.get_by_text("Group: - muon").wait_for()
        assert "Does muon pay?" in page.content()
        chosen = ("full · seed 0", "- muon · seed 0")
        for name in chosen:
            _tick(page, name)
        page.get_by_role("button", name="Compare", exact=True).click()
        page.get_by_text("Parallel Coordinates Plot").wait_for()
        page.locator(".js-plotly-plot").first.wait_for()
        words = {*chosen, "optim.lr", "0.007", "0.003", "Show diff only", "val/loss"}
        assert lacking(words, page.content) == set()

        plan = store.read_plan("tiny")
        store.write_plan(replace(plan, name="later"))
        sync(store, ["later"])
        page.goto(served.address)
        page.get_by_role("link", name="ablab/later", exact=True).click()
        page.get_by_text("Group: - muon").wait_for()
        assert "viewStateShareKey=arms" in page.url
    finally:
        served.stop()


def _tick(page, run: str) -> None:
    """The box of a run in the table, whose row stands in two halves of one id."""
    row = page.get_by_role("row").filter(has_text=run).first.get_attribute("row-id")
    page.locator(f'[row-id="{row}"] input[type=checkbox]').first.check()


def lacking(words: set[str], content) -> set[str]:
    """The words that a page has not shown after a minute."""
    until = time.monotonic() + 60
    while (
        absent := {word for word in words if word not in content()}
    ) and time.monotonic() < until:
        time.sleep(0.2)
    return absent
