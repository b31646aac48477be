"""The README's commands, run as written where that takes seconds; a suffix makes those smaller that take minutes."""

import lzma
import os
import re
import shlex
import subprocess
import sys
from itertools import accumulate
from pathlib import Path

import pytest

from tests.experiments.warmed import Warmed

ROOT = Path(__file__).parents[1]
SMALL = (
    "data.name=docs data.vocab=32000 data.held_out=1024 data.batch=2 budget.tokens=1.5e3 schedule.warmup_steps=2"
    " 'study.space={optim.lr: {log: [0.004, 0.016], points: 2}}'"
)
WRITTEN = ""
# Takes minutes at any size, or a GPU: what it does is tested in tests/experiments, here only that it exists.
HELP = "--help"
# In an order in which each finds what it needs -> what is added to it.
COMMANDS = {
    "ablab list": WRITTEN,
    "ablab show loo_70m --diff base": WRITTEN,
    "ablab show": HELP,
    "ablab new intervention my_idea": WRITTEN,
    "ablab new design my_ladder": WRITTEN,
    "ablab list --plugins plugins": WRITTEN,
    "ablab run quickstart with=[qk_norm,muon] metric.name=train/loss name=mine": "--dry-run",
    "pytest tests/contracts --plugins plugins -k my_idea": "--collect-only",
    "ablab data train-tokenizer text/*.jsonl --vocab 32000 --out tokenizer.json": WRITTEN,
    "ablab data tokenize text/*.jsonl --tokenizer tokenizer.json --name docs": WRITTEN,
    "ablab data list": WRITTEN,
    "ablab data import": HELP,
    "ablab data mix": HELP,
    "ablab data tokenize": HELP,
    "ablab data train-tokenizer": HELP,
    "ablab run loo_70m --dry-run": WRITTEN,
    "ablab run loo_70m": "--dry-run",
    "ablab run imu1_tiny": "--dry-run",
    "ablab run loo_70m optim.lr=0.01 --only '*gating*' --seeds 0-4": "--dry-run",
    "ablab run loo_70m --until-decided --budget 4h": "--dry-run",
    "ablab run loo_70m --launcher ray --address ray://HOST:10001 --ray num_gpus=0.5": HELP,
    "ablab run loo_70m --launcher slurm --slurm partition=gpu --slurm gres=gpu:1 --slurm time=240": HELP,
    "ablab eval loo_70m --suite core --bundle DIR --launcher ray": HELP,
    "ablab plan loo_70m --effect 0.003 --power 0.8": HELP,
    "ablab challenge loo_70m '- gating'": HELP,
    "ablab why RUN_A RUN_B": HELP,
    "ablab why loo_70m full": WRITTEN,
    "ablab study lr_width_tiny": SMALL,
    "ablab study lr_width_70m": HELP,
    "ablab report loo_70m": HELP,
    "ablab report small medium large": HELP,
    "ablab watch loo_70m": HELP,
    "ablab export-hf RUN --out DIR": HELP,
    "ablab import-hf DIR --out NEW": HELP,
    'ablab generate RUN --prompt "The cat"': HELP,
    "ablab eval RUN --suite core --bundle DIR": HELP,
    "ablab eval --fetch-bundle bundle": HELP,  # a network
    "ablab eval RUN --suite core --bundle bundle --max-per-task 500": HELP,
    "ablab convert smollm2 DIR --width 1152 --n-heads 18 --out NEW": HELP,
    "ablab bench decode": HELP,
    "ablab runs": WRITTEN,
    "ablab rm": HELP,
    "ablab export": HELP,
    "ablab sync": WRITTEN,
    "ablab sync --track tensorboard": WRITTEN,
    "ablab ui": HELP,
    "ablab check coords": HELP,
    "ablab check stats": HELP,
    "ablab bench overhead": HELP,
    "ablab bench study": HELP,
    "ablab bench report": HELP,
    "ablab bench step loo_70m --against hf": HELP,
    "ablab bench peers loo_70m --nanochat DIR": HELP,
    "ablab bench step loo_70m": HELP,
    "ablab bench step loo_70m runtime.micro_batch=96": HELP,
    "ablab bench kernels --only optimizer": HELP,
    "ablab run loo_70m budget.tokens=3.002e7 runtime.evaluations=1 --seeds 0 --jobs 2": "--dry-run",
    "ablab run quickstart --no-mlflow": "--dry-run",
    "ablab bench kernels --only 'attention*'": HELP,
    "ablab bench kernels --only swiglu_epilogue": HELP,
    "ablab bench grid loo_70m": HELP,
    "ablab bench checkpoint 430m": HELP,
    "ablab bench claims": HELP,
    "ablab run loo_70m --gpus-per-run 2": "--dry-run runtime.device=cpu",
    "ablab bench scale": HELP,
    "ablab bench scale --gpus 2": HELP,
    "ablab bench step 430m data.batch=48 runtime.micro_batch=48": HELP,
    "ablab bench step 430m 'with=[fp8]' --cell '+ fp8' data.batch=48 runtime.micro_batch=48": HELP,
    "ablab bench step fp8_70m --cell 'fp8 both' --against base": HELP,
    "ablab run fp8_70m": HELP,
    "make demo": None,  # the set-up of `make test` and `ablab run quickstart`
    "make test": None,  # CI runs it
    "make lint": None,  # likewise
    "make docs": None,  # tests/test_site.py builds it so
}


PROGRAMS = ("ablab ", "make ", "pytest ")


def written() -> set[str]:
    """Every command in backticks or in a fenced block."""
    text = (ROOT / "README.md").read_text()
    fenced = re.findall(r"```\w*\n(.*?)```", text, flags=re.S)
    lines = [line for block in fenced for line in block.splitlines()]
    blocks = [line.split("  #")[0].strip() for line in lines]
    rest = re.sub(r"```.*?```", "", text, flags=re.S)
    prose = re.findall(r"`(?:\.venv/bin/)?(\w+ [^`]*)`", rest)
    return {line for line in [*blocks, *prose] if line.startswith(PROGRAMS)}


def test_every_command_of_the_readme_is_listed_here():
    assert written() == set(COMMANDS)


@pytest.mark.slow
def test_the_commands_of_the_readme_do_what_they_say(tmp_path, warmed):
    write_text(tmp_path / "text")
    said = {}
    for command, suffix in COMMANDS.items():
        if suffix is not None:
            said[command] = output(command, suffix, tmp_path, warmed)
    assert "my_idea" in said["ablab list --plugins plugins"]
    assert "my_idea" not in said["ablab list"]
    collected = said["pytest tests/contracts --plugins plugins -k my_idea"]
    assert "test_interventions.py" in collected
    assert "105.9 M parameters" in said["ablab show loo_70m --diff base"]
    assert "loo_70m: 36 runs, 36 missing" in said["ablab run loo_70m --dry-run"]
    chosen = said["ablab run loo_70m optim.lr=0.01 --only '*gating*' --seeds 0-4"]
    assert chosen.count("gating") >= 5
    assert re.search(r"\+ mup +2 complete", said["ablab study lr_width_tiny"])


def write_text(folder: Path) -> None:
    """Two files of the embedded text: enough for 32,000 ids and a held-out document."""
    embedded = ROOT / "configs" / "data" / "embedded" / "train.jsonl.xz"
    lines = lzma.decompress(embedded.read_bytes()).splitlines(keepends=True)
    sizes = accumulate(len(line) for line in lines)
    few = [line for line, until in zip(lines, sizes, strict=True) if until < 2_200_000]
    folder.mkdir()
    for half in (0, 1):
        (folder / f"{half}.jsonl").write_bytes(b"".join(few[half::2]))


def output(command: str, suffix: str, folder: Path, warmed: Warmed) -> str:
    """What a command of the README prints, run in the folder with its suffix."""
    program, _, rest = command.partition(" ")
    words = [word for one in shlex.split(f"{rest} {suffix}") for word in expanded(one, folder)]
    environment = os.environ | {"ABLAB_STORE": str(folder / "store"), "OMP_NUM_THREADS": "1"}
    if program == "ablab":
        code, out, err = warmed.run(words, folder, environment)
    else:
        code, out, err = asked_of_pytest(words, folder, environment)
    assert code == 0, f"{command} {suffix}\n{out[-2000:]}\n{err[-2000:]}"
    return out


def expanded(word: str, folder: Path) -> list[str]:
    """As a shell does it: what matches, in the order of names, else the word itself."""
    found = sorted(folder.glob(word)) if "*" in word else []
    return [str(path.relative_to(folder)) for path in found] or [word]


def asked_of_pytest(
    words: list[str], folder: Path, environment: dict[str, str]
) -> tuple[int, str, str]:
    """`pytest WORDS` as in the house's folder; a folder of plugins is that of the commands."""
    places = {"tests/contracts": ROOT / "tests" / "contracts", "plugins": folder / "plugins"}
    told = [str(places.get(word, word)) for word in words]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *told],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    return done.returncode, done.stdout, done.stderr
