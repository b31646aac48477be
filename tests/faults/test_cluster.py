"""A grid on a cluster that loses a node, in short, where Ray is installed.  `make cluster` does the long one."""

import subprocess
import sys
from pathlib import Path

import pytest

CLUSTER = Path(__file__).with_name("cluster.py")


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_grid_survives_the_loss_of_a_node():
    pytest.importorskip("ray", reason="needs ablab[ray]")
    done = subprocess.run(
        [sys.executable, CLUSTER, "--seeds", "3", "--steps", "60"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "12 runs with Ray: each finished once, the same ids and bits" in done.stdout
