"""The campaign in its short form: one fault of some kinds.  `make faults` does hundreds, of all kinds."""

import subprocess
import sys
from pathlib import Path

import pytest

CAMPAIGN = Path(__file__).with_name("campaign.py")
SHORT = (
    "runner killed",
    "Ctrl-C",
    "worker killed, as for lack of memory",
    "copies at once",
    "disk full at a write",
    "a record of ended runs damaged",
    "a record of a run on its way damaged",
    "tokens damaged",
    "a failure dated in the future",
    "a plugin that breaks, then mended",
    "tokenizing killed",
)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_fault_of_each_kind_is_survived():
    words = [word for name in SHORT for word in ("--only", name)]
    done = subprocess.run(
        [sys.executable, CAMPAIGN, "--most", "1", *words],
        capture_output=True,
        text=True,
    )
    table = done.stdout.rpartition("\n\n")[2].splitlines()
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(table) == len(SHORT) + 2
    assert table[-1].split() == ["all", str(len(SHORT)), str(len(SHORT))]
