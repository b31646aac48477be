"""Experiments: a sheet with its overrides, resolved to a base recipe, its cells, and the runs that answer them."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from ablab.ablations.design import Cell, layout_of_menu
from ablab.core.errors import UserError
from ablab.core.recipe.edit import diff
from ablab.core.recipe.load import blaming
from ablab.core.recipe.recipe import Recipe, plain, run_id
from ablab.core.store.planned import CATALOG, Factors
from ablab.core.store.registration import Stopping
from ablab.experiments.plan.arms import ArmReader
from ablab.experiments.plan.feasible import buildable
from ablab.experiments.plan.judging import Judging, judging_of
from ablab.experiments.plan.link import Link
from ablab.experiments.plan.metrics import check_direction, check_left, check_study
from ablab.experiments.plan.overrides import Overrides
from ablab.experiments.plan.sheets import Sheet, catalog, check_name, find_sheet, read_sheet
from ablab.experiments.plan.stages import (
    Point,
    Reader,
    Stage,
    Start,
    chained,
    not_kept,
    recipes_of,
    whole_menu,
)
from ablab.experiments.plan.trunk import check_some, cut

MOST_SEEDS = 1000  # each is planned and hashed in every cell before one is run
REPLICA = 1000  # how far the seeds of A/A replicas lie apart


@dataclass(frozen=True)
class PlannedRun:
    """One recipe of one cell; `id` is its content hash.  Runs of one `pair` see the same rows at the same step.

    stage: empty where the experiment has none.  before: the runs of the stages before it, the first one first.
    """

    cell: str
    pair: int
    recipe: Recipe
    id: str
    stage: str = ""
    before: tuple["PlannedRun", ...] = ()
    repeats: bool = False  # it computes as the run before it, so nothing of it is to be checked

    @property
    def chain(self) -> tuple["PlannedRun", ...]:
        """All stages, this one last."""
        return (*self.before, self)

    @property
    def title(self) -> str:
        """The cell, and the stage where there are several."""
        return f"{self.cell} · {self.stage}" if self.stage else self.cell


@dataclass(frozen=True)
class Experiment:
    name: str
    sheet: Sheet
    stages: list[Stage]  # one, without a name, where the sheet has none
    cells: list[Cell]
    # Its file, or "catalog".
    origin: str | None = field(default=None, kw_only=True)
    # Of arms that set recipe paths of their own: their stages, by cell.
    arm_stages: dict[str, list[Stage]] = field(default_factory=dict, kw_only=True)
    # Its catalog entry or the stem of its file, then the overrides that make another experiment of it; [] without any.
    asked: list[str] = field(default_factory=list, kw_only=True)
    # What its runs are asked at their end; None: nothing.
    judging: Judging | None = field(default=None, kw_only=True)
    # What the first stage begins with; None: the weights of its seed.
    start: Start | None = field(default=None, kw_only=True)
    # What the design says of its cells besides, and of those that cannot be built: ablations/designs/cell.py:Layout.
    factors: Factors | None = field(default=None, kw_only=True)
    infeasible: dict[str, str] = field(default_factory=dict, kw_only=True)
    stopping: Stopping = field(default=Stopping(), kw_only=True)

    @property
    def base(self) -> Recipe:
        """Of the last stage, which is the one that is compared."""
        return self.stages[-1].scaled_base

    @cached_property
    def recipes(self) -> dict[str, Recipe]:
        """Cell -> recipe of its last stage, before what that goes on from.

        Raises UserError where one cannot be built.
        """
        return {name: recipes[-1] for name, recipes in self.stage_recipes.items()}

    @cached_property
    def stage_recipes(self) -> dict[str, list[Recipe]]:
        """Cell -> a recipe for each stage."""
        return {cell.name: self._resolve(cell) for cell in self.cells}

    @cached_property
    def cell_named(self) -> dict[str, Cell]:
        return {cell.name: cell for cell in self.cells}

    @property
    def not_kept(self) -> list[str]:
        """What `scale` cannot keep exactly, of the arm with the most ingredients."""
        fullest = max(self.cells, key=lambda cell: len(cell.treatment))
        return not_kept(self.stages_of(fullest), fullest.treatment)

    def runs(self, seeds: Iterable[int] | None = None) -> list[PlannedRun]:
        """Every run, the first seed of all cells before the second.

        Raises UserError where a cell cannot be built, and where a seed would be that of a replica.
        """
        pairs = list(dict.fromkeys(self.sheet.seeds if seeds is None else seeds))
        if len(pairs) > MOST_SEEDS:
            raise UserError(
                f"{self.name} asks for {len(pairs):,} seeds; at most {MOST_SEEDS:,} at once"
            )
        replicated = any(cell.replica for cell in self.cells)
        highest = max(pairs, default=0)
        if replicated and highest >= REPLICA:
            raise UserError(
                f"seed {highest} of {self.name} would run in both A and B; "
                f"keep the seeds of a replicate design below {REPLICA}"
            )
        return [self.run(cell, pair) for pair in pairs for cell in self.cells]

    def run(self, cell: Cell, pair: int) -> PlannedRun:
        """Replica k of an A/A arm takes seeds 1000 k + pair, so that its seeds are its own."""
        seed = pair + REPLICA * cell.replica
        return self.planned(cell, pair, self.stage_recipes[cell.name], seed)

    def planned(
        self, cell: Cell, pair: int, recipes: Sequence[Recipe], seed: int
    ) -> PlannedRun:
        """The run of the last stage.  recipes: one for each stage."""
        before: list[PlannedRun] = []
        links = self._links(recipes)
        for link, recipe in zip(links, chained(links, seed, self.start), strict=True):
            run = PlannedRun(
                cell=cell.name,
                pair=pair,
                recipe=recipe,
                id=run_id(recipe),
                stage=link.name,
                before=tuple(before),
                repeats=link.repeats,
            )
            before.append(run)
        return run

    def _links(self, recipes: Sequence[Recipe]) -> list[Link]:
        """Of an arm: its stages, or the pieces of its trunk and the rest."""
        if self.sheet.trunk is None:
            pairs = zip(self.stages, recipes, strict=True)
            return [Link(stage.name, recipe, stage.wish) for stage, recipe in pairs]
        if len(self.stages) > 1:
            raise UserError(
                "trunk cuts one run, and there are stages; write the pieces as stages"
            )
        return cut(recipes[0], round(self.sheet.trunk * self.sheet.scale))

    def resolved(self, cell: Cell, point: Point = {}) -> list[Recipe]:
        """A recipe for each stage, before what it goes on from.

        point: recipe paths and doses (`with.NAME.DOSE`) that a search has set.
        """
        return recipes_of(self.stages_of(cell), cell.treatment, point)

    def stages_of(self, cell: Cell) -> list[Stage]:
        return self.arm_stages.get(cell.name, self.stages)

    @property
    def every_stage(self) -> list[Stage]:
        """Of all arms."""
        return [*self.stages, *(one for own in self.arm_stages.values() for one in own)]

    def _resolve(self, cell: Cell) -> list[Recipe]:
        try:
            return self.resolved(cell)
        except UserError as flaw:
            raise UserError(
                f"cell {cell.name!r} of {self.name} cannot be built: {flaw}"
            ) from flaw

    def params(self, run: PlannedRun) -> dict[str, Any]:
        """What a tracker shows of a run: each leaf that differs from the base, the common dials, each toggle."""
        recipe = run.recipe
        # A piece of a trunk is of the only stage.
        stage = next((one for one in self.stages if one.name == run.stage), self.stages[-1])
        differences = diff(plain(stage.scaled_base), plain(recipe))
        changed = {path: str(new) for path, (_, new) in differences.items() if new is not None}
        dials = {
            "optim.lr": recipe.optim.lr,
            "model.width": recipe.model.width,
            "model.layers": recipe.model.layers,
            "seed": recipe.seed,
            "budget.tokens": recipe.budget.tokens,
            "data.name": recipe.data.name,
        }
        own = self.cell_named[run.cell].treatment
        toggles = {
            f"with.{name}": name in own for cell in self.cells for name in cell.treatment
        }
        staged = {"stage": run.stage} if run.stage else {}
        return changed | dials | toggles | staged


def _no_weights(name: str) -> Start:
    raise UserError(f"init={name}: weights are found in a store, and none was given")


def _unknown(data: str) -> None:
    """The digest of token folders that nobody has looked at."""


def load(
    name: str,
    overrides: Mapping[str, Any] = {},
    digest_of: Callable[[str], str | None] = _unknown,
    start_of: Callable[[str], Start] = _no_weights,
) -> Experiment:
    """Read a catalog entry or a file of the user's own, and resolve it.

    digest_of: data name -> digest of its token folder, asked only when the config leaves it open.
    start_of: what `init` names -> the weights, asked only where it stands there.
    Raises UserError for whatever in the file, its configs or the overrides cannot be built.
    """
    path = find_sheet(name)
    asked = Overrides(overrides)
    with blaming(path):
        sheet = read_sheet(path)
        check_direction(sheet.metric)
        if "with" not in overrides:
            whole_menu(sheet)
    stem = sheet.name or path.stem
    sheet = asked.on_sheet(sheet)
    if sheet.name is not None or "name" in overrides:
        check_name(sheet.name or "")
    if "name" in overrides and sheet.name == stem:
        raise UserError(f"name={stem} is its name already; choose another, or drop it")
    check_direction(sheet.metric)
    check_study(sheet.metric.name, sheet.study)
    judging = judging_of(sheet, path.parent)
    menu = whole_menu(sheet)

    def stages_of(asked: Overrides) -> list[Stage]:
        return Reader(sheet, asked, path.parent, digest_of).stages()

    stages = stages_of(asked)
    check_some(sheet.trunk, stages[0].base, menu)
    layout = layout_of_menu(sheet.design, asked.on_menu(menu))
    layout = buildable(lambda cell: recipes_of(stages, cell.treatment), layout)
    arms = ArmReader(asked, stages, stages_of).beside(layout, sheet.arms)
    layout = arms.layout
    experiment = Experiment(
        asked.title(sheet.name or path.stem),
        sheet,
        stages,
        layout.cells,
        arm_stages=arms.stages,
        origin=CATALOG if path in catalog().values() else str(path.resolve()),
        factors=layout.factors,
        infeasible=layout.infeasible,
        start=start_of(sheet.init) if sheet.init else None,
        asked=[path.stem, *asked.words] if asked.words else [],
        judging=judging,
    )
    check_left(sheet.metric.name, _buildable_recipes(experiment))
    return experiment


def _buildable_recipes(experiment: Experiment) -> Iterator[tuple[str, Recipe]]:
    """Of the last stage.  An experiment of which nothing can be built says so when it is run."""
    for cell in experiment.cells:
        try:
            yield cell.name, experiment.resolved(cell)[-1]
        except UserError:
            continue
