"""The document mask against fp64 attention within each document by itself, whole and token by token."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ablab.ablations.interventions.document_mask import ROW, within_documents
from ablab.core.errors import UserError
from ablab.core.runtime.runtime import Runtime
from ablab.core.train.trainer import Trainer

END = 0


def masked(**dose):
    return [{"document_mask": dose}]


@given(st.lists(st.sampled_from([0, 0, 5, 6]), min_size=2, max_size=12), st.data())
def test_each_query_mixes_the_keys_of_its_own_document_up_to_itself(row, data):
    start = data.draw(st.integers(0, len(row) - 1))
    draw = torch.Generator().manual_seed(len(row))
    keys = len(row)
    q = torch.randn(1, 4, keys - start, 6, generator=draw, dtype=torch.float64)
    k = torch.randn(1, 2, keys, 6, generator=draw, dtype=torch.float64)
    v = torch.randn(1, 2, keys, 6, generator=draw, dtype=torch.float64)
    y = within_documents(q, k, v, {ROW: torch.tensor([row])}, start, end_of_text=END)
    for t in range(start, keys):
        begin = max((i + 1 for i in range(t) if row[i] == END), default=0)
        for head in range(4):
            own_keys = k[0, head // 2, begin : t + 1]
            scores = own_keys @ q[0, head, t - start] / math.sqrt(6)
            expected = scores.softmax(0) @ v[0, head // 2, begin : t + 1]
            assert torch.allclose(y[0, head, t - start], expected, atol=1e-12)


def test_a_document_is_read_in_a_row_as_it_is_read_alone(tiny, build):
    """Rotary positions are relative, so that it does not matter where in the row it stands."""
    model = build(tiny(masked()), stirred=0.1)
    first = torch.tensor([[7, 9, 12, END]])
    second = torch.tensor([[5, 5, 33, 2, END, 8]])
    together = model(torch.cat((first, second), 1))
    assert (together[:, :4] - model(first)).abs().max() < 1e-5
    assert (together[:, 4:9] - model(second)[:, :5]).abs().max() < 1e-5


@pytest.mark.parametrize("sizes", [[1] * 16, [5, 1, 1, 9], [15, 1]])
def test_decoding_with_a_cache_equals_the_full_forward(tiny, build, sizes):
    model = build(tiny(masked(), model__attention__group=2), stirred=0.1)
    row = np.random.default_rng(0).choice([END, 5, 6, 40], (3, 16))
    tokens = torch.from_numpy(row)
    pieces = []
    cache = None
    for piece in tokens.split(sizes, dim=1):
        logits, cache = model.extend(piece, cache)
        pieces.append(logits)
    assert (torch.cat(pieces, 1) - model(tokens)).abs().max() < 1e-5


def test_a_row_without_an_end_is_causal_attention(tiny, build):
    tokens = torch.randint(1, 64, (2, 16), generator=torch.Generator().manual_seed(0))
    plain, own = (build(tiny(arms), stirred=0.1) for arms in ([], masked()))
    assert (plain(tokens) - own(tokens)).abs().max() < 1e-5


def test_an_end_that_is_not_the_tokens_own_is_refused(tiny, token_folder):
    with pytest.raises(
        UserError, match=r"document_mask\.end_of_text=3, but .*/tiny ends documents with id 0"
    ):
        Trainer(tiny(masked(end_of_text=3)), Runtime(device="cpu"), token_folder)
