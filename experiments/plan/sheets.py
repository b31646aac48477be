"""Sheets: the experiment files as they are written, and the catalog of those that are shipped."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from ablab.core.errors import UserError
from ablab.core.language.numbers import Natural, NonNegative, Positive, Share, Whole
from ablab.core.language.parse import near, parse
from ablab.core.model.heritage import Wanted
from ablab.core.recipe.load import read_yaml
from ablab.core.recipe.stage import Read
from ablab.core.runtime.runtime import Runtime
from ablab.core.store.metrics import LOGGED, MEASURED, OPEN, Better, known

LONGEST_NAME = 100
NAME = re.compile(rf"[A-Za-z0-9_][A-Za-z0-9_.+-]{{0,{LONGEST_NAME - 1}}}")
ALONE = "arms"  # the design of a sheet that writes out its arms and names no design
CATALOG = Path(str(files("ablab.experiments"))) / "catalog"


@dataclass(frozen=True)
class Metric:
    """Any number that the runs leave; `better` may be left out where it is known (experiments/plan/metrics.py)."""

    name: str = "val/bits_per_byte"
    better: Better = "lower"


@dataclass(frozen=True)
class StudySheet:
    """The `study:` block of an experiment file."""

    # path -> {log: [a, b]} | {uniform: [a, b]} | {int: [a, b]} | {choices: [...]}; `points` for a grid
    space: dict[str, Any]
    trials_per_cell: Whole = 8  # for a grid: all of its points, whatever this says
    # Selection seeds; a trial's value is the mean over them.
    seeds: list[Natural] = field(default_factory=lambda: [100])
    sampler: Literal["gp", "tpe", "qmc", "random", "grid"] = "gp"
    sampler_seed: int = 0
    # Trials proposed at once for each cell; fixes the proposals, whatever --jobs is.
    generation: Whole = 4
    pruner: Literal["none", "median", "asha", "hyperband"] = "none"
    # path -> bounds within which an edge optimum widens the range
    hard: dict[str, list[float]] = field(default_factory=dict)
    widenings: Natural = 4  # extra trials a cell may spend on that
    hours: NonNegative | None = None  # no new generation is started after so long


@dataclass(frozen=True)
class EvaluateSheet:
    """What every run is asked at its end, by suite: a path, relative to the sheet.  None of them: nothing."""

    core: str | None = None  # a bundle in DCLM's format
    blimp: str | None = None  # BLiMP's folder
    bpb: str | None = None  # JSONL whose lines hold text and source
    max_per_task: Whole | None = (
        None  # items of each task, or documents of each source; None: all
    )

    @property
    def suites(self) -> dict[str, str]:
        named = {"core": self.core, "blimp": self.blimp, "bpb": self.bpb}
        return {suite: path for suite, path in named.items() if path}


@dataclass(frozen=True)
class StageSheet:
    """One of `stages:`: how it differs from the experiment's recipe, and what it takes over from the one before."""

    name: str
    base: list[str] = field(default_factory=list)  # configs, after those of the experiment
    # `with` in the file: interventions that act in this stage alone
    treatment: list[Any] = field(default_factory=list)
    # recipe paths, and doses as with.NAME.DOSE
    set: dict[str, Any] = field(default_factory=dict)
    takes: tuple[Wanted, ...] = ("optimizer", "steps")  # besides the weights
    read: Read = "trained"  # which weights of the stage before


@dataclass(frozen=True)
class ArmSheet:
    """One of `arms:`: how it differs from its reference (experiments/plan/arms.py)."""

    name: str
    # recipe paths, and doses as with.NAME.DOSE
    set: dict[str, Any] = field(default_factory=dict)
    treatment: list[Any] = field(default_factory=list)  # `with` in the file
    without: list[str] = field(default_factory=list)
    reference: str | None = (
        None  # a cell; unless it is named, the one that others are measured against
    )


@dataclass(frozen=True)
class Sheet:
    """The keys of an experiment file."""

    question: str
    base: list[str]
    name: str | None = None  # of the experiment; unless it is given, that of the file
    treatment: list[Any] = field(default_factory=list)  # `with` in the file
    # a name, or {name: options}: ablations/design.py
    design: str | dict[str, Any] = "leave_one_out"
    arms: tuple[ArmSheet, ...] = ()  # beside those of the design
    seeds: list[Natural] = field(default_factory=lambda: [0, 1, 2])
    metric: Metric = field(default_factory=Metric)
    # The smallest effect of interest, in the metric's unit: arms surely nearer than that are called equivalent.
    equivalence: Positive | None = None
    # dotted recipe path -> value, after the base configs
    set: dict[str, Any] = field(default_factory=dict)
    # Tokens of a piece of the trunk: a WSD run is cut before its cooldown (experiments/plan/trunk.py).
    trunk: Whole | None = None
    # A run of the store or a weights folder whose weights the first stage begins with.
    init: str | None = None
    scale: Share = 1.0  # of tokens and steps: a shorter run with the same ratios
    stages: tuple[StageSheet, ...] = ()  # one after another; none: the recipe is all
    runtime: Runtime = field(default_factory=Runtime)
    evaluate: EvaluateSheet = EvaluateSheet()
    # Options of --launcher ray and --launcher slurm: {num_gpus: 0.25}, {partition: gpu, gres: gpu:1, time: 240}.
    ray: dict[str, Any] = field(default_factory=dict)
    slurm: dict[str, Any] = field(default_factory=dict)
    study: StudySheet | None = None  # tune before comparing: `ablab study`
    command: str = ""  # how it is started, with the time and the result once measured
    time: str = ""
    result: str = ""


def catalog() -> dict[str, Path]:
    """Name -> file of every shipped experiment."""
    return {path.stem: path for path in sorted(CATALOG.glob("*.yaml"))}


def find_sheet(name: str) -> Path:
    """The file of a catalog entry, or a file of the user's own: a path that ends in .yaml.

    Raises UserError for a name that the catalog lacks, and for one that no experiment can have.
    """
    if name.endswith((".yaml", ".yml")):
        path = Path(name)
        if not path.stem.isprintable():
            raise UserError(
                f"{name!r} cannot name an experiment; rename it in letters and digits"
            )
        return path
    shipped = catalog()
    if name in shipped:
        return shipped[name]
    beside = Path(f"{name}.yaml").is_file()
    hint = f"Did you mean '{name}.yaml'? " if beside else near(name, shipped)
    raise UserError(
        f"unknown experiment {name!r}. {hint}"
        f"Catalog: {', '.join(shipped)}; or give a path to a .yaml file"
    )


def read_sheet(path: Path) -> Sheet:
    """The sheet in a file.  `with` is no name in Python, so its field is `treatment`; in the file it is `with` alone.

    Raises UserError: not YAML, an unknown key, a value of another type.
    """
    content = _renamed(read_yaml(path), "with")
    for key in ("stages", "arms"):
        if key in content:
            content[key] = renamed_items(content[key], key)
    if content.get("arms"):
        content.setdefault("design", ALONE)
    content["metric"] = with_direction(content.get("metric", {}))
    sheet: Sheet = parse(Sheet, content, "")
    return sheet


def with_direction(metric: Any) -> Any:
    """With the usual direction of the metric, where none is given.  Raises UserError where there is no usual one."""
    if not isinstance(metric, Mapping) or not isinstance(metric.get("name"), str):
        return metric
    if metric.get("better") is not None:
        return metric
    name = metric["name"]
    better = known(name).better
    if better is None:
        common = [*LOGGED, *MEASURED]
        hint = "" if name in common or name.startswith(OPEN) else near(name, common)
        raise UserError(
            f"metric {name:.80}: which way is better is not known. {hint}"
            f"Write metric: {{name: {name:.80}, better: lower}} or higher"
        )
    return {**metric, "better": better}


def renamed_items(items: Any, key: str) -> Any:
    """The stages or arms of a sheet, each with what stands under its `with` under `treatment`."""
    if not isinstance(items, list):
        return items
    return [
        _renamed(item, f"{key}[{i}].with") if isinstance(item, Mapping) else item
        for i, item in enumerate(items)
    ]


def _renamed(content: Mapping[str, Any], path: str) -> dict[str, Any]:
    """With what stands under `with` under `treatment`.  path: of `with`, for messages."""
    if "treatment" in content:
        raise UserError("unknown key 'treatment'; interventions are listed under `with`")
    renamed = dict(content)
    return renamed | {"treatment": listed(renamed.pop("with", None), path)}


def listed(given: Any, path: str) -> list[Any]:
    """What stands under a `with`.  Raises UserError where it is no list."""
    if isinstance(given or [], list):
        return given or []
    raise UserError(
        f"{path}={given!r} must be a list of interventions, such as [qk_norm, {{gating: {{per: head}}}}]"
    )


def check_name(name: str) -> None:
    """Raises UserError for what cannot name an experiment, and for the name of one that is shipped."""
    if not NAME.fullmatch(name):
        raise UserError(
            f"name={name!r:.100} cannot name an experiment; use letters, digits and _ . + -, at most {LONGEST_NAME}"
        )
    if name in catalog():
        raise UserError(f"name={name} is that of a shipped experiment; choose another")
