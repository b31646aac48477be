"""Whom an evaluation asks: a run, a weights folder, or any causal model that transformers loads."""

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ablab.core.errors import UserError
from ablab.core.interop.folder import RECIPE, WEIGHTS, found
from ablab.core.store.evaluation import FOLDER
from ablab.core.store.store import Store

if TYPE_CHECKING:
    from ablab.core.interop.score import Scorer

Device = str  # cpu, cuda:0, ...
Kind = Literal["ablab", "transformers"]
EXPORT = "config.json"


@dataclass(frozen=True)
class How:
    """How a model is executed; recorded with what it says."""

    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    dtype: str = "auto"  # fp32, bf16; auto: bf16 on a GPU
    batch: int = 16  # rows at once
    trust_remote_code: bool = False
    plugins: tuple[str, ...] = ()

    def settled_dtype(self, device: Device) -> str:
        if self.dtype != "auto":
            return self.dtype
        return "bf16" if device.startswith("cuda") else "fp32"


@dataclass(frozen=True)
class Subject:
    """Plain data: every process builds the model for itself.

    name: as a person calls it.  kind: whose weights.  model: a folder, or a name of the hub.
    folder: where its evaluations stand.  weights: their digest.
    """

    name: str
    kind: Kind
    model: str
    folder: Path
    weights: str
    store: Path
    run: str = ""  # of a run of the store

    def anywhere(self) -> "Subject":
        """With its folders as every machine names them."""
        model = str(Path(self.model).absolute()) if Path(self.model).is_dir() else self.model
        return replace(self, model=model, folder=self.folder.absolute())

    def check(self) -> None:
        """On another machine.  Raises UserError where the folder is not there, or holds other weights."""
        model = Path(self.model)
        if not model.is_absolute():  # a name of the hub, with the commit that we would get too
            return
        try:
            found = _weights_in(model, self.kind)
        except OSError as flaw:
            raise UserError(
                f"{model}: {flaw.strerror}; name a folder that every machine sees"
            ) from None
        if found != self.weights:
            raise UserError(
                f"{model} holds other weights ({found}) than where they were asked for ({self.weights}); "
                "name a folder that every machine sees"
            )

    def scorer(self, how: How, device: Device) -> "Scorer":
        """Raises UserError: damaged weights, no tokenizer, a class that transformers does not know."""
        from ablab.core.interop.score import AblabScorer, TransformersScorer

        dtype = how.settled_dtype(device)
        if self.kind == "ablab":
            from ablab.ablations.registry import discover

            discover(how.plugins)
            store = Store(self.store)
            return AblabScorer.of(Path(self.model), store, device, dtype, how.batch)
        asked = {"fp32": "float32", "bf16": "bfloat16"}[dtype]
        return TransformersScorer.of(
            self.model, device, asked, how.trust_remote_code, how.batch
        )


def subject_of(name: str, store: Store, trust_remote_code: bool = False) -> Subject:
    """What a person names: a folder, a run's id or its beginning, or OWNER/NAME of the hub.

    Raises UserError: nothing of that name, a folder that lacks files, a run without weights.
    """
    path = Path(name)
    if path.is_dir() and not (path / WEIGHTS).is_file():
        exported = (path / EXPORT).is_file()  # with the recipe that it came from
        if exported or not (path / RECIPE).is_file():
            return _of_transformers(path, store)
    if not path.is_dir() and name.count("/") == 1 and not name.startswith((".", "/")):
        return _of_the_hub(name, store, trust_remote_code)
    return of_weights(found(name, store), store)


def of_weights(folder: Path, store: Store) -> Subject:
    """A weights folder; that of a run of the store is its run."""
    weights = digest_in(folder / WEIGHTS)
    own = folder.resolve().parent == (store.root / "runs").resolve()
    return Subject(
        name=folder.name,
        kind="ablab",
        model=str(folder),
        folder=folder if own else elsewhere(store, folder.name, weights),
        weights=weights,
        store=store.root,
        run=folder.name if own else "",
    )


def digest_in(path: Path) -> str:
    """Of the weights, as their file says it.  Raises UserError for a damaged file, or one that does not say."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "np") as file:
            told = file.metadata() or {}
    except (OSError, SafetensorError) as flaw:
        raise UserError(f"cannot read {path}: {flaw!s:.80}") from None
    if "digest" not in told:
        raise UserError(f"{path} does not say its digest; make the folder anew")
    return told["digest"]


def elsewhere(store: Store, name: str, weights: str) -> Path:
    """Where the evaluations of a model stand that is no run: by its name and the digest of its weights."""
    return store.root / FOLDER / f"{name.replace('/', '--')}-{weights[:8]}"


def _of_transformers(folder: Path, store: Store) -> Subject:
    weights = _weights_files(folder)
    needed = {
        EXPORT: (folder / EXPORT).is_file(),
        "weights (*.safetensors)": bool(weights),
        "a tokenizer (tokenizer.json)": any((folder / one).is_file() for one in TOKENIZERS),
    }
    lacking = [what for what, there in needed.items() if not there]
    if lacking:
        raise UserError(
            f"{folder} lacks {', '.join(lacking)}; name a run, a weights folder or a whole folder of transformers "
            "(ablab export-hf writes one)"
        )
    name = folder.resolve().name
    digest = _weights_in(folder, "transformers")
    return Subject(
        name=name,
        kind="transformers",
        model=str(folder),
        folder=elsewhere(store, name, digest),
        weights=digest,
        store=store.root,
    )


TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")


def _weights_files(folder: Path) -> list[Path]:
    return sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")])


def _weights_in(folder: Path, kind: Kind) -> str:
    """Their digest."""
    if kind == "ablab":
        return digest_in(folder / WEIGHTS)
    return _digest_of([*_weights_files(folder), folder / EXPORT])


def _digest_of(files: list[Path]) -> str:
    total = hashlib.sha256()
    for path in files:
        with open(path, "rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()[:16]


def _of_the_hub(name: str, store: Store, trust_remote_code: bool) -> Subject:
    """Its weights are named by the commit that the hub gives."""
    try:
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
    except ImportError:
        raise UserError(
            "models of transformers need it installed: pip install 'ablab[hf]'"
        ) from None
    except (OSError, ValueError) as flaw:
        said = str(flaw).strip().partition("\n")[0]
        raise UserError(
            f"{name!r:.80} is no folder here, and the hub does not give it: {said:.120}"
        ) from None
    commit = str(getattr(config, "_commit_hash", None) or "unknown")[:16]
    return Subject(
        name=name,
        kind="transformers",
        model=name,
        folder=elsewhere(store, name, commit),
        weights=commit,
        store=store.root,
    )
