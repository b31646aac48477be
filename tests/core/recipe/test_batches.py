"""Batch shapes: which windows a step takes, against a loop over steps."""

from dataclasses import dataclass, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ablab.core.errors import UserError
from ablab.core.language.part import Part
from ablab.core.parts.shape import Fixed, Phase
from ablab.core.recipe.batches import batches_of
from ablab.core.recipe.recipe import check, run_id

BATCH, CONTEXT = 8, 16


@dataclass(frozen=True)
class Listed(Part):
    """Phases as listed, whatever the batch."""

    listed: tuple[Phase, ...]
    kind: str = "listed"

    def phases(self, batch: int, context: int) -> tuple[Phase, ...]:
        return self.listed


@st.composite
def shapes(draw) -> Listed:
    count = draw(st.integers(1, 4))
    marks = st.integers(1, 99)
    ends = draw(st.lists(marks, min_size=count - 1, max_size=count - 1, unique=True))
    phases = []
    for end in [*sorted(ends), 100]:
        pieces = draw(st.sampled_from([1, 2, 4]))
        windows = draw(st.integers(1, BATCH))
        phases.append(Phase(end / 100, windows * pieces, CONTEXT // pieces))
    return Listed(tuple(phases))


def looped(shape: Listed, tokens: int) -> list[tuple[int, int, int]]:
    """(windows before the step, windows of the step, pieces) of every step, one after another."""
    steps, seen = [], 0
    while True:
        phase = next(
            (one for one in shape.listed if seen < round(one.until * tokens)), shape.listed[-1]
        )
        pieces = CONTEXT // phase.context
        size = phase.rows * phase.context
        if seen + size > tokens:
            return steps
        steps.append((seen // CONTEXT, phase.rows // pieces, pieces))
        seen += size


@given(shape=shapes(), windows=st.integers(1, 300))
def test_every_step_is_of_the_phase_in_which_it_begins(shape, windows):
    """The budget's tokens are kept to within the step that did not fit any more."""
    tokens = windows * CONTEXT
    batches = batches_of(shape, BATCH, CONTEXT, tokens)
    steps = looped(shape, tokens)
    found = [
        (batches.windows_before(t), batches.at(t).windows, batches.at(t).pieces)
        for t in range(len(steps))
    ]
    assert found == steps
    taken = batches.windows_before(batches.steps) * CONTEXT
    assert taken <= tokens


@given(shape=shapes(), windows=st.integers(1, 300))
def test_steps_take_window_after_window_and_leave_none_out(shape, windows):
    batches = batches_of(shape, BATCH, CONTEXT, windows * CONTEXT)
    taken = [
        window
        for t in range(batches.steps)
        for window in range(
            batches.windows_before(t), batches.windows_before(t) + batches.at(t).windows
        )
    ]
    assert taken == list(range(batches.windows_before(batches.steps)))
    assert all(batches.at(t).windows % batches.largest_micro_batch == 0 for t in range(windows))


@given(tokens=st.integers(1, 10_000), batch=st.integers(1, 12))
def test_a_fixed_shape_takes_the_whole_steps_that_the_budget_holds(tokens, batch):
    batches = batches_of(Fixed(), batch, CONTEXT, tokens)
    assert batches.steps == tokens // (batch * CONTEXT)
    assert batches.largest_micro_batch == batch
    assert batches.windows_before(7) == 7 * batch


def shaped(tiny, *phases: Phase):
    recipe = tiny()
    return replace(recipe, data=replace(recipe.data, shape=Listed(phases)))


def test_the_recipe_counts_steps_and_tokens_by_its_shape(tiny):
    """768 tokens: a quarter in steps of 16 (12 of them), the rest in steps of 64 (9)."""
    recipe = shaped(tiny, Phase(0.25, 1, 16), Phase(1.0, 4, 16))
    assert recipe.steps == 12 + 9 and recipe.tokens_per_step == 64
    assert [recipe.tokens_after(t) for t in (0, 1, 12, 13, 21)] == [0, 16, 192, 256, 768]


@pytest.mark.parametrize(
    ("phases", "said"),
    [
        ([], "end at nowhere of the budget"),
        (
            [Phase(0.5, 4, 16)],
            "end at 0.5 of the budget; they must follow each other and end at 1",
        ),
        ([Phase(0.5, 4, 16), Phase(0.4, 4, 16), Phase(1.0, 4, 16)], "end at 0.5, 0.4, 1"),
        (
            [Phase(1.0, 4, 5)],
            "rows of 5 tokens, which do not divide a window of data.context=16",
        ),
        ([Phase(1.0, 5, 8)], "5 rows of 8 tokens a step.* use a multiple of 2, as 6"),
        ([Phase(1.0, 0, 16)], "0 rows of 16 tokens a step.* use a multiple of 1, as 1"),
    ],
)
def test_a_shape_that_cannot_be_cut_is_refused(tiny, phases, said):
    with pytest.raises(UserError, match=said):
        check(shaped(tiny, *phases))


def test_the_fixed_shape_is_no_part_of_an_identity_and_another_is(tiny):
    assert (
        run_id(tiny()) == "411cc91280f1bd78"
    )  # that of a recipe without the field: test_slots.py writes it out
    assert run_id(shaped(tiny, Phase(1.0, 4, 16))) != run_id(tiny())
