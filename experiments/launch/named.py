"""From the words of a command to its launcher."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ablab.core.errors import UserError
from ablab.core.language.parse import near
from ablab.core.language.written import read
from ablab.experiments.plan.sheets import Sheet
from ablab.experiments.run.executor import Launcher
from ablab.experiments.run.this_machine import ThisMachine
from ablab.experiments.run.torchrun import ranks_here

LAUNCHERS = ("local", "ray", "slurm")


@dataclass(frozen=True)
class Launching:
    """What a command says of where its runs are executed."""

    launcher: str = "local"
    address: str = ""  # of a Ray cluster
    ray: tuple[str, ...] = ()  # KEY=VALUE
    slurm: tuple[str, ...] = ()

    @property
    def is_elsewhere(self) -> bool:
        """Whether other machines execute them, or this one as if it were another."""
        return self.launcher != "local"

    def of(self, sheet: Sheet | None = None) -> Launcher:
        """Options of the command win over those of the sheet.  Raises UserError."""
        self._check()
        if self.launcher == "ray":
            from ablab.experiments.launch.ray import RayLauncher

            of_sheet = sheet.ray if sheet else {}
            return RayLauncher(self.address, of_sheet | options_of("ray", self.ray))
        if self.launcher == "slurm":
            from ablab.experiments.launch.slurm import SlurmLauncher

            of_sheet = sheet.slurm if sheet else {}
            return SlurmLauncher(of_sheet | options_of("slurm", self.slurm))
        return ThisMachine()

    def _check(self) -> None:
        if self.launcher not in LAUNCHERS:
            raise UserError(
                f"--launcher {self.launcher!r:.40}: no such launcher. {near(self.launcher, LAUNCHERS)}"
                f"Known: {', '.join(LAUNCHERS)}"
            )
        if self.is_elsewhere and ranks_here() > 1:
            raise UserError(
                f"torchrun started {ranks_here()} ranks, and --launcher {self.launcher} starts those of each run "
                "where it is trained; start the command without torchrun, with --gpus-per-run"
            )
        flags: Mapping[str, tuple[object, str]] = {
            "--address": (self.address, "ray"),
            "--ray": (self.ray, "ray"),
            "--slurm": (self.slurm, "slurm"),
        }
        for flag, (given, launcher) in flags.items():
            if given and self.launcher != launcher:
                raise UserError(
                    f"{flag} speaks to another launcher than {self.launcher}; add --launcher {launcher}, or drop it"
                )


def options_of(launcher: str, words: Iterable[str]) -> dict[str, Any]:
    """`KEY=VALUE`, values as YAML.  Raises UserError."""
    options = {}
    for word in words:
        key, sign, value = word.partition("=")
        if not sign or not key.isidentifier():
            raise UserError(
                f"--{launcher} {word!r:.80} must look like KEY=VALUE, as partition=gpu"
            )
        options[key] = read(value)
    return options
