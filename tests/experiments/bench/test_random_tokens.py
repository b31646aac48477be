"""What the benchmarks train on."""

import numpy

from ablab.experiments.bench.random_tokens import experiment_on_random_tokens


def test_a_size_alone_can_be_timed(tmp_path):
    experiment = experiment_on_random_tokens("70m", {"data.vocab": 512}, tmp_path)
    assert list(experiment.recipes) == ["base"]
    assert experiment.base.model.width == 768
    ids = numpy.fromfile(tmp_path / "data/random/train.bin", "uint16")
    assert len(ids) >= 4_000_000
    assert set(numpy.unique(ids)) == set(range(512))
