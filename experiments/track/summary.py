"""The report in MLflow: one run an experiment, beside those that it sums up.

Its artifacts are the page, the Markdown and the pictures of STORE/reports/NAME, its description the verdicts.
"""

import zlib
from pathlib import Path
from typing import TYPE_CHECKING

from ablab.core.store.planned import GridPlan
from ablab.core.store.store import Store
from ablab.experiments.track.cards import CHARACTERS
from ablab.experiments.track.mlflow_view import KIND, NOTE, SUMMARY, MlflowView

if TYPE_CHECKING:
    from mlflow.entities import Run

NAME = "report"  # of the run, and of its group in the table
REPORT = "ablab.report"  # fingerprint of what is attached
SUFFIXES = (".html", ".md", ".png")


def attach(view: MlflowView, plan: GridPlan) -> bool:
    """Show the report that stands in the store; False where there is none, or where MLflow holds this one."""
    files = report_files(view.store, plan.name)
    if not files:
        return False
    held = _only_one(view, plan.name)
    fingerprint = _fingerprint(files)
    if held and held.data.tags.get(REPORT) == fingerprint:
        return False
    run = held or _created(view, plan)
    for path in files:
        view.client.log_artifact(run.info.run_id, str(path))
    view.client.set_tag(run.info.run_id, NOTE, _verdicts(files))
    view.client.set_terminated(run.info.run_id, "FINISHED")
    view.client.set_tag(run.info.run_id, REPORT, fingerprint)
    return True


def _only_one(view: MlflowView, experiment: str) -> "Run | None":
    """The run that shows the report, if there is one; its twins are retired."""
    held = view.summaries(experiment)
    kept = max(held, key=lambda run: (REPORT in run.data.tags, run.info.run_id), default=None)
    for run in held:
        if run is not kept:
            view.retire(run)
    return kept


def report_files(store: Store, experiment: str) -> list[Path]:
    """What `ablab report` left, in the order of names; empty before it has left a page."""
    folder = store.root / "reports" / experiment
    if not (folder / "report.html").is_file():
        return []
    return sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES)


def _created(view: MlflowView, plan: GridPlan) -> "Run":
    tags = {
        KIND: SUMMARY,
        "ablab.experiment": plan.name,
        "ablab.cell": NAME,
        "mlflow.source.name": f"ablab report {plan.name}",
        "mlflow.source.type": "LOCAL",
    }
    experiment = view.experiment(plan.name)
    return view.client.create_run(experiment, tags=tags, run_name=NAME)


def _fingerprint(files: list[Path]) -> str:
    digest = 0
    for path in files:
        digest = zlib.crc32(path.read_bytes(), zlib.crc32(path.name.encode(), digest))
    return f"{digest:08x}"


def _verdicts(files: list[Path]) -> str:
    """The Markdown as far as its verdicts, without pictures: the UI draws its tables."""
    text = next((path.read_text("utf-8") for path in files if path.suffix == ".md"), "")
    head, _, _ = text.partition("\n## Numbers")
    lines = [line for line in head.splitlines() if not line.startswith("![")]
    return "\n".join(lines).strip()[:CHARACTERS]
