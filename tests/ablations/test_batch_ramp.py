"""Batch ramp: rows rise with the tokens seen, over the windows of the control, and nothing is left out."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ablab.ablations.interventions.batch_ramp import BatchRamp
from ablab.core.data.tokens import Tokens
from ablab.core.errors import UserError
from ablab.core.recipe.batches import batches_of
from ablab.core.runtime.runtime import Runtime
from ablab.core.store.record import Record
from ablab.core.train.run import run
from ablab.core.train.trainer import Trainer

CPU = Runtime(device="cpu", compile=False, log_every=1, evaluations=2)
BATCH = 24
CONTEXT = 16


@st.composite
def ramps(draw) -> BatchRamp:
    counts = st.integers(1, BATCH)
    rows = draw(st.lists(counts, min_size=2, max_size=5, unique=True))
    stages = tuple(count / BATCH for count in sorted(rows))
    return BatchRamp(stages, draw(st.sampled_from([0.1, 0.5, 0.75, 1.0])))


def rows_at(ramp: BatchRamp, seen: int, tokens: int) -> int:
    """Of a step that begins after `seen` tokens: stage i holds until i/n of `until`, the last one to the end."""
    count = len(ramp.stages)
    ends = [Fraction(ramp.until) * i / count for i in range(1, count)]
    stage = sum(seen >= round(end * tokens) for end in ends)
    return round(ramp.stages[stage] * BATCH)


@given(ramp=ramps(), windows=st.integers(BATCH, 2000))
def test_each_step_has_the_rows_of_the_stage_in_which_it_begins(ramp, windows):
    tokens = windows * CONTEXT
    batches = batches_of(ramp, BATCH, CONTEXT, tokens)
    seen = 0
    for step in range(batches.steps):
        assert batches.at(step).windows == rows_at(ramp, seen, tokens)
        assert batches.windows_before(step) * CONTEXT == seen
        seen += batches.at(step).windows * CONTEXT
    assert tokens - BATCH * CONTEXT < seen <= tokens


@given(ramp=ramps(), windows=st.integers(BATCH, 2000))
def test_rows_never_fall_and_every_step_is_whole_micro_batches(ramp, windows):
    batches = batches_of(ramp, BATCH, CONTEXT, windows * CONTEXT)
    rows = [batches.at(step).windows for step in range(batches.steps)]
    assert rows == sorted(rows)
    assert all(count % batches.largest_micro_batch == 0 for count in rows)


def test_the_default_is_a_quarter_a_half_and_all_of_the_batch_over_equal_thirds(tiny):
    """768 tokens: 16 steps of 16 tokens, 8 of 32 and 4 of 64."""
    recipe = tiny(["batch_ramp"])
    spans = [(span.steps, span.windows) for span in recipe.batches.spans]
    assert spans == [(16, 1), (8, 2), (4, 4)]
    assert recipe.tokens_after(recipe.steps) == 768


def test_until_ends_the_ramp_early(tiny):
    """Over the first half: 8 steps of 16 tokens, 4 of 32, and the full batch for two thirds of the tokens."""
    recipe = tiny([{"batch_ramp": {"until": 0.5}}])
    spans = [(span.steps, span.windows) for span in recipe.batches.spans]
    assert spans == [(8, 1), (4, 2), (8, 4)]


def test_every_window_is_seen_once_an_epoch_in_the_order_of_the_control(tiny, token_folder):
    """61 windows an epoch: the run of 72 goes into the second."""
    recipe = tiny(["batch_ramp"], budget__tokens=72 * 16)
    tokens = Tokens(recipe, token_folder)
    plain = Tokens(tiny(), token_folder)
    sizes = [recipe.batches.at(t).windows for t in range(recipe.steps)]
    ours = [tokens.rows(t, 0, size) for t, size in enumerate(sizes)]
    theirs = [plain.rows(t, 0, 4) for t in range(18)]
    rows = torch.cat(ours)
    assert torch.equal(rows, torch.cat(theirs))
    assert tokens.windows == 61
    assert len(rows[:61].unique(dim=0)) == 61


def test_shares_may_be_rounded_to_four_digits():
    thirds = BatchRamp((0.3333, 0.6667, 1.0))
    assert [phase.rows for phase in thirds.phases(192, 16)] == [64, 128, 192]


@pytest.mark.parametrize(
    ("stages", "said"),
    [
        ([0.5], r"stages=\[0.5\] must be two shares of the batch or more"),
        ([], r"stages=\[\] must be two shares"),
        ([0.5, 0.25, 1.0], r"stages=\[0.5, 0.25, 1\] must be .* each above the one before it"),
        ([0.5, 0.5], "each above the one before it"),
        ([0.3, 1.0], "stages=0.3 of data.batch=4 is 1.20 rows; use whole rows, as 0.25"),
        ([0.01, 1.0], "stages=0.01 of data.batch=4 is 0.04 rows; use whole rows, as 0.25"),
        ([0.5, 1.5], "must be"),
    ],
)
def test_stages_that_do_not_rise_or_are_not_whole_rows_are_refused(tiny, stages, said):
    with pytest.raises(UserError, match=said) as refusal:
        tiny([{"batch_ramp": {"stages": stages}}])
    assert "\n" not in str(refusal.value)


def test_a_set_micro_batch_must_divide_every_stage(tiny, token_folder):
    ramp = {"batch_ramp": {"stages": [0.5, 1.0]}}
    recipe = tiny([ramp])
    assert Trainer(recipe, CPU, token_folder).runtime.micro_batch == 2
    single = Runtime(device="cpu", micro_batch=1)
    assert Trainer(recipe, single, token_folder).runtime.micro_batch == 1
    thirds = tiny([ramp], data__batch=12)  # stages of 6 and 12
    with pytest.raises(UserError, match="runtime.micro_batch=4 does not divide"):
        Trainer(thirds, Runtime(device="cpu", micro_batch=4), token_folder)


def test_the_schedule_stretches_over_the_steps_and_knows_nothing_of_rows(
    tiny, token_folder, tmp_path
):
    """A constant learning rate: small steps move as far as full ones; the run learns the frequencies."""
    recipe = tiny(
        ["batch_ramp"],
        budget__tokens=60 * 64,
        schedule={"kind": "constant", "warmup_steps": 3},
        optim__lr=0.01,
    )
    record = Record(tmp_path)
    result = run(recipe, CPU, token_folder, record)
    lines = list(record.metrics())
    assert result.step == recipe.steps == 80 + 40 + 20
    assert [line["optim/lr"] for line in lines[2:]] == [0.01] * 138
    grown = [line["tokens"] for line in lines]
    taken = [after - before for before, after in zip([0, *grown], grown, strict=False)]
    assert taken == [16] * 80 + [32] * 40 + [64] * 20
    assert lines[0]["train/loss"] > 4.0
    assert sum(line["train/loss"] for line in lines[-10:]) / 10 < 3.7


def test_no_kernel_steps_aside_for_it(tiny, refusals):
    """The kernels compute a micro-batch, and its rows are the same in every stage."""
    served = {"model__width": 64, "model__attention__head_dim": 32}
    recipe = tiny(["batch_ramp"], **served)
    assert not refusals(recipe, "bf16")
