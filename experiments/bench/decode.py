"""What decoding with a cache saves: `ablab bench decode`, beside running the whole row again for each token."""

import tempfile
from pathlib import Path
from typing import Any

import torch
import typer
from torch import Tensor

from ablab.core.errors import UserError
from ablab.core.model.decode import Sampling, stream
from ablab.core.model.init import initialise
from ablab.core.model.transformer import Transformer
from ablab.experiments.bench.clocks import seconds
from ablab.experiments.bench.subjects import subjects_of

GREEDY = Sampling(temperature=0.0)


def bench_decode(
    name: str, overrides: dict[str, Any], cell: str | None, prompt: int, tokens: int, rows: int
) -> dict[str, Any]:
    """Tokens/s of both ways, after one warm-up each, on random prompts; both must write the same.

    Raises UserError where prompt and tokens do not fit the context.
    """
    with tempfile.TemporaryDirectory() as root:
        (subject,) = subjects_of(name, overrides, None, cell, Path(root))
    recipe, settled = subject.recipe, subject.settled
    torch.set_num_threads(settled.threads)
    if prompt + tokens > recipe.data.context:
        raise UserError(
            f"--prompt {prompt} and --tokens {tokens} exceed the context of {recipe.data.context}; "
            f"ask for fewer, or set data.context={prompt + tokens}"
        )
    device = torch.device(settled.device)
    model = Transformer(recipe)
    initialise(model, recipe)
    model.to(device).eval()
    draw = torch.Generator().manual_seed(0)
    prompts = torch.randint(recipe.data.vocab, (rows, prompt), generator=draw).to(device)
    ways = {"cached": Cached(model, prompts, tokens), "again": Again(model, prompts, tokens)}
    rates = {}
    for way, write in ways.items():
        write(4)
        rates[way] = rows * tokens / seconds(write, device)
    same = torch.equal(ways["cached"].written, ways["again"].written)
    return {
        "what": subject.name,
        "device": settled.device,
        "rows": rows,
        "prompt": prompt,
        "tokens": tokens,
        "tokens_per_second": rates,
        "ratio": rates["cached"] / rates["again"],
        "same": same,
    }


class Cached:
    """As `ablab generate` writes."""

    def __init__(self, model: Transformer, prompts: Tensor, tokens: int):
        self.model = model
        self.prompts = prompts
        self.tokens = tokens
        self.written = prompts

    def __call__(self, tokens: int | None = None) -> None:
        count = tokens or self.tokens
        steps = list(stream(self.model, self.prompts.tolist(), count, GREEDY))
        self.written = torch.tensor(steps).T


class Again(Cached):
    """The whole row through the model for each token, and the last position read out."""

    @torch.inference_mode()
    def __call__(self, tokens: int | None = None) -> None:
        rows = self.prompts
        for _ in range(tokens or self.tokens):
            features = self.model.features(rows)[:, -1:]
            new = self.model.logits(features).argmax(-1)
            rows = torch.cat((rows, new), dim=1)
        self.written = rows[:, self.prompts.shape[1] :].cpu()


def show_decode(found: dict[str, Any]) -> None:
    rates = found["tokens_per_second"]
    typer.echo(
        f"{found['what']} on {found['device']}: {found['rows']} rows, {found['tokens']} tokens "
        f"after {found['prompt']}, greedy, fp32"
    )
    typer.echo(f"  with its cache      {rates['cached']:>10,.1f} tokens/s")
    typer.echo(f"  the row run again   {rates['again']:>10,.1f} tokens/s")
    same = "the same tokens" if found["same"] else "NOT the same tokens: near ties"
    typer.echo(f"  {found['ratio']:.1f} x; {same}")
