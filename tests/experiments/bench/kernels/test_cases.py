"""The cases: their formulas and their work, against loops and sums by hand."""

import math

import pytest
import torch
from torch.nn.attention import SDPBackend

from ablab.core.runtime.runtime import repeat_bits
from ablab.experiments.bench.kernels import attention as cases
from ablab.experiments.bench.kernels.attention import attention
from ablab.experiments.bench.kernels.measure import Ceilings, measure
from ablab.experiments.bench.kernels.newton_schulz import flops

CPU = torch.device("cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_on_a_gpu_every_form_of_attention_is_timed_with_small_errors(tmp_path):
    cuda = torch.device("cuda")
    repeat_bits(
        False
    )  # as `ablab bench kernels` runs: a peer may have no algorithm that repeats them
    case = next(iter(attention(cuda, tmp_path)))
    rows = measure(case, Ceilings(matmul=800e12, copy=3e12), cuda)
    assert not [row.note for row in rows if row.note]
    for row in rows:
        assert row.error < 5e-3
        assert row.gradient_error < 1e-2
        assert row.total_ms > row.floor_ms / 2


def test_each_backend_of_torch_attends_in_a_graph_of_its_own(monkeypatch):
    from torch._dynamo.testing import AotEagerAndRecordGraphs

    recorded = AotEagerAndRecordGraphs()
    monkeypatch.setattr(cases, "needs_gpu", lambda device: None)
    monkeypatch.setattr(
        cases, "compiled", lambda call, device: torch.compile(call, backend=recorded)
    )
    shape = cases.SHAPES["cpu"][0]
    inputs = cases._inputs(shape, CPU)
    for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH):
        cases._sdpa(shape, CPU, backend).call(*inputs)

    def is_fused(graph):
        return any("flash" in str(node.target) for node in graph.graph.nodes)

    assert [is_fused(graph) for graph in recorded.fw_graphs] == [True, False]


def test_newton_schulz_products_are_counted_in_full_along_the_shorter_side():
    """768x2048, 7 triples.

    X X^T and the sum times X take 2 * 768^2 * 2048 each, the square of X X^T 2 * 768^3.
    """
    one = 7 * (2 * 2 * 768 * 768 * 2048 + 2 * 768**3)
    assert flops((8, 768, 2048), "polar7") == 8 * one
    assert flops((8, 2048, 768), "polar7") == 8 * one


def test_the_whole_70m_model_takes_1_42_tflop_of_newton_schulz():
    """Its 32 matrices, none taken apart."""
    shapes = [
        (8, 2304, 768),
        (8, 768, 768),
        (8, 4096, 768),
        (8, 768, 2048),
    ]
    whole = sum(flops(shape, "polar7") for shape in shapes)
    assert whole == pytest.approx(1.42e12, rel=0.01)


class Head:
    """One query head of the packed qkv [B,T,(H+2KV)*D], attended position by position in fp64."""

    def __init__(self, inputs, head, heads, kv_heads, dim):
        qkv, q_gain, k_gain, gate, self.cos, self.sin = inputs
        shared = head // (heads // kv_heads)
        q, k, self.v = (
            qkv[..., index * dim : (index + 1) * dim]
            for index in (head, heads + shared, heads + kv_heads + shared)
        )
        self.q = self.turned(q, q_gain)
        self.k = self.turned(k, k_gain)
        self.gate = gate[..., head, None]

    def turned(self, x, gain):
        mean_square = x.square().mean(-1, keepdim=True)
        x = x / (mean_square + 1e-6).sqrt() * gain
        left, right = x.chunk(2, -1)
        turned_left = left * self.cos - right * self.sin
        turned_right = right * self.cos + left * self.sin
        return torch.cat((turned_left, turned_right), -1)

    def at(self, position):
        past = slice(position + 1)
        scores = torch.einsum("bd,btd->bt", self.q[:, position], self.k[:, past])
        odds = (scores / math.sqrt(self.q.shape[-1])).softmax(-1)
        mixed = torch.einsum("bt,btd->bd", odds, self.v[:, past])
        return mixed * self.gate[:, position]


def test_all_attention_forms_start_from_the_same_packed_qkv(tmp_path):
    """The fp32 formula against a loop over positions in fp64, for one head of each group."""
    (case,) = attention(CPU, tmp_path)
    with torch.no_grad():
        y = case.reference(*case.inputs).double()
    heads, kv_heads, tokens, dim = 4, 2, 32, 32
    inputs = [x.detach().double() for x in case.inputs]
    for index in (1, 3):
        head = Head(inputs, index, heads, kv_heads, dim)
        for position in (0, 7, tokens - 1):
            found = y[:, position, index * dim : (index + 1) * dim]
            wanted = head.at(position)
            assert (found - wanted).norm() / wanted.norm() < 1e-5
