"""A short form of the campaign of workers that share nothing but a folder."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_workers_of_one_folder_finish_each_run_once_though_two_die_and_one_sleeps():
    workers = Path(__file__).with_name("workers.py")
    done = subprocess.run(
        [sys.executable, workers, "--seeds", "2"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("6 runs by 5 workers")
