"""`ablab check`: does the machine keep its promises here?

`coords`: do activations move as far at every width under muP?
`stats`:  do intervals cover and verdicts err as often as they say?
"""

import math
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ablab.core.errors import UserError
from ablab.experiments.cli.asked import whole_numbers
from ablab.experiments.cli.options import Json, Plugins

if TYPE_CHECKING:
    from ablab.core.recipe.recipe import Recipe

app = typer.Typer(
    no_args_is_help=True,
    help="Checks of the machine itself, cheap enough to run before a grid.",
)

BASE = ["base", "size/tiny"]
SMALL = {  # one batch of 512 tokens; the feed-forward is 8/3 widths to within 3 % at every width
    "data.name": "random",
    "data.vocab": 256,
    "model.layers": 2,
    "model.ffn.multiple": 16,
}
# Below, muP's logits are not flat either (-0.38 at widths 16-64, base 4; -0.07 at 64-512, base 16): too few directions.
SMALLEST_TELLING = 64  # channels
STANDARD = "standard"  # the control: where it passes, the check cannot fail and shows nothing
ARMS = {"mup": "mup"}
# Zero readouts: Muon's features move so far that a random one shows its own m^-1/2 (ablations/checks/coords.py).
# Matrices at 10 lr: at the 3.36 of IMU-1 the embedding still moves the most, and an rms rate wrong by m^-1/2 passed
# (-0.08; at 10 -0.31).
MORE = {
    "mup, zero readout": "{mup: {readout: zero}}",
    "mup, spectral muon": "{mup: {readout: zero}}, {muon: {scale: spectral, lr: 10}}",
    "mup, keller muon": "{mup: {readout: zero}}, {muon: {scale: keller, lr: 10}}",
    "mup, rms muon": "{mup: {readout: zero}}, {muon: {scale: rms, lr: 10}}",
}

Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        help="path=value of the small recipe, such as 'model.attention.on_qk=\\[qk_norm]'"
    ),
]
With = Annotated[
    list[str] | None,
    typer.Option(
        "--with",
        help="an arm, such as 'qk_norm, mup, {muon: {scale: rms}}'; repeat for more (mup)",
    ),
]


@app.callback()
def _group() -> None:
    """Checks of the machine itself, cheap enough to run before a grid."""


@app.command()
def coords(
    overrides: Overrides = None,
    widths: Annotated[str, typer.Option(help="four or more, in channels")] = "64,128,256,512",
    seeds: Annotated[str, typer.Option(help="three or more")] = "0-2",
    steps: Annotated[int, typer.Option(help="optimizer steps, five or more")] = 6,
    lr: Annotated[
        float, typer.Option(help="learning rate of every step, deliberately high")
    ] = 0.02,
    with_: With = None,
    every: Annotated[
        bool,
        typer.Option("--all", help="also muP with a zero readout, under AdamW and each Muon"),
    ] = False,
    base_width: Annotated[
        int | None, typer.Option(min=1, help="of muP (a quarter of the smallest width)")
    ] = None,
    plugins: Plugins = None,
    out: Annotated[
        Path | None, typer.Option(help="a folder for coords.png and coords.json")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "cpu",
    as_json: Json = False,
) -> None:
    """Coordinate check: how far a few steps move each activation, at several widths.

    Exit code 0: every muP arm is flat and the standard parametrization is not; 1: not so, and a line says which tensor.
    """
    from ablab.experiments.cli.printing import show_coords

    if not 0 < lr < math.inf:
        raise UserError(f"--lr {lr:g} must be a number above 0; try 0.02")
    setting = Setting(
        whole_numbers(widths, "--widths", "64,128,256"),
        whole_numbers(seeds, "--seeds", "0-2"),
        steps,
        lr,
    )
    base_width = base_width or max(min(setting.widths) // 4, 1)
    texts = {text: text for text in with_} if with_ else ARMS
    if every:
        texts = texts | MORE
    recipes = _recipes(texts, base_width, overrides, plugins)
    found = _measure(recipes, setting, device) | {"base_width": base_width}
    show_coords(found, out, as_json)
    if flaw := _flaw(found):
        typer.echo(flaw, err=True)
        raise typer.Exit(1)


@dataclass(frozen=True)
class Setting:
    """What every arm is put through."""

    widths: list[int]  # channels
    seeds: list[int]
    steps: int
    lr: float


def _recipes(
    texts: dict[str, str],
    base_width: int,
    overrides: list[str] | None,
    plugins: list[Path] | None,
) -> "dict[str, Recipe]":
    """Arm -> recipe, the control first.  `base_width` holds for each mup whose dose names none."""
    from ablab.ablations.registry import discover
    from ablab.core.recipe.intervention import resolve, treatment_of
    from ablab.core.recipe.load import overrides_from, recipe_from

    discover(plugins or ())
    base = recipe_from(BASE, SMALL | overrides_from(overrides or []))
    recipes = {STANDARD: base}
    for name, text in texts.items():
        doses = [_with_base_width(item, base_width) for item in _listed(text)]
        recipes[name] = resolve(base, treatment_of(doses, "--with"))
    return recipes


def _listed(text: str) -> list[Any]:
    from ablab.core.language.written import Unreadable, read

    try:
        return list(read(f"[{text}]"))
    except (Unreadable, TypeError):
        raise UserError(
            f"--with {text!r:.120} must list interventions as an experiment does, "
            "such as 'mup, {muon: {scale: rms}}'"
        ) from None


def _with_base_width(item: Any, base_width: int) -> Any:
    """An intervention as `with` lists it; the dose of mup spelled out."""
    doses = {item: None} if isinstance(item, str) else item
    given = doses.get("mup", False) if isinstance(doses, dict) else False
    if given is None or isinstance(given, dict):
        return doses | {"mup": {"base_width": base_width} | (given or {})}
    return item


def _measure(recipes: "dict[str, Recipe]", setting: Setting, device: str) -> dict[str, Any]:
    """All arms as plain data, in the form that analysis/pictures/coords.py reads."""
    import torch

    from ablab.ablations.checks import coords as check
    from ablab.core.language.parse import parse
    from ablab.core.runtime.runtime import Runtime, settle

    runtime = parse(Runtime, {"device": device}, "")
    torch.set_num_threads(runtime.threads)
    where = settle(runtime, rows=1).device
    runs = len(setting.widths) * len(setting.seeds)
    arms = []
    for name, recipe in recipes.items():
        began = perf_counter()
        rows = check.coordinates(recipe, **asdict(setting), device=where)
        slopes = check.slopes(rows)
        seconds = round(perf_counter() - began, 1)
        arm = {
            "name": name,
            "control": name == STANDARD,
            "parametrization": recipe.parametrization.kind,
            "failing": check.failing(slopes),
            "slopes": {tensor: _finite(slope) for tensor, slope in slopes.items()},
            "seconds": seconds,
            "rows": [_plain(row) for row in rows],
        }
        arms.append(arm)
        typer.echo(f"{name}: {runs} runs of {setting.steps} steps in {seconds} s", err=True)
    return asdict(setting) | {
        "flat": check.FLAT,
        "judged": list(check.CHANGES),
        "reported": [check.START, check.PEAK],
        "arms": arms,
    }


def _plain(row: Any) -> dict[str, Any]:
    """row: ablations/checks/coords.py's."""
    return {
        "width": row.width,
        "seed": row.seed,
        "step": row.step,
        "tensor": row.tensor,
        "change": _finite(row.change),
    }


def _finite(value: float) -> float | None:
    """JSON knows no nan."""
    return float(f"{value:.6g}") if math.isfinite(value) else None


def _doubt(found: dict[str, Any]) -> str:
    """Why a failure need not mean that muP is broken: the widths are ones for which it promises nothing."""
    smallest, base = min(found["widths"]), found["base_width"]
    if smallest < base:
        why = f"width {smallest} is below the base width {base}"
        cure = f"give --base-width {smallest} or less, or wider --widths"
    elif smallest < SMALLEST_TELLING:
        why = f"width {smallest} is below {SMALLEST_TELLING}"
        cure = "try --widths 64,128,256,512"
    else:
        return ""
    return f"; that need not be muP's fault: {why}, where its rule does not show yet; {cure}"


def _flaw(found: dict[str, Any]) -> str | None:
    """What keeps the check from passing, on one line."""
    flat = f"{found['flat']:g}"
    for arm in found["arms"]:
        if arm["parametrization"] == "mup" and arm["failing"]:
            worst = arm["failing"][0]
            slope = arm["slopes"][worst]
            said = "has no finite slope"
            if slope is not None:
                said = f"changes as width^{slope:+.2f}, beyond {flat} either way"
            return f"arm {arm['name']!r} fails: {worst} {said}{_doubt(found)}"
        if arm["control"] and not arm["failing"]:
            return (
                "the standard parametrization passes, so the check shows nothing: "
                f"every change is within {flat}; raise --lr or widen --widths"
            )
    return None


@app.command()
def stats(
    experiments: Annotated[
        int, typer.Option(min=100, max=1_000_000, help="simulated, of each scenario")
    ] = 10_000,
    seed: Annotated[int, typer.Option(min=0, help="of the simulation")] = 0,
    as_json: Json = False,
) -> None:
    """Coverage, family-wise error and power of the verdicts over simulated experiments, beside their targets.

    Exit code 0: every target is met; 1: one is missed by more than three standard errors of the simulation.
    """
    from ablab.analysis.effects.simulation import figures
    from ablab.experiments.cli.printing import show_figures

    found = list(figures(experiments, seed))
    show_figures(found, experiments, as_json)
    if missed := [figure for figure in found if figure.missed]:
        first = missed[0]
        typer.echo(
            f"{len(missed)} of {len(found)} targets missed, first: {first.scenario} at {first.seeds} seeds: "
            f"{first.what} {first.share:.2f} %, not {first.target}",
            err=True,
        )
        raise typer.Exit(1)
