"""Stages of an experiment: one recipe after another, each going on from the one before.

    stages:
      - {name: stable, set: {data.context: 768, budget.tokens: 29.5e9}}
      - {name: decay, base: [data/decay], set: {data.context: 896, with.wsd.decay_fraction: 1.0}}
      - {name: midtrain, with: [ema], takes: [optimizer, steps], read: trained}

Each stage begins with the experiment's own configs, `with` and `set`, not with those of the stage before: `base` adds
configs, `with` interventions that act in this stage alone, `set` recipe paths and doses.  `takes` and `read` say what
it takes over (core/model/heritage.py).  A stage is a run like any other, named by its whole history: arms that differ
in a later stage alone share the runs of the earlier ones.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ablab.core.data.mixture import digest_of_data
from ablab.core.errors import UserError
from ablab.core.language.parse import near
from ablab.core.model.heritage import Wish, beginning, following
from ablab.core.recipe.doses import Menu, firsts, menu_of
from ablab.core.recipe.intervention import Treatment, resolve
from ablab.core.recipe.load import assign, recipe_from
from ablab.core.recipe.recipe import Recipe
from ablab.core.recipe.scale import inexact, scaled
from ablab.core.runtime.runtime import rows_at_once
from ablab.experiments.plan.link import Link
from ablab.experiments.plan.overrides import Overrides, dosed, of_recipe, with_open_digest
from ablab.experiments.plan.sheets import Sheet, StageSheet

Point = Mapping[str, Any]  # dotted path -> value


@dataclass(frozen=True)
class Stage:
    """A stage before its arms are known.  name: empty where an experiment has no `stages`."""

    name: str
    base: Recipe
    wish: Wish = field(default_factory=Wish)
    elsewhere: frozenset[str] = frozenset()  # interventions that act in other stages alone
    doses: Point = field(default_factory=dict)  # with.NAME.DOSE -> value, of this stage
    scale: float = 1.0  # of its tokens and steps

    def recipe(self, treatment: Treatment, point: Point = {}) -> Recipe:
        """An arm's recipe, before what it goes on from.  point: paths and doses that a search has set.

        Raises UserError where it cannot be built.
        """
        base = self.base
        here = {name: dose for name, dose in treatment.items() if name not in self.elsewhere}
        for path, value in self._own(point):
            if path.startswith("with."):
                _, name, dose = path.split(".")
                if name in here:
                    here[name] = assign(here[name], dose, value)
            else:
                base = assign(base, path, value)
        return scaled(resolve(base, here), self.scale)

    @property
    def scaled_base(self) -> Recipe:
        return scaled(self.base, self.scale)

    def _own(self, point: Point) -> Iterator[tuple[str, Any]]:
        """What is set for all stages, then for this one."""
        mine = f"stages.{self.name}."
        yield from ((path, value) for path, value in point.items() if not _of_a_stage(path))
        yield from self.doses.items()
        for path, value in point.items():
            if path.startswith(mine):
                yield path.removeprefix(mine), value


def _of_a_stage(path: str) -> bool:
    return path.startswith("stages.")


def recipes_of(
    stages: Sequence[Stage], treatment: Treatment, point: Point = {}
) -> list[Recipe]:
    """An arm's recipe in each stage.  Raises UserError where one cannot be built."""
    return [stage.recipe(treatment, point) for stage in stages]


def not_kept(stages: Sequence[Stage], treatment: Treatment) -> list[str]:
    """What the scale of an experiment cannot keep exactly, stage by stage."""
    said = []
    for stage in stages:
        whole = replace(stage, scale=1.0).recipe(treatment)
        lead = f"stage {stage.name!r}: " if stage.name else ""
        said += [f"{lead}{line}" for line in inexact(whole, stage.scale)]
    return said


@dataclass(frozen=True)
class Start:
    """Weights to begin with: their folder, the recipe they belong to, their digest.

    run: the id, where the folder is a run of the store.
    """

    folder: Path
    recipe: Recipe
    digest: str
    run: str = ""


def chained(links: Sequence[Link], seed: int, start: Start | None = None) -> list[Recipe]:
    """The recipes of a chain with their seed, each going on from the one before.

    Raises UserError where one asks for what the one before, or the start, cannot give.
    """
    chain: list[Recipe] = []
    for link in links:
        seeded = replace(link.recipe, seed=seed)
        with _blaming(link.name):
            if chain:
                seeded = following(chain[-1], seeded, link.wish)
            elif start:
                seeded = beginning(start.recipe, start.digest, seeded)
        if link.counts_averages and seeded.init and seeded.after_step:
            seeded = replace(seeded, init=replace(seeded.init, averaged=seeded.init.steps))
        chain.append(seeded)
    return chain


@contextmanager
def _blaming(stage: str) -> Iterator[None]:
    """Lead a UserError by the stage that it concerns, where it has a name."""
    try:
        yield
    except UserError as flaw:
        raise UserError(f"stage {stage!r}: {flaw}" if stage else str(flaw)) from None


# -- from a sheet ------------------------------------------------------------------------------------------------------
def whole_menu(sheet: Sheet) -> Menu:
    """The interventions of all stages, with their doses.  Raises UserError for one that stands in two places."""
    whole = menu_of(sheet.treatment)
    for stage in sheet.stages:
        own = menu_of(stage.treatment, f"stages.{stage.name}.with")
        for name, doses in own.items():
            if name in whole:
                raise UserError(
                    f"{name} stands in `with` of stage {stage.name!r} and elsewhere; list it once for all "
                    f"stages, and write set: {{with.{name}.DOSE: ...}} where a stage differs"
                )
            whole[name] = doses
    return whole


@dataclass(frozen=True)
class Reader:
    """Reads the stages of a sheet.

    beside: folder of the sheet, where configs are looked for first.
    digest_of: data name -> digest of its token folder, asked only where a config leaves it open.
    """

    sheet: Sheet
    asked: Overrides
    beside: Path
    digest_of: Callable[[str], str | None]

    def stages(self) -> list[Stage]:
        """Every stage; one without a name where the sheet has none.  Raises UserError for what cannot be built."""
        written = self.sheet.stages
        _check_names(written)
        self.asked.check_stages(written)
        whole = firsts(whole_menu(self.sheet))
        own = {one.name: set(menu_of(one.treatment)) for one in written}
        acting = frozenset().union(*own.values())
        stages = [self._stage(one, acting - own[one.name], whole) for one in written]
        return stages or [Stage("", self._base([], {}), scale=self.sheet.scale)]

    def _stage(self, written: StageSheet, elsewhere: frozenset[str], whole: Treatment) -> Stage:
        """elsewhere: interventions of other stages alone; whole: those of all."""
        edits = self.asked.of_stage(written)
        doses = {path: value for path, value in edits.items() if path.startswith("with.")}
        with _blaming(written.name):
            dosed({name: one for name, one in whole.items() if name not in elsewhere}, doses)
            return Stage(
                name=written.name,
                base=self._base(written.base, of_recipe(edits)),
                wish=Wish(written.takes, written.read),
                elsewhere=elsewhere,
                doses=doses,
                scale=self.sheet.scale,
            )

    def _base(self, configs: list[str], edits: Point) -> Recipe:
        """The recipe of a stage without interventions."""
        shared = self.asked.recipe_edits(self.sheet)
        changed = shared | with_open_digest(edits)
        base = recipe_from([*self.sheet.base, *configs], changed, beside=self.beside)
        # Here, before a worker would.
        rows_at_once(self.sheet.runtime, base.batches.largest_micro_batch)
        if base.data.digest is not None:
            return base
        digest = digest_of_data(base.data, self.digest_of)
        return replace(base, data=replace(base.data, digest=digest))


def _check_names(stages: Sequence[StageSheet]) -> None:
    names = [stage.name for stage in stages]
    for name in names:
        if not name.isidentifier():
            raise UserError(
                f"stages: {name!r} cannot name a stage; use letters, digits and _, as stable"
            )
        if names.count(name) > 1:
            raise UserError(f"stages: {name!r} stands there twice; rename one")


def stage_named(stages: Sequence[Stage], name: str) -> Stage:
    """Raises UserError for a name that none has."""
    known = [stage.name for stage in stages if stage.name]
    for stage in stages:
        if name and stage.name == name:
            return stage
    raise UserError(
        f"no stage {name!r}. {near(name, known)}Stages: {', '.join(known) or 'none'}"
    )
