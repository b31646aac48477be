"""Whatever stands in a record: it is read, or named in a line, in less than two seconds; it costs its own run alone."""

import json
import shutil
import struct
import sys
import zlib
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ablab.analysis.api import read_looks
from ablab.core.errors import UserError
from ablab.core.language.written import dump
from ablab.core.recipe.recipe import plain
from ablab.core.store.evaluation import Evaluation, Part
from ablab.core.store.evaluation import write as write_evaluation
from ablab.core.store.record import digest_of
from ablab.core.store.result import FINISHED, Result
from ablab.core.store.store import Store
from ablab.core.store.study_record import StudyRecord, Trial, study_path, write
from ablab.core.train import checkpoint
from ablab.experiments.plan.experiment import load
from ablab.experiments.plan.grid_plan import grid_plan_of
from ablab.experiments.track.cards import card_of, data_of, summary_of
from ablab.experiments.track.mlflow_sync import replay

sys.path.append(str(Path(__file__).parent))
from odd import JSON, ODD, changed, many  # noqa: E402

fewer = settings(many, max_examples=many.max_examples // 2)  # each costs two or three commands


@pytest.fixture(scope="module")
def store(lab) -> Store:
    """A grid of two cells and two seeds that has ended, and a study; nothing was trained for them."""
    lab.sheet("kept", arms=["qk_norm"], design="add_one")
    experiment = load(str(lab.root / "kept.yaml"))
    kept = Store(lab.store)
    for run in experiment.runs():
        record = kept.run(run.id)
        record.begin(dump(plain(run.recipe)), {"params": experiment.params(run)})
        scalars = {"tokens": 1280, "train/loss": 2.0, "val/loss": 2.0 + run.recipe.seed / 9}
        record.log(20, scalars, {"seconds": 1.0, "tokens_per_second": 1280.0})
        record.note_look(20, {"layer/kurtosis/00": 3.0})
        metrics = {"train/loss": 2.0, "val/loss": scalars["val/loss"]}
        log = digest_of(record.logged())
        how = {"device": "cpu", "keep_weights": False}
        ended = Result(
            run.id, FINISHED, 20, 1280, metrics, 1.0, 1280.0, 9, "", "c0de", how, log=log
        )
        ended = replace(ended, dynamics=record.digest_of_looks())
        record.finish(ended)
        asked = Part("one", [1.0, 0.0, 1.0]), Part("two", [3.5, 2.0], [4, 5])
        write_evaluation(
            record.folder, Evaluation("blimp", "eval/blimp", "centered", list(asked), "b", "")
        )
    kept.write_plan(grid_plan_of(experiment, experiment.runs()))
    trials = [
        Trial(
            "full",
            number,
            {"optim.lr": lr},
            "complete",
            2.0 + lr,
            {"100": 2.0},
            [f"{number:016x}"],
        )
        for number, lr in enumerate((0.001, 0.01, 0.1))
    ]
    searched = StudyRecord(
        name="tried",
        question="Which?",
        metric="val/loss",
        better="lower",
        space={"optim.lr": {"log": [0.001, 0.1]}},
        hard={},
        base={"optim.lr": 0.01},
        sampler="tpe",
        pruner="none",
        seeds=[100],
        trials_per_cell=3,
        trials=trials,
    )
    write(kept, searched)
    return kept


RECORDS = (
    "result.json",
    "run.json",
    "metrics.jsonl",
    "pace.jsonl",
    "dynamics.jsonl",
    "recipe.yaml",
    "evaluations/blimp.json",
)
VALUES = JSON | st.sampled_from(ODD) | st.sampled_from([10**30, -1, 1e308, "finished", "../x"])


@pytest.fixture
def with_record(store):
    """A function that does something while another content stands in a file of the store."""

    def during(path: Path, content: bytes, do) -> None:
        whole = path.read_bytes()
        path.write_bytes(content)
        try:
            do()
        finally:
            path.write_bytes(whole)

    return during


def odd_bytes(path: Path, at: float, value, how: str) -> bytes:
    """The content of a file, changed in one of three ways."""
    whole = path.read_bytes()
    place = int(at * len(whole))
    written = json.dumps(value).encode()
    if how == "a value" and path.suffix == ".json":
        return json.dumps(changed(json.loads(whole), at, value)).encode()
    if how == "cut":
        return whole[:place]
    return whole[:place] + written + whole[place + len(written) :]


HOW = st.sampled_from(["a value", "a value", "cut", "written over"])


@fewer
@given(name=st.sampled_from(RECORDS), at=st.floats(0, 1), value=VALUES, how=HOW)
def test_any_record_of_a_run(store, said, with_record, name, at, value, how):
    plan = store.read_plan("kept")
    folder = store.run(plan.rows[0].run).folder

    def read() -> None:
        reported = said("report", "kept", "--json")
        assert reported.code == 0, reported
        assert said("run", "kept.yaml", "--dry-run").code == 0
        shown_in_mlflow(store, plan)
        with suppress(UserError):
            read_looks("kept", store.root)

    with_record(folder / name, odd_bytes(folder / name, at, value, how), read)


class Sink:
    """A tracker that keeps nothing."""

    def open(self, card): ...
    def log(self, step, scalars, seconds): ...
    def flush(self): ...
    def close(self, status, summary): ...


def shown_in_mlflow(store: Store, plan) -> None:
    """What `ablab sync` reads of a run, without MLflow."""
    row = plan.rows[0]
    record = store.run(row.run)
    data_of(record.recipe_path)
    card = card_of(store, plan, row)
    try:
        result = record.result()
        if not record.hole(result):
            replay(record, card, Sink(), result)
            summary_of(result, record)
    except UserError:
        pass


@fewer
@given(at=st.floats(0, 1), value=VALUES, how=HOW)
def test_any_plan(store, said, with_record, at, value, how):
    path = store.plan_path("kept")

    def read() -> None:
        said("report", "kept", "--json")
        said("run", "kept.yaml", "--dry-run")

    with_record(path, odd_bytes(path, at, value, how), read)


@fewer
@given(at=st.floats(0, 1), value=VALUES, how=HOW)
def test_any_study_record(store, said, with_record, at, value, how):
    path = study_path(store, "tried")
    with_record(
        path, odd_bytes(path, at, value, how), lambda: said("report", "tried", "--json")
    )


# -- checkpoints -------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> bytes:
    import torch

    folder = tmp_path_factory.mktemp("saved")
    tensors = {"model/a": torch.arange(6.0).reshape(2, 3), "watch": torch.zeros(2)}
    origin = checkpoint.Origin(
        "0123", "c0de", {"dtype": "fp32"}, [], {"torch": "2"}, "0-00000000"
    )
    return checkpoint.write(folder, 12, tensors, origin).read_bytes()


def with_header(content: bytes, at: float, value) -> bytes:
    """A safetensors file with something else in a place of its header."""
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    header["__metadata__"]["ablab"] = json.loads(header["__metadata__"]["ablab"])
    odd = changed(header, at, value)
    if isinstance(odd.get("__metadata__"), dict) and "ablab" in odd["__metadata__"]:
        odd["__metadata__"]["ablab"] = json.dumps(odd["__metadata__"]["ablab"])
    written = json.dumps(odd).encode()
    return struct.pack("<Q", len(written)) + written + content[8 + length :]


@fewer
@given(
    at=st.floats(0, 1),
    value=VALUES,
    how=st.sampled_from(["header", "cut", "written over", "length"]),
    step=st.integers(0, 10**9),
)
@example(at=0.0, value=2**62, how="length", step=12)
def test_any_checkpoint_is_taken_or_named_and_set_aside(saved, tmp_path, at, value, how, step):
    """Its checksum is right: whoever wrote it meant it so."""
    place = int(at * len(saved))
    ways = {
        "header": lambda: with_header(saved, at, value),
        "cut": lambda: saved[:place],
        "written over": lambda: saved[:place] + json.dumps(value).encode() + saved[place:],
        "length": lambda: struct.pack("<Q", zlib.crc32(repr(value).encode()) << 31) + saved[8:],
    }
    content = ways[how]()
    folder = tmp_path / "checkpoints"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    path = folder / f"step-{step:08d}-{zlib.crc32(content):08x}.safetensors"
    path.write_bytes(content)
    said: list[str] = []
    found = checkpoint.newest(folder, said.append)
    assert (found is None) == (len(said) == 1) == (not path.exists())
    assert found is None or found[0] == step
