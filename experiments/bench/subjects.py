"""Who is timed by `ablab bench step` and `ablab bench peers`: cells of an experiment, the same otherwise, and peers."""

from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from ablab.core.errors import UserError
from ablab.core.language.parse import near
from ablab.core.model.cost import cost_of
from ablab.core.recipe.intervention import resolve, treatment_of
from ablab.core.recipe.load import overrides_from
from ablab.core.recipe.recipe import Budget, Recipe
from ablab.core.runtime.runtime import Runtime, Settled, settle
from ablab.core.train.trainer import Trainer
from ablab.experiments.bench.phases import Marks
from ablab.experiments.bench.random_tokens import NAME, experiment_on_random_tokens

HF = "hf"
FP8 = "with.fp8."  # before a dose of it
LEAST_STEPS = 10_000  # of the budget: a schedule that does not end while we look
SHOWN = (  # of the runtime
    "dtype",
    "compile",
    "replay",
    "micro_batch",
    "recompute",
    "deterministic",
    "threads",
    "kernels",
)


class Stepper(Protocol):
    """What can be timed."""

    about: str  # how it trains, for the table

    @property
    def flops_per_token(self) -> int:
        """Forward and backward."""

    def step(self) -> None:
        """One optimizer step."""

    def peak_memory(self) -> int:
        """Bytes on the GPU."""

    def show_phases(self) -> None:
        """From here on each kernel is launched by its phase."""


class Ours:
    """The trainer's own `advance`; the marks stand around its calls, not in it."""

    def __init__(self, recipe: Recipe, runtime: Runtime, folder: Path, marks: Marks) -> None:
        self.trainer = Trainer(recipe, runtime, folder)
        self.marks = marks
        marks.around(self.trainer.training_step, "loss", "forward", "backward")
        marks.around(self.trainer.tokens, "rows", "data", "data")
        marks.around(self.trainer.optimizer, "step", "optimizer", "optimizer")
        self.flops_per_token = cost_of(recipe).flops_per_token
        settings = asdict(self.trainer.runtime).items()
        self.about = ", ".join(f"{name}={value}" for name, value in settings if name in SHOWN)

    def step(self) -> None:
        self.marks("data")
        self.trainer.advance()

    def peak_memory(self) -> int:
        return self.trainer.peak_memory()

    def show_phases(self) -> None:
        """Without replays: the kernels are the same, but launched one by one."""
        for one in self.trainer.training_step.replayed:
            one.stop_replaying()


def _llama(recipe: Recipe, runtime: Runtime, folder: Path, marks: Marks) -> Stepper:
    from ablab.experiments.bench.hugging_face import HuggingFace

    return HuggingFace(
        recipe, settle(runtime, recipe.batches.largest_micro_batch), folder, marks
    )


def _nanochat(
    recipe: Recipe, runtime: Runtime, folder: Path, marks: Marks, checkout: Path
) -> Stepper:
    from ablab.experiments.bench.nanochat import Nanochat

    settled = settle(runtime, recipe.batches.largest_micro_batch)
    return Nanochat(recipe, settled, folder, marks, checkout)


@dataclass(frozen=True)
class Subject:
    """What is timed, and `make`, which builds it; runtime: as asked, not settled."""

    name: str
    recipe: Recipe
    runtime: Runtime
    folder: Path  # of tokens
    make: Callable[[Recipe, Runtime, Path, Marks], Stepper]

    @property
    def settled(self) -> Settled:
        return settle(self.runtime, self.recipe.batches.largest_micro_batch)

    def build(self, marks: Marks) -> Stepper:
        return self.make(self.recipe, self.runtime, self.folder, marks)


def subjects_of(
    name: str,
    overrides: dict[str, Any],
    against: str | None,
    cell: str | None,
    root: Path,
) -> list[Subject]:
    """The first, and what it is timed against: `hf`, path=value, or another cell.  Raises UserError."""
    first = _cell(name, overrides, cell, root)
    if against is None:
        return [first]
    if against == HF:
        return [first, llama_like(first)]
    if "=" in against:
        changed = overrides | overrides_from([against])
        second = _cell(name, changed, cell, root / "against")
        return [first, replace(second, name=f"{first.name}, {against}")]
    return [first, _cell(name, overrides, against, root, others=[HF, "path=value"])]


def ablab_and_peers(
    name: str, overrides: dict[str, Any], nanochat: Path | None, root: Path
) -> list[Subject]:
    """ablab's full cell, the same with `fp8`, and the peers of its shape.  Raises UserError.

    nanochat: the folder of a checkout; None: it takes no part.  Paths `with.fp8.DOSE` are of the second subject alone.
    """
    doses = {path: value for path, value in overrides.items() if path.startswith(FP8)}
    shared = {path: value for path, value in overrides.items() if path not in doses}
    full = _cell(name, shared, None, root)
    dose = {path.removeprefix(FP8): value for path, value in doses.items()}
    fp8 = resolve(full.recipe, treatment_of([{"fp8": dose}]))
    ours = [replace(full, name="ablab"), replace(full, name="ablab + fp8", recipe=fp8)]
    peers = [llama_like(full)]
    if nanochat:
        from ablab.experiments.bench.nanochat import check

        check(nanochat, full.recipe)
        make = partial(_nanochat, checkout=nanochat)
        peers.append(replace(full, name="nanochat", make=make))
    return [*ours, *peers]


def llama_like(subject: Subject) -> Subject:
    """Hugging Face's Llama of its shape."""
    return replace(subject, name="Hugging Face Llama", make=_llama)


def _cell(
    name: str,
    overrides: dict[str, Any],
    cell: str | None,
    root: Path,
    others: Iterable[str] = (),
) -> Subject:
    """The cell asked for, else `full`, else the first.  others: what else may be asked for, to name in an error."""
    experiment = experiment_on_random_tokens(name, overrides, root)
    recipes = experiment.recipes
    if cell is None:
        cell = "full" if "full" in recipes else next(iter(recipes))
    if cell not in recipes:
        known = [*recipes, *others]
        raise UserError(f"no cell {cell!r}. {near(cell, known)}Cells: {', '.join(known)}")
    recipe = recipes[cell]
    tokens = max(recipe.steps, LEAST_STEPS) * recipe.tokens_per_step
    return Subject(
        name=f"{experiment.name.split('@')[0]}, {cell}",
        recipe=replace(recipe, budget=Budget(tokens)),
        runtime=experiment.sheet.runtime,
        folder=root / "data" / NAME,
        make=Ours,
    )
