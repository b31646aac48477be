"""What the stopwatch says of the thread that trains."""

import time

import pytest
import torch

from ablab.core.train.stopwatch import Stopwatch

STEP = torch.zeros(())


def test_a_thread_that_waits_for_a_core_has_no_share_of_it():
    """Sleep stands for a core that others have."""
    watch = Stopwatch()
    watch.step(STEP, 10)
    time.sleep(0.2)
    watch.step(STEP, 10)
    watch.stop()
    assert watch.seconds >= 0.2
    assert watch.share < 0.5
    assert watch.rate == pytest.approx(10 / watch.seconds)


def test_the_share_is_that_of_this_process_whatever_was_timed_before():
    watch = Stopwatch(seconds=1000.0, tokens=10.0)
    assert watch.share == 1.0
    watch.step(STEP, 10)
    spent = time.thread_time() + 0.05
    while time.thread_time() < spent:
        pass
    watch.stop()
    assert 0.05 <= watch.ran <= watch.timed
    assert watch.share == pytest.approx(watch.ran / (watch.seconds - 1000.0))
