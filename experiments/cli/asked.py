"""From words on the command line to what they name: a store, an experiment and its runs, a cell, seeds."""

import re
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

from ablab.core.errors import UserError
from ablab.core.store.store import Store, store_root

if TYPE_CHECKING:
    from ablab.experiments.plan.experiment import Experiment, PlannedRun
    from ablab.experiments.plan.stages import Start

MOST_NUMBERS = 1000  # that one option may name: cells times seeds are planned at once


def store_of(flag: Path | None) -> Store:
    return Store(store_root(str(flag) if flag else None).absolute())


def folders_of(plugins: list[Path] | None) -> list[str]:
    """Plugin folders as a worker can find them, wherever it runs."""
    return [str(folder.absolute()) for folder in plugins or ()]


def prepare(
    name: str,
    overrides: list[str] | None,
    plugins: list[Path] | None,
    store: Store,
    seeds: str | None = None,
    scale: str | None = None,
) -> "tuple[Experiment, list[PlannedRun]]":
    """Load an experiment and its runs.  The data digest is read from the store where the config leaves it open."""
    from ablab.ablations.registry import discover
    from ablab.core.recipe.load import overrides_from
    from ablab.experiments.plan.experiment import load

    discover(plugins or ())
    _refuse_name_of_a_plan(name, store)
    asked = overrides_from(overrides or [])
    if scale is not None:
        asked["scale"] = share_of(scale)
    experiment = load(
        name, asked, lambda data: _digest(store, data), lambda init: _start(store, init)
    )
    return experiment, experiment.runs(seeds_of(seeds))


def experiments_of(name: str, words: list[str]) -> list[tuple[str, list[str]]]:
    """Experiments with their overrides: a word that is no override names another experiment.

    An experiment's own name may end in overrides, as NAME@path=value.
    """
    found: list[tuple[str, list[str]]] = [(name, [])]
    for word in words:
        path, is_override, _ = word.partition("=")
        if is_override and "@" not in path:
            found[-1][1].append(word)
        else:
            found.append((word, []))
    return found


def _refuse_name_of_a_plan(name: str, store: Store) -> None:
    """Raises UserError for a name that only the store knows, with what was typed for it."""
    from ablab.core.store.planned import command
    from ablab.experiments.plan.sheets import catalog

    if name.endswith((".yaml", ".yml")) or name in catalog() or name not in store.experiments():
        return
    plan = store.read_plan(name)
    again = command(name, "run", plan.sheet, plan.asked)
    raise UserError(
        f"{name!r} is the name of a plan in {store.root}; it was asked for as: {again}"
    )


def held_name(
    store: Store, name: str, overrides: list[str] | None, plugins: list[Path] | None
) -> str:
    """The name under which the store holds an experiment, or would: that of its sheet and overrides.

    UserError for a name that neither the store nor the catalog knows, and for a sheet whose name is another's.
    """
    from ablab.core.language.parse import near
    from ablab.experiments.plan.sheets import catalog

    held: list[str] = []
    for one in store.experiments():
        held += [one.removesuffix("@study"), one]
    held = list(dict.fromkeys(held))
    known = [*held, *catalog()]
    if not name.endswith((".yaml", ".yml")) and name not in known:
        raise UserError(
            f"no experiment {name!r} in {store.root} (--store or $ABLAB_STORE names another). "
            f"{near(name, known)}It holds: {', '.join(held) or 'none'}"
        )
    if overrides or name not in held:
        experiment, _ = prepare(name, overrides, plugins, store)
        name = experiment.name
        store.check_owner(name, experiment.origin, experiment.asked)
    return name


def _start(store: Store, init: str) -> "Start":
    """What `init` names: a run of the store that kept its weights, or a weights folder.  Raises UserError."""
    from safetensors import SafetensorError, safe_open

    from ablab.core.interop.folder import WEIGHTS, found, recipe_of
    from ablab.experiments.plan.stages import Start

    folder = found(init, store)
    try:
        with safe_open(folder / WEIGHTS, "np") as file:
            told = file.metadata() or {}
    except (OSError, SafetensorError) as flaw:
        raise UserError(f"init={init}: cannot read its weights ({flaw!s:.80})") from None
    if "digest" not in told:
        raise UserError(
            f"init={init}: {folder / WEIGHTS} does not say its digest; write it again"
        )
    folder = folder.absolute()
    is_run = folder.parent == store.root / "runs"
    return Start(folder, recipe_of(folder), told["digest"], folder.name if is_run else "")


def _digest(store: Store, data: str) -> str | None:
    """None while the tokens are not there: a recipe can be shown before its data exists, but not run."""
    from ablab.core.data.corpus import load_meta

    folder = store.root / "data" / data
    return load_meta(folder).digest if folder.exists() else None


def seeds_of(text: str | None) -> list[int] | None:
    """`0-4`, or `0,3,7`, or both."""
    if text is None:
        return None
    return whole_numbers(text, "--seeds", "0-4 or 0,3,7")


def share_of(text: str) -> float:
    """`1/1000` or `0.001`.  Raises UserError."""
    try:
        share = float(Fraction(text.strip()))
    except (ValueError, ZeroDivisionError):
        raise UserError(f"--scale {text!r:.80} must look like 1/1000 or 0.001") from None
    if not 0 < share <= 1:
        raise UserError(f"--scale {text!r:.80} must be above 0 and at most 1, as 1/1000")
    return share


def whole_numbers(text: str, flag: str, example: str) -> list[int]:
    """`0-4`, or `0,3,7`, or both; decimal, whatever zeros stand before.  Raises UserError."""
    numbers: list[int] = []
    for part in text.split(","):
        ends = re.fullmatch(r"\s*([0-9]{1,18})(?:-([0-9]{1,18}))?\s*", part)
        first, last = (int(ends[1]), int(ends[2] or ends[1])) if ends else (0, -1)
        if first > last:
            raise UserError(f"{flag} {text!r:.80} must look like {example}")
        if last - first + len(numbers) >= MOST_NUMBERS:
            raise UserError(
                f"{flag} {text!r:.80} names more than {MOST_NUMBERS:,} numbers; ask for fewer at once"
            )
        numbers += range(first, last + 1)
    return numbers


def run_of(runs: "list[PlannedRun]", cell: str) -> "PlannedRun":
    """The first run of a cell."""
    from ablab.core.language.parse import near

    for run in runs:
        if run.cell == cell:
            return run
    cells = list(dict.fromkeys(run.cell for run in runs))
    raise UserError(f"no cell {cell!r}. {near(cell, cells)}Cells: {', '.join(cells)}")
