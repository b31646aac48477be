"""Batches: pure in (seed, step, row), every window once an epoch, and bad token folders named in one line."""

import json
import os

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ablab.core.data.contents import digest_of
from ablab.core.data.tokens import Tokens, spread_rows
from ablab.core.errors import UserError


@pytest.fixture(scope="module")
def counting_folder(write_token_folder, tmp_path_factory):
    """Training token i is i, so that a row tells where it was cut: 1,003 tokens, 61 windows of 16."""
    folder = write_token_folder(
        tmp_path_factory.mktemp("data") / "counting", train=1003, vocab=1003
    )
    return with_ids(folder, np.arange(1003, dtype="<u2"))


def with_ids(folder, ids):
    """The folder with other training tokens, and a digest that says so."""
    ids.tofile(folder / "train.bin")
    meta = json.loads((folder / "meta.json").read_text())
    meta["digest"] = digest_of(folder, "uint16")
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


def open_tokens(tiny, folder, **more):
    return Tokens(
        tiny(data__vocab=json.loads((folder / "meta.json").read_text())["vocab"], **more),
        folder,
    )


def test_a_row_is_a_run_of_consecutive_tokens_one_longer_than_the_context(
    tiny, counting_folder
):
    rows = open_tokens(tiny, counting_folder).rows(0, 0, 4)
    assert rows.shape == (4, 17)
    assert rows.dtype == torch.int64
    assert torch.equal(rows, rows[:, :1] + torch.arange(17))


def test_an_epoch_visits_each_window_exactly_once(tiny, counting_folder):
    """61 windows at the epoch's own phase; with replacement 37 % would be missed."""
    tokens = open_tokens(tiny, counting_folder, data__batch=1)
    phases = set()
    orders = set()
    for epoch in range(4):
        starts = [tokens.rows(epoch * 61 + i, 0, 1)[0, 0].item() for i in range(61)]
        phases.add(min(starts))
        orders.add(tuple(starts))
        assert sorted(starts) == list(range(min(starts), min(starts) + 61 * 16, 16))
        assert min(starts) < 16
        assert starts != sorted(starts)
    assert len(orders) == 4
    assert len(phases) > 1


def test_batches_run_through_epochs_without_a_gap(tiny, counting_folder):
    """Batches of 4 do not divide 61 windows: the batch over the border takes its rows from both epochs."""
    whole = open_tokens(tiny, counting_folder)
    single = open_tokens(tiny, counting_folder, data__batch=1)
    rows = torch.cat([whole.rows(step, 0, 4) for step in range(32)])
    assert torch.equal(rows, torch.cat([single.rows(i, 0, 1) for i in range(128)]))
    assert len(set(rows[:61, 0].tolist())) == 61


@settings(max_examples=30)
@given(st.integers(0, 10_000), st.integers(0, 2**40), st.integers(0, 3))
def test_a_batch_is_a_pure_function_of_seed_step_and_row(
    tiny, counting_folder, step, seed, row
):
    fresh, used = (open_tokens(tiny, counting_folder, seed=seed) for _ in range(2))
    used.rows(step + 3, 0, 4)
    torch.manual_seed(step)
    np.random.seed(step % 2**32)
    assert torch.equal(fresh.rows(step, 0, 4)[row], used.rows(step, row, 1)[0])


@pytest.mark.parametrize("size", [1, 2, 4])
def test_micro_batches_concatenate_to_the_batch(tiny, token_folder, size):
    tokens = open_tokens(tiny, token_folder)
    pieces = [tokens.rows(5, first, size) for first in range(0, 4, size)]
    assert torch.equal(torch.cat(pieces), tokens.rows(5, 0, 4))


def test_seeds_and_steps_give_different_batches(tiny, counting_folder):
    batches = [
        open_tokens(tiny, counting_folder, seed=seed).rows(step, 0, 4)
        for seed in (0, 1, 2)
        for step in (0, 1, 2)
    ]
    assert len({tuple(batch.flatten().tolist()) for batch in batches}) == 9


def test_the_seed_alone_decides_so_every_arm_sees_the_same_rows(tiny, token_folder):
    arms = [
        open_tokens(tiny, token_folder),
        open_tokens(
            lambda **more: tiny(["muon", "qk_norm", "mup"], optim__lr=0.5, **more), token_folder
        ),
    ]
    assert all(
        torch.equal(arms[0].rows(step, 0, 4), arms[1].rows(step, 0, 4)) for step in range(20)
    )


def test_held_out_rows_are_spread_over_the_file_in_its_order_whatever_the_seed(
    tiny, token_folder
):
    """Its 400 tokens are 24 windows of 16 and one token more; 320 are 20 rows: 24 / 20 windows from one to the next."""
    ids = np.fromfile(token_folder / "val.bin", "<u2").astype(np.int64)
    for seed in (0, 1):
        tokens = open_tokens(tiny, token_folder, seed=seed)
        assert tokens.held_out_rows() == 20
        expected = np.stack([ids[16 * window : 16 * window + 17] for window in (3, 4, 6, 7, 8)])
        assert np.array_equal(tokens.held_out_batch(3, 5).numpy(), expected)
    quarter = open_tokens(tiny, token_folder, data__held_out=100)
    assert quarter.sources[0].held_out_starts == [0, 64, 128, 192, 256, 320]
    whole = open_tokens(tiny, token_folder, data__held_out=10_000)
    assert whole.sources[0].held_out_starts == list(range(0, 384, 16))


@settings(max_examples=100)
@given(
    context=st.integers(1, 50),
    windows=st.integers(1, 500),
    more=st.integers(0, 49),
    data=st.data(),
)
def test_spread_rows_never_meet_and_leave_no_long_gap(context, windows, more, data):
    """Each lies in the file, on a window; neighbours are n windows apart, n the mean distance rounded down or up."""
    tokens = windows * context + 1 + more % context
    wanted = data.draw(st.integers(1, windows))
    starts = np.array(spread_rows(tokens, context, wanted))
    assert len(starts) == wanted
    assert starts[0] == 0
    assert starts[-1] + context + 1 <= tokens
    assert not (starts % context).any()
    apart = np.diff([*starts, windows * context]) // context
    assert set(apart) <= {windows // wanted, -(-windows // wanted)}
    assert spread_rows(tokens, context, windows + 7) == list(
        range(0, windows * context, context)
    )


def test_the_shortest_folder_that_is_accepted_yields_its_one_window(
    tiny, write_token_folder, tmp_path
):
    tokens = open_tokens(tiny, write_token_folder(tmp_path / "short", train=32, val=17))
    assert (tokens.windows, tokens.held_out_rows()) == (1, 1)
    assert [tuple(tokens.rows(step, 0, 4).shape) for step in range(5)] == [(4, 17)] * 5


# ---- folders that do not fit ----


def refused(tiny, folder, **more) -> str:
    with pytest.raises(UserError) as flaw:
        Tokens(tiny(**more), folder).rows(0, 0, 4)
    assert "\n" not in str(flaw.value)
    assert str(folder) in str(flaw.value)
    return str(flaw.value)


def test_too_little_text_is_refused_with_what_there_is_and_what_is_needed(
    tiny, write_token_folder, tmp_path
):
    assert "train.bin holds 31 tokens, but context=16 needs at least 32" in refused(
        tiny, write_token_folder(tmp_path / "a", train=31)
    )
    assert "val.bin holds 16 tokens, but context=16 needs at least 17" in refused(
        tiny, write_token_folder(tmp_path / "b", val=16)
    )


def test_another_vocabulary_is_refused_with_the_override_that_fits(tiny, token_folder):
    assert refused(tiny, token_folder, data__vocab=65).endswith("set data.vocab=64")


def test_a_token_beyond_the_vocabulary_is_refused_by_number(tiny, write_token_folder, tmp_path):
    folder = with_ids(write_token_folder(tmp_path / "high"), np.full(1000, 64, "<u2"))
    assert "holds token 64, beyond data.vocab=64" in refused(tiny, folder)


def test_other_text_than_the_recipe_names_is_refused_with_both_digests(tiny, token_folder):
    digest = digest_of(token_folder, "uint16")
    said = refused(tiny, token_folder, data__digest="feedfeedfeedfeed")
    assert digest in said
    assert "feedfeedfeedfeed" in said
    Tokens(tiny(data__digest=digest), token_folder)


@pytest.mark.parametrize("name", ["train.bin", "val.bin", "token_bytes.npy"])
def test_a_file_overwritten_at_equal_size_is_refused_with_both_digests(
    tiny, write_token_folder, tmp_path, name
):
    folder = write_token_folder(tmp_path / "changed")
    digest = digest_of(folder, "uint16")
    Tokens(tiny(), folder)
    content = bytearray((folder / name).read_bytes())
    content[-2] ^= 1
    (folder / name).write_bytes(content)
    said = refused(tiny, folder)
    assert f"meta.json says {digest}" in said
    assert f"have digest {digest_of(folder, 'uint16')}" in said


def test_a_missing_and_a_truncated_folder_are_refused(tiny, write_token_folder, tmp_path):
    assert "no token folder" in refused(tiny, tmp_path / "nowhere")
    folder = write_token_folder(tmp_path / "cut")
    (folder / "train.bin").write_bytes((folder / "train.bin").read_bytes()[:-1])
    assert "has 1,999 bytes, but meta.json says 2,000" in refused(tiny, folder)


def test_tokens_written_over_while_a_run_reads_them_are_refused(
    tiny, write_token_folder, tmp_path
):
    for name in ("train.bin", "val.bin"):
        folder = write_token_folder(tmp_path / name)
        tokens = Tokens(tiny(), folder)
        tokens.rows(0, 0, 4)
        tokens.held_out_batch(0, 4)
        with open(folder / name, "r+b") as file:
            file.write(b"\x01")
        os.utime(
            folder / name, ns=(0, 0)
        )  # not the time of its making, whatever the clock's tick
        with pytest.raises(UserError, match=f"{name} was written over while it was read"):
            for step in range(2):
                tokens.rows(step, 0, 4)
                tokens.held_out_batch(step, 4)


def test_tokens_replaced_or_deleted_meanwhile_are_read_to_the_end(
    tiny, write_token_folder, tmp_path
):
    folder = write_token_folder(tmp_path / "gone")
    tokens = Tokens(tiny(), folder)
    first = tokens.rows(0, 0, 4), tokens.held_out_batch(0, 4)
    other = write_token_folder(tmp_path / "other", seed=1)
    os.replace(other / "train.bin", folder / "train.bin")
    os.unlink(folder / "val.bin")
    assert torch.equal(tokens.rows(0, 0, 4), first[0])
    assert torch.equal(tokens.held_out_batch(0, 4), first[1])


# ---- what a held-out token is ----


def test_held_out_targets_say_their_bytes_and_their_document(tiny, token_folder):
    """Documents end with token 0, and are counted over the whole file, whatever rows are read."""
    ids = np.fromfile(token_folder / "val.bin", "<u2").astype(np.int64)
    sizes = np.load(token_folder / "token_bytes.npy")
    numbers = []  # document of each token: a loop
    number = 0
    for token in ids:
        numbers.append(number)
        number += token == 0
    assert number > 5
    for held_out in (100, 10_000):
        tokens = open_tokens(tiny, token_folder, data__held_out=held_out)
        found_sizes, documents = tokens.held_out_targets()
        for row, start in enumerate(tokens.sources[0].held_out_starts):
            targets = slice(start + 1, start + 17)
            assert np.array_equal(found_sizes[row], sizes[ids[targets]])
            assert np.array_equal(documents[row], numbers[targets])
