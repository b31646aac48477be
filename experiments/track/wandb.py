"""Weights & Biases: a project for each experiment, a group for each arm, a run for each seed.

The id of a run there follows from its recipe and its place in the plan, so a killed run goes on under it.  Online, the
server says which steps it has, and no others are sent.  Offline (WANDB_MODE=offline), the runs wait in STORE/wandb for
`wandb sync`: one that is opened again is written anew, whole, and what it left before is removed.
"""

import os
import shutil
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ablab.core.errors import UserError
from ablab.core.store.result import FINISHED, PRUNED
from ablab.experiments.track.cards import data_of, name_of
from ablab.experiments.track.chosen import WANDB
from ablab.experiments.track.store_view import StoreView, file_name, finite
from ablab.experiments.track.tracker import Card

if TYPE_CHECKING:
    from wandb import Run, Settings

OFFLINE = ("offline", "dryrun")
QUIET = {  # defaults of ours, which the user's own environment overrides
    "WANDB_SILENT": "true",
    "WANDB_CONSOLE": "off",
    "WANDB_ERROR_REPORTING": "false",
    "WANDB_DISABLE_GIT": "true",
}
# W&B waits 90 s for a server that hangs, and without end for what was not sent.
START_SECONDS, END_SECONDS = 20.0, 30.0
NO_KEY = "there is no API key; run `wandb login`, or set WANDB_MODE=offline"


class Wandb(StoreView):
    """The user's W&B account, or STORE/wandb while that is offline."""

    name = WANDB

    def connect(self) -> None:
        for name, value in QUIET.items():
            os.environ.setdefault(name, value)
        import wandb

        if not self.is_offline and not wandb.login(prompt=False, verify=False):
            raise UserError(NO_KEY)

    @property
    def is_offline(self) -> bool:
        import wandb

        return wandb.setup().settings.mode in OFFLINE

    @property
    def place(self) -> str:
        import wandb

        return "offline" if self.is_offline else wandb.setup().settings.base_url

    def tracker(self) -> "WandbTracker":
        return WandbTracker(self)

    @property
    def folder(self) -> Path:
        """Where W&B keeps what it sends, or would send."""
        return self.store.root / "wandb"

    def receipt_path(self, card: Card) -> Path:
        return self.folder / "shown" / f"{file_name(card.experiment)} {id_of(card)}.json"

    def is_there(self, card: Card) -> bool:
        if self.is_offline:
            return bool(self.kept(card))
        return self.receipt_path(card).is_file()

    def kept(self, card: Card) -> list[Path]:
        """What was written of the run while offline."""
        return sorted(self.folder.glob(f"offline-run-*-{id_of(card)}"))

    def drop_unsent(self, card: Card) -> None:
        for folder in self.kept(card):
            if not any(folder.glob("*.wandb.synced")):
                shutil.rmtree(folder, ignore_errors=True)  # a killed W&B may still end there


def id_of(card: Card) -> str:
    """A recipe may answer two cells of an experiment, whose project both are in."""
    place = zlib.crc32(f"{card.experiment}|{card.cell}|{card.pair}".encode())
    return f"{card.run}-{place:08x}"


def project_of(card: Card) -> str:
    return f"ablab-{file_name(card.experiment)}"


def settings() -> "Settings":
    import wandb

    return wandb.Settings(
        disable_git=True,
        save_code=False,
        x_disable_meta=True,
        x_disable_stats=True,  # the parent's: it does not train
        x_disable_machine_info=True,
        init_timeout=float(os.environ.get("WANDB_INIT_TIMEOUT", START_SECONDS)),
        finish_timeout=float(os.environ.get("WANDB_FINISH_TIMEOUT", END_SECONDS)),
        finish_timeout_raises=True,
    )


class WandbTracker:
    """One run.  Runs train side by side, so each is a W&B run of its own in this process."""

    run: "Run"

    def __init__(self, view: Wandb):
        self.view = view

    def open(self, card: Card) -> None:
        import wandb

        self.card = card
        self.view.receipt_path(card).unlink(missing_ok=True)
        self.view.folder.mkdir(parents=True, exist_ok=True)
        resume: Literal["allow"] | None = "allow"
        if self.view.is_offline:
            self.view.drop_unsent(card)
            resume = None  # there is nobody who knows the run
        self.run = wandb.init(
            project=project_of(card),
            id=id_of(card),
            name=name_of(card),
            group=card.cell,
            job_type=card.tags.get("ablab.design"),
            notes=card.description,
            config=config_of(card),
            dir=str(self.view.store.root),
            resume=resume,
            reinit="create_new",
            settings=settings(),
        )
        self.step = self.run.step - 1  # the last one that is there

    def log(self, step: int, scalars: Mapping[str, float], seconds: float) -> None:
        if step > self.step:
            self.step = step
            self.run.log(finite(scalars) | {"seconds": seconds}, step=step)

    def flush(self) -> None:
        """W&B sends by itself what it was told."""

    def leave(self) -> None:
        self.run.finish(exit_code=0)
        self.view.vouch(self.card, Path(self.run.dir))

    def close(self, status: str, summary: Mapping[str, float]) -> None:
        self.run.summary.update(finite(summary) | {"status": status})
        self.run.finish(exit_code=0 if status in (FINISHED, PRUNED) else 1)
        self.view.vouch(self.card, Path(self.run.dir))


def config_of(card: Card) -> dict[str, object]:
    """What differs from the base recipe, and who the run is."""
    who = {
        "experiment": card.experiment,
        "arm": card.cell,
        "pair": card.pair,
        "seed": card.seed,
        "run": card.run,
    }
    told = {key.removeprefix("ablab."): value for key, value in card.tags.items()}
    known = {key: value for key, value in told.items() if not key.startswith("mlflow.")}
    if data := data_of(card.folder / "recipe.yaml"):
        known |= {"data.name": data[0], "data.digest": data[1]}
    return dict(card.params) | {"ablab": known | who}
