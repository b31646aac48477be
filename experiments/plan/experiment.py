"""An experiment file, read: base recipe, treatment, design, seeds, metric -> the runs that it wants."""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

from ablab.ablations.design import Cell, cells_of
from ablab.core.errors import UserError
from ablab.core.language.numbers import Natural
from ablab.core.language.parse import near, parse
from ablab.core.recipe.edit import diff
from ablab.core.recipe.intervention import REGISTRY, resolve, treatment_of
from ablab.core.recipe.load import assign, blaming, read_yaml, recipe_from
from ablab.core.recipe.recipe import Recipe, plain, run_id
from ablab.core.runtime.runtime import Runtime, rows_at_once
from ablab.core.store.record import GridPlan, Planned
from ablab.experiments.tune.proposals import StudySheet

REPLICA = 1000  # how far the seeds of A/A replicas lie apart
CATALOG = Path(str(files("ablab.experiments"))) / "catalog"


@dataclass(frozen=True)
class Metric:
    name: Literal["val/bits_per_byte", "val/loss", "train/loss"] = "val/bits_per_byte"
    better: Literal["lower", "higher"] = "lower"


@dataclass(frozen=True)
class Sheet:
    """The keys of an experiment file."""

    question: str
    base: list[str]
    treatment: list[Any] = field(default_factory=list)  # `with` in the file
    design: str = "leave_one_out"
    seeds: list[Natural] = field(default_factory=lambda: [0, 1, 2])
    metric: Metric = field(default_factory=Metric)
    set: dict[str, Any] = field(
        default_factory=dict
    )  # dotted recipe path -> value, after the base configs
    runtime: Runtime = field(default_factory=Runtime)
    study: StudySheet | None = None  # tune before comparing: `ablab study`
    command: str = ""  # how it is started, with the time and the result once measured
    time: str = ""
    result: str = ""


@dataclass(frozen=True)
class Run:
    """One recipe of one cell; `id` is its content hash."""

    cell: str
    pair: int
    recipe: Recipe
    id: str


@dataclass(frozen=True)
class Experiment:
    name: str
    sheet: Sheet
    base: Recipe
    cells: list[Cell]

    @cached_property
    def recipes(self) -> dict[str, Recipe]:
        """Cell -> recipe.  Raises UserError where one cannot be built."""
        return {cell.name: self._resolve(cell) for cell in self.cells}

    def runs(self, seeds: Iterable[int] | None = None) -> list[Run]:
        """Every run, the first seed of all cells before the second.  Raises UserError where a cell cannot be built."""
        seeds = list(dict.fromkeys(self.sheet.seeds if seeds is None else seeds))
        if any(cell.replica for cell in self.cells) and max(seeds, default=0) >= REPLICA:
            raise UserError(
                f"seed {max(seeds)} of {self.name} would run in both A and B; keep the seeds of a replicate design below {REPLICA}"
            )
        return [self.run(cell, seed) for seed in seeds for cell in self.cells]

    def run(self, cell: Cell, pair: int) -> Run:
        """Replica k of an A/A arm takes seeds 1000 k + pair, so that its seeds are its own."""
        seeded = replace(self.recipes[cell.name], seed=pair + REPLICA * cell.replica)
        return Run(cell.name, pair, seeded, run_id(seeded))

    def _resolve(self, cell: Cell) -> Recipe:
        try:
            return resolve(self.base, cell.treatment)
        except UserError as flaw:
            raise UserError(
                f"cell {cell.name!r} of {self.name} cannot be built: {flaw}"
            ) from None

    def plan(self, runs: Iterable[Run]) -> GridPlan:
        cells = {cell.name: cell for cell in self.cells}
        rows = [
            Planned(run.cell, run.pair, run.recipe.seed, run.id, cells[run.cell].reference)
            for run in runs
        ]
        treatments = {
            cell.name: {name: _dose(dose) for name, dose in cell.treatment.items()}
            for cell in self.cells
        }
        off = {name: REGISTRY[name].about.off for cell in self.cells for name in cell.treatment}
        sheet = self.sheet
        return GridPlan(
            self.name,
            sheet.question,
            sheet.metric.name,
            sheet.metric.better,
            sheet.design,
            rows,
            treatments,
            off,
        )

    def params(self, run: Run) -> dict[str, Any]:
        """What a tracker shows of a run: the dials that people compare, each toggle, and every leaf that differs from the base."""
        recipe = run.recipe
        dials = {
            "optim.lr": recipe.optim.lr,
            "model.width": recipe.model.width,
            "model.layers": recipe.model.layers,
            "seed": recipe.seed,
            "budget.tokens": recipe.budget.tokens,
            "data.name": recipe.data.name,
        }
        cells = {cell.name: cell.treatment for cell in self.cells}
        toggles = {
            f"with.{name}": name in cells[run.cell]
            for treatment in cells.values()
            for name in treatment
        }
        changed = {
            path: str(new)
            for path, (_, new) in diff(plain(self.base), plain(recipe)).items()
            if new is not None
        }
        return changed | dials | toggles


def _dose(intervention: Any) -> dict[str, Any]:
    return {name: value for name, value in plain(intervention).items() if name != "kind"}


def catalog() -> dict[str, Path]:
    return {path.stem: path for path in sorted(CATALOG.glob("*.yaml"))}


def load(
    name: str,
    overrides: Mapping[str, Any] = {},
    digest_of: Callable[[str], str | None] = lambda data: None,
) -> Experiment:
    """Read a catalog entry, or a file of the user's own (a path ending in .yaml).

    overrides: `with.NAME.DOSE`, `runtime.X`, `study.X` and `seeds`, `design` belong to the experiment; all other paths to the
    recipe.  Overridden recipes are another experiment with the override in its name, so no result is overwritten.
    digest_of: data name -> digest of its token folder, asked only when the config leaves it open.
    """
    path = _find(name)
    sheet_overrides = {
        p: v
        for p, v in overrides.items()
        if p.split(".")[0] in ("runtime", "seeds", "design", "study")
    }
    with blaming(path):
        sheet = _sheet(read_yaml(path))
        treatment = treatment_of(sheet.treatment)
    for key, value in sheet_overrides.items():
        sheet = assign(sheet, key, value)
    doses = {p: v for p, v in overrides.items() if p.startswith("with.")}
    paths = {p: v for p, v in overrides.items() if p not in sheet_overrides and p not in doses}
    if "seed" in sheet.set | paths:
        raise UserError(
            f"seed={(sheet.set | paths)['seed']} would be overwritten: each run has its own; write seeds: [3], or give --seeds 3"
        )
    base = recipe_from(
        sheet.base, _other_data(sheet.set) | _other_data(paths), beside=path.parent
    )
    rows_at_once(sheet.runtime, base.data.batch)
    if base.data.digest is None:
        base = replace(base, data=replace(base.data, digest=digest_of(base.data.name)))
    renaming = {
        p: v for p, v in overrides.items() if p.split(".")[0] not in ("runtime", "seeds")
    }
    return Experiment(
        _title(path.stem, renaming),
        sheet,
        base,
        cells_of(sheet.design, _dosed(treatment, doses)),
    )


def _other_data(paths: Mapping[str, Any]) -> dict[str, Any]:
    """The digest in a config is of the data named there: another name leaves it open."""
    return ({"data.digest": None} if "data.name" in paths else {}) | dict(paths)


def _sheet(content: dict[str, Any]) -> Sheet:
    """`with` is no name in Python, so the field is `treatment`; in the file it is `with` alone."""
    listed = content.pop("with", None) or []
    if "treatment" in content:
        raise UserError("unknown key 'treatment'; interventions are listed under `with`")
    if not isinstance(listed, list):
        raise UserError(
            f"with={listed!r} must be a list of interventions, such as [qk_norm, {{gating: {{per: head}}}}]"
        )
    return parse(Sheet, content | {"treatment": listed}, "")


def _title(stem: str, overrides: Mapping[str, Any]) -> str:
    """quickstart@optim.lr=0.01; where that would be too long for a file's name, its digest."""
    told = "".join(
        f"@{key}={_written(value)}" for key, value in sorted(overrides.items())
    ).replace("/", "_")
    return stem + (
        told if len(stem + told) < 150 else f"@{hashlib.sha256(told.encode()).hexdigest()[:12]}"
    )


def _written(value: Any) -> Any:
    """20000.0 as 20000, None as null: one recipe has one name, and the name can be typed again."""
    return (
        "null"
        if value is None
        else int(value)
        if isinstance(value, float) and value.is_integer()
        else value
    )


def _find(name: str) -> Path:
    if name.endswith((".yaml", ".yml")):
        return Path(name)
    if name not in catalog():
        hint = (
            f"Did you mean '{name}.yaml'? "
            if Path(f"{name}.yaml").is_file()
            else near(name, catalog())
        )
        raise UserError(
            f"unknown experiment {name!r}. {hint}Catalog: {', '.join(catalog())}; or give a path to a .yaml file"
        )
    return catalog()[name]


def _dosed(treatment: dict, doses: Mapping[str, Any]) -> dict:
    for path, value in doses.items():
        _, name, *dose = path.split(".")
        if name not in treatment or len(dose) != 1:
            known = [f"with.{one}.<dose>" for one in treatment]
            raise UserError(
                f"unknown path {path!r}. {near(path, known)}This experiment has: {', '.join(known)}"
            )
        treatment[name] = assign(treatment[name], dose[0], value)
    return treatment


def chosen(runs: Iterable[Run], patterns: Iterable[str]) -> list[Run]:
    """Runs whose cell matches a pattern (`*gating*`) and none of the `!` patterns.  A pattern that fits nothing is an error."""
    runs, patterns = list(runs), list(patterns)
    cells = list(dict.fromkeys(run.cell for run in runs))
    for pattern in patterns:
        if not any(_fits(cell, pattern.removeprefix("!")) for cell in cells):
            raise UserError(
                f"--only {pattern!r} fits no cell. {near(pattern, cells)}Cells: {', '.join(cells)}"
            )
    wanted = [pattern for pattern in patterns if not pattern.startswith("!")] or ["*"]
    barred = [pattern[1:] for pattern in patterns if pattern.startswith("!")]
    kept = [
        run
        for run in runs
        if any(_fits(run.cell, p) for p in wanted)
        and not any(_fits(run.cell, p) for p in barred)
    ]
    if runs and not kept:
        raise UserError(
            f"--only {' --only '.join(map(repr, patterns))} leaves no cell to run; drop one of them. Cells: {', '.join(cells)}"
        )
    return kept


def _fits(cell: str, pattern: str) -> bool:
    """A shell pattern, or a bare word that stands in the cell's name."""
    return fnmatchcase(cell, pattern) or (
        pattern.isidentifier()
        and pattern in cell.replace("(", " ").replace(")", " ").replace(",", " ").split()
    )


def merged_plan(
    experiment: Experiment, runs: list[Run], old: GridPlan | None, inert: Mapping[str, str] = {}
) -> GridPlan:
    """The plan of these runs, and of earlier seeds of the same cells whose recipes are still the same.

    inert: for each cell just looked at, the reference whose bits it computes, or "" where it is alive; any other cell
    keeps what was noted of it.
    """
    plan, cells = experiment.plan(runs), {cell.name: cell for cell in experiment.cells}
    have = {(row.cell, row.pair) for row in plan.rows}
    before = old.rows if old else []
    earlier = [
        (row, experiment.run(cells[row.cell], row.pair))
        for row in before
        if row.cell in cells and (row.cell, row.pair) not in have
    ]
    kept = experiment.plan([run for row, run in earlier if run.id == row.run]).rows
    notes = {row.run: row.note for row in before}
    told = {
        cell: reference and f"inert: same bits as {reference}"
        for cell, reference in inert.items()
    }
    return replace(
        plan,
        rows=[
            replace(row, note=told.get(row.cell, notes.get(row.run, "")))
            for row in plan.rows + kept
        ],
    )
