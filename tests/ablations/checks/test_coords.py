"""The coordinate check: it reads slopes rightly, muP passes it, and the standard parametrization does not."""

import json
import math

import numpy as np
import pytest
import torch
import typer
from typer.testing import CliRunner

from ablab.ablations.checks.coords import (
    CHANGES,
    FLAT,
    PEAK,
    START,
    Row,
    coordinates,
    failing,
    slopes,
    tokens,
)
from ablab.core.errors import UserError
from ablab.core.model.objective import token_losses
from ablab.core.train.banks import Optimizer
from ablab.experiments.cli import check as check_cli

WIDTHS, SEEDS = (32, 64, 128, 256), (0, 1, 2)
MUP = {"mup": {"base_width": 8}}


def small(tiny, treatment=(), **paths):
    """Two layers with heads of 8 and a feed-forward of two widths; 256 tokens a batch."""
    ffn = {"kind": "swiglu", "expansion": 2.0, "multiple": 8}
    return tiny(
        treatment,
        **(
            {
                "model__layers": 2,
                "model__ffn": ffn,
                "data__context": 32,
                "data__batch": 8,
                "budget__tokens": 1e6,
            }
            | paths
        ),
    )


# ---- slopes ----


def power_laws(exponents, noise=0.0, steps=3):
    draw = np.random.default_rng(0)
    for tensor, slope in exponents.items():
        for width in WIDTHS:
            for seed in SEEDS:
                for step in range(1, steps + 1):  # earlier steps have slopes of their own
                    yield Row(
                        width,
                        seed,
                        step,
                        tensor,
                        3.0 * width ** (slope + step - steps) * np.exp(noise * draw.normal()),
                    )


def test_slopes_are_the_exponents_of_power_laws_at_the_last_step():
    exponents = {"logits": -0.5, "residual": 0.0, "attention out": 1.82}
    assert slopes(power_laws(exponents)) == pytest.approx(exponents, abs=1e-9)


def test_slopes_average_over_seeds_before_the_logarithm():
    """Two seeds a width at 1 and 1 + w: the mean is 1 + w/2, whatever the mean of the logarithms."""
    rows = [
        Row(width, seed, 5, "logits", 1.0 + seed * width) for width in WIDTHS for seed in (0, 1)
    ]
    expected = np.polyfit(np.log(WIDTHS), np.log1p(np.array(WIDTHS) / 2), 1)[0]
    assert slopes(rows)["logits"] == pytest.approx(expected, abs=1e-12)


def test_slopes_do_not_depend_on_the_order_of_rows():
    rows = list(power_laws({"logits": 0.3}, noise=0.2))
    assert slopes(rows[::-1])["logits"] == pytest.approx(slopes(rows)["logits"], abs=1e-12)


@pytest.mark.parametrize("bad", [0.0, math.inf, math.nan])
def test_a_change_that_is_zero_or_not_finite_has_no_slope_and_fails(bad):
    rows = [
        row
        for row in power_laws(dict.fromkeys(CHANGES, 0.0))
        if (row.tensor, row.width) != ("logits", 64)
    ]
    found = slopes([*rows, Row(64, 0, 3, "logits", bad)])
    assert math.isnan(found["logits"]) and failing(found) == ["logits"]


def test_a_slope_of_either_sign_fails_beyond_the_limit_the_steepest_first():
    steep = dict(zip(CHANGES, (FLAT, -FLAT - 0.01, 0.0, 1.2, -FLAT), strict=True))
    assert failing(steep | {START: -0.5, PEAK: 3.0}) == ["residual", "feed-forward up"]


# ---- what is recorded ----


def by_hand(model, block) -> dict[str, torch.Tensor]:
    """The activations of a pre-norm SwiGLU transformer, from its parts; the largest attention logit apart."""
    x, seen = model.embedding(block), {name: [] for name in (*CHANGES, PEAK)}
    for layer in model.blocks:
        q, k, _, _ = layer.attention.project(layer.attention.normed(x), {}, 0)
        visible = torch.ones(q.shape[2], q.shape[2]).tril()
        seen[PEAK].append(((q @ k.mT) * visible).abs().max() / q.shape[-1] ** 0.5)
        seen["attention out"].append(layer.attention(x, {})[0])
        x = x + seen["attention out"][-1]
        gate, up = layer.ffn.inner.gate_up(layer.ffn.norm(x)).chunk(2, dim=-1)
        seen["feed-forward up"].append(torch.nn.functional.silu(gate) * up)
        seen["feed-forward out"].append(layer.ffn.inner.down(seen["feed-forward up"][-1]))
        x = x + seen["feed-forward out"][-1]
    return {
        name: torch.stack(
            values or [x if name == "residual" else model.logits(model.norm(x))]
        ).detach()
        for name, values in seen.items()
    }


def test_what_is_recorded_is_the_rms_change_of_the_activations_named(tiny, build):
    """Against a model of the same seed that takes one step and is read by hand."""
    recipe = small(tiny, [MUP], seed=1, schedule="constant", optim__lr=0.01)
    rows = {
        (row.step, row.tensor): row.change
        for row in coordinates(recipe, WIDTHS, SEEDS, 5, 0.01)
        if (row.width, row.seed) == (32, 1)
    }
    model, block = build(recipe), tokens(recipe)
    optimizer, before = Optimizer(model, recipe), by_hand(model, block[:, :-1])
    token_losses(model(block[:, :-1]), block[:, 1:]).mean().backward()
    optimizer.step(1)
    after = by_hand(model, block[:, :-1])
    expected = {
        (1, name): (after[name] - before[name]).square().mean().sqrt().item()
        for name in CHANGES
    }
    expected |= {
        (0, START): before["logits"].square().mean().sqrt().item(),
        (0, PEAK): before[PEAK].max().item(),
        (1, PEAK): after[PEAK].max().item(),
    }
    assert {key: rows[key] for key in expected} == pytest.approx(expected, rel=1e-4)
    assert {tensor for _, tensor in rows} == {*CHANGES, START, PEAK} and {
        step for step, _ in rows
    } == set(range(6))


def test_when_the_readout_alone_learns_the_logits_alone_move(tiny):
    still = {f"optim__chains__{role}__lr": 1e-9 for role in ("embedding", "hidden", "vector")}
    rows = coordinates(small(tiny, **still), WIDTHS, SEEDS, 5, 0.02)
    last = {
        row.tensor: row.change for row in rows if (row.width, row.seed, row.step) == (64, 0, 5)
    }
    assert (
        last["logits"] > 0.1 and max(last[name] for name in CHANGES if name != "logits") < 1e-5
    )


def test_the_batch_is_fixed_and_its_frequencies_fall(tiny):
    recipe = small(tiny, data__batch=256)
    block = tokens(recipe)
    assert (
        block.shape == (256, 33)
        and torch.equal(block, tokens(recipe))
        and not torch.equal(block, tokens(recipe, seed=1))
    )
    counts = torch.bincount(block.flatten(), minlength=64).double()
    expected = 1 / torch.arange(1, 65) / (1 / torch.arange(1, 65)).sum()
    assert (counts / counts.sum() - expected).abs().max() < 0.015


def test_grouped_queries_other_feed_forwards_and_every_stage_can_be_checked(tiny):
    recipe = small(
        tiny,
        ["relu2", "qk_norm", "gating", "value_residual", "ln_scaling", "soft_cap"],
        model__attention__group=2,
        model__ffn="swiglu",
    )
    assert all(
        math.isfinite(slope)
        for slope in slopes(coordinates(recipe, (16, 32, 48, 64), SEEDS, 5, 0.01)).values()
    )


# ---- the verdicts ----


@pytest.mark.parametrize("more", [[], ["qk_norm"]])
def test_mup_passes_and_the_standard_parametrization_fails(tiny, more):
    """Measured, three sets of seeds: all within 0.10 against 0.7 and more."""
    ours, standard = (
        slopes(coordinates(small(tiny, [*more, *arm]), WIDTHS, SEEDS, 6, 0.05))
        for arm in ([MUP], [])
    )
    assert failing(ours) == [], ours
    assert {"attention out", "feed-forward out", "residual"} <= set(failing(standard)), standard
    assert ours[START] == pytest.approx(-0.5, abs=0.05) and standard[START] == pytest.approx(
        0.0, abs=0.05
    )


def test_half_the_exponent_is_seen(tiny):
    """A hidden learning rate that falls as m^-1/2 is wrong under Adam."""
    found = slopes(
        coordinates(
            small(tiny, [{"mup": {"base_width": 8, "adam_lr": 0.5}}]), WIDTHS, SEEDS, 5, 0.05
        )
    )
    assert found["residual"] > 3 * FLAT, found


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"widths": (32, 64, 128)}, "at least 4 widths, not 3"),
        ({"widths": (32, 64, 64, 128)}, "at least 4 widths, not 3"),
        ({"seeds": (0, 1)}, "at least 3 seeds, not 2"),
        ({"steps": 4}, "at least 5 steps, not 4"),
        (
            {"widths": (32, 64, 128, 250)},
            "model.width=250 is 31.2 heads of 8; .*nearest: 248, 256",
        ),
    ],
)
def test_too_little_to_read_a_slope_from_is_refused(tiny, words, said):
    with pytest.raises(UserError, match=said):
        coordinates(
            small(tiny), **({"widths": WIDTHS, "seeds": SEEDS, "steps": 5, "lr": 0.02} | words)
        )


# ---- the command ----

COMMAND = typer.Typer()
COMMAND.add_typer(check_cli.app, name="check")
QUICK = (
    "--widths",
    "16,32,48,64",
    "--steps",
    "5",
    "data.context=16",
    "data.batch=4",
    "data.vocab=64",
)


@COMMAND.command()
def other():
    """So that `check` stays a group."""


def call(*words):
    result = CliRunner().invoke(COMMAND, ["check", "coords", *words])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def test_the_command_leaves_a_picture_and_numbers_and_its_exit_code_is_its_verdict(tmp_path):
    result = call(*QUICK, "--out", str(tmp_path / "found"), "--json")
    printed, saved = (
        json.loads(result.stdout),
        json.loads((tmp_path / "found" / "coords.json").read_text()),
    )
    arms = {arm["name"]: arm for arm in printed["arms"]}
    assert (
        set(arms) == {"standard", "mup"}
        and printed["base_width"] == 4
        and (tmp_path / "found" / "coords.png").stat().st_size > 10_000
    )
    good = bool(arms["standard"]["failing"]) and not arms["mup"]["failing"]
    assert result.exit_code == (0 if good else 1)
    assert len(saved["arms"][1]["rows"]) == 4 * 3 * (2 + 5 * 6)
    assert arms["mup"]["slopes"] == pytest.approx(
        slopes(Row(**row) for row in saved["arms"][1]["rows"]), abs=1e-4
    )


def test_a_mup_arm_that_is_not_flat_is_named_with_its_tensor():
    """The exponent 0 is the standard parametrization's."""
    result = call(*QUICK, "--lr", "0.05", "--with", "mup: {adam_lr: 0.0, base_width: 16}")
    assert result.exit_code == 1 and "FAIL" in result.stdout
    assert (
        "arm 'mup: {adam_lr: 0.0, base_width: 16}' fails: " in result.stderr
        and "changes as width^+" in result.stderr
    )


def test_a_standard_parametrization_that_passes_shows_nothing():
    """Forged: every change flat."""
    arm = {
        "name": "standard",
        "control": True,
        "parametrization": "standard",
        "failing": [],
        "slopes": {},
    }
    assert "the standard parametrization passes, so the check shows nothing" in check_cli._flaw(
        {"arms": [arm], "flat": FLAT}
    )
    assert check_cli._flaw({"arms": [arm | {"failing": ["logits"]}], "flat": FLAT}) is None


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--widths", "64,wide"], "--widths '64,wide' must look like 64,128,256"),
        (["--seeds", "0..2"], "--seeds '0..2' must look like 0-2"),
        (["--with", "mupp"], "unknown intervention 'mupp'. Did you mean 'mup'"),
        (["--with", "mup, {"], "must list interventions as an experiment does"),
        (["--device", "gpu"], "device='gpu' must be one of auto, cpu, cuda"),
        (["model.widht=3"], "unknown path 'model.widht'"),
        (["--lr", "-1"], "--lr -1 must be a number above 0"),
        (["--lr", "inf"], "--lr inf must be a number above 0"),
        (["--widths", "64,128,256"], "at least 4 widths"),
        (["--widths", "64,128,256,500"], "model.width=500"),
    ],
)
def test_what_cannot_be_met_is_one_line(words, said):
    with pytest.raises(UserError, match=said.replace("(", r"\(")):
        call(*words)
