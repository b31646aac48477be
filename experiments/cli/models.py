"""`ablab export-hf`, `import-hf`, `generate` and `convert`: models that come, go, speak and grow."""

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ablab.core.errors import UserError
from ablab.core.store.store import Store
from ablab.experiments.cli.asked import store_of
from ablab.experiments.cli.options import Json, Plugins, Quiet, Where

convert = typer.Typer(
    no_args_is_help=True, help="Make another model of an imported one, such as a wider one."
)

Model = Annotated[
    str,
    typer.Argument(
        help="a run's id or its beginning, or a folder: a run's, or an imported one"
    ),
]
NewFolder = Annotated[
    Path, typer.Option("--out", help="the folder to write; it must not exist")
]
Tokenizer = Annotated[
    Path | None, typer.Option(help="a tokenizer.json (the model's own, or that of its data)")
]


def export_hf(
    model: Model,
    out: NewFolder,
    tokenizer: Tokenizer = None,
    plugins: Plugins = None,
    store: Where = None,
    as_json: Json = False,
) -> None:
    """Write a folder that transformers loads: native classes where they compute the model, else its code beside it."""
    from ablab.ablations.registry import discover
    from ablab.core.interop.card import card
    from ablab.core.interop.exporting import export
    from ablab.core.interop.folder import found, refuse_existing, tokenizer_of
    from ablab.core.interop.weights import load

    discover(plugins or ())
    where = store_of(store)
    folder = found(model, where)
    refuse_existing(out)
    weights = load(folder)
    chosen = tokenizer or tokenizer_of(folder, weights.recipe, where)
    verdicts = verdicts_of(where, folder.name)
    page = card(folder, weights.recipe, weights.source, verdicts)
    written = export(weights, out, chosen, page)
    if as_json:
        return typer.echo(json.dumps({"folder": str(out), **asdict(written)}))
    typer.echo(f"{out}: {written.architecture}")
    for note in written.notes:
        typer.echo(f"  {note}")


def verdicts_of(store: Store, run: str) -> Iterator[str]:
    """Lines of the reports that stand in the store, of experiments that hold the run."""
    for name in store.experiments():
        report = store.root / "reports" / name / "report.md"
        try:
            rows = store.read_plan(name).rows
            text = report.read_text()
        except (OSError, UserError):
            continue
        for cell in dict.fromkeys(row.cell for row in rows if row.run == run):
            yield f"- `{cell}` of {name}:"
            yield from _said_of(cell, text)


def _said_of(cell: str, report: str) -> Iterator[str]:
    """Its own verdict; of the reference, those of all others."""
    _, _, after = report.partition("## Verdicts\n")
    section, _, _ = after.partition("\n## ")
    cells = [
        [part.strip() for part in line.strip("|").split("|")]
        for line in section.splitlines()
        if line.startswith("| `")
    ]
    own = [words for words in cells if words[0] == f"`{cell}`"]
    for words in own or cells:
        yield f"  - {words[1]}"


def import_hf(
    model: Annotated[
        Path,
        typer.Argument(help="a folder with config.json and safetensors, or an IMU-1 .pt file"),
    ],
    out: NewFolder,
    context: Annotated[
        int | None,
        typer.Option(min=2, help="tokens that it shall be good for (all it was made for)"),
    ] = None,
    qk_scale: Annotated[
        float | None,
        typer.Option(
            help="of an IMU-1 model: the factor on its QK-norm's scores besides 1/sqrt(head_dim) (1)"
        ),
    ] = None,
    plugins: Plugins = None,
) -> None:
    """Llama, SmolLM2, Qwen3 and IMU-1 models as weights folders; what cannot be held is refused by name."""
    from ablab.ablations.registry import discover
    from ablab.core.interop.importing import import_from
    from ablab.core.model.cost import cost_of

    discover(plugins or ())
    read = import_from(model, out, context, qk_scale)
    shape = read.recipe.model
    parameters = cost_of(read.recipe).parameters
    typer.echo(
        f"{out}: {read.source.form}, {parameters:,} parameters, width {shape.width}, "
        f"{shape.layers} layers, {shape.heads} heads, context {read.recipe.data.context:,}"
    )
    for line in read.source.done:
        typer.echo(f"  {line}")


def generate(
    model: Model,
    prompt: Annotated[
        list[str] | None, typer.Option(help="what to go on from; repeat for a batch")
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="after each prompt")] = 100,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="0: always the likeliest token")
    ] = 0.8,
    top_k: Annotated[
        int | None, typer.Option(min=1, help="only among the likeliest so many")
    ] = None,
    top_p: Annotated[
        float,
        typer.Option(min=0.0, max=1.0, help="only among those with this share of probability"),
    ] = 1.0,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    stop: Annotated[bool, typer.Option(help="at the end of the text")] = True,
    device: Annotated[Literal["auto", "cpu", "cuda"], typer.Option()] = "auto",
    dtype: Annotated[Literal["fp32", "bf16"], typer.Option(help="of the activations")] = "fp32",
    tokenizer: Tokenizer = None,
    plugins: Plugins = None,
    store: Where = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Go on from a prompt, as the tokens come; from several at once, each when it is over."""
    from ablab.ablations.registry import discover
    from ablab.core.interop.folder import found
    from ablab.core.interop.speaking import Speaker
    from ablab.core.model.decode import Sampling

    discover(plugins or ())
    where = store_of(store)
    speaker = Speaker.of(found(model, where), where, tokenizer, device, dtype)
    prompts = prompt or [""]
    sampling = Sampling(temperature, top_k, top_p)
    spoken = speaker.texts(prompts, max_tokens, sampling, seed, stop)
    alone = len(prompts) == 1 and not as_json
    if alone:
        typer.echo(prompts[0], nl=False)
    for row, piece in spoken:
        if alone:
            typer.echo(piece, nl=False)
            sys.stdout.flush()
        elif piece is None and not as_json:
            typer.echo(f"--- {row + 1}\n{prompts[row]}{spoken.said[row]}")
    if alone:
        typer.echo("")
    if as_json:
        return typer.echo(json.dumps(spoken.told(prompts), indent=1))
    if not quiet:
        typer.echo(spoken.pace(), err=True)


@convert.command()
def smollm2(
    model: Annotated[
        Path, typer.Argument(help="a Llama-shaped model's folder, such as SmolLM2's")
    ],
    out: NewFolder,
    width: Annotated[int, typer.Option(min=1, help="channels of the stream")],
    n_heads: Annotated[int | None, typer.Option(min=1, help="(as many as it has)")] = None,
    n_kv_heads: Annotated[
        int | None, typer.Option(min=1, help="(so that each serves as many heads as it did)")
    ] = None,
    d_ff: Annotated[
        int | None, typer.Option(min=1, help="feed-forward units (grow with the width)")
    ] = None,
    mode: Annotated[
        Literal["preserve", "preserve-norm", "noise"],
        typer.Option(help="new regions zero; initial, with norms kept; or initial alone"),
    ] = "preserve-norm",
    ffn_expand: Annotated[
        Literal["copy", "net2wider"], typer.Option(help="net2wider repeats units")
    ] = "copy",
    attn_expand: Annotated[
        Literal["copy", "net2wider"], typer.Option(help="net2wider repeats heads")
    ] = "copy",
    noise: Annotated[
        float,
        typer.Option(min=0.0, help="tells repeated units apart; in standard deviations"),
    ] = 0.0,
    initial: Annotated[
        float, typer.Option(min=0.0, help="factor on the initial values of new regions")
    ] = 1.0,
    untied: Annotated[
        bool, typer.Option("--untied", help="give the readout a matrix of its own")
    ] = False,
    with_: Annotated[
        list[str] | None,
        typer.Option("--with", help="an intervention of the new model, as in a sheet; repeat"),
    ] = None,
    context: Annotated[
        int | None, typer.Option(min=2, help="tokens that it shall be good for")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="of initial values and noise")] = 0,
    plugins: Plugins = None,
) -> None:
    """Widen a Llama-shaped model into a weights folder to start from, and say how far its function moved."""
    from dataclasses import replace

    from ablab.ablations.registry import discover
    from ablab.core.interop.folder import refuse_existing
    from ablab.core.interop.importing import leave, read
    from ablab.core.interop.widening import Widening, apart, widened, widened_recipe

    discover(plugins or ())
    refuse_existing(out)
    source = read(model, out.name, context)
    if source.source.form != "llama":
        raise UserError(f"{model} is {source.source.form}; only Llama shapes can be widened")
    asked = Widening(
        width=width,
        heads=n_heads,
        kv_heads=n_kv_heads,
        hidden=d_ff,
        mode=mode,
        heads_by=attn_expand,
        hidden_by=ffn_expand,
        noise=noise,
        initial=initial,
        tied=False if untied else None,
        seed=seed,
    )
    recipe = widened_recipe(source.recipe, asked, [_intervention(word) for word in with_ or ()])
    tensors = widened(source.tensors, source.recipe, recipe, asked)
    moved = apart(source.recipe, source.tensors, recipe, tensors)
    said = f"widened from {source.recipe.model.width} to {width}, mode {mode}"
    kept = f"logits on random tokens differ by {moved:.1e} of their scale"
    done = [*source.source.done, said, kept]
    wide = replace(source.source, dtype="float32", dtypes={}, done=done)
    leave(replace(source, recipe=recipe, tensors=tensors, source=wide), model, out)
    shape = recipe.model
    typer.echo(f"{out}: width {shape.width}, {shape.heads} heads on {shape.kv_heads}, {said}")
    verdict = "the function is preserved" if moved <= 1e-4 else "the function is NOT preserved"
    typer.echo(f"  {verdict}: {kept}")


def _intervention(word: str) -> str | dict[str, Any]:
    """`gating`, or `{gating: {per: head}}`, as a sheet's `with` lists them."""
    from ablab.core.language.written import Unreadable, read

    try:
        return read(word)
    except Unreadable as flaw:
        raise UserError(f"--with {word!r:.80} is not YAML: {flaw}") from None
