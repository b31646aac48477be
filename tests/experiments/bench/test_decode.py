"""The benchmark of decoding runs both ways on the same prompts, and they write the same."""

import pytest

from ablab.core.errors import UserError
from ablab.experiments.bench.decode import bench_decode

TINY = {"data.context": 32, "budget.tokens": 10**6, "runtime.device": "cpu"}


def test_both_ways_write_the_same_tokens():
    found = bench_decode("quickstart", TINY, "base", prompt=20, tokens=8, rows=2)
    assert found["same"]
    assert set(found["tokens_per_second"]) == {"cached", "again"}
    assert found["ratio"] > 0


def test_what_does_not_fit_is_refused():
    with pytest.raises(UserError, match="exceed the context of 32"):
        bench_decode("quickstart", TINY, "base", prompt=30, tokens=8, rows=1)
