"""What the benchmarks train on: any experiment or size, on random tokens of its vocabulary, so no text is needed."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from ablab.core.data.contents import digest_of
from ablab.core.data.corpus import Meta
from ablab.core.errors import UserError
from ablab.core.language.parse import near
from ablab.core.recipe.load import CONFIGS
from ablab.core.recipe.recipe import Data
from ablab.experiments.plan.experiment import Experiment, load
from ablab.experiments.plan.sheets import catalog

NAME = "random"
TRAIN = 4_000_000  # tokens, or 20 steps if that is more; epochs differ in order
OWN = ("data.name", "data.digest")  # recipe paths that no override may choose


def experiment_on_random_tokens(
    name: str,
    overrides: Mapping[str, Any],
    root: Path,
) -> Experiment:
    """The experiment, or the size alone as one cell `base`, with its token folder filled at root/data/random.

    Raises UserError for a name that is neither, and for overrides that do not fit.
    """
    for path in OWN:
        if path in overrides:
            raise UserError(
                f"{path} cannot be chosen here: benchmarks train on random tokens; drop it"
            )
    is_experiment = name in catalog() or name.endswith((".yaml", ".yml"))
    sheet = name if is_experiment else str(_sized(name, root))
    paths = {**overrides, "data.name": NAME}
    asked = load(sheet, paths, lambda data: None).base.data
    digest = fill(root / "data" / NAME, asked)
    return load(sheet, paths, lambda data: digest)


def _sized(name: str, root: Path) -> Path:
    """An experiment file with nothing but a size from configs/size."""
    sizes = [f"size/{path.stem}" for path in sorted((CONFIGS / "size").glob("*.yaml"))]
    size = name if name in sizes else f"size/{name}"
    if size not in sizes:
        known = [*catalog(), *sizes]
        listed = ", ".join(known)
        raise UserError(
            f"unknown experiment or size {name!r}. {near(name, known)}"
            f"Known: {listed}; or give a path to a .yaml file"
        )
    sheet = {
        "question": "How fast is this size?",
        "base": ["base", size],
        "design": "add_one",
        "set": {"data.name": NAME},
    }
    root.mkdir(parents=True, exist_ok=True)
    path = root / f"{size.removeprefix('size/')}.yaml"
    path.write_text(json.dumps(sheet))  # JSON is YAML
    return path


def fill(folder: Path, data: Data) -> str:
    """Write a token folder of uniformly random ids below data.vocab, as core/data/corpus.py lays one out.

    Returns its digest.
    """
    import numpy

    dtype: Literal["uint16", "uint32"] = "uint16" if data.vocab <= 1 << 16 else "uint32"
    train = max(TRAIN, 20 * data.batch * data.context)
    val = data.held_out + 1
    folder.mkdir(parents=True, exist_ok=True)
    draw = numpy.random.default_rng(0)
    for side, size in {"train": train, "val": val}.items():
        draw.integers(data.vocab, size=size, dtype=dtype).tofile(folder / f"{side}.bin")
    numpy.save(folder / "token_bytes.npy", numpy.ones(data.vocab, "int32"))
    digest = digest_of(folder, dtype)
    meta = Meta(
        schema=1,
        name=NAME,
        vocab=data.vocab,
        dtype=dtype,
        end_of_text=0,
        train_tokens=train,
        val_tokens=val,
        train_bytes=train,
        val_bytes=val,
        digest=digest,
    )
    (folder / "meta.json").write_text(json.dumps(asdict(meta)))
    return digest
