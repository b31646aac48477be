"""How a run is executed never enters its name; and every field of Runtime does what it says."""

from dataclasses import asdict, fields

import pytest
import torch

from ablab.core.errors import UserError
from ablab.core.runtime.runtime import Runtime, settle
from ablab.core.store.record import Record
from ablab.core.store.state import left_state
from ablab.core.train import checkpoint
from ablab.core.train.run import run
from ablab.core.train.trainer import Trainer
from ablab.experiments.plan.experiment import load

OTHER = {
    "device": "cuda",
    "dtype": "bf16",
    "kernels": "torch",
    "compile": True,
    "replay": True,
    "micro_batch": 2,
    "ranks": 2,
    "shard": "weights",
    "recompute": 2,
    "deterministic": True,
    "turns": False,
    "threads": 2,
    "log_every": 1,
    "evaluations": 3,
    "dynamics": 10,
    "save_seconds": 0.0,
    "keep_last": 3,
    "keep_every": 5,
    "mirror": "memory://copies",
    "keep_weights": True,
    "keep_state": True,
}
# The other fields may round differently; `deterministic` and `kernels` do so on a GPU alone.
KEEP_THE_BITS = (
    "kernels",
    "replay",
    "recompute",
    "deterministic",
    "log_every",
    "evaluations",
    "dynamics",
    "save_seconds",
    "keep_last",
    "keep_every",
    "mirror",
    "keep_weights",
    "keep_state",
)
every_field = pytest.mark.parametrize("field", [field.name for field in fields(Runtime)])


@pytest.fixture(autouse=True)
def global_state():
    yield
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(False)


@every_field
def test_a_field_does_not_rename_a_run(field):
    plain, other = (
        load("quickstart", {f"runtime.{field}": value})
        for value in (getattr(Runtime(), field), OTHER[field])
    )
    assert (
        getattr(other.sheet.runtime, field)
        == OTHER[field]
        != getattr(plain.sheet.runtime, field)
    )
    assert other.name == plain.name and [one.id for one in other.runs()] == [
        one.id for one in plain.runs()
    ]


class Seen:
    """What one run showed of how it was executed."""

    def __init__(self, recipe, runtime, folder, place, patch):
        self.saves = self.compiled = self.blocks = 0
        self.rows: set[int] = set()
        write, make = checkpoint.write, Trainer.__init__

        def count_saves(*given):
            self.saves += 1
            return write(*given)

        def count_compiled(function, **more):
            self.compiled += 1
            return function

        def watch(trainer, *given):
            make(trainer, *given)
            self.trainer = trainer
            trainer.model.norm.register_forward_pre_hook(
                lambda norm, inputs: self.rows.add(len(inputs[0]))
            )
            trainer.model.norm.register_forward_hook(
                lambda norm, inputs, normed: setattr(self, "dtype", normed.dtype)
            )
            trainer.model.blocks[0].register_forward_pre_hook(
                lambda *given: setattr(self, "blocks", self.blocks + 1)
            )

        patch.setattr(checkpoint, "write", count_saves)
        patch.setattr(torch, "compile", count_compiled)
        patch.setattr(Trainer, "__init__", watch)
        record = Record(place)
        self.result = run(recipe, runtime, folder, record)
        self.lines, self.about = list(record.metrics()), record.about()
        self.looks = list(record.dynamics())
        self.kept = (place / "weights.safetensors").exists()
        self.left = left_state(place)
        self.checkpoints = len(checkpoint.listed(place / "checkpoints"))
        self.deterministic = torch.are_deterministic_algorithms_enabled()
        patch.undo()


OBSERVED = {
    "dtype": lambda seen: (seen.dtype, seen.result.weights),
    "kernels": lambda seen: seen.about["kernels"],
    "compile": lambda seen: seen.compiled > 0,
    "replay": lambda seen: (
        seen.trainer.runtime.replay
    ),  # a GPU's alone: tests/core/train/test_gpu.py
    "micro_batch": lambda seen: seen.rows,
    "recompute": lambda seen: (
        seen.blocks
    ),  # forward passes of the first block: twice where it is recomputed
    "deterministic": lambda seen: seen.deterministic,
    "log_every": lambda seen: [line["step"] for line in seen.lines if "val/loss" not in line],
    "evaluations": lambda seen: [line["step"] for line in seen.lines if "val/loss" in line],
    "dynamics": lambda seen: [line["step"] for line in seen.looks],
    "save_seconds": lambda seen: seen.saves,
    "keep_last": lambda seen: seen.trainer.kept.last,
    "keep_every": lambda seen: (seen.saves, seen.checkpoints),
    "keep_weights": lambda seen: seen.kept,
    "keep_state": lambda seen: seen.left,
}


@pytest.fixture
def seen(tiny, token_folder, tmp_path, monkeypatch):
    return lambda **how: Seen(
        tiny(),
        Runtime(**{"device": "cpu"} | how),
        token_folder,
        tmp_path / str(how),
        monkeypatch,
    )


@pytest.mark.parametrize("field", OBSERVED)
def test_a_field_shows_in_how_a_run_goes_and_is_recorded(seen, field):
    plain, other = seen(), seen(**{field: OTHER[field]})
    assert OBSERVED[field](other) != OBSERVED[field](plain)
    assert (
        other.about["runtime"][field]
        == other.result.runtime[field]
        == OTHER[field]
        != plain.result.runtime[field]
    )
    assert other.result.run == plain.result.run
    if field in KEEP_THE_BITS:
        assert (
            other.result.weights == plain.result.weights
            and other.result.metrics["val/loss"] == plain.result.metrics["val/loss"]
        )


@pytest.mark.parametrize(
    ("device", "chosen"),
    [("cpu", ("fp32", False, False, False)), ("cuda", ("bf16", "blocks", True, True))],
)
def test_what_nobody_asked_for_is_chosen_for_the_device(monkeypatch, device, chosen):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: device == "cuda")
    for asked in ("auto", device):
        settled = settle(Runtime(device=asked), 6)
        assert settled.device == device and settled.micro_batch == 6
        assert (settled.dtype, settled.compile, settled.replay, settled.deterministic) == chosen


def test_the_device_is_the_one_asked_for(tiny, token_folder):
    assert Trainer(tiny(), Runtime(device="cpu"), token_folder).device.type == "cpu"
    if torch.cuda.is_available():
        assert Trainer(tiny(), Runtime(device="cuda"), token_folder).device.type == "cuda"
    else:
        with pytest.raises(UserError, match="device=cuda, but torch sees no GPU"):
            Trainer(tiny(), Runtime(device="cuda"), token_folder)


def test_threads_are_as_many_as_asked_for(tiny, token_folder):
    """Not trained: two threads on a few numbers wait for each other 20 s long."""
    for count in (2, 1):
        trainer = Trainer(tiny(), Runtime(device="cpu", threads=count), token_folder)
        assert trainer.runtime.threads == torch.get_num_threads() == count


ELSEWHERE = {"mirror", "device", "threads", "turns", "ranks", "shard"}


def test_every_field_is_asked():
    """`turns` is the runner's: tests/experiments/test_runner.py; `ranks`: tests/core/train/test_sharded.py;
    `shard`: tests/core/train/test_fully_sharded.py;
    `mirror`: tests/core/store/test_mirror.py.
    """
    assert set(asdict(Runtime())) == set(OTHER) == ELSEWHERE | set(OBSERVED)
