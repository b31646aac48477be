"""Who a run is, and how MLflow keeps that: a card as tags and params, a result as final numbers.

MLflow's limits: mlflow/utils/validation.py, 3.17.
"""

import re
import time
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ablab.core.errors import UserError
from ablab.core.store.evaluation import files_of, scores_of
from ablab.core.store.planned import GridPlan, Planned
from ablab.core.store.record import Record
from ablab.core.store.result import Result
from ablab.core.store.store import Store
from ablab.experiments.track.mlflow_view import colour_of
from ablab.experiments.track.tracker import Card

if TYPE_CHECKING:
    from mlflow.entities import Run

CHARACTERS = 6000  # of a value; MLflow takes no more
DIGEST_CHARACTERS = 36  # of the data's digest

Identity = tuple[str | None, ...]  # of a planned run: two cells may share a recipe


def card_of(store: Store, plan: GridPlan, planned: Planned) -> Card:
    """The card of one planned run, for the live tracker and for `ablab sync` alike.

    Params come from the plan, else from its run.json, which the experiment wrote that trained it.
    """
    record = store.run(planned.run)
    about = record.about()
    told = {
        "ablab.design": plan.design,
        "ablab.reference": planned.reference,
        "ablab.note": planned.note,
    }
    tags = {key: value for key, value in told.items() if value}
    tags["mlflow.runColor"] = colour_of(plan, planned.cell)
    return Card(
        run=planned.run,
        experiment=plan.name,
        cell=planned.cell,
        pair=planned.pair,
        seed=planned.seed,
        folder=record.folder,
        tags=tags | _mapping(about.get("tags")) | planned.tags,
        params=planned.params or _mapping(about.get("params")),
        description=description_of(plan, planned),
    )


def _mapping(said: Any) -> dict[str, Any]:
    """What run.json holds there, unless something else wrote that file."""
    return said if isinstance(said, dict) else {}


def description_of(plan: GridPlan, planned: Planned) -> str:
    """Which arm a run is, beside which it stands, and what stands where an ingredient is off."""
    beside = f", beside `{planned.reference}` on the same seed" if planned.reference else ""
    sentences = [f"Arm `{planned.cell}`, seed {planned.seed}{beside}."]
    ours = plan.treatments.get(planned.cell, {})
    theirs = plan.treatments.get(planned.reference or planned.cell, {})
    for name in sorted(ours.keys() ^ theirs.keys()):
        has = "with" if name in ours else "without"
        off = f" (off: {plan.off[name]})" if name in plan.off else ""
        sentences.append(f"It is trained {has} `{name}`{off}.")
    if planned.reference:
        for name, fields in plan.doses_apart(planned.cell, planned.reference):
            told = ", ".join(f"{field}={value}" for field, value in fields.items())
            sentences.append(f"`{planned.reference}` has `{name}` with {told}.")
        for path, value in plan.set_apart(planned.cell, planned.reference).items():
            sentences.append(f"It sets {path}={value}.")
    return " ".join(sentences)


def tags_of(card: Card) -> dict[str, str]:
    tags = {
        "ablab.experiment": card.experiment,
        "ablab.cell": card.cell,
        "ablab.pair": card.pair,
        "ablab.seed": card.seed,
        "ablab.run_id": card.run,
        **card.tags,
    }
    return {key: str(value)[:CHARACTERS] for key, value in tags.items()}


def params_of(card: Card) -> dict[str, str]:
    params = {key_of(name): value for name, value in card.params.items()}
    return {key: str(value)[:CHARACTERS] for key, value in params.items()}


def identity(tags: Mapping[str, str]) -> Identity:
    return tuple(tags.get(f"ablab.{key}") for key in ("run_id", "cell", "pair"))


def told(run: "Run") -> tuple[bool, int, str]:
    """Orders twins: the one of which MLflow was told most comes last, and twins of nothing come in an order too.

    Twins arise where MLflow did twice what it was asked once: a request to create a run whose answer was late is sent
    again, or another process asks for the same one.
    """
    return "ablab.result" in run.data.tags, step_of(run), run.info.run_id


def step_of(run: "Run") -> int:
    """The last step that MLflow was told of, as its tag says; -1: none."""
    return int(run.data.tags.get("ablab.step", -1))


def changed(tags: Mapping[str, str], held: Mapping[str, str]) -> dict[str, str]:
    """What MLflow should hold and does not.

    Its own keys, such as a run's colour, are the user's once the run exists.
    """
    return {
        key: value
        for key, value in tags.items()
        if held.get(key) != value and not key.startswith("mlflow.")
    }


def name_of(card: Card) -> str:
    """What the UI calls the run."""
    trial = card.tags.get("ablab.trial")
    return f"{card.cell} · " + (f"trial {trial}" if trial else f"seed {card.seed}")


def key_of(name: str) -> str:
    """`name` in the characters that MLflow allows in a key: optim.chains[hidden] -> optim.chains.hidden."""
    return re.sub(r"[^\w\-./: ]+", ".", name).strip("./")


def summary_of(result: Result, record: Record | None = None) -> dict[str, float]:
    """What a finished run shows besides its curves: final metrics, tokens/second, peak device memory in GiB.

    record: of the run, whose later evaluations are shown too.
    """
    pace = {
        "tokens_per_second": result.tokens_per_second,
        "peak_gib": result.peak_bytes / 2**30,
    }
    known = {key: value for key, value in pace.items() if value != 0}
    asked = scores_of(record, result) if record else {}
    return result.metrics | asked | known


# -- what a run folder says --------------------------------------------------------------------------------------------
def started(folder: Path) -> float:
    """When the run began, unix seconds: as run.json says, else the age of its recipe, else now."""
    said = Record(folder).about().get("started")
    if isinstance(said, int | float):
        return float(said)
    recipe = folder / "recipe.yaml"
    return recipe.stat().st_mtime if recipe.is_file() else time.time()


def data_of(recipe: Path) -> tuple[str, str] | None:
    """Name and digest of the data that a recipe.yaml names; None where it names none, or cannot be read."""
    from ablab.core.recipe.load import read_yaml

    try:
        data = read_yaml(recipe).get("data")
    except UserError:  # damaged: the run's next start writes it again
        return None
    named = data if isinstance(data, dict) else {}
    name, digest = named.get("name"), named.get("digest")
    if not (name and digest):
        return None
    return str(name), str(digest)[:DIGEST_CHARACTERS]


def fingerprint(folder: Path) -> str:
    """Of the result and of what the run was asked since; empty while there is no result."""
    result = folder / "result.json"
    if not result.is_file():
        return ""
    digest = 0
    for path in (result, *files_of(folder)):
        digest = zlib.crc32(path.read_bytes(), digest)
    return f"{digest:08x}"
