"""Sheets: the experiment files as they are written, and the catalog of those that are shipped."""

from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from ablab.core.errors import UserError
from ablab.core.language.numbers import Natural, NonNegative, Positive, Whole
from ablab.core.language.parse import near, parse
from ablab.core.recipe.load import read_yaml
from ablab.core.runtime.runtime import Runtime

CATALOG = Path(str(files("ablab.experiments"))) / "catalog"


@dataclass(frozen=True)
class Metric:
    name: Literal["val/bits_per_byte", "val/loss", "train/loss"] = "val/bits_per_byte"
    better: Literal["lower", "higher"] = "lower"


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
class Sheet:
    """The keys of an experiment file."""

    question: str
    base: list[str]
    treatment: list[Any] = field(default_factory=list)  # `with` in the file
    # a name, or {name: options}: ablations/design.py
    design: str | dict[str, Any] = "leave_one_out"
    seeds: list[Natural] = field(default_factory=lambda: [0, 1, 2])
    metric: Metric = field(default_factory=Metric)
    # The smallest effect of interest, in the metric's unit: arms surely nearer than that are called equivalent.
    equivalence: Positive | None = None
    # dotted recipe path -> value, after the base configs
    set: dict[str, Any] = field(default_factory=dict)
    runtime: Runtime = field(default_factory=Runtime)
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
    content = read_yaml(path)
    listed = content.pop("with", None) or []
    if "treatment" in content:
        raise UserError("unknown key 'treatment'; interventions are listed under `with`")
    if not isinstance(listed, list):
        raise UserError(
            f"with={listed!r} must be a list of interventions, such as [qk_norm, {{gating: {{per: head}}}}]"
        )
    sheet: Sheet = parse(Sheet, content | {"treatment": listed}, "")
    return sheet
