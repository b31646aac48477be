"""Looks into a run: what they say, beside formulas in fp64, and that the run keeps its bits."""

import json
import math
from dataclasses import replace

import pytest
import torch

from ablab.core.errors import UserError
from ablab.core.fusion.places import plan_with
from ablab.core.runtime.runtime import Runtime, settle
from ablab.core.store.record import Damaged, Record
from ablab.core.train import dynamics
from ablab.core.train.dynamics import Unwatched, Watched, looks_into
from ablab.core.train.probe import Probe, largest_score, place_of
from ablab.core.train.run import Loop, run, watched_by_nobody
from ablab.core.train.trainer import Trainer

CPU = Runtime(device="cpu", compile=False, log_every=2, evaluations=3)
LOOKING = replace(CPU, dynamics=4)
MANY = ["qk_norm", {"gating": {"per": "head"}}, "value_residual", "ln_scaling", "muon", "ema"]


def train(recipe, folder, store, runtime=LOOKING, **more):
    record = Record(store)
    return run(recipe, runtime, folder, record, **more), record


def lines(record) -> list[dict]:
    return list(record.dynamics())


# ---- it changes nothing ----


def test_a_run_has_the_same_bits_with_looks_and_without(tiny, token_folder, tmp_path):
    recipe = tiny(MANY)
    kept = replace(CPU, keep_weights=True)
    off, plain = train(recipe, token_folder, tmp_path / "off", kept)
    on, looked = train(recipe, token_folder, tmp_path / "on", replace(kept, dynamics=4))
    assert (on.weights, on.evaluated, on.log) == (off.weights, off.evaluated, off.log)
    for name in ("metrics.jsonl", "held_out.npz", "weights.safetensors", "recipe.yaml"):
        assert (looked.folder / name).read_bytes() == (plain.folder / name).read_bytes()
    assert [line["step"] for line in lines(looked)] == [4, 8, 12]
    assert not plain.dynamics_path.exists() and off.dynamics == ""


def test_a_run_that_nobody_looks_into_steps_as_the_trainer_does(tiny, token_folder, tmp_path):
    trainer = Trainer(tiny(), CPU, token_folder)
    loop = Loop(trainer, Record(tmp_path), watched_by_nobody, pytest.fail)
    assert isinstance(loop.looks, Unwatched)
    assert loop.looks.advance == trainer.advance


def test_what_is_trained_gets_no_hook_and_the_twin_no_tensor(tiny, token_folder):
    trainer = Trainer(tiny(MANY), LOOKING, token_folder)
    looks = looks_into(trainer, pytest.fail)
    for module in trainer.model.modules():
        assert not module._forward_pre_hooks and not module._forward_hooks
    trained = {id(tensor) for tensor in trainer.model.state_dict(keep_vars=True).values()}
    for tensor in looks.probe.twin.state_dict(keep_vars=True).values():
        assert id(tensor) in trained


def test_where_kernels_serve_the_stages_are_read_as_they_are_written(tiny, build, batch):
    recipe = tiny(MANY, model__width=64, model__attention__head_dim=32)
    served = build(recipe, stirred=0.1, plan=plan_with({"attention", "ffn", "loss"}, recipe))
    assert served.blocks[0].attention.attend != served.blocks[0].attention._attend
    rows, sizes = batch(recipe), torch.ones(recipe.data.vocab)
    told = Probe(served, recipe).look(rows, sizes)
    assert told == Probe(build(recipe, stirred=0.1), recipe).look(rows, sizes)


def test_killed_and_resumed_it_has_looked_the_same(tiny, token_folder, tmp_path):
    recipe = tiny(MANY)
    saving = replace(LOOKING, save_seconds=0.0)
    _, whole = train(recipe, token_folder, tmp_path / "whole", saving)

    def killed(step, scalars, seconds):
        if step == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(recipe, token_folder, tmp_path / "killed", saving, log=killed)
    assert [line["step"] for line in lines(Record(tmp_path / "killed"))] == [4, 8]
    again, resumed = train(recipe, token_folder, tmp_path / "killed", saving)
    assert resumed.dynamics_path.read_bytes() == whole.dynamics_path.read_bytes()
    assert again.dynamics == resumed.digest_of_looks()


def test_without_memory_for_a_look_training_goes_on(tiny, token_folder, tmp_path, monkeypatch):
    def full(self, rows, sizes):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(Probe, "look", full)
    said = []
    result, record = train(tiny(), token_folder, tmp_path, warn=said.append)
    assert result.status == "finished" and not lines(record)
    assert said == [f"step {t}: no memory for a look into the layers" for t in (4, 8, 12)]


# ---- what it says ----


@pytest.fixture(scope="module")
def seen(tiny, token_folder):
    """A look after step 2, the weights before and after that step, and the rows that it read."""
    trainer = Trainer(
        tiny(MANY, model__attention__group=2), replace(LOOKING, log_every=1), token_folder
    )
    looks = Watched(trainer, 2, pytest.fail)
    trainer.advance()
    before = {name: value.detach().clone() for name, value in trainer.model.named_parameters()}
    looks.advance()
    return looks.look(), before, trainer


@pytest.fixture
def model(seen):
    return seen[2].model


@pytest.fixture
def rows(seen):
    return seen[2].tokens.rows(1, 0, 4)


@torch.no_grad()
def entering(model, rows) -> list[tuple[torch.Tensor, dict]]:
    """What enters each layer with its carry, and what leaves the last one."""
    x = model.embed(rows[:, :-1])
    carry: dict = {}
    streams = [(x, carry)]
    for block in model.blocks:
        x, carry = block(x, carry)
        streams.append((x, carry))
    return streams


def test_kurtosis_and_rms_are_those_of_the_stream(seen, model, rows):
    streams = entering(model, rows)
    places = ["00", "01", "02", "end"]
    for place, (x, _) in zip(places, streams, strict=True):
        x = x.double()
        m2, m4 = (x**2).mean(-1), (x**4).mean(-1)
        assert seen[0][f"layer/kurtosis/{place}"] == pytest.approx(
            (m4 / m2**2).mean().item(), rel=1e-5
        )
        assert seen[0][f"layer/rms/{place}"] == pytest.approx(m2.sqrt().mean().item(), rel=1e-5)


@torch.no_grad()
def test_the_attention_logit_is_the_largest_of_the_keys_up_to_the_query(seen, model, rows):
    for i, (x, carry) in enumerate(entering(model, rows)[:-1]):
        attention = model.blocks[i].attention
        q, k, _, _ = attention.project(attention.normed(x), carry, 0)
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        scores = torch.einsum("bhtd,bhsd->bhts", q.double(), k.double()) / math.sqrt(
            q.shape[-1]
        )
        known = torch.ones(scores.shape[-2:]).tril().bool()
        expected = scores[:, :, known].max().item()
        assert seen[0][f"layer/attention_logit/0{i}"] == pytest.approx(expected, rel=1e-5)


def test_a_key_behind_the_query_counts_for_nothing():
    q = torch.tensor([[[1.0, 0.0], [1.0, 0.0]]])
    k = torch.tensor([[[0.5, 0.0], [9.0, 0.0]]])
    assert largest_score(q[:, :1], k[:, :1]) == pytest.approx(0.5 / math.sqrt(2))
    assert largest_score(q, k) == pytest.approx(9 / math.sqrt(2))  # the second query's own
    assert largest_score(q * torch.tensor([[[1.0], [0.0]]]), k) == pytest.approx(
        0.5 / math.sqrt(2)
    )


def test_norms_of_weights_and_updates_are_by_role_and_place(seen, model):
    found, before, _ = seen
    squares: dict[str, float] = {}
    for name, value in model.named_parameters():
        role = value.declared.role
        place, _ = place_of(name)
        for word, tensor in (("weight", value), ("update", value - before[name])):
            quantity = f"layer/{role}.{word}/{place}"
            square = tensor.detach().double().square().sum().item()
            squares[quantity] = squares.get(quantity, 0.0) + square
    assert {"layer/hidden.update/02", "layer/gate.weight/00", "layer/vector.weight/norm"} < set(
        squares
    )
    for quantity, square in squares.items():
        assert found[quantity] == pytest.approx(math.sqrt(square), rel=1e-6), quantity


@torch.no_grad()
def test_gates_mixes_and_gains_are_what_the_stages_compute(seen, model, rows):
    found = seen[0]
    x, carry = entering(model, rows)[1]
    attention = model.blocks[1].attention
    normed = attention.normed(x).double()
    weight = attention.on_heads["gating"]._modules["project"].weight.double()
    gates = 2 * torch.sigmoid(normed @ weight.T)
    assert found["layer/attention.gating.factor/01"] == pytest.approx(
        gates.mean().item(), rel=1e-5
    )
    spread = gates.std(correction=0).item()
    assert found["layer/attention.gating.factor_sd/01"] == pytest.approx(spread, rel=1e-4)
    mix = {
        name: value.item()
        for name, value in attention.on_values["value_residual"]._parameters.items()
    }
    length = math.hypot(mix["own"], mix["first"])
    told = found["layer/attention.value_residual.mixes_first/01"]
    assert told == pytest.approx(mix["scale"] * mix["first"] / length, rel=1e-5)
    gain = attention.on_qk["qk_norm"]._parameters["q_gain"].double().mean().item()
    assert found["layer/attention.qk_norm.q_gain/01"] == pytest.approx(gain, rel=1e-6)


@torch.no_grad()
def test_the_readout_is_read_on_those_rows(seen, model, rows):
    logits = model(rows[:, :-1]).double()
    nats = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="none"
    )
    sizes = seen[2].tokens.token_bytes[rows[:, 1:].flatten()]
    bits = (nats * (sizes > 0)).sum() / math.log(2) / sizes.sum()
    assert seen[0]["train/logit"] == pytest.approx(logits.max().item(), rel=1e-5)
    assert seen[0]["train/bits_per_byte"] == pytest.approx(bits.item(), rel=1e-5)


@pytest.mark.parametrize(
    ("path", "place", "name"),
    [
        (
            "blocks.3.attention.on_heads.gating.project.weight",
            "03",
            "attention.gating.project.weight",
        ),
        ("blocks.112.ffn.norm.gain", "112", "ffn.norm.gain"),
        ("norm.gain", "norm", "gain"),
        ("on_embedding.smear.gate.weight", "smear", "gate.weight"),
    ],
)
def test_a_name_is_told_by_its_place(path, place, name):
    assert place_of(path) == (place, name)


# ---- when, and what is kept ----


@pytest.mark.parametrize(("every", "near"), [(5, "4, 6"), (1, "2")])
def test_looks_stand_where_logs_are(every, near):
    with pytest.raises(
        UserError, match=f"dynamics={every} is no multiple of .*log_every=2.*: {near}$"
    ):
        settle(replace(CPU, dynamics=every), 4)


def test_a_number_that_is_none_leaves_a_gap(tiny, token_folder, monkeypatch):
    trainer = Trainer(tiny(), LOOKING, token_folder)
    looks = Watched(trainer, 1, pytest.fail)
    looks.advance()
    monkeypatch.setattr(looks.probe, "look", lambda *given: {"a": math.nan, "b": 1.0})
    found = looks.look()
    assert "a" not in found and found["b"] == 1.0
    assert looks.look() == {}  # once a step


def test_of_long_rows_few_are_read(tiny, token_folder, monkeypatch):
    trainer = Trainer(tiny(), LOOKING, token_folder)
    looks = Watched(trainer, 1, pytest.fail)
    looks.advance()
    monkeypatch.setattr(dynamics, "PROBED", 40)
    assert looks._rows().shape == (2, 17)


def test_lines_that_were_lost_or_changed_are_named_and_cost_no_result(
    tiny, token_folder, tmp_path
):
    result, record = train(tiny(), token_folder, tmp_path)
    assert list(record.dynamics(result)) == lines(record)
    kept = record.dynamics_path.read_bytes()
    record.dynamics_path.write_bytes(kept[: len(kept) // 2])
    with pytest.raises(Damaged, match="dynamics.jsonl is not what the run left.*no verdict"):
        record.dynamics(result)
    assert record.sound_result(pytest.fail) == result


def test_whoever_watches_a_run_is_told_with_the_log(tiny, token_folder, tmp_path):
    told = {}
    _, record = train(
        tiny(),
        token_folder,
        tmp_path,
        log=lambda step, scalars, _: told.update({step: scalars}),
    )
    for line in lines(record):
        step = line.pop("step")
        assert line.items() <= told[step].items()
    assert not any(name.startswith("layer/") for name in told[2])
    json.dumps(told)
